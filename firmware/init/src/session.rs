//! A process and its connections to the host, for the main session and additional ones.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use husk_protocol::{Container, Identity, MAIN_SESSION, Overlay, Process, Renewal, Role, Run, ToGuest, ToHost};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Pid;

use crate::cgroup;
use crate::clock::{self, Clock};
use crate::connection::{self, ControlConnection, shortened};
use crate::container::Containers;
use crate::entering::Entering;
use crate::errors::Failure;
use crate::pump::Pump;
use crate::report;
use crate::sys::{self, Ended};

mod oom;
mod start;

/// How many signals and window sizes are kept for a process that is not there yet.
const HELD_MAX: usize = 32;

pub use start::World;

/// A session. Its process starts when its streams are connected, and it ends when the host says so or disconnects.
pub struct Session {
    pub id: u64,
    control: ControlConnection,
    /// Whether it was admitted.
    admitted: bool,
    /// Whether its process is in a container, once that is known.
    is_contained: Option<bool>,
    /// What to start when its streams are connected: a process, which may be the first of a container.
    wanted: Option<(Option<Box<Container>>, Box<Process>)>,
    /// The ID of the container that was created for this session.
    container: Option<String>,
    /// The process until it has executed its program, and what it is to be told then.
    entering: Option<Entering>,
    held: Vec<ToGuest>,
    /// The first process of a container that has failed to start, until it was reaped.
    dying: Option<Pid>,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    input: Option<Pump>,
    outputs: Vec<(Role, Pump)>,
    terminal: Option<OwnedFd>,
    /// The process, once it is running, or waits in its new container.
    pid: Option<Pid>,
    clock: Clock,
    /// What the machine is to become, and whether its connections to others are to be reset.
    change: Option<(Box<Identity>, bool)>,
    /// Whether the host knows that memory of the container was short.
    oom_told: bool,
    /// How the process ended, and whether that was reported to the host.
    end: Option<ToHost>,
    told: bool,
    finished: bool,
}

impl Session {
    fn new(id: u64, control: ControlConnection) -> Session {
        Session {
            id,
            control,
            admitted: false,
            is_contained: None,
            wanted: None,
            container: None,
            entering: None,
            held: Vec::new(),
            dying: None,
            stdin: None,
            stdout: None,
            stderr: None,
            input: None,
            outputs: Vec::new(),
            terminal: None,
            pid: None,
            clock: Clock::default(),
            change: None,
            oom_told: false,
            end: None,
            told: false,
            finished: false,
        }
    }

    /// Creates the main session over its connections.
    pub fn main(connections: Vec<(Role, OwnedFd)>) -> Session {
        let mut session = Session::new(MAIN_SESSION, ControlConnection::default());
        session.add(connections);
        session
    }

    /// Adds connections of the main session.
    pub fn add(&mut self, connections: Vec<(Role, OwnedFd)>) {
        for (role, socket) in connections {
            match role {
                Role::Control => self.control = ControlConnection::new(socket),
                role => *self.slot(role) = Some(socket),
            }
        }
    }

    /// Creates a session opened by the host. Its process is not started before it is [admitted](Session::admit).
    pub fn accepted(id: u64, control: OwnedFd) -> Session {
        Session::new(id, ControlConnection::new(control))
    }

    /// Whether it was admitted.
    pub fn is_admitted(&self) -> bool {
        self.admitted
    }

