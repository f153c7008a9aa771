//! A process and its connections to the host, for the main session and additional ones.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use husk_protocol::{Hello, MAIN_SESSION, Process, Role, ToGuest, ToHost};
use nix::poll::PollFlags;
use nix::unistd::Pid;

use crate::clock::Clock;
use crate::connection::{self, ControlConnection, shortened};
use crate::errors::Failure;
use crate::process::{self, Started};
use crate::pump::Pump;
use crate::sys::{self, Ended};

/// A session. Its process starts when its streams are connected, and it ends when the host says so or disconnects.
pub struct Session {
    pub id: u64,
    control: ControlConnection,
    /// Whether it was admitted.
    admitted: bool,
    /// The process to start when its streams are connected.
    wanted: Option<Process>,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    input: Option<Pump>,
    outputs: Vec<Pump>,
    terminal: Option<OwnedFd>,
    pid: Option<Pid>,
    clock: Clock,
    /// How the process ended, and whether that was reported to the host.
    end: Option<ToHost>,
    told: bool,
    finished: bool,
}

impl Session {
    fn new(id: u64, control: OwnedFd) -> Session {
        Session {
            id,
            control: ControlConnection::new(control),
            admitted: false,
            wanted: None,
            stdin: None,
            stdout: None,
            stderr: None,
            input: None,
            outputs: Vec::new(),
            terminal: None,
            pid: None,
            clock: Clock::default(),
            end: None,
            told: false,
            finished: false,
        }
    }

    /// Creates the main session and starts its connections.
    pub fn connect(process: &Process) -> Result<Session, Failure> {
        let mut session = Session::new(MAIN_SESSION, connection::connect()?);
        for role in streams_of(process) {
            *session.slot(role) = Some(connection::connect()?);
        }
        Ok(session)
    }

    /// Waits until the connections of [`Session::connect`] are established.
    pub fn complete_connections(&mut self) -> Result<(), Failure> {
        let hello = |role| Hello { session: MAIN_SESSION, role };
        self.control.complete(hello(Role::Control))?;
        for role in [Role::Stdin, Role::Stdout, Role::Stderr] {
            if let Some(socket) = self.slot(role) {
                connection::complete(socket, hello(role))?;
            }
        }
        Ok(())
    }

    /// Creates a session opened by the host. Its process is not started before it is [admitted](Session::admit).
    pub fn accepted(id: u64, control: OwnedFd) -> Session {
        Session::new(id, control)
    }

    /// Whether it was admitted.
    pub fn is_admitted(&self) -> bool {
        self.admitted
    }

    /// Admits the session.
    pub fn admit(&mut self) {
        self.admitted = true;
        self.control.say(&ToHost::Admitted);
    }

    /// Adds a stream opened by the host; a duplicate is dropped.
    pub fn offer(&mut self, role: Role, socket: OwnedFd) {
        if role != Role::Control && self.pid.is_none() {
            self.slot(role).get_or_insert(socket);
        }
    }

    fn slot(&mut self, role: Role) -> &mut Option<OwnedFd> {
        match role {
            Role::Stdin => &mut self.stdin,
            Role::Stdout => &mut self.stdout,
            Role::Stderr | Role::Control => &mut self.stderr,
        }
    }

    /// Starts the process, or reports why it cannot start.
    pub fn start(&mut self, process: &Process, hostname: &str) {
        let started = process::start(process, hostname).and_then(|started| self.join_streams(started));
        match started {
            Ok(pid) => {
                self.pid = Some(pid);
                self.control.say(&ToHost::Started(pid.as_raw().unsigned_abs()));
            }
            Err(failure) => self.fail(failure),
        }
    }

    /// Reports why there is no process.
    pub fn fail(&mut self, failure: Failure) {
        (self.stdin, self.stdout, self.stderr) = (None, None, None);
        self.end = Some(ToHost::Failed { message: shortened(&failure.message), code: failure.code });
    }

