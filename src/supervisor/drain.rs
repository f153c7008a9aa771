//! From a machine's end to the end of its output: what it printed is still printed, to a reader who may be slow, or asleep.
//! Signals and requests are served meanwhile, so that nobody is waited for longer than somebody wants.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_sys_util::epoll::{Epoll, EpollEvent};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::{self, Token};
use super::endpoint::ControlEndpoint;
use crate::console::hub::HubStream;
use crate::console::log::Log;
use crate::console::stream_log::Stream;
use crate::exit_latch::ExitReason;
use crate::guest::session::Session;
use crate::guest::signal;
use crate::machine::Machine;
use crate::sandbox;
use crate::sys::SignalFd;

/// How long a reader has for what is left, when a machine was ended by force: long for who reads, short for who waits.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// The console thread, and a word from it when it has printed all.
pub(super) struct Printer {
    thread: JoinHandle<()>,
    done: Arc<EventFd>,
}

impl Printer {
    /// Starts the thread. What the serial port prints goes to the log where there is one; else, in the background, to the hub,
    /// and to standard output where not.
    pub(super) fn start(machine: &Machine, log: Option<Log>, endpoint: &ControlEndpoint) -> Result<Printer> {
        let (output, exit_latch) = (machine.console_output().clone(), machine.exit_latch().clone());
        let stdout = || io::stdout().as_fd().try_clone_to_owned().context("use standard output");
        let sink: Box<dyn Write + Send> = match (log, endpoint.hub()) {
            (Some(log), _) => Box::new(log),
            (None, Some(hub)) => Box::new(HubStream(hub.clone(), Stream::Output)),
            (None, None) => Box::new(File::from(stdout()?)),
        };
        let done = Arc::new(EventFd::new(EFD_NONBLOCK).context("watch the console")?);
        let told = done.clone();
        let print = move || {
            output.print_to(sink, || exit_latch.declare(ExitReason::Killed(libc::SIGPIPE)));
            let _ = told.write(1);
        };
        let thread = sandbox::spawn("console", print).context("start the console thread")?;
        Ok(Printer { thread, done })
    }
}

/// Waits until all that the machine printed has been taken, but no longer than a signal, a request or `reason` lets it.
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
    let last_words_by = Instant::now() + LAST_WORDS;
    let mut is_cut = false;
    loop {
        let console_is_printed = printer.thread.is_finished() || printer.done.read().is_ok();
        let streams_are_printed = session.as_ref().is_none_or(|session| session.outputs_are_closed());
        if console_is_printed && streams_are_printed {
            return Ok(());
        }
        let stop_by = if forced { Some(last_words_by) } else { endpoint.stop_by.map(|by| by.max(last_words_by)) };
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
            is_cut |= signal::asks_for_end(number);
        }
        is_cut |= endpoint.answer_without_guest("the machine has exited, but its output has not been read yet");
    }
}
