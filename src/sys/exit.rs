//! Exits the process without waiting for the kernel to release its memory and files.
#![allow(unsafe_code)]

use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::{env, fs, io, process, ptr};

/// The stack size of [`wait_for_parent`].
const STACK_BYTES: usize = 16 << 10;
/// The inode of the host's PID namespace (PROC_PID_INIT_INO, linux/proc_ns.h).
const INITIAL_PID_NAMESPACE: u64 = 0xefff_fffc;
/// Programs that wait for orphaned processes if they are PID 1 of a container.
const INITS: [&str; 7] = ["systemd", "init", "tini", "docker-init", "podman-init", "catatonit", "dumb-init"];
const PAGE_BYTES: u64 = 4096;
/// More memory than this takes longer to release than what a fast exit saves.
const RESIDENT_MAX_BYTES: u64 = 1 << 30;

/// Exits with `code` before the kernel releases `kept` and this process's memory. Must be called on the first thread.
/// Other threads may exist if nobody waits for their work: they are killed.
///
/// The kernel reports the exit of a process when its memory and files are released, which takes milliseconds for a virtual
/// machine. A child that shares both (clone(2), CLONE_VM and CLONE_FILES) is the last to release them: it only waits for the
/// exit of this process, and is then killed. All files except `kept` are closed before, and the working directory is left,
/// so that no process that waits for a file to be closed or unlocked, or for a file system to be unused, waits for the child.
///
/// Without a reaper for the child, and with so much resident memory that its release takes long, this is a plain exit.
pub fn exit_before_release(code: i32, kept: RawFd) -> ! {
    if has_reaper() && is_small() && env::set_current_dir("/").is_ok() && close_all_but(kept).is_ok() {
        let _ = spawn_waiter();
    }
    process::exit(code)
}

/// Whether a process whose parent has exited is waited for: by the init of the host, or by a known init of a container. The
/// program of a container often is its init without being written for it, and would leave a zombie for each machine.
fn has_reaper() -> bool {
    let is_host = fs::metadata("/proc/self/ns/pid").is_ok_and(|namespace| namespace.ino() == INITIAL_PID_NAMESPACE);
    // Children of an init process are killed with it, and waited for.
    process::id() != 1 && (is_host || fs::read_to_string("/proc/1/comm").is_ok_and(|name| INITS.contains(&name.trim())))
}

/// Whether this process's memory is released quickly enough not to be missed by the next machine.
fn is_small() -> bool {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let resident_pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    resident_pages.is_some_and(|pages| pages * PAGE_BYTES <= RESIDENT_MAX_BYTES)
}

fn close_all_but(kept: RawFd) -> io::Result<()> {
    let kept = u32::try_from(kept).map_err(io::Error::other)?;
    let below = kept.checked_sub(1).map(|last| (0, last));
    for (first, last) in below.into_iter().chain([(kept + 1, u32::MAX)]) {
        // SAFETY: the caller is about to exit and uses no more descriptors. Other threads keep theirs, because this thread gets
        // a table of its own (CLOSE_RANGE_UNSHARE). The call accesses no memory.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_UNSHARE) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

fn spawn_waiter() -> io::Result<()> {
    let stack = Box::leak(vec![0_u8; STACK_BYTES].into_boxed_slice());
    let parent = process::id() as usize;
    // SAFETY: the stack grows down from its end, is aligned by the wrapper and never freed. The child shares this
    // process's memory, but runs only `wait_for_parent`, which makes system calls and uses nothing except its stack.
    let pid = unsafe {
        let top = stack.as_mut_ptr().add(STACK_BYTES).cast();
        libc::clone(wait_for_parent, top, libc::CLONE_VM | libc::CLONE_FILES, ptr::without_provenance_mut(parent))
    };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// The code of the child. The kernel kills it when the parent has released its memory and files.
extern "C" fn wait_for_parent(parent: *mut libc::c_void) -> libc::c_int {
    // SAFETY: none of these calls accesses memory; the last one does not return while the parent exists.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        while libc::getppid() as usize == parent.addr() {
            libc::pause();
        }
        libc::_exit(0)
    }
}
