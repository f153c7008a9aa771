//! What an instance is beside its work: there, idle, ticking.

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use std::os::fd::AsFd;

use crate::memory::PAGE_BYTES;
use crate::say;
use crate::sys::Pages;

/// Says that it is there, and ends.
pub fn hello(code: u8) -> u8 {
    say::line(format_args!("ready"));
    code
}

/// Sleeps until it is told to end, having used memory.
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

/// Says that it is still there, so often.
pub fn tick(interval_ms: u16) -> u8 {
    let ends = Ends::listen();
    say::line(format_args!("ready"));
    while !ends.wait(PollTimeout::from(interval_ms)) {
        say::line(format_args!("tick"));
    }
    0
}

/// The signals that end an instance. PID 1 of a container has to ask for them: it is spared those it does not.
pub struct Ends(Option<SignalFd>);

impl Ends {
    /// Listens from now on, and so do the threads that are started from now on.
    pub fn listen() -> Ends {
        let mut set = SigSet::empty();
        set.add(Signal::SIGTERM);
        set.add(Signal::SIGINT);
        let _ = set.thread_block();
        Ends(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).ok())
    }

    /// Whether one has come within the time.
    pub fn wait(&self, timeout: PollTimeout) -> bool {
        let Some(signals) = &self.0 else { return true };
        matches!(poll(&mut [PollFd::new(signals.as_fd(), PollFlags::POLLIN)], timeout), Ok(1))
    }
}
