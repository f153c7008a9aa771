//! Disk back ends on the host. The interface is asynchronous: requests are submitted and completions reaped.

use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::GuestBuffers;

mod blocking;
mod direct;
mod loss;
mod plain;
mod qcow2;
#[cfg(test)]
mod tests;
mod uring;

pub use blocking::{Blocking, BlockingDisk};
pub use direct::{Alignment, BOUNCE_BYTES};
pub use plain::PlainDisk;
pub use qcow2::{Backing, Qcow2Disk, Refusal};
pub use uring::{Shortcuts, UringDisk};

/// The unit of a disk's capacity, positions and lengths in virtio, regardless of its block size (virtio 1.2 §5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// A disk operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill all of the buffers from the disk.
    Read,
    /// Write all of the buffers to the disk.
    Write,
    /// Make everything that was completed before durable.
    Flush,
    /// Discard this range, whose content is no longer needed.
    Discard {
        /// The length.
        len_bytes: u64,
    },
    /// Make this range read as zeroes.
    WriteZeroes {
        /// The length.
        len_bytes: u64,
        /// Whether its space may be deallocated.
        unmap: bool,
    },
}

/// A request. It owns its buffers, so that guest memory stays mapped while it is in flight.
#[derive(Debug)]
pub struct Request {
    /// Identifies the request to its submitter; the back end only returns it.
    pub token: usize,
    /// The operation.
    pub operation: Operation,
    /// The position of the buffers. The submitter has validated that the range is within the disk.
    pub offset_bytes: u64,
    /// The guest's buffers.
    pub buffers: GuestBuffers,
}

impl Request {
    /// Consumes the first `count` bytes of the buffers after they have been transferred.
    fn advance(&mut self, count: usize) {
        self.buffers.advance(count);
        self.offset_bytes += count as u64;
    }
}

/// A completed request, whose buffers can be reused.
#[derive(Debug)]
pub struct Completion {
    /// The request as submitted; its buffers may have been consumed, which moves its position.
    pub request: Request,
    /// The result. After an error the request may have been executed in part.
    pub result: io::Result<()>,
}

/// Memory that direct I/O accepts.
#[repr(align(4096))]
struct Aligned([u8; 64 << 10]);

/// Zeroes to be written where the host has no better method.
static ZEROES: &[u8; 64 << 10] = &Aligned([0; 64 << 10]).0;

/// Calls `write` with zeroes and their offset, until `len_bytes` from `offset_bytes` are covered.
fn write_zeroes_out(
    offset_bytes: u64,
    len_bytes: u64,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut done = 0;
    while done < len_bytes {
        let len = (len_bytes - done).min(ZEROES.len() as u64);
        write(&ZEROES[..len as usize], offset_bytes + done)?;
        done += len;
    }
    Ok(())
}

/// A disk of the host, used by one thread at a time.
pub trait DiskBackend: Send {
    /// Submits a request, which is started at the latest by the next call of [`DiskBackend::kick`].
    fn submit(&mut self, request: Request);

    /// Starts all submitted requests. Called once for each batch.
    fn kick(&mut self) {}

    /// Returns a completed request, in any order; `None` if there is none now.
    fn reap(&mut self) -> Option<Completion>;

    /// Becomes readable when a request completes, for back ends where that is not within `submit`. Watched
    /// edge-triggered: [`DiskBackend::reap`] must be called until it returns `None`.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Starts all submitted requests and waits until they can be reaped.
    fn drain(&mut self);

    /// Writes to the file of the disk what only this back end knows, such as tables. Called when nothing is in flight.
    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }
}
