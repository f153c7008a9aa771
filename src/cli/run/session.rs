//! Runs a machine whose guest has husk's init, with the streams, signals and terminal of its process.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use husk_protocol::{Overlay, Run, ToHost};
use log::Level;

use crate::cli::boot;
use crate::cli::exit::Exit;
use crate::config::MachineConfig;
use crate::console::log::{Log, Tail};
use crate::exit_latch::ExitReason;
use crate::guest::GuestSpec;
use crate::guest::session::{Attached, Change, Endpoints, Session};
use crate::monitor::release;
use crate::resources::{Outside, Resources, Source};
use crate::snapshot::{Received, Snapshot};
use crate::state_dir;
use crate::supervisor::{self, ControlEndpoint, Save, Stdio};
use crate::sys::{SignalFd, socket};
use crate::timings::Timings;

/// The number of kernel messages shown to explain a failure.
const TAIL_LINES: usize = 20;

/// How the guest comes to its process.
pub enum Start {
    /// It boots with it.
    Boot {
        /// Whether the process reads standard input.
        stdin: bool,
        /// Whether it has a terminal.
        terminal: bool,
        /// The streams of this process that it gets.
        attached: Attached,
    },
    /// The same in a container, where it waits until it is told to go.
    Contained {
        /// Whether the process reads standard input.
        stdin: bool,
        /// Whether it has a terminal.
        terminal: bool,
    },
    /// It waits for this one, with this writable layer, which gets these streams of this process. Then a record of the memory that it
    /// has touched is added to this snapshot, if that has none.
    Begin(Overlay, Box<Run>, Attached, Option<PathBuf>),
    /// It had it when the machine was saved.
    Resume {
        /// What had arrived of its outputs.
        received: Received,
        /// Whether the process reads standard input.
        stdin: bool,
        /// Whether it has a terminal.
        terminal: bool,
        /// What the machine becomes.
        change: Change,
    },
    /// It gets none: the machine is saved, and ends.
    Wait(Save),
}

/// How a machine has ended.
pub struct Ended {
    /// What its init has said of its process.
    pub process: Option<ToHost>,
    /// Why the machine has ended.
    pub reason: ExitReason,
    tail: Tail,
    /// Whether its kernel's messages were printed.
    told_already: bool,
}

/// What a machine for `spec` that begins in the snapshot `warm` is made of, and how it comes to its process, which gets these streams of
/// this one.
pub fn begin(spec: &GuestSpec, warm: Snapshot, attached: Attached) -> Result<(Source, Start)> {
    let Snapshot { description, files, path, .. } = warm;
    let (overlay, run) = spec.begin(&description.config.networks)?;
    let unrecorded = files.touched.is_none().then_some(path);
    Ok((Source::Snapshot(files), Start::Begin(overlay, run, attached, unrecorded)))
}

/// Starts a machine in the snapshot `warm`, if there is one. If that fails before it has run, says `refused` and why, and boots it.
pub fn start_or_boot<Ended>(
    warm: Option<Snapshot>,
    refused: &str,
    endpoint: &mut ControlEndpoint,
    start: impl Fn(Option<Snapshot>, &mut ControlEndpoint) -> Result<Ended>,
) -> Result<Ended> {
    let may_boot = warm.is_some();
    match start(warm, endpoint) {
        Err(error) if may_boot && !endpoint.has_run() => {
            log::warn!("{refused}: {error:#}");
            // Its files are locked until then.
            release::await_exit();
            start(None, endpoint)
        }
        ended => ended,
    }
}

