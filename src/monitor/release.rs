//! The end of monitor processes: closing the KVM descriptor and unmapping guest memory take the kernel several milliseconds,
//! for which callers should not have to wait. A supervisor therefore exits before its monitor does.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::{Mutex, PoisonError};

use rustix::process::WaitStatus;

use crate::sys::fork;

/// The inode of the host's PID namespace (PROC_PID_INIT_INO, linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;
/// Programs that wait for orphaned processes if they are PID 1 of a container.
const INITS: [&str; 7] = ["systemd", "init", "tini", "docker-init", "podman-init", "catatonit", "dumb-init"];
const PAGE_BYTES: u64 = 4096;
/// More memory than this takes longer to release than what a fast exit saves, and the next machine may need it.
const RESIDENT_MAX_BYTES: u64 = 1 << 30;

/// The last monitor that was started and has not been waited for.
static MONITOR: Mutex<Option<u32>> = Mutex::new(None);

/// Notes that monitor `pid` was started.
pub(super) fn started(pid: u32) {
    await_exit();
    *MONITOR.lock().unwrap_or_else(PoisonError::into_inner) = Some(pid);
}

/// Kills monitor `pid`, if it has not been waited for.
pub(super) fn kill(pid: u32) {
    let monitor = MONITOR.lock().unwrap_or_else(PoisonError::into_inner);
    if *monitor == Some(pid) {
        fork::kill(pid);
    }
}

/// Waits for the exit of monitor `pid`. `None` if it has been waited for before.
pub(super) fn reap(pid: u32) -> Option<WaitStatus> {
    let mut monitor = MONITOR.lock().unwrap_or_else(PoisonError::into_inner);
    monitor.take_if(|monitor| *monitor == pid)?;
    fork::wait(pid)
}

/// Waits until the monitor has released its machine, because this process runs another one or waits for something else.
pub fn await_exit() {
    let monitor = *MONITOR.lock().unwrap_or_else(PoisonError::into_inner);
    monitor.map(reap);
}

/// Exits with `code`. If a machine has run, its monitor may still be releasing it, and exits after this process. Waits for it
/// where nobody else would, or if it has much memory.
pub fn exit(code: u8) -> ! {
    let monitor = *MONITOR.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(pid) = monitor
        && !(has_reaper() && is_small(pid))
    {
        reap(pid);
    }
    std::process::exit(code.into())
}

/// Whether a process whose parent has exited is waited for: by the init of the host, or by a known init of a container. The
/// program of a container often is its init without being written for it, and would leave a zombie for each machine.
fn has_reaper() -> bool {
    let is_host = fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == INITIAL_PID_NAMESPACE);
    // Children of an init process are killed with it, and waited for.
    std::process::id() != 1
        && (is_host || fs::read_to_string("/proc/1/comm").is_ok_and(|name| INITS.contains(&name.trim())))
}

/// Whether the memory of process `pid` is released quickly enough not to be missed by the next machine.
fn is_small(pid: u32) -> bool {
    let statm = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let resident_pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    resident_pages.is_some_and(|pages| pages * PAGE_BYTES <= RESIDENT_MAX_BYTES)
}
