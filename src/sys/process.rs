//! What a process does to itself between its start and its program's.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Has the process enter control groups, by the open `cgroup.procs` of each, and then take `root` as its root directory.
pub fn begin_in(command: &mut Command, groups: Vec<File>, root: Option<&Path>) -> io::Result<()> {
    let root = root.map(|root| CString::new(root.as_os_str().as_bytes())).transpose()?;
    let begin = move || {
        for group in &groups {
            // SAFETY: the descriptor is open as long as its file is, and the one byte is a constant's.
            check(unsafe { libc::write(group.as_raw_fd(), b"0".as_ptr().cast(), 1) })?;
        }
        if let Some(root) = &root {
            // SAFETY: both paths end with a NUL and are only read.
            check(unsafe { libc::chroot(root.as_ptr()) } as isize)?;
            // SAFETY: as above.
            check(unsafe { libc::chdir(c"/".as_ptr()) } as isize)?;
        }
        Ok(())
    };
    // SAFETY: it runs in the child of a fork that may have other threads' locks in it: it takes none and allocates nothing.
    unsafe { command.pre_exec(begin) };
    Ok(())
}

fn check(result: isize) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
