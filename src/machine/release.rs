//! Postpones the release of a machine's virtual machine until the process has reported its exit.
//!
//! Closing the KVM descriptor and unmapping guest memory take the kernel several milliseconds, for which callers should
//! not have to wait.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::kvm::Vm;
use crate::sys::exit::exit_before_release;

/// A virtual machine that outlives its [`Machine`](super::Machine): otherwise KVM would destroy it immediately, and the
/// caller would have to wait.
static POSTPONED: Mutex<Option<Arc<Vm>>> = Mutex::new(None);

/// Keeps `vm` until [`release`] or [`exit`], and releases the previous one, if any.
pub(super) fn postpone(vm: Arc<Vm>) {
    drop(POSTPONED.lock().unwrap_or_else(PoisonError::into_inner).replace(vm));
}

/// Releases the postponed virtual machine now, because this process runs another one or waits for something else.
pub fn release() {
    drop(POSTPONED.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// Exits with `code`. If a machine has run, the kernel releases its virtual machine afterwards. Must be called on the
/// first thread; other threads are killed.
pub fn exit(code: u8) -> ! {
    let kept = POSTPONED.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(vm) = kept else { std::process::exit(code.into()) };
    let _ = std::io::stdout().flush();
    exit_before_release(code.into(), vm.as_raw_fd())
}
