//! A session: connects the guest's process to this process's streams, signals and exit code.
//!
//! The guest connects to the main session, which belongs to the machine. All other sessions belong to processes added
//! to a running machine, and connect to the guest: see [`super::exec`]. The thread that drives a session never blocks
//! in it; each stream has its own thread (`streams`). Data from the guest is untrusted: connections are limited in
//! number, messages in size, and a protocol violation ends the machine.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use husk_protocol::{Hello, Identity, Overlay, Renewal, Role, Run, ToGuest, ToHost, WindowSize};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::streams::Streams;
pub use super::streams::{Attached, Endpoints};
use crate::console::terminal;
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::foreign;
use crate::guest::signal;
use crate::snapshot::Received;
use crate::sys;
use crate::timings::{Step, Timings};

mod control;
mod create;
#[cfg(test)]
mod tests;

use control::ControlConnection;

/// The maximum number of connections that have not sent their hello yet.
const PENDING_MAX: usize = 8;
/// How long a guest that was asked to exit may take; it may have to write to a disk.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(30);
/// This many termination signals within [`KILL_WINDOW`] end the machine, whatever the process does.
const KILL_SIGNALS: usize = 3;
const KILL_WINDOW: Duration = Duration::from_secs(2);

/// A session. Its file descriptor is readable when there are events to handle.
pub struct Session {
    epoll: Epoll,
    id: u64,
    /// Where the guest connects, if this is the main session.
    listener: Option<UnixListener>,
    pending: Vec<(UnixStream, Vec<u8>)>,
    control: Option<ControlConnection>,
    streams: Streams,
    /// The streams that the process has, and those connected so far.
    expected: Vec<Role>,
    arrived: Vec<Role>,
    on_terminal: bool,
    started: bool,
    /// Whether the process waits in its container to be told to go.
    is_created: bool,
    /// Whether termination signals are the process's business alone, as in a container.
    only_forwards: bool,
    /// What the guest is to become when it says that its process started before the machine was saved.
    change: Option<Change>,
    /// Whether it still has to become that.
    is_changing: bool,
    /// Whether it has the identity of a machine that may run elsewhere.
    is_double: bool,
    /// Whether the guest is to wait for its process, and whether it does.
    is_to_wait: bool,
    is_waiting: bool,
    /// What the guest begins when it waits.
    run: Option<(Overlay, Box<Run>)>,
    end: Option<ToHost>,
    /// Whether the guest was short of memory since that was last asked.
    was_out_of_memory: bool,
    finish_by: Option<Instant>,
    signaled_at: Vec<Instant>,
    timings: Arc<Timings>,
}

/// What a restored guest becomes.
#[derive(Debug, Clone)]
pub struct Change {
    /// What the machine is called and how it is connected.
    pub identity: Identity,
    /// Whether it is the machine that was saved; otherwise it is another one.
    pub is_same: bool,
    /// Whether the guest's connections to others are reset.
    pub cut: bool,
}

