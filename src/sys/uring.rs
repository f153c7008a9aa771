//! Asynchronous file operations (io_uring(7)), in rings that can do nothing else.
//!
//! System calls: to create a ring io_uring_setup, io_uring_register and mmap; to use it io_uring_enter; to release it
//! io_uring_register (IORING_UNREGISTER_FILES) and munmap.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use io_uring::register::Restriction;
use io_uring::{IoUring, cqueue, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use super::IoVecs;

/// The operations in use, which every kernel with restrictions has.
const OPCODES: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Readv::CODE,
    opcode::Write::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];
/// The request of io_uring_register(2) that releases a ring's file (linux/io_uring.h).
pub const UNREGISTER_FILES: u8 = 3;
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
/// The kernel refuses any operation that is not one of a [`Call`], as well as changes of the ring. If it can release the file
/// before the ring, it also refuses any other descriptor.
pub struct Ring<B> {
    ring: IoUring,
    /// Open for as long as operations may be in flight.
    _file: Arc<File>,
    /// What the file is in an entry.
    target: Target,
    /// The buffers that the kernel accesses, by slot. Never resized.
    in_flight: Box<[Option<B>]>,
    free_slots: Vec<usize>,
}

/// A file in an entry of a ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// The first of the files that are registered with the ring.
    Registered,
    /// A descriptor of the process.
    Descriptor(RawFd),
}

impl<B: IoVecs> Ring<B> {
    /// Creates a ring for up to `size` operations in flight on `file`, a power of two. Completions signal `event`. Any
    /// thread of this process may then use it.
    ///
    /// Fails if the host does not allow io_uring or its kernel cannot restrict it (before Linux 5.10).
    pub fn new(file: Arc<File>, event: &EventFd, size: u16) -> io::Result<Ring<B>> {
        let ring = disabled(size)?;
        let target = match releases_files_at_once(&ring) {
            true => Target::Registered,
            false => Target::Descriptor(file.as_raw_fd()),
        };
        Ring::with(ring, file, target, event, size)
    }

