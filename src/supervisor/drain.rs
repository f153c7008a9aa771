//! Drains the output after the machine has ended: buffered output is still written even if its reader is slow or
//! stopped. Signals and requests are handled meanwhile, so that the wait can be cut short.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use super::control::{self, Token};
use super::endpoint::ControlEndpoint;
use crate::console::hub::HubStream;
use crate::console::log::Log;
use crate::console::stream_log::Stream;
use crate::exit_latch::ExitReason;
use crate::guest::session::Session;
use crate::guest::signal;
use crate::machine::{Machine, release};
use crate::sandbox;
use crate::sys::SignalFd;
use crate::sys::event;

/// How long the remaining output may take after a forced end: enough for an active reader, and short for a waiting
/// user.
const FORCED_DRAIN_TIMEOUT: Duration = Duration::from_millis(500);

/// How long guest memory is kept for a fast exit. A slow reader may take hours, and the memory is free in that time.
const RELEASE_AFTER: Duration = Duration::from_millis(100);

/// The console thread, and an event signaled when everything is printed.
pub(super) struct Printer {
    thread: JoinHandle<()>,
    done: Arc<EventFd>,
}

impl Printer {
    /// Starts the thread. Output of the serial port goes to the log if there is one, otherwise to the hub in the
    /// background, or to standard output.
    pub(super) fn start(machine: &Machine, log: Option<Log>, endpoint: &ControlEndpoint) -> Result<Printer> {
        let (output, exit_latch) = (machine.console_output().clone(), machine.exit_latch().clone());
        let stdout = || io::stdout().as_fd().try_clone_to_owned().context("use standard output");
        let sink: Box<dyn Write + Send> = match (log, endpoint.hub()) {
            (Some(log), _) => Box::new(log),
            (None, Some(hub)) => Box::new(HubStream(hub.clone(), Stream::Output)),
            (None, None) => Box::new(File::from(stdout()?)),
        };
        let done = Arc::new(event::create().context("watch the console")?);
        let signal = done.clone();
        let print = move || {
            output.print_to(sink, || exit_latch.declare(ExitReason::Killed(libc::SIGPIPE)));
            let _ = signal.write(1);
        };
        let thread = sandbox::spawn("console", print).context("start the console thread")?;
        Ok(Printer { thread, done })
    }
}

/// Waits until all of the machine's output has been taken, or until a signal, a request or `reason` cuts the wait
/// short.
pub(super) fn print(
    printer: Printer,
    mut session: Option<&mut Session>,
    signals: &SignalFd,
    endpoint: &mut ControlEndpoint,
    reason: &ExitReason,
) -> Result<()> {
    let epoll = Epoll::new().context("epoll")?;
    control::watch(&epoll, printer.done.as_raw_fd(), Token::Exit)?;
    control::watch(&epoll, signals.as_raw_fd(), Token::Signal)?;
    control::watch(&epoll, endpoint.as_raw_fd(), Token::ControlEndpoint)?;
    if let Some(session) = &mut session {
        session.disconnect();
        control::watch(&epoll, session.as_raw_fd(), Token::Session)?;
    }
    let forced = matches!(reason, ExitReason::Killed(_) | ExitReason::Quit);
    let forced_drain_by = Instant::now() + FORCED_DRAIN_TIMEOUT;
    let mut release_at = Some(Instant::now() + RELEASE_AFTER);
    let mut is_cut = false;
    loop {
        let console_is_printed = printer.thread.is_finished() || printer.done.read().is_ok();
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
        let until_release = release_at.map(|at| at.saturating_duration_since(Instant::now()));
        if until_release.is_some_and(|left| left.is_zero()) {
            release::release();
            release_at = None;
        }
        let timeout = [left, until_release.filter(|left| !left.is_zero())].into_iter().flatten().min();
        let timeout_ms = timeout.map_or(-1, |left| left.as_millis().min(i32::MAX as u128 - 1) as i32 + 1);
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
