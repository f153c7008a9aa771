//! The host memory that a guest's connections may use together: a budget, divided into shares.
//!
//! The first connections get large shares, since they are what a machine typically uses; further ones get small shares,
//! so that many work at the same time. A connection keeps its share until it is closed: nothing has to be reclaimed
//! from a guest.

use super::credit::BUFFER_BYTES;

/// The maximum number of connections, including those in their handshake. Together with a machine's other files they
/// fit into the usual limit of 1024.
pub const CONNECTIONS_MAX: usize = 512;
/// The number of connections with a large share.
const LARGE_MAX: usize = 24;
/// The kernel doubles the configured buffer size, and lets the last message exceed it, rounded up.
const KERNEL_FACTOR: u64 = 4;
/// Other state of a connection, here and in the kernel.
const RECORD_BYTES: u64 = 4 << 10;

/// The maximum memory that a guest can make all connections use, in bytes: data that their readers have not taken.
pub const BUDGET_BYTES: u64 = LARGE_MAX as u64 * Share::LARGE.bytes()
    + (CONNECTIONS_MAX - LARGE_MAX) as u64 * Share::SMALL.bytes()
    + CONNECTIONS_MAX as u64 * RECORD_BYTES;

/// The buffer space of one connection for the guest's data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// In this process: the guest's credit.
    pub backlog_bytes: u32,
    /// In the kernel: the stream's send buffer size.
    pub send_buffer_bytes: usize,
}

impl Share {
    /// The share of one of the first connections.
    pub const LARGE: Share = Share { backlog_bytes: BUFFER_BYTES, send_buffer_bytes: 64 << 10 };
    /// The share of a further connection.
    pub const SMALL: Share = Share { backlog_bytes: 8 << 10, send_buffer_bytes: 4 << 10 };

    /// The share of a new connection, given those of the `others`.
    pub fn beside(others: impl Iterator<Item = Share>) -> Share {
        let large = others.filter(|share| *share == Share::LARGE).count();
        if large < LARGE_MAX { Share::LARGE } else { Share::SMALL }
    }

    const fn bytes(self) -> u64 {
        self.backlog_bytes as u64 + KERNEL_FACTOR * self.send_buffer_bytes as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_that_come_and_go_stay_within_the_budget() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut shares: Vec<Share> = Vec::new();
        let (mut most, mut bias) = (0, 0);
        for step in 0..100_000 {
            // Phases in which there are more and more of them, and fewer and fewer.
            if step % 2000 == 0 {
                bias = random.u8(1..9);
            }
            if random.u8(..10) < bias && shares.len() < CONNECTIONS_MAX {
                shares.push(Share::beside(shares.iter().copied()));
            } else if !shares.is_empty() {
                shares.swap_remove(random.usize(..shares.len()));
            }
            let bytes: u64 = shares.iter().map(|share| share.bytes() + RECORD_BYTES).sum();
            assert!(bytes <= BUDGET_BYTES, "{} connections take {bytes} bytes", shares.len());
            most = most.max(bytes);
        }
        assert_eq!(most, BUDGET_BYTES, "the budget can be used");
    }
}
