//! Asynchronous file operations (io_uring(7)).
//!
//! System calls: io_uring_setup, io_uring_register (IORING_REGISTER_PROBE, IORING_REGISTER_EVENTFD,
//! IORING_REGISTER_IOWQ_MAX_WORKERS), io_uring_enter, mmap and munmap.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::{IoUring, Probe, cqueue, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::IoVecs;

/// The operations in use: all of them are in Linux 5.6.
const OPCODES: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];
/// The maximum number of kernel threads for operations that block.
const KERNEL_THREADS_MAX: u32 = 8;
/// How long to wait for memory of the kernel.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// A file operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// preadv(2) into the buffers.
    Read,
    /// pwritev(2) of the buffers.
    Write,
    /// fdatasync(2).
    SyncData,
    /// fallocate(2) with FALLOC_FL_PUNCH_HOLE, as in [`punch_hole`](super::disk::punch_hole).
    PunchHole {
        /// The length of the range.
        len_bytes: u64,
    },
    /// fallocate(2) with FALLOC_FL_ZERO_RANGE, as in [`zero_range`](super::disk::zero_range).
    ZeroRange {
        /// The length of the range.
        len_bytes: u64,
    },
}

/// A ring for operations on one file. It owns the buffers of operations in flight; dropping it waits for them.
///
/// The file is not registered with the ring: the kernel releases rings asynchronously, and the file would stay locked
/// (flock(2)) after it was closed.
pub struct Ring<B> {
    ring: IoUring,
    file: Arc<File>,
    /// The buffers that the kernel accesses, by slot. Never resized.
    in_flight: Box<[Option<B>]>,
    free_slots: Vec<usize>,
}

impl<B: IoVecs> Ring<B> {
    /// Creates a ring for up to `size` operations in flight on `file`, a power of two. Completions signal `event`.
    ///
    /// Fails if the host does not allow io_uring or its kernel does not support everything that is needed.
    pub fn new(file: Arc<File>, event: &EventFd, size: u16) -> io::Result<Ring<B>> {
        // Without interrupts of a running worker by completions, where the kernel supports that (5.19).
        let built = IoUring::builder().setup_coop_taskrun().build(size.into());
        let mut ring = built.or_else(|_| IoUring::new(size.into()))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        if !OPCODES.iter().all(|code| probe.is_supported(*code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        // The kernel has a limit of its own, and cannot change it before 5.15.
        let _ = ring.submitter().register_iowq_max_workers(&mut [KERNEL_THREADS_MAX; 2]);
        // A system call filter may allow setup but not submission.
        // SAFETY: this operation has no buffers.
        unsafe { ring.submission().push(&opcode::Nop::new().build()) }.map_err(|_| io::ErrorKind::Unsupported)?;
        ring.submit_and_wait(1)?;
        ring.completion().next().ok_or(io::ErrorKind::Unsupported)?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        let in_flight = (0..size).map(|_| None).collect();
        Ok(Ring { ring, file, in_flight, free_slots: (0..size.into()).collect() })
    }

    /// Whether no operation is in flight.
    pub fn is_idle(&self) -> bool {
        self.free_slots.len() == self.in_flight.len()
    }

    /// Queues an operation for the next [`Ring::submit`]. Returns its slot, which identifies it until it is complete,
    /// or the buffers if the ring is full.
    pub fn queue(&mut self, call: Call, offset_bytes: u64, buffers: B) -> Result<usize, B> {
        let Some(slot) = self.free_slots.pop() else { return Err(buffers) };
        let buffers = self.in_flight[slot].insert(buffers);
        let entry = entry(&self.file, call, offset_bytes, buffers).user_data(slot as u64);
        // SAFETY: `self` owns the file and the buffers, and keeps both until the operation is complete. Buffers in
        // `in_flight` are neither moved nor changed.
        let queued = unsafe { self.ring.submission().push(&entry) };
        match queued {
            Ok(()) => Ok(slot),
            // Not reached: there are at least as many entries as slots.
            Err(_) => {
                self.free_slots.push(slot);
                self.in_flight[slot].take().map_or(Ok(slot), Err)
            }
        }
    }

    /// Starts all queued operations with one system call.
    pub fn submit(&mut self) {
        if !self.ring.submission().is_empty() {
            self.enter(0);
        }
    }

    /// The same, and waits until an operation is complete, if there is one.
    pub fn submit_and_wait(&mut self) {
        if !self.is_idle() {
            self.enter(1);
        }
    }

    /// Takes a complete operation, without a system call: its slot, its buffers and its result.
    pub fn complete(&mut self) -> Option<(usize, B, io::Result<usize>)> {
        let done: cqueue::Entry = self.ring.completion().next()?;
        let slot = done.user_data() as usize;
        let buffers = self.in_flight.get_mut(slot)?.take()?;
        self.free_slots.push(slot);
        let result = usize::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()));
        Some((slot, buffers, result))
    }

    fn enter(&mut self, wanted: usize) {
        while !enter(&mut self.ring, wanted) {}
    }
}

impl<B> Drop for Ring<B> {
    fn drop(&mut self) {
        // The kernel may still write to the buffers of these operations.
        let mut left = self.in_flight.len() - self.free_slots.len();
        while left > 0 {
            enter(&mut self.ring, 1);
            left -= self.ring.completion().count().min(left);
        }
    }
}

/// Submits queued operations and waits for `wanted` completions (io_uring_enter(2)). Returns whether both is done. A
/// kernel without memory fails this, but takes the operations later.
fn enter(ring: &mut IoUring, wanted: usize) -> bool {
    match ring.submit_and_wait(wanted) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::Interrupted => return false,
        Err(_) => {
            thread::sleep(RETRY_INTERVAL);
            return false;
        }
    }
    ring.submission().is_empty()
}

/// The ring's entry for an operation.
fn entry(file: &File, call: Call, offset_bytes: u64, buffers: &impl IoVecs) -> squeue::Entry {
    let fd = types::Fd(file.as_raw_fd());
    let allocate = |mode, len_bytes| {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        opcode::Fallocate::new(fd, len_bytes).offset(offset_bytes).mode(mode).build()
    };
    // Longer parts are transferred in several operations.
    let len = |iovec: &libc::iovec| u32::try_from(iovec.iov_len).unwrap_or(1 << 30);
    match (call, buffers.iovecs()) {
        // A single part has less overhead this way.
        (Call::Read, [one]) => opcode::Read::new(fd, one.iov_base.cast(), len(one)).offset(offset_bytes).build(),
        (Call::Read, all) => opcode::Readv::new(fd, all.as_ptr(), all.len() as u32).offset(offset_bytes).build(),
        (Call::Write, [one]) => opcode::Write::new(fd, one.iov_base.cast(), len(one)).offset(offset_bytes).build(),
        (Call::Write, all) => opcode::Writev::new(fd, all.as_ptr(), all.len() as u32).offset(offset_bytes).build(),
        (Call::SyncData, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        (Call::PunchHole { len_bytes }, _) => allocate(libc::FALLOC_FL_PUNCH_HOLE, len_bytes),
        (Call::ZeroRange { len_bytes }, _) => allocate(libc::FALLOC_FL_ZERO_RANGE, len_bytes),
    }
}
