//! A session: from the guest's connections to this process's streams, signals and exit code.
//!
//! The main one is the machine's, and its guest connects. Every other is a process that somebody adds to a running machine,
//! and connects to the guest: see [`super::exec`]. Whoever drives it never waits in it: the streams have threads of their own
//! (`streams`). What comes from the guest is foreign: connections are counted, messages bounded, and what makes no sense
//! ends the machine.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use husk_protocol::frame::{self, Reader};
use husk_protocol::{HELLO_BYTES, Hello, MAIN_SESSION, Role, ToGuest, ToHost, WindowSize};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use super::streams::Ends;
use super::streams::Streams;
use crate::console::terminal;
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::guest::signal;
use crate::timings::{Step, Timings};

/// Connections that may be open before they have said what for.
const GREETINGS_MAX: usize = 8;
/// How long a guest that was told to end may take; it may have a disk to write to.
const FINISH_PATIENCE: Duration = Duration::from_secs(30);
/// This many signals that ask for the end, within this time, end the machine whatever the process does.
const URGES: usize = 3;
const URGES_WITHIN: Duration = Duration::from_secs(2);
/// What a guest that does not listen may have us hold of messages.
const UNSENT_MAX_BYTES: usize = 16 << 10;

/// The session. Its descriptor is readable when there is something to be done.
pub struct Session {
    epoll: Epoll,
    id: u64,
    /// Where the guest connects to, if this is the main one.
    listener: Option<UnixListener>,
    greetings: Vec<(UnixStream, Vec<u8>)>,
    control: Option<Control>,
    streams: Streams,
    /// Which streams the process has, and those that have come.
    expected: Vec<Role>,
    arrived: Vec<Role>,
    on_terminal: bool,
    started: bool,
    end: Option<ToHost>,
    finish_by: Option<Instant>,
    urged_at: Vec<Instant>,
    timings: Arc<Timings>,
}

struct Control {
    stream: UnixStream,
    reader: Reader,
    unsent: Vec<u8>,
}

impl Session {
    /// A session whose guest connects to `listener`. `stdin` says whether the process reads ours, `on_terminal` whether it
    /// has a terminal.
    pub fn new(
        listener: UnixListener,
        stdin: bool,
        on_terminal: bool,
        ends: Ends,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        listener.set_nonblocking(true).context("set up the session")?;
        let mut session = Session::without_connections(MAIN_SESSION, stdin, on_terminal, ends, timings)?;
        session.watch(listener.as_raw_fd(), EventSet::IN)?;
        session.listener = Some(listener);
        Ok(session)
    }

    /// A session about one more process, over connections that the guest has taken: one for each of its streams, and
    /// `control`, over which it was told what to start.
    pub fn over(
        id: u64,
        control: UnixStream,
        streams: Vec<(Role, UnixStream)>,
        on_terminal: bool,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        let stdin = streams.iter().any(|(role, _)| *role == Role::Stdin);
        let mut session = Session::without_connections(id, stdin, on_terminal, Ends::Ours, timings)?;
        control.set_nonblocking(true).context("set up the session")?;
        session.watch(control.as_raw_fd(), EventSet::IN)?;
        session.control = Some(Control { stream: control, reader: Reader::default(), unsent: Vec::new() });
        for (role, stream) in streams {
            session.arrived.push(role);
            session.streams.start(role, stream)?;
        }
        Ok(session)
    }

    fn without_connections(
        id: u64,
        stdin: bool,
        on_terminal: bool,
        ends: Ends,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        let epoll = Epoll::new().context("epoll")?;
        let mut expected = vec![Role::Stdout];
        expected.extend(stdin.then_some(Role::Stdin));
        expected.extend((!on_terminal).then_some(Role::Stderr));
        let session = Session {
            epoll,
            id,
            listener: None,
            greetings: Vec::new(),
            control: None,
            streams: Streams::new(ends).context("set up the streams")?,
            expected,
            arrived: Vec::new(),
            on_terminal,
            started: false,
            end: None,
            finish_by: None,
            urged_at: Vec::new(),
            timings,
        };
        session.watch(session.streams.closed().as_raw_fd(), EventSet::IN)?;
        Ok(session)
    }

