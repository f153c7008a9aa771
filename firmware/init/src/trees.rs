//! Copies of mounts that are attached elsewhere (open_tree(2), move_mount(2), mount_setattr(2)), each call as a safe function.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::mount::MsFlags;

const OPEN_TREE_CLONE: u32 = 1;
const OPEN_TREE_CLOEXEC: u32 = libc::O_CLOEXEC as u32;
const MOVE_MOUNT_F_EMPTY_PATH: u32 = 4;
/// Flags of mount(2), and the attributes of mount_setattr(2) that say the same.
const ATTRIBUTES: [(MsFlags, u64); 4] = [
    (MsFlags::MS_RDONLY, libc::MOUNT_ATTR_RDONLY),
    (MsFlags::MS_NOSUID, libc::MOUNT_ATTR_NOSUID),
    (MsFlags::MS_NODEV, libc::MOUNT_ATTR_NODEV),
    (MsFlags::MS_NOEXEC, libc::MOUNT_ATTR_NOEXEC),
];

/// A copy of what is mounted at `path`, or of the file there, with all that is mounted in it if it `is_recursive`.
pub fn copy(path: &Path, is_recursive: bool) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let recursive = if is_recursive { libc::AT_RECURSIVE as u32 } else { 0 };
    let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive;
    // SAFETY: the path is a string that ends with a NUL.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Mounts a copy at `target`.
pub fn attach(tree: BorrowedFd, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes())?;
    let (from, empty) = (tree.as_raw_fd(), c"".as_ptr());
    // SAFETY: both paths are strings that end with a NUL.
    let result = unsafe {
        libc::syscall(libc::SYS_move_mount, from, empty, libc::AT_FDCWD, target.as_ptr(), MOVE_MOUNT_F_EMPTY_PATH)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Adds to a copy what `flags` restrict.
pub fn restrict(tree: BorrowedFd, flags: MsFlags, is_recursive: bool) -> io::Result<()> {
    let has = |flag: &MsFlags| flags.contains(*flag);
    let attr_set = ATTRIBUTES.iter().filter(|(flag, _)| has(flag)).fold(0, |all, (_, attribute)| all | attribute);
    if attr_set == 0 {
        return Ok(());
    }
    let attributes = libc::mount_attr { attr_set, attr_clr: 0, propagation: 0, userns_fd: 0 };
    let recursive = if is_recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a string that ends with a NUL, and the size is that of the attributes, which are only read.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
