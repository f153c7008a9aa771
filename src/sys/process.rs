//! Setup of a child process before it executes its program.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

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

fn check(result: isize) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
