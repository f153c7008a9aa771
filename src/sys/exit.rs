//! Exits the process without waiting for the kernel to release its memory and files.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::RawFd;
use std::process;
use std::ptr;

/// The stack size of [`wait_for_parent`].
const STACK_BYTES: usize = 16 << 10;

/// Exits with `code` before the kernel releases `kept` and this process's memory. Must be called when all other
/// threads have ended.
///
/// The kernel reports a process's exit only when it has released its memory and its files, which takes it some milliseconds
/// for a virtual machine. A child that shares both (clone(2), CLONE_VM and CLONE_FILES) is the last to release them: it
/// does nothing but wait for the end of this process, and is then killed. All files except `kept` are closed before, so that
/// processes that wait for one to be closed or unlocked do not wait for the child.
pub fn exit_before_release(code: i32, kept: RawFd) -> ! {
    // A child of an init process would be killed with it, and waited for.
    if process::id() != 1 && close_all_but(kept).is_ok() {
        let _ = spawn_waiter();
    }
    process::exit(code)
}

fn close_all_but(kept: RawFd) -> io::Result<()> {
    let kept = u32::try_from(kept).map_err(io::Error::other)?;
    let below = kept.checked_sub(1).map(|last| (0, last));
    for (first, last) in below.into_iter().chain([(kept + 1, u32::MAX)]) {
        // SAFETY: the caller is about to exit and uses no more descriptors; the call accesses no memory.
        if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
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
