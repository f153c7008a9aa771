//! Lifecycle flags of `run` and `boot`: the machine's name, running in the background, restarting and removal.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use super::argv::{self, IN_BACKGROUND};
use super::exit::Exit;
use super::labels::LabelFlags;
use super::size;
use crate::config::MachineConfig;
use crate::console::stream_log;
use crate::monitor::release;
use crate::state_dir::identity::IdentityRecord;
use crate::state_dir::mounts::MountRecord;
use crate::state_dir::origin::Origin;
use crate::state_dir::record::{Inherited, Record, State, now_ms};
use crate::state_dir::{MachineDir, MachineEntry, StateDir, names};
use crate::supervisor::{self, ControlEndpoint};
use crate::sys::SignalFd;

/// Exponential backoff before a machine that failed is restarted.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// After a run of this length the backoff starts over.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Hidden flag: the ID of the machine to start again.
const AGAIN_FLAG: &str = "--again";

// How a machine runs: its name, whether it is kept, and whether it is restarted.
#[derive(Debug, Args)]
pub(super) struct LifecycleArgs {
    /// Run the machine in the background and print its ID
    #[arg(short, long)]
    detach: bool,

    /// Assign a name to the machine
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,

    /// Automatically remove the machine and its logs when it exits; always on in the foreground
    #[arg(long)]
    rm: bool,

    /// Restart policy to apply when the machine fails: no, on-failure or on-failure:MAX_RETRIES
    #[arg(long, value_name = "POLICY", value_parser = restart_policy, default_value = "no", hide_default_value = true)]
    #[arg(requires = "detach", conflicts_with = "rm")]
    restart: RestartPolicy,

    /// Maximum size of the output kept for `husk logs` [default: 16M]
    #[arg(long, value_name = "SIZE", value_parser = log_max, requires = "detach")]
    log_max: Option<u64>,

    #[command(flatten)]
    labels: LabelFlags,

    #[arg(long, hide = true)]
    in_background: bool,

    /// The ID of the stopped machine to start again
    #[arg(long, hide = true)]
    again: Option<String>,
}

/// The value of `--restart`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestartPolicy {
    max_retries: u32,
}

/// The contents of a machine's record, apart from its name and configuration.
pub struct RecordInfo {
    /// The image or kernel, as specified by the user.
    pub image: String,
    /// The command, if known.
    pub command: Vec<String>,
    /// What the processes of `husk exec` inherit.
    pub process: Option<Inherited>,
    /// What it is called and how it is connected, with husk's init.
    pub identity: Option<IdentityRecord>,
    /// What it mounts.
    pub mounts: Vec<MountRecord>,
    /// The signal that stops its process.
    pub stop_signal: u8,
}

impl LifecycleArgs {
    /// Of a machine without a name, in the foreground.
    pub fn foreground() -> LifecycleArgs {
        LifecycleArgs {
            detach: false,
            name: None,
            rm: false,
            restart: RestartPolicy { max_retries: 0 },
            log_max: None,
            labels: LabelFlags::default(),
            in_background: false,
            again: None,
        }
    }

    /// Whether this process only starts the one that runs the machine in the background.
    pub fn spawns_detached(&self) -> bool {
        self.detach && !self.in_background
    }

    /// Whether the machine runs without this process's terminal and input.
    pub fn is_detached(&self) -> bool {
        self.detach
    }

    /// Whether the machine stays when it has ended, until it is removed.
    pub fn is_kept(&self) -> bool {
        self.detach && !self.rm
    }

    /// Whether the machine has run before.
    pub fn is_again(&self) -> bool {
        self.again.is_some()
    }

    /// Whether the machine may be restarted within this process.
    pub fn may_restart(&self) -> bool {
        self.restart.max_retries > 0
    }

    /// Creates the machine's directory, with its name. In the background this also leaves the terminal's session.
    ///
    /// From then on a signal does not end this process, which would leave the directory behind: [`Self::run_with_restarts`]
    /// reads it.
    pub fn dir(&mut self) -> Result<MachineDir> {
        supervisor::block_signals(false)?;
        if self.in_background {
            rustix::process::setsid().context("leave the terminal")?;
        }
        let state_dir = StateDir::open()?;
        let Some(id) = &self.again else { return state_dir.create(self.name.as_deref()) };
        let dir = state_dir.reopen(id)?;
        // It may have been renamed.
        self.name = dir.record()?.name;
        Ok(dir)
    }

    /// Opens the machine's endpoint.
    pub fn endpoint(&self, dir: MachineDir, info: RecordInfo, config: &MachineConfig) -> Result<ControlEndpoint> {
        let RecordInfo { image, command, process, identity, mounts, stop_signal } = info;
        let earlier = if self.again.is_some() { Some(dir.record()?) } else { None };
        let labels = self.labels.labels()?;
        let keep = self.is_kept();
        if keep && earlier.is_none() {
            let ours = |word: &OsString| word == IN_BACKGROUND;
            let mut words = argv::all().to_vec();
            if let Some(place) = words.iter().position(ours) {
                words.remove(place);
            }
            Origin::here(words)?.write(&dir)?;
        }
        let record = Record {
            id: dir.id(),
            name: self.name.clone(),
            pid: std::process::id(),
            image,
            command,
            created_ms: earlier.as_ref().map_or_else(now_ms, |earlier| earlier.created_ms),
            max_retries: self.restart.max_retries,
            log_max_bytes: self.log_max,
            snapshot: earlier.and_then(|earlier| earlier.snapshot),
            state: State::Starting,
            restarts: 0,
            detached: self.detach,
            keep,
            stop_signal,
            labels,
            process,
            identity,
            mounts,
            sandbox_lacks: Vec::new(),
            config: config.clone(),
        };
        ControlEndpoint::open(dir, record, self.log_max.unwrap_or(stream_log::DEFAULT_MAX_BYTES))
    }

