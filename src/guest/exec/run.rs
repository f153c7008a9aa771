//! Runs the session of an additional process with this process's streams and signals.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result};
use husk_protocol::ToHost;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::Connections;
use crate::console::terminal::RawTerminal;
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::guest::session::Session;
use crate::sys::SignalFd;
use crate::timings::Timings;

/// How a session with an additional process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest reported this result.
    Reported(ToHost),
    /// A signal to husk ended the session; the process may still be running.
    Interrupted(i32),
    /// The machine has exited, and the process with it.
    Lost,
}

/// What is done at certain moments in the life of a process in a container.
pub trait Moments {
    /// Its container is created, and it waits to be told to go.
    fn created(&mut self) -> Result<()> {
        Ok(())
    }

    /// A descriptor that is readable when it may be told that, if it is waited for.
    fn order(&self) -> Option<RawFd> {
        None
    }

    /// The descriptor is readable: it is going to be told, and the descriptor is not waited for any more.
    fn ordered(&mut self) -> Result<()> {
        Ok(())
    }

    /// The guest's kernel has killed processes of its container because memory was short.
    fn ran_out_of_memory(&mut self) -> Result<()> {
        Ok(())
    }

    /// It is running, or it is not, for this reason.
    fn started(&mut self, failure: Option<&str>) -> Result<()>;
}

/// Those of no interest.
struct Unnoticed;

impl Moments for Unnoticed {
    fn started(&mut self, _: Option<&str>) -> Result<()> {
        Ok(())
    }
}

/// Runs the session until the process exits, with this process's streams and `signals`. With `takes_keys`, all keys
/// typed on this terminal go to the process.
pub fn run_session(connections: Connections, signals: &SignalFd, takes_keys: bool) -> Result<End> {
    Attended::new(connections, signals, takes_keys)?.run(&mut Unnoticed)
}

/// The same for a process in a container, which gets all signals.
pub fn run_contained(
    connections: Connections,
    signals: &SignalFd,
    takes_keys: bool,
    moments: &mut dyn Moments,
) -> Result<End> {
    let mut attended = Attended::new(connections, signals, takes_keys)?;
    attended.session.only_forward();
    attended.run(moments)
}

/// A session, and what ends it.
struct Attended<'a> {
    session: Session,
    signals: &'a SignalFd,
    /// There is no machine in this process to end.
    exit_latch: ExitLatch,
    epoll: Epoll,
    terminal: Option<RawTerminal>,
    /// The descriptor of an order to go that is waited for.
    awaited: Option<RawFd>,
    is_created: bool,
    is_known_to_have_started: bool,
}

impl<'a> Attended<'a> {
    fn new(connections: Connections, signals: &'a SignalFd, takes_keys: bool) -> Result<Attended<'a>> {
        let Connections { id, control, reader: _, streams, on_terminal } = connections;
        // Before the streams have threads.
        let terminal = if takes_keys { RawTerminal::enter().context("set up the terminal")? } else { None };
        let session = Session::over(id, control, streams, on_terminal, Arc::new(Timings::new(Instant::now())))?;
        let epoll = Epoll::new().context("epoll")?;
        let (awaited, is_created, is_known_to_have_started) = (None, false, false);
        let exit_latch = ExitLatch::new()?;
        let attended =
            Attended { session, signals, exit_latch, epoll, terminal, awaited, is_created, is_known_to_have_started };
        attended.watch(attended.session.as_raw_fd())?;
        attended.watch(signals.as_raw_fd())?;
        Ok(attended)
    }

    fn watch(&self, fd: RawFd) -> Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, fd as u64)).context("watch the session")
    }

    fn run(mut self, moments: &mut dyn Moments) -> Result<End> {
        let end = loop {
            self.session.on_ready(&self.exit_latch)?;
            self.notice(moments)?;
            if let Some(end) = self.session.end().filter(|_| self.session.is_over()) {
                break Ok(End::Reported(end.clone()));
            }
            match self.exit_latch.reason() {
                Some(ExitReason::Killed(signal)) => break Ok(End::Interrupted(signal)),
                Some(reason) => break Err(anyhow::anyhow!("{reason}")),
                None if self.session.is_lost() && self.session.outputs_are_closed() => break Ok(End::Lost),
                None => {}
            }
            self.wait(moments)?;
        };
        self.session.disconnect();
        drop(self.terminal);
        end
    }

    fn notice(&mut self, moments: &mut dyn Moments) -> Result<()> {
        if self.session.is_created() && !self.is_created {
            self.is_created = true;
            moments.created()?;
            self.awaited = moments.order();
            self.awaited.map_or(Ok(()), |fd| self.watch(fd))?;
        }
        if self.session.take_out_of_memory() {
            moments.ran_out_of_memory()?;
        }
        let failure = match self.session.end() {
            Some(ToHost::Failed { message, .. }) => Some(message.clone()),
            _ => None,
        };
        if (self.session.has_started() || failure.is_some()) && !self.is_known_to_have_started {
            self.is_known_to_have_started = true;
            moments.started(failure.as_deref())?;
        }
        Ok(())
    }

    fn wait(&mut self, moments: &mut dyn Moments) -> Result<()> {
        let mut events = [EpollEvent::default(); 3];
        let count = match self.epoll.wait(-1, &mut events) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error).context("wait for events"),
            waited => waited.unwrap_or(0),
        };
        let is_ordered = |event: &EpollEvent| Some(event.fd()) == self.awaited;
        if events.iter().take(count).any(is_ordered)
            && let Some(fd) = self.awaited.take()
        {
            self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default()).context("watch the session")?;
            moments.ordered()?;
            self.session.go();
        }
        while let Some(signal) = self.signals.read().context("read a signal")? {
            self.session.on_signal(signal, &self.exit_latch);
        }
        Ok(())
    }
}
