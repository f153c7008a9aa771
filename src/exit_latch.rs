//! Why a machine exits, and the latch that keeps the first reason declared.

use std::fmt;
use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::sys::event;
use vmm_sys_util::eventfd::EventFd;

/// Why a machine exited.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ExitReason {
    /// The guest entered sleep state S5.
    PoweredOff,
    /// The guest reset itself.
    Reset,
    /// The guest wrote this status to the exit port.
    Reported(u8),
    /// The guest's kernel panicked; its message, if seen on the console.
    Panicked(Option<String>),
    /// A vCPU took an exception that the guest could not handle.
    TripleFault {
        /// Which vCPU.
        vcpu: u32,
        /// The instruction pointer, if the processor preserves it.
        rip: Option<u64>,
    },
    /// KVM cannot continue a vCPU.
    KvmError {
        /// Which vCPU.
        vcpu: u32,
        /// KVM's error and its location.
        reason: String,
    },
    /// The guest's init violated the protocol.
    SessionLost(String),
    /// A signal to husk ended it.
    Killed(i32),
    /// The user ended it on the terminal.
    Quit,
    /// It was saved, to be continued later.
    Saved,
    /// The monitor process made a system call that it does not need: it has been taken over, or has a defect.
    Violation {
        /// The thread.
        thread: String,
        /// The number of the call.
        call: u32,
    },
    /// Something that the monitor process needs has failed, and it has exited.
    MonitorFailed(String),
    /// Standard output cannot be written, although it has a reader.
    OutputFailed(String),
    /// The monitor process died, and how.
    MonitorDied {
        /// The signal that killed it, if one did.
        signal: Option<i32>,
    },
}

impl ExitReason {
    /// The reason to exit after output could not be written.
    pub fn of_failed_output(error: &io::Error) -> ExitReason {
        match error.kind() {
            io::ErrorKind::BrokenPipe => ExitReason::Killed(libc::SIGPIPE),
            _ => ExitReason::OutputFailed(error.to_string()),
        }
    }
}

impl fmt::Display for ExitReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ExitReason::PoweredOff => write!(f, "the guest powered off"),
            ExitReason::Reset => write!(f, "the guest reset itself"),
            ExitReason::Reported(code) => write!(f, "the guest reported exit status {code}"),
            ExitReason::Panicked(None) => write!(f, "the guest kernel panicked"),
            ExitReason::Panicked(Some(words)) => write!(f, "the guest kernel panicked: {words}"),
            ExitReason::TripleFault { vcpu, rip: Some(rip) } => write!(f, "triple fault on vCPU {vcpu} at {rip:#x}"),
            ExitReason::TripleFault { vcpu, rip: None } => write!(f, "triple fault on vCPU {vcpu}"),
            ExitReason::KvmError { vcpu, reason } => write!(f, "KVM failed to run vCPU {vcpu}: {reason}"),
            ExitReason::SessionLost(reason) => write!(f, "lost the connection to the guest's init: {reason}"),
            ExitReason::Killed(signal) => write!(f, "terminated by signal {signal}"),
            ExitReason::Saved => write!(f, "the machine was saved and ended"),
            ExitReason::Quit => write!(f, "quit from the terminal"),
            ExitReason::Violation { thread, call } => write!(
                f,
                "the sandbox stopped system call {call} of the monitor's thread {thread}: the guest may have attacked husk"
            ),
            ExitReason::MonitorFailed(reason) => write!(f, "the monitor process failed: {reason}"),
            ExitReason::OutputFailed(reason) => write!(f, "the machine's output cannot be written: {reason}"),
            ExitReason::MonitorDied { signal: Some(signal) } => {
                write!(f, "the monitor process was killed by signal {signal}")
            }
            ExitReason::MonitorDied { signal: None } => write!(f, "the monitor process exited unexpectedly"),
        }
    }
}

/// What is known about a kernel panic in the guest.
#[derive(Default)]
struct Panic {
    words: Option<String>,
    panicked_at: Option<Instant>,
}

/// Where vCPUs and devices declare that the machine must exit. The first reason counts; [`ExitLatch::event`] wakes the
/// thread that waits for it.
pub struct ExitLatch {
    /// Lock-free: vCPUs check it before each entry to the guest.
    reason: OnceLock<ExitReason>,
    panic: Mutex<Panic>,
    event: EventFd,
}

impl ExitLatch {
    /// Creates a latch without a reason.
    pub fn new() -> io::Result<ExitLatch> {
        Ok(ExitLatch { reason: OnceLock::new(), panic: Mutex::default(), event: event::create()? })
    }

    /// Declares that the machine must exit for `reason`. Only the first call counts. May be called on any thread.
    ///
    /// A reset or a triple fault after a kernel panic is a consequence of the panic and is reported as such.
    pub fn declare(&self, reason: ExitReason) {
        let mut panic = self.lock();
        if self.is_declared() {
            return;
        }
        let panicked = panic.panicked_at.is_some() || panic.words.is_some();
        let reason = match reason {
            ExitReason::Reset | ExitReason::TripleFault { .. } if panicked => ExitReason::Panicked(panic.words.take()),
            other => other,
        };
        // Under the lock, so that it is the first.
        let _ = self.reason.set(reason);
        drop(panic);
        self.wake();
    }

    /// Notes that the guest's kernel reported a panic (pvpanic). It may still print and reset by itself. Any thread.
    pub fn note_panic(&self) {
        self.lock().panicked_at.get_or_insert_with(Instant::now);
        self.wake();
    }

    /// Notes a panic message seen on the console. It counts only if the machine then resets. Any thread.
    pub fn note_panic_words(&self, words: String) {
        self.lock().words.get_or_insert(words);
    }

    /// Whether a reason was declared.
    pub fn is_declared(&self) -> bool {
        self.reason.get().is_some()
    }

    /// The reason, once one is declared.
    pub fn reason(&self) -> Option<ExitReason> {
        self.reason.get().cloned()
    }

    /// When the guest's kernel reported a panic, if it did.
    pub fn panicked_at(&self) -> Option<Instant> {
        self.lock().panicked_at
    }

    /// Ends a machine whose kernel panicked but did not reset.
    pub fn give_up_on_panic(&self) {
        let words = self.lock().words.take();
        self.declare(ExitReason::Panicked(words));
    }

    /// Readable after every notification; read it before checking the state.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    fn wake(&self) {
        // A full counter has already woken the reader.
        let _ = self.event.write(1);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Panic> {
        self.panic.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_counts() {
        let exit_latch = ExitLatch::new().unwrap();
        exit_latch.declare(ExitReason::Reported(3));
        exit_latch.declare(ExitReason::PoweredOff);
        assert_eq!(exit_latch.reason(), Some(ExitReason::Reported(3)));
    }

    #[test]
    fn a_reset_after_a_panic_is_reported_as_the_panic() {
        let exit_latch = ExitLatch::new().unwrap();
        exit_latch.note_panic_words("VFS: no root".into());
        exit_latch.declare(ExitReason::Reset);
        assert_eq!(exit_latch.reason(), Some(ExitReason::Panicked(Some("VFS: no root".into()))));
    }

    #[test]
    fn a_power_off_is_not_a_panic_whatever_is_on_the_console() {
        let exit_latch = ExitLatch::new().unwrap();
        exit_latch.note_panic_words("quoted by a program".into());
        exit_latch.declare(ExitReason::PoweredOff);
        assert_eq!(exit_latch.reason(), Some(ExitReason::PoweredOff));
    }
}