    /// Whether its process is to be in a container, once the host has said what that is.
    pub fn is_contained(&self) -> Option<bool> {
        self.is_contained
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

    /// Whether its connections were lost because the machine was restored, so that it can go on over others.
    pub fn is_cut(&self) -> bool {
        self.control.is_cut() && !self.finished
    }

    /// Connects the main session again, with its input if that is still open, and with the outputs that have a reader.
    pub fn reconnect(&mut self) -> Result<(), Failure> {
        let input = self.input.iter().filter(|pump| pump.is_open()).map(|_| Role::Stdin);
        let outputs = self.outputs.iter().filter(|(_, pump)| pump.has_reader()).map(|(role, _)| *role);
        let streams: Vec<Role> = input.chain(outputs).collect();
        self.connect_again(&streams)?;
        // The host of the restored machine knows of nothing.
        self.told = false;
        self.control.say(&ToHost::Resumed { pid: self.pid.map(|pid| pid.as_raw().unsigned_abs()), streams });
        Ok(())
    }

    fn connect_again(&mut self, streams: &[Role]) -> Result<(), Failure> {
        for (role, socket) in connection::connect_again(&[&[Role::Control], streams].concat())? {
            match role {
                Role::Control => self.control = ControlConnection::new(socket),
                Role::Stdin => {
                    if let Some(pump) = &mut self.input {
                        pump.replace_source(socket);
                    }
                }
                role => {
                    if let Some((_, pump)) = self.outputs.iter_mut().find(|(of, _)| *of == role) {
                        pump.replace_sink(socket);
                    }
                }
            }
        }
        Ok(())
    }

    /// Says that the process of the main session may begin, and waits until it is to. Meanwhile the machine may be restored
    /// any number of times.
    pub fn wait_for_run(&mut self) -> Result<(Renewal, Overlay, Box<Run>), Failure> {
        loop {
            self.control.say(&ToHost::Waiting);
            while self.control.is_open() && !self.finished {
                match self.control.next() {
                    Some(ToGuest::Begin(renewal, overlay, run)) => return Ok((renewal, overlay, run)),
                    Some(message) => self.obey(message),
                    None => {
                        if let Some((fd, events)) = self.control.awaits() {
                            let _ = poll(&mut [PollFd::new(fd, events)], PollTimeout::NONE);
                        }
                    }
                }
            }
            if !self.is_cut() {
                return Err(Failure::new("the host has no process for this machine"));
            }
            self.connect_again(&[])?;
        }
    }

    /// Makes up for the time that has passed since the machine was saved, and for the random numbers that others restored
    /// from the same state would share with it.
    pub fn renew(&mut self, renewal: &Renewal) {
        // First of all, since everything else may need random numbers.
        if let Err(error) = sys::add_entropy(renewal.entropy) {
            report::say(&format!("add entropy: {error}"));
        }
        clock::set(Duration::from_nanos(renewal.time_ns));
    }

    /// What the host has said that the machine is to become, once, and whether its connections to others are to be reset.
    pub fn take_change(&mut self) -> Option<(Box<Identity>, bool)> {
        self.change.take()
    }

    /// Tells the host whether the machine has changed.
    pub fn answer_change(&mut self, changed: Result<(), Failure>) {
        self.control.say(&ToHost::Renewed(changed.map_err(|failure| shortened(&failure.message))));
    }

    /// Gives up the connection to the host, which ends the session.
    pub fn disconnect(&mut self) {
        self.control = ControlConnection::default();
    }

    /// Asks the host for the time.
    pub fn ask_time(&mut self) {
        self.clock.ask();
        self.control.say(&ToHost::AskTime);
    }

    fn slot(&mut self, role: Role) -> &mut Option<OwnedFd> {
        match role {
            Role::Stdin => &mut self.stdin,
            Role::Stdout => &mut self.stdout,
            Role::Stderr | Role::Control => &mut self.stderr,
        }
    }

    /// Records how process `pid` ended; returns whether it belongs to this session. A container ends with its first process.
    pub fn note_end(&mut self, pid: Pid, ended: Ended, containers: &mut Containers) -> bool {
        if self.entering.as_mut().is_some_and(|entering| entering.note_end(pid)) {
            self.follow(containers);
        }
        if self.dying == Some(pid) {
            self.dying = None;
            self.leave_container(containers);
        }
        if self.pid != Some(pid) {
            return false;
        }
        self.entering = None;
        self.end = Some(match ended {
            Ended::Exited(code) => ToHost::Exited(code),
            Ended::Signaled(number) => ToHost::Signaled(number),
        });
        (self.pid, self.input, self.terminal) = (None, None, None);
        self.report_oom_kills_of_container();
        self.leave_container(containers);
        true
    }

    /// Whether the process has ended or failed to start.
    pub fn has_ended(&self) -> bool {
        self.end.is_some()
    }

    /// Whether nothing is left to do.
    pub fn is_over(&self) -> bool {
        self.is_left() && self.dying.is_none() && (self.container.is_none() || self.pid.is_none())
    }

    /// Whether the host has left it. The process goes on, unless it is the first of a container.
    fn is_left(&self) -> bool {
        self.finished || !self.control.is_open()
    }

    /// Whether the host is gone without a word, and not because the machine was restored.
    fn is_lost(&self) -> bool {
        !self.control.is_open() && !self.finished && !self.is_cut()
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
        self.outputs.iter_mut().for_each(|(_, pump)| pump.expect_no_more());
    }

    /// Transfers what is possible without blocking, and handles messages of the host.
    pub fn advance(&mut self, world: &mut World) {
        for pump in self.input.iter_mut().chain(self.outputs.iter_mut().map(|(_, pump)| pump)) {
            pump.advance();
        }
        while let Some(message) = self.control.next() {
            self.obey(message);
        }
        self.start_when_complete(world);
        self.follow(world.containers);
        if self.is_left() && !self.is_cut() {
            self.give_up_start();
        }
        if self.is_lost()
            && self.is_contained == Some(true)
            && let Some(pid) = self.pid
        {
            // Whoever kills the process on the host that stands for it means this one.
            let _ = sys::send_signal(pid, libc::SIGKILL as u8);
        }
        if self.is_left()
            && let Some(id) = &self.container
            && let Some(pid) = self.pid
        {
            let _ = sys::send_signal(pid, libc::SIGKILL as u8);
            cgroup::kill_container(id);
        }
        if self.outputs.iter().all(|(_, pump)| pump.is_done())
            && !self.told
            && self.dying.is_none()
            && let Some(end) = &self.end
        {
            self.told = true;
            self.control.say(end);
        }
    }

    fn obey(&mut self, message: ToGuest) {
        match message {
            ToGuest::Start(process) => self.want(None, process),
            ToGuest::Create(container, process) => self.want(Some(container), process),
            ToGuest::Go => self.entering.iter_mut().for_each(Entering::go),
            // There is nobody yet who could do so.
            ToGuest::Signal(_) | ToGuest::Resize(_) if self.entering.is_some() && self.pid.is_none() => {
                if self.held.len() < HELD_MAX {
                    self.held.push(message);
                }
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
            ToGuest::CheckClock => self.ask_time(),
            ToGuest::Time(since_1970_ns) => {
                if self.clock.hear(since_1970_ns) {
                    self.control.say(&ToHost::AskTime);
                }
            }
            ToGuest::Renew { renewal, identity, cut } => {
                self.renew(&renewal);
                self.ask_time();
                self.change = Some((identity, cut));
            }
            // It has begun.
            ToGuest::Begin(..) => {}
        }
    }

    /// The events to wait for before the next [`Session::advance`].
    pub fn awaits(&self) -> impl Iterator<Item = (BorrowedFd<'_>, PollFlags)> {
        let pumps = self.input.iter().chain(self.outputs.iter().map(|(_, pump)| pump));
        let entering = self.entering.iter().filter_map(Entering::awaits);
        self.control.awaits().into_iter().chain(entering).chain(pumps.filter_map(Pump::awaits))
    }

    /// When the next [`Session::advance`] is due although none of them has happened.
    pub fn deadline(&self) -> Option<Instant> {
        self.entering.as_ref().and_then(Entering::deadline)
    }
}

/// The streams of a process. With a terminal both outputs are one.
pub fn streams_of(process: &Process) -> impl Iterator<Item = Role> {
    let some = !process.detached;
    let (stdin, stderr) = (process.stdin, process.terminal.is_none());
    [(Role::Stdin, some && stdin), (Role::Stdout, some), (Role::Stderr, some && stderr)]
        .into_iter()
        .filter_map(|(role, wanted)| wanted.then_some(role))
}
