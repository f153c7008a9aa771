//! From the end of a machine to the release of what the kernel takes longest to release, which is the process's last
//! act.

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};

use crate::kvm::Vm;
use crate::sys::exit::exit_before_release;

/// The virtual machine that outlives its [`Machine`](super::Machine): with its descriptor closed and its memory
/// unmapped, KVM would take it down at once, and the caller would wait.
static POSTPONED: Mutex<Option<Arc<Vm>>> = Mutex::new(None);

/// Keeps `vm` until [`release`] or [`exit`]. One that was kept before is released.
pub(super) fn postpone(vm: Arc<Vm>) {
    drop(POSTPONED.lock().unwrap_or_else(PoisonError::into_inner).replace(vm));
}

/// Releases what is kept, because another machine is to run in this process.
pub fn release() {
    drop(POSTPONED.lock().unwrap_or_else(PoisonError::into_inner).take());
}

/// Exits with `code`. If a machine has run, the kernel releases its virtual machine after that. Must be called when no
/// other thread is left.
pub fn exit(code: u8) -> ! {
    let kept = POSTPONED.lock().unwrap_or_else(PoisonError::into_inner).take();
    let Some(vm) = kept else { std::process::exit(code.into()) };
    let _ = std::io::stdout().flush();
    exit_before_release(code.into(), vm.as_raw_fd())
}
