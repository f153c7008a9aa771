//! Starts the process that runs a machine: in the background, or in the place of this one.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use super::{AGAIN_FLAG, ATTACHED_FLAG, UNSIGNALED_FLAG};
use crate::cli::argv::{self, IN_BACKGROUND};
use crate::cli::exit::Exit;
use crate::request::attach;
use crate::state_dir::origin::Origin;
use crate::state_dir::record::Record;
use crate::state_dir::{self, MachineEntry, StateDir};
use crate::supervisor::notify;

/// Starts this command again in the background, and waits until its machine is running or has failed to start.
pub fn spawn_detached() -> Result<Exit> {
    match launch(Command::new("/proc/self/exe"), argv::all(), None)? {
        Launched::Running(id) => crate::cli::print(&id).map(|()| Exit::Success),
        Launched::Failed(exit) => Ok(exit),
    }
}

/// The same, and forwards standard input to the machine's process until it ends.
pub fn spawn_fed() -> Result<Exit> {
    match launch(Command::new("/proc/self/exe"), argv::all(), None)? {
        Launched::Running(id) => {
            crate::cli::print(&id)?;
            // A process that has exited needs no input.
            if let Ok(entry) = StateDir::open()?.find(id.trim_end())
                && let Err(error) = attach::feed_process(&entry.file(state_dir::CONTROL))
            {
                log::info!("forward standard input: {error:#}");
            }
            Ok(Exit::Success)
        }
        Launched::Failed(exit) => Ok(exit),
    }
}

/// Runs this command in a process behind this one, with the same streams. A signal ends this process, and the machine goes on.
pub fn run_behind() -> Result<Exit> {
    let words = argv::all();
    let (before, after) = words.split_at(argv::command_index(words)? + 1);
    let mut command = Command::new("/proc/self/exe");
    command.arg0("husk").args(before).arg(UNSIGNALED_FLAG).args(after);
    wait_for(command)
}

/// The exit of a process that runs a machine.
fn wait_for(mut command: Command) -> Result<Exit> {
    command.status().context("start husk").map(Exit::from)
}

/// Starts a machine in the background with `words`, which say that, and returns its ID; `None` if it has failed and reported why.
pub fn spawn(command: Command, words: &[OsString]) -> Result<Option<String>> {
    Ok(match launch(command, words, None)? {
        Launched::Running(id) => Some(id),
        Launched::Failed(_) => None,
    })
}

/// Starts a stopped machine in the background, as it was started before, or where it was suspended. That process prints its own errors.
/// It is a success if somebody else has started it meanwhile.
pub fn start_stopped(entry: &MachineEntry) -> Result<Exit> {
    let _turn = entry.turn_to_start()?;
    if StateDir::open()?.find(&entry.id)?.alive {
        return Ok(Exit::Success);
    }
    let (command, words) = command_of(entry)?;
    Ok(match launch(command, &words, Some(&entry.id))? {
        Launched::Running(_) => Exit::Success,
        Launched::Failed(exit) => exit,
    })
}

/// Replaces this process by one that starts a stopped machine, with this process's terminal and streams. Without `stdin`, the
/// machine's process gets nothing from standard input, and no end of it. Without `sig_proxy`, this process stays in front of it.
pub fn become_stopped(entry: &MachineEntry, stdin: bool, sig_proxy: bool) -> Result<Exit> {
    let (mut command, words) = command_of(entry)?;
    if !stdin {
        silence_stdin().context("replace standard input")?;
    }
    let (before, after) = words.split_at(argv::command_index(&words)? + 1);
    command.arg0("husk").args(before).arg(format!("{AGAIN_FLAG}={}", entry.id)).arg(ATTACHED_FLAG);
    command.args((!sig_proxy).then_some(UNSIGNALED_FLAG)).args(after);
    command.envs(std::env::vars_os().filter(|(name, _)| name == notify::SOCKET));
    if !sig_proxy {
        return wait_for(command);
    }
    Err(command.exec()).context("start husk")
}

/// Makes standard input one that says nothing and does not end, for as long as this process runs, whatever it executes.
fn silence_stdin() -> std::io::Result<()> {
    let (reader, writer) = std::io::pipe()?;
    rustix::stdio::dup2_stdin(&reader)?;
    rustix::io::fcntl_setfd(&writer, rustix::io::FdFlags::empty())?;
    std::mem::forget(writer);
    Ok(())
}

/// The command that starts a stopped machine, and its arguments.
fn command_of(entry: &MachineEntry) -> Result<(Command, Vec<OsString>)> {
    check_restartable(entry)?;
    match entry.suspended() {
        Some(snapshot) => Ok((Command::new("/proc/self/exe"), continue_words(entry.record()?, snapshot))),
        None => Origin::read(entry)?.command(),
    }
}

/// The command line that continues a suspended machine.
fn continue_words(record: &Record, snapshot: &Path) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["restore".into()];
    match (record.restarts_always, record.max_retries) {
        (true, _) => words.push("--restart=always".into()),
        (false, 0) => {}
        (false, times) => words.push(format!("--restart=on-failure:{times}").into()),
    }
    words.extend(record.log_max_bytes.map(|bytes| format!("--log-max={bytes}").into()));
    words.extend(["--".into(), snapshot.into()]);
    words
}

/// Fails if the machine is removed when it exits.
pub fn check_restartable(entry: &MachineEntry) -> Result<()> {
    ensure!(
        entry.record()?.stays(),
        "only a machine that was created, or started with --detach or --name, and without --rm can be started again"
    );
    Ok(())
}

/// The result of starting a machine in the background.
enum Launched {
    /// The machine is running; its ID, with a newline.
    Running(String),
    /// It failed, and has reported why.
    Failed(Exit),
}

/// Runs `command` with `words` in the background, for a new machine or a stopped one. Returns when it is running or has
/// failed.
///
/// The arguments are sent through a pipe: a process's arguments are readable by everyone, and may contain secrets.
fn launch(mut command: Command, words: &[OsString], again: Option<&str>) -> Result<Launched> {
    let place = argv::command_index(words)?;
    command.arg0("husk").args(words.get(place)).arg(IN_BACKGROUND);
    command.args(again.map(|id| format!("{AGAIN_FLAG}={id}"))).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().context("start husk in the background")?;
    if let Some(pipe) = child.stdin.take() {
        // If it has already exited, its exit status tells why.
        let _ = argv::send(words, pipe);
    }
    let mut id = String::new();
    if let Some(stdout) = &mut child.stdout {
        stdout.read_to_string(&mut id).context("read from husk in the background")?;
    }
    if id.is_empty() {
        let status = child.wait().context("wait for husk in the background")?;
        if let Some(signal) = status.signal() {
            bail!("the machine's husk process was killed by signal {signal}");
        }
        // It has reported why.
        let code = status.code().and_then(|code| u8::try_from(code).ok());
        return Ok(Launched::Failed(code.map_or(Exit::NotRun, Exit::Reported)));
    }
    Ok(Launched::Running(id))
}
