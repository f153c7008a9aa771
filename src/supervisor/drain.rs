//! Drains the output after the machine has ended: buffered output is still written even if its reader is slow or
//! stopped. Signals and requests are handled meanwhile, so that the wait can be cut short.

use std::fs::File;
use std::io::{self, PipeReader, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::fs::FileType;
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::control::{self, Token};
use super::endpoint::ControlEndpoint;
use crate::console::hub::{Copied, HubStream};
use crate::console::log::Log;
use crate::console::stream_log::Stream;
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::guest::session::Session;
use crate::guest::signal;
use crate::monitor::Monitor;
use crate::sandbox;
use crate::sys::SignalFd;
use crate::sys::event;

/// How long the remaining output may take after a forced end: enough for an active reader, and short for a waiting
/// user.
const FORCED_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// Where the monitor's console thread writes, and what is written there is copied to, unless it is standard output.
pub(super) type Sink = Option<(PipeReader, Box<dyn Write + Send>)>;

/// Where output of the serial port goes: to the log if there is one, otherwise to the hub in the background, or to standard
/// output, and to the hub as well if there is one. Returns also what is given to the monitor.
pub(super) fn console(log: Option<Log>, endpoint: &ControlEndpoint) -> Result<(OwnedFd, Sink)> {
    let copy: Box<dyn Write + Send> = match (log, endpoint.hub()) {
        (Some(log), _) => Box::new(log),
        (None, Some(hub)) if endpoint.is_detached() => Box::new(HubStream(hub.clone(), Stream::Output)),
        (None, hub) => {
            let stdout = io::stdout().as_fd().try_clone_to_owned().context("use standard output")?;
            // A pipe can be written to and nothing else. A terminal or a file could be read, or cut.
            let is_pipe =
                FileType::from_raw_mode(rustix::fs::fstat(&stdout).map_or(0, |found| found.st_mode)).is_fifo();
            match hub {
                Some(hub) => Box::new(Copied(HubStream(hub.clone(), Stream::Output), File::from(stdout))),
                None if is_pipe => return Ok((stdout, None)),
                None => Box::new(File::from(stdout)),
            }
        }
    };
    let (reader, writer) = io::pipe().context("create a pipe for the console")?;
    Ok((writer.into(), Some((reader, copy))))
}

/// The thread that copies the output, if there is one, and an event signaled when everything is copied.
pub(super) struct Printer {
    copying: Option<(JoinHandle<()>, Arc<EventFd>)>,
    is_done: bool,
}

impl Printer {
    /// Starts the thread. It ends with the monitor's console thread, or ends the machine if the output cannot be written.
    pub(super) fn start(sink: Sink, exit_latch: &Arc<ExitLatch>) -> Result<Printer> {
        let Some((mut reader, mut copy)) = sink else { return Ok(Printer { copying: None, is_done: true }) };
        let done = Arc::new(event::create().context("watch the console")?);
        let (signal, exit_latch) = (done.clone(), exit_latch.clone());
        let print = move || {
            if let Err(error) = io::copy(&mut reader, &mut copy) {
                exit_latch.declare(ExitReason::of_failed_output(&error));
            }
            let _ = signal.write(1);
        };
        let thread = sandbox::spawn("console", print).context("start the console thread")?;
        Ok(Printer { copying: Some((thread, done)), is_done: false })
    }

    fn is_done(&mut self) -> bool {
        let looks = |(thread, done): &(JoinHandle<()>, Arc<EventFd>)| {
            let is_finished = thread.is_finished();
            // Read in any case: it would wake this thread again and again.
            done.read().is_ok() || is_finished
        };
        self.is_done = self.is_done || self.copying.as_ref().is_none_or(looks);
        self.is_done
    }
}

/// Waits until all of the machine's output has been taken, or until a signal, a request or `reason` cuts the wait
/// short.
pub(super) fn print(
    monitor: &mut Monitor,
    mut printer: Printer,
    mut session: Option<&mut Session>,
    signals: &SignalFd,
    endpoint: &mut ControlEndpoint,
    reason: &ExitReason,
) -> Result<()> {
    let epoll = Epoll::new().context("epoll")?;
    control::watch(&epoll, monitor.as_raw_fd(), Token::Monitor)?;
    if let Some((_, done)) = &printer.copying {
        control::watch(&epoll, done.as_raw_fd(), Token::Exit)?;
    }
    control::watch(&epoll, signals.as_raw_fd(), Token::Signal)?;
    control::watch(&epoll, endpoint.as_raw_fd(), Token::ControlEndpoint)?;
    if let Some(session) = &mut session {
        session.disconnect();
        control::watch(&epoll, session.as_raw_fd(), Token::Session)?;
    }
    let forced = matches!(reason, ExitReason::Killed(_) | ExitReason::Quit);
    let forced_drain_by = Instant::now() + FORCED_DRAIN_TIMEOUT;
    let (mut is_cut, mut is_watched) = (false, true);
    loop {
        monitor.handle_events();
        // It has nothing more to report. Its end, which may take a while, would wake this thread again and again.
        if monitor.console_is_closed() && std::mem::take(&mut is_watched) {
            control::unwatch(&epoll, monitor.as_raw_fd())?;
        }
        // The event is read even if the monitor has not reported the end yet: it would wake this thread again and again.
        let console_is_printed = printer.is_done() && monitor.console_is_closed();
        let streams_are_printed = session.as_ref().is_none_or(|session| session.outputs_are_closed());
        if console_is_printed && streams_are_printed {
            return Ok(());
        }
        let stop_by = if forced { Some(forced_drain_by) } else { endpoint.stop_by.map(|by| by.max(forced_drain_by)) };
        let left = stop_by.map(|by| by.saturating_duration_since(Instant::now()));
        if is_cut || left.is_some_and(|left| left.is_zero()) {
            log::warn!("the last output of the machine is lost: it was not read");
            return Ok(());
        }
        let timeout_ms = left.map_or(-1, |left| left.as_millis().min(i32::MAX as u128 - 1) as i32 + 1);
        match epoll.wait(timeout_ms, &mut [EpollEvent::default(); 4]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error).context("wait for events"),
            _ => {}
        }
        while let Some(number) = signals.read().context("read a signal")? {
            is_cut |= signal::is_termination(number);
        }
        is_cut |= endpoint.answer_without_guest("the machine has exited, but its output has not been read yet");
    }
}
