//! Namespaces of the calling thread or process.
#![allow(unsafe_code)]

use std::fs;
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

/// The users that this process's user namespace has (user_namespaces(7)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Users(Vec<(u64, u64)>);

impl Users {
    /// All of the host's.
    const ALL: (u64, u64) = (0, 0xffff_ffff);

    /// Those of this process. If that is unknown, they are all of the host's.
    pub fn own() -> Users {
        fs::read_to_string("/proc/self/uid_map").map_or_else(|_| Users(vec![Users::ALL]), |map| Users::parse(&map))
    }

    fn parse(map: &str) -> Users {
        let range = |line: &str| {
            let numbers: Vec<u64> = line.split_whitespace().filter_map(|number| number.parse().ok()).collect();
            let [first, _, count] = numbers[..] else { return None };
            Some((first, count))
        };
        Users(map.lines().filter_map(range).collect())
    }

    /// Whether this user is one of them.
    pub fn contain(&self, uid: u32) -> bool {
        self.0.iter().any(|(first, count)| (*first..first.saturating_add(*count)).contains(&uid.into()))
    }

    /// Whether they are all of the host's, so that root is the host's root, unlike in a container or with rootless podman.
    pub fn are_all(&self) -> bool {
        self.0 == [Users::ALL]
    }
}

/// Whether this process is the host's root, and not only that of a user namespace.
pub fn is_hosts_root() -> bool {
    rustix::process::geteuid().is_root() && Users::own().are_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_root_of_a_user_namespace_is_not_the_hosts() {
        let host = Users::parse("         0          0 4294967295\n");
        assert!(host.are_all() && host.contain(2_000_000_000));
        let rootless = Users::parse("         0       1000          1\n         1     100000      65536\n");
        assert!(!rootless.are_all() && rootless.contain(0) && rootless.contain(65536) && !rootless.contain(65537));
        assert!(!Users::parse("").contain(0));
    }
}
