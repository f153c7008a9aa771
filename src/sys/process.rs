//! Setup of a child process before it executes its program, and what it takes over from its parent.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::process::Pid;

/// Makes the process enter cgroups through their open `cgroup.procs` files, and then change its root directory to
/// `root`.
pub fn begin_in(command: &mut Command, groups: Vec<File>, root: Option<&Path>) -> io::Result<()> {
    let root = root.map(|root| CString::new(root.as_os_str().as_bytes())).transpose()?;
    let begin = move || {
        for group in &groups {
            // SAFETY: the descriptor is open as long as its file, and the byte is a constant.
            check(unsafe { libc::write(group.as_raw_fd(), b"0".as_ptr().cast(), 1) })?;
        }
        if let Some(root) = &root {
            // SAFETY: both paths are NUL-terminated and only read.
            check(unsafe { libc::chroot(root.as_ptr()) } as isize)?;
            // SAFETY: as above.
            check(unsafe { libc::chdir(c"/".as_ptr()) } as isize)?;
        }
        Ok(())
    };
    // SAFETY: it runs in the child of a fork, which may have inherited locks of other threads: it takes none and does
    // not allocate.
    unsafe { command.pre_exec(begin) };
    Ok(())
}

/// Gives the process all signals as if nobody had blocked or ignored any.
pub fn reset_signals(command: &mut Command) {
    let reset = || {
        for signal in 1..=libc::SIGRTMAX() {
            // SAFETY: the call accesses no memory. It fails for those that cannot be changed.
            let _ = unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        let mut none = std::mem::MaybeUninit::uninit();
        // SAFETY: the set is initialised by the first call, and only read by the second.
        let unblocked = unsafe {
            libc::sigemptyset(none.as_mut_ptr());
            libc::sigprocmask(libc::SIG_SETMASK, none.as_ptr(), std::ptr::null_mut())
        };
        check(unblocked as isize)
    };
    // SAFETY: it runs in the child of a fork, which may have inherited locks of other threads: it takes none and does
    // not allocate.
    unsafe { command.pre_exec(reset) };
}

/// Keeps all descriptors but the standard streams from programs that this process executes: those that it was started with may be
/// another program's. Does nothing on a kernel without this call (Linux 5.11).
pub fn keep_descriptors() {
    // SAFETY: the call changes flags of descriptors, and accesses no memory.
    let _ = unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
}

/// kill(2) with any signal, including real-time signals. Does nothing if there is no such process.
pub fn send_signal(process: Pid, signal: i32) {
    // SAFETY: the call accesses no memory.
    let _ = unsafe { libc::kill(process.as_raw_nonzero().get(), signal) };
}

/// The same for a process that was opened: no other one can get it (pidfd_send_signal(2)).
pub fn signal_opened(process: impl AsFd, signal: i32) -> io::Result<()> {
    let fd = process.as_fd().as_raw_fd();
    // SAFETY: without information about the signal, the call accesses no memory.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<libc::siginfo_t>(), 0) }
        as isize)
    .map(drop)
}

/// Takes over the descriptor `number` that this process was started with for that purpose. To be called once for each, before
/// anything else opens files.
pub fn take_descriptor(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the call accesses no memory.
    check(unsafe { libc::fcntl(number, libc::F_GETFD) } as isize)?;
    // SAFETY: it is open, since this process started, and nothing else knows of it.
    let taken = unsafe { OwnedFd::from_raw_fd(number) };
    rustix::io::fcntl_setfd(&taken, rustix::io::FdFlags::CLOEXEC)?;
    Ok(taken)
}

fn check(result: isize) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