impl Session {
    fn watch(&self, fd: RawFd, events: EventSet) -> Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0)).context("watch the session")
    }

    /// Whether the process is running or has run.
    pub fn has_started(&self) -> bool {
        self.started
    }

    /// Whether the container of the process is created, so that it may be [told to go](Session::go).
    pub fn is_created(&self) -> bool {
        self.is_created
    }

    /// Executes the program of a process that waits in its container.
    pub fn go(&mut self) {
        self.send(&ToGuest::Go);
    }

    /// Forwards any number of termination signals to a process that has started.
    pub fn only_forward(&mut self) {
        self.only_forwards = true;
    }

    /// Whether the guest has, as far as is known, the identity of another machine, so that its networks must not see it.
    pub fn is_double(&self) -> bool {
        self.is_double
    }

    /// Whether the guest waits for its process, so that the machine can be saved.
    pub fn is_waiting(&self) -> bool {
        self.is_waiting
    }

    /// How much of the process's outputs has arrived, or will as soon as it is printed, if the guest does not run.
    pub fn received(&self) -> Received {
        self.streams.received()
    }

    /// Whether the session is complete: the process has exited and all of its output has arrived.
    pub fn is_over(&self) -> bool {
        self.finish_by.is_some()
    }

    /// Whether the guest disconnected before it reported how the process exited.
    pub fn is_lost(&self) -> bool {
        self.control.is_none() && self.end.is_none()
    }

    /// How the process exited, once known.
    pub fn end(&self) -> Option<&ToHost> {
        self.end.as_ref()
    }

    /// Whether the guest's kernel has killed processes because memory was short since the last call.
    pub fn take_out_of_memory(&mut self) -> bool {
        std::mem::take(&mut self.was_out_of_memory)
    }

    /// Handles pending events: accepts connections, processes messages and ends the machine when the session is
    /// complete.
    pub fn on_ready(&mut self, exit_latch: &ExitLatch) -> Result<()> {
        self.streams.clear();
        self.accept()?;
        self.read_hellos()?;
        if let Err(error) = self.read_control() {
            // What follows cannot be understood, and would only be kept.
            self.control = None;
            exit_latch.declare(ExitReason::SessionLost(error.to_string()));
        }
        self.finish_when_done();
        Ok(())
    }

    /// Forwards a signal to the process. Before the process has started, and after it has exited while its output is
    /// still unread, a termination signal ends the machine.
    pub fn on_signal(&mut self, signal: i32, exit_latch: &ExitLatch) {
        if signal == libc::SIGWINCH && self.on_terminal {
            return self.resize();
        }
        let terminates = signal::is_termination(signal);
        let now = Instant::now();
        if terminates {
            self.signaled_at.retain(|at| now - *at < KILL_WINDOW);
            self.signaled_at.push(now);
        }
        if terminates && (!self.started || self.end.is_some() || self.kills_by(self.signaled_at.len())) {
            return exit_latch.declare(ExitReason::Killed(signal));
        }
        if let Ok(number) = u8::try_from(signal) {
            self.send_signal(number);
        }
    }

    fn kills_by(&self, signals: usize) -> bool {
        signals >= KILL_SIGNALS && !self.only_forwards
    }

    /// Sends the process a signal. Does nothing if there is no process.
    pub fn send_signal(&mut self, number: u8) {
        self.send(&ToGuest::Signal(number));
    }

    /// Notifies the process of its terminal's size.
    pub fn resize_to(&mut self, size: WindowSize) {
        self.send(&ToGuest::Resize(size));
    }

    /// Makes the guest set its wall clock to the host's, after the guest was stopped or the host's clock was set.
    pub fn check_clock(&mut self) {
        self.send(&ToGuest::CheckClock);
    }

    /// Forwards input from `from` to the process, if it has an input, which ends with it if it `is_only` input.
    pub fn attach_input(&mut self, from: UnixStream, is_only: bool) -> Result<()> {
        self.streams.attach_input(from, is_only)
    }

    /// The maximum time to wait for the guest to exit, in milliseconds; -1 is unlimited.
    pub fn timeout_ms(&self, exit_latch: &ExitLatch) -> i32 {
        let Some(finish_by) = self.finish_by else { return -1 };
        let left = finish_by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            exit_latch.declare(ExitReason::SessionLost("it did not exit when it was told to".into()));
        }
        left.as_millis() as i32
    }

    /// Whether all of the process's output has been written or discarded.
    pub fn outputs_are_closed(&self) -> bool {
        self.streams.clear();
        self.streams.outputs_are_closed()
    }

    /// Stops reading from and writing to the guest. Output received so far is still written.
    pub fn disconnect(&mut self) {
        (self.listener, self.control) = (None, None);
        self.pending.clear();
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
                Ok((stream, _)) if self.pending.len() < PENDING_MAX && self.wants_connections() => {
                    stream.set_nonblocking(true).context("accept a connection")?;
                    self.watch(stream.as_raw_fd(), EventSet::IN)?;
                    self.pending.push((stream, Vec::new()));
                }
                // Unneeded connections are closed.
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("accept the guest's connection"),
            }
        }
    }

    fn wants_connections(&self) -> bool {
        self.wants_control() || self.arrived.len() < self.expected.len()
    }

    fn wants_control(&self) -> bool {
        self.control.is_none() && !self.started
    }

    fn read_hellos(&mut self) -> Result<()> {
        for (mut stream, mut received) in std::mem::take(&mut self.pending) {
            match control::read_hello(&mut stream, &mut received) {
                Some(Some(hello)) => self.join(hello, stream)?,
                Some(None) => self.pending.push((stream, received)),
                None => {}
            }
        }
        Ok(())
    }

    /// Assigns a connection to its role, if the role is expected and not taken.
    fn join(&mut self, hello: Hello, stream: UnixStream) -> Result<()> {
        if hello.session != self.id {
            return Ok(());
        }
        match hello.role {
            Role::Control if self.wants_control() => {
                self.control = Some(ControlConnection::new(stream));
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

    fn read_control(&mut self) -> Result<()> {
        let Some(control) = &mut self.control else { return Ok(()) };
        let messages = control.receive()?;
        if control.has_ended() {
            // The end of the guest's init or of the guest follows.
            self.control = None;
        }
        messages.into_iter().try_for_each(|message| self.hear(message))?;
        self.flush();
        Ok(())
    }

    fn hear(&mut self, message: ToHost) -> Result<()> {
        match message {
            ToHost::Started(_) => {
                self.timings.mark(Step::Process);
                self.started = true;
                // The size may have changed since the process was described.
                if self.on_terminal {
                    self.resize();
                }
            }
            ToHost::Created(_) => self.is_created = true,
            ToHost::Resumed { streams, .. } => {
                let Some(Change { identity, cut, .. }) = self.change.take() else { return Ok(()) };
                self.is_changing = true;
                self.expected.retain(|role| streams.contains(role));
                self.send(&ToGuest::Renew { renewal: renewal()?, identity: Box::new(identity), cut });
            }
            ToHost::Renewed(changed) if self.is_changing => self.note_change(changed),
            ToHost::Waiting => {
                self.is_waiting = self.is_to_wait;
                if let Some((overlay, run)) = self.run.take() {
                    self.send(&ToGuest::Begin(renewal()?, overlay, run));
                }
            }
            ToHost::AskTime => self.send(&ToGuest::Time(wall_clock_ns())),
            ToHost::OutOfMemory => self.was_out_of_memory = true,
            // Already handled by the code that opened the session, or made up by the guest.
            ToHost::Admitted | ToHost::Renewed(_) => {}
            end @ (ToHost::Failed { .. } | ToHost::Exited(_) | ToHost::Signaled(_)) => {
                if self.is_changing {
                    // It ends before it is told: what it becomes makes no difference any more.
                    self.started = true;
                }
                self.timings.mark(Step::ProcessEnd);
                self.end.get_or_insert(end);
            }
        }
        Ok(())
    }

    /// The guest has become what it was told to, or not.
    fn note_change(&mut self, changed: Result<(), String>) {
        self.is_changing = false;
        self.timings.mark(Step::Process);
        self.started = true;
        match changed {
            Ok(()) => self.is_double = false,
            Err(reason) => log::warn!(
                "the machine keeps the addresses of the one that was saved{}: {}",
                if self.is_double { ", and its network is down (`husk update --link up`)" } else { "" },
                foreign::one_line(&reason)
            ),
        }
        // The size may have changed since the machine was saved.
        if self.on_terminal {
            self.resize();
        }
    }

    /// All of the process's output has been written, so the guest may exit.
    fn finish_when_done(&mut self) {
        let all_here =
            self.expected.iter().all(|role| self.arrived.contains(role)) && self.streams.outputs_are_closed();
        if self.end.is_some() && all_here && self.finish_by.is_none() {
            self.finish_by = Some(Instant::now() + SHUTDOWN_TIMEOUT);
            self.send(&ToGuest::Finish);
        }
    }

    fn send(&mut self, message: &ToGuest) {
        if let Some(control) = &mut self.control {
            control.queue(message);
            self.flush();
        }
    }

    fn flush(&mut self) {
        let Some(control) = &mut self.control else { return };
        let events = if control.flush() { EventSet::IN } else { EventSet::IN | EventSet::OUT };
        let event = EpollEvent::new(events, 0);
        let _ = self.epoll.ctl(ControlOperation::Modify, control.as_raw_fd(), event);
    }
}

impl AsRawFd for Session {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

/// The host's wall clock, in nanoseconds since 1970.
fn wall_clock_ns() -> u64 {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_nanos()).unwrap_or(u64::MAX)
}

/// What a restored machine needs, as of now.
fn renewal() -> Result<Renewal> {
    let mut entropy = [0; 32];
    sys::getrandom(&mut entropy).context("get random bytes for the guest")?;
    Ok(Renewal { time_ns: wall_clock_ns(), entropy })
}
