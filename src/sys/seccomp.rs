//! Installs system call filters.
#![allow(unsafe_code)]

use std::io;

/// Installs `filter` on the calling thread (seccomp(2)), which has PR_SET_NO_NEW_PRIVS. It can not be removed.
pub fn install(filter: &[libc::sock_filter]) -> io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: the kernel copies the instructions, whose number is that of the slice, and validates them.
    match unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
