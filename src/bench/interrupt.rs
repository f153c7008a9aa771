//! Ctrl-C during a run: instances are stopped and everything is removed before husk exits.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result, bail};

use crate::guest::signal;
use crate::sys::SignalFd;

static SIGNALS: OnceLock<SignalFd> = OnceLock::new();
/// The first signal received, or 0.
static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// Blocks the signals until [`check`] reads them. Must be called before other threads start.
pub fn install() -> Result<()> {
    // SIGQUIT keeps its default action, so that a stuck run can still be aborted.
    let signals: Vec<i32> = signal::TERMINATION.into_iter().filter(|&number| number != libc::SIGQUIT).collect();
    let signals = SignalFd::block(&signals).context("block signals")?;
    let _ = SIGNALS.set(signals);
    Ok(())
}

/// A descriptor that is readable while a signal is pending. `None` before [`install`].
pub fn fd() -> Option<RawFd> {
    SIGNALS.get().map(SignalFd::as_raw_fd)
}

/// Fails once a signal was received, on any thread and every time. Never fails before [`install`].
pub fn check() -> Result<()> {
    if let Some(signal) = SIGNALS.get().and_then(|signals| signals.read().ok().flatten()) {
        RECEIVED.store(signal, Ordering::Relaxed);
    }
    match RECEIVED.load(Ordering::Relaxed) {
        0 => Ok(()),
        signal => bail!("interrupted by signal {signal}"),
    }
}
