//! From a device's request to the host's disk: back ends that are shaped by their completions.

use std::io;
use std::os::fd::BorrowedFd;

use crate::memory::GuestBuffers;

mod blocking;
mod plain;
mod qcow2;

pub use blocking::{Blocking, BlockingDisk};
pub use plain::PlainDisk;
pub use qcow2::{Qcow2Disk, Refusal};

/// The unit in which the size of a disk, and each position and length on it, is told to a guest, whatever the disk's own blocks
/// are (virtio 1.2 §5.2.4).
pub const SECTOR_BYTES: u64 = 512;

/// What a request asks of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Fill all of the buffers from the disk.
    Read,
    /// Write all of the buffers to the disk.
    Write,
    /// Make everything that was completed before durable.
    Flush,
    /// These bytes are not needed any more.
    Discard {
        /// How many they are.
        len_bytes: u64,
    },
    /// These bytes are to read as zeroes.
    WriteZeroes {
        /// How many they are.
        len_bytes: u64,
        /// Whether their space may be given back.
        unmap: bool,
    },
}

/// One request. It owns its buffers, so that guest memory stays mapped for as long as the request is in flight.
#[derive(Debug)]
pub struct Request {
    /// The submitter's own name for it, which a back end only hands back.
    pub token: usize,
    /// What to do.
    pub operation: Operation,
    /// Where on the disk. The submitter has checked that all of it lies on the disk.
    pub offset_bytes: u64,
    /// The guest's memory to read into or to write from.
    pub buffers: GuestBuffers,
}

/// A request that is done, with its buffers to be used again.
#[derive(Debug)]
pub struct Completion {
    /// The request as it was submitted; its buffers may be used up.
    pub request: Request,
    /// Whether all of it was done. After an error any part of it may have been.
    pub result: io::Result<()>,
}

/// Zeroes to write where nothing better is to be had.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Has `write` write zeroes, given with the place that they go to, over `len_bytes` from `offset_bytes` on.
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

/// A disk of the host, used from one thread at a time.
pub trait DiskBackend: Send {
    /// Takes a request. It is under way, or done, when [`DiskBackend::reap`] is next called at the latest.
    fn submit(&mut self, request: Request);

    /// One request that is done, in any order; `None` when there is none for now.
    fn reap(&mut self) -> Option<Completion>;

    /// What becomes readable when a request is done, for a back end where that happens later than in `submit`. It is
    /// watched edge-triggered: [`DiskBackend::reap`] is called until it returns `None`.
    fn completion_fd(&self) -> Option<BorrowedFd<'_>>;

    /// Waits until every submitted request can be reaped.
    fn drain(&mut self);
}