    fn watch(&self, fd: RawFd, events: EventSet) -> Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0)).context("watch the session")
    }

    /// Whether the process runs, or has run.
    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Whether all is said: how the process ended, and all that it wrote.
    pub fn is_over(&self) -> bool {
        self.finish_by.is_some()
    }

    /// Whether the guest has gone before it said how the process ended.
    pub fn is_lost(&self) -> bool {
        self.control.is_none() && self.end.is_none()
    }

    /// How the process ended, once that is known.
    pub fn end(&self) -> Option<&ToHost> {
        self.end.as_ref()
    }

    /// Does what there is to do: takes connections and messages, and ends the machine when all is said.
    pub fn on_ready(&mut self, exit_latch: &ExitLatch) -> Result<()> {
        self.streams.clear();
        self.accept()?;
        self.greet()?;
        if let Err(error) = self.listen_to_control() {
            exit_latch.declare(ExitReason::SessionLost(error.to_string()));
        }
        self.finish_when_done();
        Ok(())
    }

    /// Hands a signal of ours on to the process; before there is one, and when it has ended but nobody takes what it wrote, one
    /// that asks for an end ends the machine.
    pub fn on_signal(&mut self, signal: i32, exit_latch: &ExitLatch) {
        if signal == libc::SIGWINCH && self.on_terminal {
            return self.resize();
        }
        let asks_for_end = signal::asks_for_end(signal);
        let now = Instant::now();
        if asks_for_end {
            self.urged_at.retain(|at| now - *at < URGES_WITHIN);
            self.urged_at.push(now);
        }
        if asks_for_end && (!self.started || self.end.is_some() || self.urged_at.len() >= URGES) {
            return exit_latch.declare(ExitReason::Killed(signal));
        }
        if let Ok(number) = u8::try_from(signal) {
            self.send_signal(number);
        }
    }

    /// Sends the process a signal. Nothing happens where there is none.
    pub fn send_signal(&mut self, number: u8) {
        self.say(&ToGuest::Signal(number));
    }

    /// Tells the process how large its terminal is.
    pub fn resize_to(&mut self, size: WindowSize) {
        self.say(&ToGuest::Resize(size));
    }

    /// Has the guest set its wall clock by ours: it did not run for a while, or ours was set.
    pub fn check_clock(&mut self) {
        self.say(&ToGuest::CheckClock);
    }

    /// Feeds the process what `from` says, if it has an input.
    pub fn attach_input(&mut self, from: UnixStream) -> Result<()> {
        self.streams.attach_input(from)
    }

    /// How long to wait at most for the guest's end, in milliseconds; -1 is for ever.
    pub fn timeout_ms(&self, exit_latch: &ExitLatch) -> i32 {
        let Some(finish_by) = self.finish_by else { return -1 };
        let left = finish_by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            exit_latch.declare(ExitReason::SessionLost("it did not exit when it was told to".into()));
        }
        left.as_millis() as i32
    }

    /// Whether all that the process wrote has been written by us, or is not wanted any more.
    pub fn outputs_are_closed(&self) -> bool {
        self.streams.clear();
        self.streams.outputs_are_closed()
    }

    /// Hears no more of the guest, and gives it no more to read. What it wrote is still written.
    pub fn disconnect(&mut self) {
        (self.listener, self.control) = (None, None);
        self.greetings.clear();
        self.streams.end_input();
    }

    fn resize(&mut self) {
        if let Some(size) = terminal::window_size() {
            self.resize_to(size);
        }
    }

    fn accept(&mut self) -> Result<()> {
        let Some(listener) = &self.listener else { return Ok(()) };
        loop {
            match listener.accept() {
                Ok((stream, _)) if self.greetings.len() < GREETINGS_MAX && self.arrived.len() < self.expected.len() => {
                    stream.set_nonblocking(true).context("accept a connection")?;
                    self.watch(stream.as_raw_fd(), EventSet::IN)?;
                    self.greetings.push((stream, Vec::new()));
                }
                // One that nobody needs is closed.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("accept the guest's connection"),
            }
        }
    }

    fn greet(&mut self) -> Result<()> {
        for (mut stream, mut said) in std::mem::take(&mut self.greetings) {
            match read_hello(&mut stream, &mut said) {
                Some(Some(hello)) => self.join(hello, stream)?,
                Some(None) => self.greetings.push((stream, said)),
                None => {}
            }
        }
        Ok(())
    }

    /// Gives a connection its place, if there is one for it that nobody has.
    fn join(&mut self, hello: Hello, stream: UnixStream) -> Result<()> {
        if hello.session != self.id {
            return Ok(());
        }
        match hello.role {
            Role::Control if self.control.is_none() && !self.started => {
                self.control = Some(Control { stream, reader: Reader::default(), unsent: Vec::new() });
            }
            role if self.expected.contains(&role) && !self.arrived.contains(&role) => {
                self.epoll
                    .ctl(ControlOperation::Delete, stream.as_raw_fd(), EpollEvent::default())
                    .context("leave a stream to its thread")?;
                self.arrived.push(role);
                self.streams.start(role, stream)?;
            }
            _ => {}
        }
        Ok(())
    }

    fn listen_to_control(&mut self) -> Result<()> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let mut messages = Vec::new();
        let mut buffer = [0; 4096];
        // One read in a turn, so that a guest that never stops talking has neither our memory nor all our time. The descriptor
        // stays readable while there is more.
        let ended = match control.stream.read(&mut buffer) {
            Ok(0) => true,
            Ok(count) => {
                control.reader.push(buffer.get(..count).unwrap_or_default());
                while let Some(message) = control.reader.take::<ToHost>()? {
                    messages.push(message);
                }
                false
            }
            Err(error) => !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        };
        if ended {
            // Its end follows: the guest's init has gone, or the guest.
            self.control = None;
        }
        messages.into_iter().for_each(|message| self.hear(message));
        self.flush();
        Ok(())
    }

    fn hear(&mut self, message: ToHost) {
        match message {
            ToHost::Started(_) => {
                self.timings.mark(Step::Process);
                self.started = true;
                // It may have changed since the process was described.
                if self.on_terminal {
                    self.resize();
                }
            }
            ToHost::AskTime => self.say(&ToGuest::Time(wall_clock_ns())),
            // Who opened the session has heard it, or the guest makes it up.
            ToHost::Admitted => {}
            end @ (ToHost::Failed { .. } | ToHost::Exited(_) | ToHost::Signaled(_)) => {
                self.timings.mark(Step::ProcessEnd);
                self.end.get_or_insert(end);
            }
        }
    }

    /// Everything that the process wrote has been written by us: so the guest may go.
    fn finish_when_done(&mut self) {
        let all_here = self.arrived.len() == self.expected.len() && self.streams.outputs_are_closed();
        if self.end.is_some() && all_here && self.finish_by.is_none() {
            self.finish_by = Some(Instant::now() + FINISH_PATIENCE);
            self.say(&ToGuest::Finish);
        }
    }

    fn say(&mut self, message: &ToGuest) {
        let Some(control) = self.control.as_mut().filter(|control| control.unsent.len() < UNSENT_MAX_BYTES) else {
            return;
        };
        // Messages of ours are short.
        let _ = frame::write(message, &mut control.unsent);
        self.flush();
    }

    fn flush(&mut self) {
        let Some(control) = &mut self.control else { return };
        while !control.unsent.is_empty() {
            match control.stream.write(&control.unsent) {
                Ok(count) => drop(control.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // Either it goes on when there is room, or reading tells that nobody is there.
                Err(_) => break,
            }
        }
        let events = if control.unsent.is_empty() { EventSet::IN } else { EventSet::IN | EventSet::OUT };
        let event = EpollEvent::new(events, 0);
        let _ = self.epoll.ctl(ControlOperation::Modify, control.stream.as_raw_fd(), event);
    }
}

impl AsRawFd for Session {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// Our wall clock, in nanoseconds since 1970.
fn wall_clock_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

/// The hello, once it is whole; `None` for a connection that is of no use.
fn read_hello(stream: &mut impl Read, said: &mut Vec<u8>) -> Option<Option<Hello>> {
    let mut buffer = [0; HELLO_BYTES];
    loop {
        if let Some(bytes) = said.first_chunk::<HELLO_BYTES>() {
            return Hello::from_bytes(*bytes).ok().map(Some);
        }
        let rest = buffer.get_mut(said.len()..)?;
        match stream.read(rest) {
            Ok(0) => return None,
            Ok(count) => said.extend_from_slice(rest.get(..count)?),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}
