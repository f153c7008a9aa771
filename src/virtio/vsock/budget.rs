//! How much of the host's memory a guest's connections may hold together: one budget, of which each has a share.
//!
//! The first ones have large shares, for they are what a machine is used by; those beyond have small ones, so that many at
//! once work too. A share is a connection's own until it is closed: nothing has to be taken back from a guest.

use super::credit::BUFFER_BYTES;

/// Connections at once, those included that are about to become one. They fit beside a machine's other files into the usual
/// limit of 1024.
pub const CONNECTIONS_MAX: usize = 512;
/// Connections that have a large share at once.
const LARGE_MAX: usize = 24;
/// The kernel doubles what a socket's buffer is set to, and lets the last message be beyond it, rounded up.
const KERNEL_FACTOR: u64 = 4;
/// What else is known of a connection, here and in the kernel.
const RECORD_BYTES: u64 = 4 << 10;

/// The most that a guest can make all connections hold beside its memory, in bytes: data that their readers have not taken.
pub const BUDGET_BYTES: u64 = LARGE_MAX as u64 * Share::LARGE.bytes()
    + (CONNECTIONS_MAX - LARGE_MAX) as u64 * Share::SMALL.bytes()
    + CONNECTIONS_MAX as u64 * RECORD_BYTES;

/// What one connection may hold of the guest's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// In this process: as much credit as the guest has.
    pub backlog_bytes: u32,
    /// In the kernel: what its stream's send buffer is set to.
    pub send_buffer_bytes: usize,
}

impl Share {
    /// What one of the first has.
    pub const LARGE: Share = Share { backlog_bytes: BUFFER_BYTES, send_buffer_bytes: 64 << 10 };
    /// What one beyond them has.
    pub const SMALL: Share = Share { backlog_bytes: 8 << 10, send_buffer_bytes: 4 << 10 };

    /// The share of one that begins beside others.
    pub fn beside(others: impl Iterator<Item = Share>) -> Share {
        let large = others.filter(|share| *share == Share::LARGE).count();
        if large < LARGE_MAX { Share::LARGE } else { Share::SMALL }
    }

    const fn bytes(self) -> u64 {
        self.backlog_bytes as u64 + KERNEL_FACTOR * self.send_buffer_bytes as u64
    }
}
