//! Flags of mounts (mount_setattr(2)).
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// What no mount of a share allows: devices, set-user-ID bits and execution.
const RESTRICTIONS: u64 = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;

/// Takes from the mount `root`, and from all below it, devices, set-user-ID bits and execution; and writing, if `readonly`. The
/// mount must be this process's own. Does nothing on a kernel without this call (Linux 5.12).
pub fn restrict(root: impl AsFd, readonly: bool) -> io::Result<()> {
    let readonly = if readonly { libc::MOUNT_ATTR_RDONLY } else { 0 };
    match set(root, RESTRICTIONS | readonly, 0, libc::AT_RECURSIVE) {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        set => set,
    }
}

/// Makes the mount `root` read-only, but not those below it.
pub fn make_readonly(root: impl AsFd) -> io::Result<()> {
    set(root, libc::MOUNT_ATTR_RDONLY, 0, 0)
}

/// Separates the mount `root`, and all below it, from those that they are copies of: neither receives what is mounted in the other.
pub fn make_private(root: impl AsFd) -> io::Result<()> {
    set(root, 0, libc::MS_PRIVATE, libc::AT_RECURSIVE)
}

fn set(root: impl AsFd, attr_set: u64, propagation: u64, flags: libc::c_int) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: the path is a string that ends with a NUL, and the size is that of the attributes, which are only read.
    let status = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            root.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if status < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
