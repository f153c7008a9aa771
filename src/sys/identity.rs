//! The identity with which the calling thread accesses files (setfsuid(2)), which the C library would change for others too.
#![allow(unsafe_code)]

/// Sets the user of the calling thread for access to files. Returns whether that was allowed.
pub fn set_fs_uid(uid: u32) -> bool {
    const NO_CHANGE: u32 = u32::MAX;
    // SAFETY: the calls change a property of this thread, and access no memory. The second one only returns it.
    let now = unsafe {
        libc::syscall(libc::SYS_setfsuid, uid);
        libc::syscall(libc::SYS_setfsuid, NO_CHANGE)
    };
    now as u32 == uid
}

/// The same for the group.
pub fn set_fs_gid(gid: u32) -> bool {
    const NO_CHANGE: u32 = u32::MAX;
    // SAFETY: as above.
    let now = unsafe {
        libc::syscall(libc::SYS_setfsgid, gid);
        libc::syscall(libc::SYS_setfsgid, NO_CHANGE)
    };
    now as u32 == gid
}