    fn with(ring: IoUring, file: Arc<File>, target: Target, event: &EventFd, size: u16) -> io::Result<Ring<B>> {
        let submitter = ring.submitter();
        submitter.register_eventfd(event.as_raw_fd())?;
        // The kernel has a limit of its own, and cannot change it before 5.15.
        let _ = submitter.register_iowq_max_workers(&mut [KERNEL_THREADS_MAX; 2]);
        let mut rules: Vec<Restriction> = OPCODES.map(Restriction::sqe_op).into();
        if target == Target::Registered {
            submitter.register_files(&[file.as_raw_fd()])?;
            rules.push(Restriction::sqe_flags_required(squeue::Flags::FIXED_FILE.bits()));
        }
        rules.push(Restriction::register_op(UNREGISTER_FILES));
        submitter.register_restrictions(&mut rules)?;
        submitter.register_enable_rings()?;
        // A system call filter may allow setup but not submission.
        submitter.submit()?;
        let in_flight = (0..size).map(|_| None).collect();
        Ok(Ring { ring, _file: file, target, in_flight, free_slots: (0..size.into()).collect() })
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
        let entry = entry(self.target, call, offset_bytes, buffers).user_data(slot as u64);
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

impl<B> AsRawFd for Ring<B> {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_raw_fd()
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
        // The kernel releases a ring some time after it was closed: until then the file would stay open, and locked.
        if self.target == Target::Registered {
            let _ = self.ring.submitter().unregister_files();
        }
    }
}

/// A ring that executes nothing until it is enabled.
fn disabled(size: u16) -> io::Result<IoUring> {
    // Without interrupts of a running worker by completions, where the kernel supports that (5.19).
    let built = IoUring::builder().setup_r_disabled().setup_coop_taskrun().build(size.into());
    built.or_else(|_| IoUring::builder().setup_r_disabled().build(size.into()))
}

/// Whether a registered file is closed when it is unregistered. Before Linux 6.4 that takes an RCU grace period, by which
/// the end of the machine would be delayed. A feature of 6.10 stands for it.
fn releases_files_at_once(ring: &IoUring) -> bool {
    ring.params().is_feature_recvsend_bundle()
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
fn entry(target: Target, call: Call, offset_bytes: u64, buffers: &impl IoVecs) -> squeue::Entry {
    let (fd, flags) = match target {
        Target::Registered => (types::Fd(0), squeue::Flags::FIXED_FILE),
        Target::Descriptor(fd) => (types::Fd(fd), squeue::Flags::empty()),
    };
    let allocate = |mode, len_bytes| {
        let mode = mode | libc::FALLOC_FL_KEEP_SIZE;
        opcode::Fallocate::new(fd, len_bytes).offset(offset_bytes).mode(mode).build()
    };
    // Longer parts are transferred in several operations.
    let len = |iovec: &libc::iovec| u32::try_from(iovec.iov_len).unwrap_or(1 << 30);
    let entry = match (call, buffers.iovecs()) {
        // A single part has less overhead this way.
        (Call::Read, [one]) => opcode::Read::new(fd, one.iov_base.cast(), len(one)).offset(offset_bytes).build(),
        (Call::Read, all) => opcode::Readv::new(fd, all.as_ptr(), all.len() as u32).offset(offset_bytes).build(),
        (Call::Write, [one]) => opcode::Write::new(fd, one.iov_base.cast(), len(one)).offset(offset_bytes).build(),
        (Call::Write, all) => opcode::Writev::new(fd, all.as_ptr(), all.len() as u32).offset(offset_bytes).build(),
        (Call::SyncData, _) => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
        (Call::PunchHole { len_bytes }, _) => allocate(libc::FALLOC_FL_PUNCH_HOLE, len_bytes),
        (Call::ZeroRange { len_bytes }, _) => allocate(libc::FALLOC_FL_ZERO_RANGE, len_bytes),
    };
    entry.flags(flags)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::event;

    struct Bytes([u8; 16], libc::iovec);

    // SAFETY: the part is memory of this structure, which is boxed.
    unsafe impl IoVecs for Box<Bytes> {
        fn iovecs(&self) -> &[libc::iovec] {
            std::slice::from_ref(&self.1)
        }
    }

    fn bytes() -> Box<Bytes> {
        let mut bytes = Box::new(Bytes([0; 16], libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 16 }));
        bytes.1.iov_base = bytes.0.as_mut_ptr().cast();
        bytes
    }

    /// Rings on a file of 16 bytes, in which the file is each kind of target.
    fn rings() -> [Ring<Box<Bytes>>; 2] {
        [true, false].map(|registers| {
            let file = Arc::new(tempfile::tempfile().unwrap());
            file.set_len(16).unwrap();
            let target = if registers { Target::Registered } else { Target::Descriptor(file.as_raw_fd()) };
            Ring::with(disabled(4).unwrap(), file, target, &event::create().unwrap(), 4).unwrap()
        })
    }

    /// The result of an entry that the ring is given as it is.
    fn result_of(ring: &mut Ring<Box<Bytes>>, entry: &squeue::Entry) -> i32 {
        // SAFETY: the caller's entries have no buffers that the kernel could access.
        unsafe { ring.ring.submission().push(entry).unwrap() };
        let _ = ring.ring.submit_and_wait(1);
        ring.ring.completion().next().unwrap().result()
    }

    #[test]
    fn a_ring_executes_the_operations_of_a_disk_and_no_others() {
        for mut ring in rings() {
            let calls =
                [(Call::Write, 16), (Call::Read, 16), (Call::SyncData, 0), (Call::PunchHole { len_bytes: 8 }, 0)];
            for (call, count) in calls {
                ring.queue(call, 0, bytes()).ok().unwrap();
                ring.submit_and_wait();
                assert_eq!(ring.complete().unwrap().2.unwrap(), count);
            }
            let path = c"/dev/null".as_ptr();
            let flag = match ring.target {
                Target::Registered => squeue::Flags::FIXED_FILE,
                Target::Descriptor(_) => squeue::Flags::empty(),
            };
            for refused in [
                opcode::Nop::new().build(),
                opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), path).build(),
                opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build(),
                opcode::Fsync::new(types::Fd(0)).build().flags(squeue::Flags::IO_LINK),
            ] {
                assert_eq!(result_of(&mut ring, &refused.flags(flag)), -libc::EACCES);
            }
        }
    }

    #[test]
    fn a_ring_with_a_registered_file_accepts_no_descriptor() {
        let [mut ring, _] = rings();
        let other = tempfile::tempfile().unwrap();
        let sync = opcode::Fsync::new(types::Fd(other.as_raw_fd())).build();
        assert_eq!(result_of(&mut ring, &sync), -libc::EACCES);
        let beyond = opcode::Fsync::new(types::Fd(1)).build().flags(squeue::Flags::FIXED_FILE);
        assert_eq!(result_of(&mut ring, &beyond), -libc::EBADF);
    }

    #[test]
    fn a_ring_cannot_be_changed() {
        for ring in rings() {
            let submitter = ring.ring.submitter();
            let refused = |result: io::Result<()>| assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EACCES));
            refused(submitter.register_files(&[0]));
            refused(submitter.register_files_update(0, &[0]).map(drop));
            refused(submitter.register_personality().map(drop));
            refused(submitter.register_iowq_max_workers(&mut [64; 2]));
            assert!(submitter.register_restrictions(&mut [Restriction::sqe_op(opcode::Nop::CODE)]).is_err());
        }
    }

    #[test]
    fn a_file_is_closed_with_its_ring() {
        let path = tempfile::NamedTempFile::new().unwrap();
        let is_free_after = |_: &i32| {
            let file = Arc::new(File::open(path.path()).unwrap());
            file.lock().unwrap();
            drop(Ring::<Box<Bytes>>::new(file, &event::create().unwrap(), 4).unwrap());
            File::open(path.path()).unwrap().try_lock().is_ok()
        };
        // A process that another test starts has all files until it executes its program.
        assert!((0..20).filter(is_free_after).count() > 10);
    }
}