    fn join_streams(&mut self, started: Started) -> Result<Pid, Failure> {
        let join = |from: Option<OwnedFd>, to: Option<OwnedFd>| match (from, to) {
            (Some(from), Some(to)) => {
                Pump::new(from, to).map(Some).map_err(|error| Failure::new(format_args!("connect a stream: {error}")))
            }
            _ => Ok(None),
        };
        self.input = join(self.stdin.take(), started.stdin)?;
        self.outputs.extend(join(started.stdout, self.stdout.take())?);
        self.outputs.extend(join(started.stderr, self.stderr.take())?);
        self.terminal = started.terminal;
        Ok(started.pid)
    }

    /// Records how process `pid` ended; returns whether it belongs to this session.
    pub fn note_end(&mut self, pid: Pid, ended: Ended) -> bool {
        if self.pid != Some(pid) {
            return false;
        }
        self.end = Some(match ended {
            Ended::Exited(code) => ToHost::Exited(code),
            Ended::Signaled(number) => ToHost::Signaled(number),
        });
        (self.pid, self.input, self.terminal) = (None, None, None);
        true
    }

    /// Whether the process has ended or failed to start.
    pub fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether nothing is left to do.
    pub fn is_over(&self) -> bool {
        self.finished || !self.control.is_open()
    }

    /// The machine's exit code if this is the main session.
    pub fn exit_code(&self) -> u8 {
        match self.end {
            Some(ToHost::Exited(code) | ToHost::Failed { code, .. }) => code,
            Some(ToHost::Signaled(number)) => number.saturating_add(128),
            _ => crate::errors::CODE_OWN,
        }
    }

    /// Marks the data in the process's pipes as the last.
    pub fn expect_no_more_output(&mut self) {
        self.outputs.iter_mut().for_each(Pump::expect_no_more);
    }

    /// Transfers what is possible without blocking, and handles messages of the host.
    pub fn advance(&mut self, hostname: &str) {
        for pump in self.input.iter_mut().chain(&mut self.outputs) {
            pump.advance();
        }
        for message in self.control.advance() {
            self.obey(message);
        }
        self.start_when_complete(hostname);
        if self.outputs.iter().all(Pump::is_done)
            && !self.told
            && let Some(end) = &self.end
        {
            self.told = true;
            self.control.say(end);
        }
    }

    fn obey(&mut self, message: ToGuest) {
        match message {
            ToGuest::Start(process) => {
                let fresh = self.id != MAIN_SESSION && self.pid.is_none() && self.end.is_none();
                self.wanted = Some(process).filter(|_| fresh);
            }
            ToGuest::Signal(number) => {
                if let Some(pid) = self.pid {
                    // It may have just exited.
                    let _ = sys::send_signal(pid, number);
                }
            }
            ToGuest::Resize(size) => {
                if let Some(terminal) = &self.terminal {
                    let _ = sys::set_window_size(terminal.as_fd(), size);
                }
            }
            ToGuest::Finish => self.finished = true,
            ToGuest::CheckClock => {
                self.clock.ask();
                self.control.say(&ToHost::AskTime);
            }
            ToGuest::Time(since_1970_ns) => {
                if self.clock.hear(since_1970_ns) {
                    self.control.say(&ToHost::AskTime);
                }
            }
        }
    }

    fn start_when_complete(&mut self, hostname: &str) {
        let there = |role| match role {
            Role::Stdin => self.stdin.is_some(),
            Role::Stdout => self.stdout.is_some(),
            Role::Stderr | Role::Control => self.stderr.is_some(),
        };
        if self.admitted
            && self.wanted.as_ref().is_some_and(|process| streams_of(process).all(there))
            && let Some(process) = self.wanted.take()
        {
            self.start(&process, hostname);
        }
    }

    /// The events to wait for before the next [`Session::advance`].
    pub fn awaits(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        self.control.awaits().into_iter().chain(self.input.iter().chain(&self.outputs).filter_map(Pump::awaits))
    }
}

/// The streams of a process. With a terminal both outputs are one.
fn streams_of(process: &Process) -> impl Iterator<Item = Role> {
    let some = !process.detached;
    let (stdin, stderr) = (process.stdin, process.terminal.is_none());
    [(Role::Stdin, some && stdin), (Role::Stdout, some), (Role::Stderr, some && stderr)]
        .into_iter()
        .filter_map(|(role, wanted)| wanted.then_some(role))
}