    /// Runs the machine with `run`, restarts it by the restart policy, and records its exit. Must be called before
    /// other threads exist, so that signals stay blocked in all of them until the exit is recorded.
    pub fn run_with_restarts(
        &self,
        mut endpoint: ControlEndpoint,
        has_session: bool,
        run: impl Fn(&mut ControlEndpoint, &SignalFd) -> Result<Exit>,
    ) -> Result<Exit> {
        let signals = supervisor::block_signals(has_session)?;
        let mut wait = INITIAL_BACKOFF;
        loop {
            let started = Instant::now();
            let ended = run(&mut endpoint, &signals);
            let code = ended.as_ref().map_or(Exit::NotRun.code(), |exit| exit.code());
            let again = code != 0 && endpoint.restarts() < self.restart.max_retries && endpoint.is_announced();
            if started.elapsed() > STABLE_AFTER {
                wait = INITIAL_BACKOFF;
            }
            if again {
                release::await_exit();
            }
            if !again || !endpoint.wait_to_restart(wait, &signals)? {
                let reason = ended.as_ref().err().map(|error| format!("{error:#}"));
                let noted = endpoint.close(code, reason);
                // Signals received by now have nothing left to end.
                while signals.read().is_ok_and(|signal| signal.is_some()) {}
                return ended.and_then(|exit| noted.map(|()| exit));
            }
            if let Err(error) = ended {
                super::report(&error);
            }
            wait = (2 * wait).min(MAX_BACKOFF);
        }
    }
}

/// Starts this command again in the background, and waits until its machine is running or has failed to start.
pub fn spawn_detached() -> Result<Exit> {
    match launch(Command::new("/proc/self/exe"), argv::all(), None)? {
        Launched::Running(id) => super::print(&id).map(|()| Exit::Success),
        Launched::Failed(exit) => Ok(exit),
    }
}

/// Starts a stopped machine in the background, as it was started before, or where it was suspended. That process prints its own errors.
pub fn start_stopped(entry: &MachineEntry) -> Result<Exit> {
    check_restartable(entry)?;
    let (command, words) = match entry.suspended() {
        Some(snapshot) => (Command::new("/proc/self/exe"), continue_words(entry.record()?, snapshot)),
        None => Origin::read(entry)?.command()?,
    };
    Ok(match launch(command, &words, Some(&entry.id))? {
        Launched::Running(_) => Exit::Success,
        Launched::Failed(exit) => exit,
    })
}

/// The command line that continues a suspended machine.
fn continue_words(record: &Record, snapshot: &Path) -> Vec<OsString> {
    let mut words: Vec<OsString> = vec!["restore".into(), "--detach".into()];
    if record.max_retries > 0 {
        words.push(format!("--restart=on-failure:{}", record.max_retries).into());
    }
    words.extend(record.log_max_bytes.map(|bytes| format!("--log-max={bytes}").into()));
    words.extend(["--".into(), snapshot.into()]);
    words
}

/// Fails if the machine is removed when it exits.
pub fn check_restartable(entry: &MachineEntry) -> Result<()> {
    ensure!(
        entry.record()?.keep,
        "only a machine that was started with --detach and without --rm can be started again"
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

fn name(text: &str) -> Result<String, String> {
    names::check(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

/// Parses the maximum size of a log.
fn log_max(text: &str) -> Result<u64, String> {
    let bytes = size::bytes(text)?;
    let least_kib = stream_log::MIN_BYTES >> 10;
    if bytes >= stream_log::MIN_BYTES { Ok(bytes) } else { Err(format!("the minimum log size is {least_kib}K")) }
}

/// Parses `no`, `on-failure` and `on-failure:TIMES`.
fn restart_policy(text: &str) -> Result<RestartPolicy, String> {
    let max_retries = match text.split_once(':') {
        None if text == "no" => Some(0),
        None if text == "on-failure" => Some(u32::MAX),
        Some(("on-failure", times)) => times.parse().ok(),
        _ => None,
    };
    max_retries
        .map(|max_retries| RestartPolicy { max_retries })
        .ok_or_else(|| "not a restart policy: use no, on-failure or on-failure:MAX_RETRIES".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_policy_is_parsed() {
        let times = |text| restart_policy(text).map(|policy| policy.max_retries);
        assert_eq!((times("no"), times("on-failure"), times("on-failure:3")), (Ok(0), Ok(u32::MAX), Ok(3)));
        for text in ["", "always", "on-failure:", "on-failure:-1", "no:1"] {
            assert!(restart_policy(text).unwrap_err().contains("on-failure:MAX_RETRIES"), "{text}");
        }
    }
}
