//! Ctrl-C in the middle of a bench: instances are ended and everything is removed before the bench ends.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result, bail};

use crate::sys::SignalFd;

/// Signals that end a bench in order.
const END_SIGNALS: [i32; 3] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP];

static SIGNALS: OnceLock<SignalFd> = OnceLock::new();
/// The first that has come; 0 before.
static RECEIVED: AtomicI32 = AtomicI32::new(0);

/// Has the signals wait until [`check`] asks for them. To be called on the first thread, before another one starts.
pub fn install() -> Result<()> {
    let signals = SignalFd::block(&END_SIGNALS).context("have signals wait")?;
    let _ = SIGNALS.set(signals);
    Ok(())
}

/// Readable from when a signal has come until [`check`] has seen it. Before [`watch`] there is none.
pub fn fd() -> Option<RawFd> {
    SIGNALS.get().map(SignalFd::as_raw_fd)
}

/// Fails once a signal has come, on any thread and each time. Before [`watch`], none has.
pub fn check() -> Result<()> {
    if let Some(signal) = SIGNALS.get().and_then(|signals| signals.read().ok().flatten()) {
        RECEIVED.store(signal, Ordering::Relaxed);
    }
    match RECEIVED.load(Ordering::Relaxed) {
        0 => Ok(()),
        signal => bail!("interrupted by signal {signal}"),
    }
}
