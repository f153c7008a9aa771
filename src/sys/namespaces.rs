//! Namespaces of the calling thread or process.
#![allow(unsafe_code)]

use std::io;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Puts the calling thread into new namespaces (unshare(2)).
pub fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the table of descriptors stays shared, so that all of them keep their owners.
    Ok(unsafe { unshare_unsafe(flags & !UnshareFlags::FILES) }?)
}

/// Puts this process, which has a single thread, into new user, mount, IPC and UTS namespaces.
pub fn unshare_all() -> io::Result<()> {
    unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)
}
