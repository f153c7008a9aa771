//! `husk oci exec`: executes one more process in a container.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::{Process, ToHost};

use super::channel::Channel;
use super::create::write_pid;
use super::{Flags, console};
use crate::cli::exit::Exit;
use crate::console::terminal;
use crate::guest::exec::{self, End, Moments};
use crate::oci::config;
use crate::oci::guest;
use crate::oci::state::Status;
use crate::state_dir;
use crate::supervisor;

/// What a process in the background says when its own is running.
const STARTED: &str = "started";

#[derive(Debug, Args)]
pub(super) struct Exec {
    /// File that describes the process, as `process` in config.json
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,

    /// Return when the process is running
    #[arg(short, long)]
    detach: bool,

    /// File to which the PID of the process that is the other's on the host is written
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// Socket to which the terminal of the process is sent
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,

    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,

    /// Working directory
    #[arg(long, value_name = "DIR")]
    cwd: Option<String>,

    /// Set an environment variable; can be repeated
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,

    /// User and group, by number
    #[arg(short, long, value_name = "UID[:GID]")]
    user: Option<String>,

    /// Number of further descriptors for the process; a machine cannot have any
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,

    /// Give the process more rights neither now nor later
    #[arg(long)]
    no_new_privs: bool,

    /// ID of the container, followed by the program and its arguments
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_names = ["ID", "COMMAND"])]
    words: Vec<String>,
}

/// What is left of a command to the process that transfers the streams.
#[derive(Debug, Args)]
pub(super) struct Attend {
    /// The descriptor of the connection with the process that has started this one.
    #[arg(long)]
    channel: i32,

    /// Whether standard input is a terminal that was opened for the process.
    #[arg(long)]
    terminal: bool,

    /// The vsock socket of the machine.
    #[arg(long)]
    vsock: PathBuf,
}

impl Exec {
    pub(super) fn run(self, flags: &Flags) -> Result<Exit> {
        ensure!(self.preserve_fds == 0, "--preserve-fds: a machine cannot have this process's descriptors");
        let id = self.words.first().cloned().unwrap_or_default();
        let (dir, state) = flags.root()?.open(&id)?;
        match state.status(&dir) {
            Status::Running | Status::Created => {}
            Status::Paused => bail!("cannot exec in a paused container"),
            Status::Creating | Status::Stopped => bail!("cannot exec in a stopped container"),
        }
        let config = dir.config()?;
        let wanted = self.wanted(config.process.unwrap_or_default())?;
        let size = wanted.console_size;
        let mut process = guest::process(&wanted, config.linux.seccomp.as_ref())?;
        process.container = Some(id);
        let vsock = state.machine()?.file(state_dir::VSOCK);
        if !self.detach && self.console_socket.is_none() {
            write_pid(self.pid_file.as_deref(), std::process::id())?;
            process.terminal = process.terminal.map(|size| terminal::window_size().unwrap_or(size));
            return run(&vsock, &process, &mut Started(|| Ok(())));
        }
        let terminal = match (&self.console_socket, process.terminal.is_some()) {
            (Some(socket), true) => Some(console::open(socket, size)?),
            (None, true) => bail!("the process has a terminal: use --console-socket to get it"),
            (Some(_), false) => bail!("the process has no terminal: remove --console-socket"),
            (None, false) => None,
        };
        self.run_in_background(&vsock, &process, terminal)
    }

    /// The process: that of the file, or the container's with the flags and another program.
    fn wanted(&self, containers: config::Process) -> Result<config::Process> {
        if let Some(path) = &self.process {
            return config::Process::read(path);
        }
        let [_, args @ ..] = &self.words[..] else { bail!("no command given: add one after the container") };
        ensure!(!args.is_empty(), "no command given: add one after the container");
        let mut process = config::Process { args: args.to_vec(), terminal: self.tty, ..containers };
        process.env.extend(self.env.iter().cloned());
        process.no_new_privileges |= self.no_new_privs;
        if let Some(cwd) = &self.cwd {
            process.cwd.clone_from(cwd);
        }
        if let Some(user) = &self.user {
            let (uid, gid) = user.split_once(':').unwrap_or((user, "0"));
            let parsed = uid.parse().ok().zip(gid.parse().ok());
            let (uid, gid) = parsed.with_context(|| format!("{user:?} is not a user: use UID or UID:GID"))?;
            process.user = config::User { uid, gid, ..config::User::default() };
        }
        Ok(process)
    }

    fn run_in_background(
        &self,
        vsock: &std::path::Path,
        process: &Process,
        terminal: Option<std::fs::File>,
    ) -> Result<Exit> {
        let words = vec!["attend".into(), "--vsock".into(), vsock.into()];
        let (mut child, mut channel) = Channel::spawn(words, terminal)?;
        // Its environment may be secret, and arguments are not.
        let described = postcard::to_allocvec(process).context("describe the process")?;
        let len_bytes = u32::try_from(described.len())?.to_le_bytes();
        channel.send(&[&len_bytes[..], &described].concat())?;
        if let Err(error) = channel.expect(STARTED, "the process has ended before it was started") {
            let _ = child.kill().and_then(|()| child.wait());
            return Err(error);
        }
        write_pid(self.pid_file.as_deref(), child.id())?;
        if self.detach {
            return Ok(Exit::Success);
        }
        let status = child.wait().context("wait for the process")?;
        Ok(Exit::Reported(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(1)))
    }
}

impl Attend {
    /// Runs the process, and exits as it does.
    pub(super) fn run(self) -> Result<Exit> {
        let mut channel = Channel::inherited(self.channel)?;
        console::lead_session(self.terminal)?;
        let begun = receive(channel.reader());
        let ended = begun.and_then(|process| run(&self.vsock, &process, &mut Started(|| channel.say(STARTED))));
        ended.or_else(|error| channel.fail(error))
    }
}

fn receive(from: &mut impl Read) -> Result<Process> {
    let mut len_bytes = [0; 4];
    from.read_exact(&mut len_bytes)?;
    let mut described = Vec::new();
    from.take(u32::from_le_bytes(len_bytes).into()).read_to_end(&mut described)?;
    postcard::from_bytes(&described).context("read the description of the process")
}

/// Tells somebody that a process is running.
struct Started<F>(F);

impl<F: FnMut() -> Result<()>> Moments for Started<F> {
    fn started(&mut self, failure: Option<&str>) -> Result<()> {
        // Why it has failed is told at the end.
        if failure.is_none() { (self.0)() } else { Ok(()) }
    }
}

/// Runs a process with this process's streams.
fn run(vsock: &std::path::Path, process: &Process, moments: &mut dyn Moments) -> Result<Exit> {
    let signals = supervisor::block_signals(true)?;
    let connections = exec::request_start(vsock, process)?.connect()?;
    exit(exec::run_contained(connections, &signals, process.terminal.is_some(), moments)?)
}

/// Exits as the process in the container has.
pub fn exit(end: End) -> Result<Exit> {
    match end {
        End::Reported(ToHost::Exited(code)) => Ok(Exit::Reported(code)),
        End::Reported(ToHost::Signaled(number)) => Ok(Exit::Signal(number)),
        End::Reported(ToHost::Failed { message, .. }) => bail!(message),
        End::Reported(_) => bail!("the guest did not say how the process ended"),
        End::Interrupted(signal) => Ok(Exit::Signal(u8::try_from(signal).unwrap_or(u8::MAX))),
        End::Lost => bail!("the machine has exited, and the process with it"),
    }
}