/// Runs the machine `config` until its end. Reports nothing of that: see [`Ended::exit`].
pub fn run(
    config: &MachineConfig,
    opened: (Resources, Outside),
    start: Start,
    endpoint: &mut ControlEndpoint,
    signals: &SignalFd,
    timings: &Arc<Timings>,
) -> Result<Ended> {
    let service = endpoint.file(&format!("{}_{}", state_dir::VSOCK, husk_protocol::PORT));
    // Left behind by a failed run.
    let _ = std::fs::remove_file(&service);
    let listener = socket::listen(&service, 0o600).with_context(|| format!("listen on {}", service.display()))?;
    let attached = match &start {
        Start::Boot { attached, .. } | Start::Begin(_, _, attached, _) => *attached,
        Start::Contained { .. } | Start::Resume { .. } | Start::Wait(_) => Attached::default(),
    };
    let endpoints = match endpoint.hub().cloned() {
        Some(hub) if endpoint.is_detached() => Endpoints::Hub(hub),
        Some(hub) => Endpoints::Logged(hub, attached),
        None => Endpoints::Stdio(attached),
    };
    let (stdin, terminal) = match &start {
        Start::Boot { stdin, terminal, .. }
        | Start::Contained { stdin, terminal }
        | Start::Resume { stdin, terminal, .. } => (*stdin, *terminal),
        Start::Begin(_, run, _, _) => (run.process.stdin, run.process.terminal.is_some()),
        Start::Wait(_) => (false, false),
    };
    let timings = timings.clone();
    let (mut session, save) = match &start {
        Start::Boot { .. } => (Session::new(listener, stdin, terminal, endpoints, timings.clone())?, None),
        Start::Contained { .. } => {
            let mut session = Session::new(listener, stdin, terminal, endpoints, timings.clone())?;
            session.only_forward();
            (session, None)
        }
        Start::Resume { received, change, .. } => {
            (Session::resumed(listener, *received, terminal, change.clone(), endpoints, timings.clone())?, None)
        }
        Start::Begin(overlay, run, _, _) => {
            let mut session = Session::beginning(listener, overlay.clone(), run.clone(), endpoints, timings.clone())?;
            if run.container.is_some() {
                session.only_forward();
            }
            (session, None)
        }
        Start::Wait(save) => (Session::waiting(listener, timings.clone())?, Some(save)),
    };
    // Without input, Ctrl-C raises a signal in this process, which is forwarded like any other.
    let takes_keys = terminal && stdin && attached.stdin;
    // In the background standard error is a file, which a guest must not fill: `husk logs --kernel` shows its
    // messages.
    let verbose = log::log_enabled!(Level::Info) && !endpoint.is_detached();
    let log = Log::create(endpoint.file(state_dir::CONSOLE_LOG), verbose).context("create the machine's log")?;
    let tail = log.tail();
    let recorded = match &start {
        Start::Begin(_, _, _, snapshot) => snapshot.as_deref(),
        _ => None,
    };
    let stdio = Stdio::Session { session: &mut session, takes_keys, log, save, recorded };
    let reason = supervisor::run(config, opened, timings, signals, stdio, endpoint)?;
    Ok(Ended { process: session.end().cloned(), reason, tail, told_already: verbose })
}

impl Ended {
    /// The command's exit status if known, otherwise the machine's. Reports the reason of a failure.
    pub fn exit(self) -> Exit {
        exit_status(self.process.as_ref(), &self.reason, &self.tail, self.told_already)
    }

    /// The exit code that is recorded.
    pub fn code(&self) -> u8 {
        match &self.process {
            Some(ToHost::Exited(code) | ToHost::Failed { code, .. }) => *code,
            Some(ToHost::Signaled(number)) => number.saturating_add(128),
            _ => Exit::NotRun.code(),
        }
    }

    /// The machine's last messages.
    pub fn last_words(&self) -> Vec<String> {
        self.tail.lines(TAIL_LINES)
    }
}

/// The command's exit status if known, otherwise the machine's. Reports the reason of a failure.
fn exit_status(end: Option<&ToHost>, reason: &ExitReason, tail: &Tail, told_already: bool) -> Exit {
    match end {
        Some(ToHost::Exited(code)) => return Exit::Reported(*code),
        Some(ToHost::Signaled(number)) => return Exit::Signal(*number),
        Some(ToHost::Failed { message, code }) => {
            crate::cli::print_error(message);
            return Exit::Reported(*code);
        }
        Some(
            ToHost::Admitted
            | ToHost::Created(_)
            | ToHost::Started(_)
            | ToHost::AskTime
            | ToHost::Resumed { .. }
            | ToHost::Renewed(_)
            | ToHost::Waiting
            | ToHost::OutOfMemory,
        )
        | None => {}
    }
    let exit = match boot::report(reason) {
        Exit::Failure => Exit::NotRun,
        exit => exit,
    };
    if !matches!(exit, Exit::Success | Exit::Signal(_)) && !told_already {
        for line in tail.lines(TAIL_LINES) {
            crate::cli::print_stderr(&format!("guest: {line}\n"));
        }
    }
    exit
}
