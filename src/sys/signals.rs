//! Signals that are blocked until they are read.
#![allow(unsafe_code)]

use std::mem::MaybeUninit;

/// Whether a blocked signal is pending for this thread or the process (sigpending(2)).
pub fn is_any_pending() -> bool {
    let mut pending = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: the kernel writes the set, which is read only if that succeeded.
    let signals = unsafe { (libc::sigpending(pending.as_mut_ptr()) == 0).then(|| pending.assume_init()) };
    let Some(signals) = signals else { return false };
    // SAFETY: the set is initialized, and the numbers are those of signals.
    (1..=libc::SIGRTMAX()).any(|signal| unsafe { libc::sigismember(&raw const signals, signal) } == 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::SignalFd;

    #[test]
    fn a_blocked_signal_is_pending_until_it_is_read() {
        // Signals to a thread of its own, since other tests share the process.
        let of_thread = || {
            let signals = SignalFd::block(&[libc::SIGURG]).unwrap();
            assert!(!is_any_pending());
            // SAFETY: raise sends the signal to this thread, which blocks it.
            unsafe { libc::raise(libc::SIGURG) };
            assert!(is_any_pending());
            assert!(signals.read().unwrap().is_some());
            assert!(!is_any_pending());
        };
        std::thread::spawn(of_thread).join().unwrap();
    }
}
