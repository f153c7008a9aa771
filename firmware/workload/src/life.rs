//! Instances without tasks: hello, idle and tick.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::AsFd;

use crate::memory::PAGE_BYTES;
use crate::say;
use crate::sys::Pages;

/// Reports that it is running, and exits.
pub fn hello(code: u8) -> u8 {
    say::line(format_args!("ready"));
    code
}

/// Touches memory, and sleeps until it is terminated.
pub fn idle(touch_mib: usize) -> u8 {
    let ends = Ends::listen();
    if touch_mib > 0 {
        match Pages::map(touch_mib << 20) {
            Ok(mut pages) => pages.chunks_mut(PAGE_BYTES).for_each(|page| page.fill(1)),
            Err(error) => {
                say::line(format_args!("fail idle map {touch_mib} MiB: {error}"));
                return 1;
            }
        }
    }
    say::line(format_args!("ready"));
    ends.wait(PollTimeout::NONE);
    0
}

/// Reports periodically that it is running.
pub fn tick(interval_ms: u16) -> u8 {
    let ends = Ends::listen();
    say::line(format_args!("ready"));
    while !ends.wait(PollTimeout::from(interval_ms)) {
        say::line(format_args!("tick"));
    }
    0
}

/// The signals that terminate an instance. PID 1 of a container must handle them explicitly, since their default
/// actions do not apply to it.
pub struct Ends(Option<SignalFd>);

impl Ends {
    /// Blocks the signals, also in threads that are started later.
    pub fn listen() -> Ends {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        let _ = set.thread_block();
        Ends(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).ok())
    }

    /// Whether a signal arrived within the timeout.
    pub fn wait(&self, timeout: PollTimeout) -> bool {
        let Some(signals) = &self.0 else { return true };
        matches!(poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], timeout), Ok(1))
    }
}
