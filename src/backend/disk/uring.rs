//! A raw image or block device, accessed asynchronously with io_uring, and without it where that is faster.
//!
//! ```text
//! submit ─> batch ─ kick ─┬ alone, or writes without RWF_NOWAIT ── plain system call ─┬─> done ─ reap ─>
//!                         └ else ─> ring ─ one io_uring_enter ─> kernel ─ event ──────┘
//! ```
//!
//! System calls: those of [`PlainDisk`], preadv2 and pwritev2 with RWF_NOWAIT, and those of [`Ring`].

use std::collections::VecDeque;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Once;

use vmm_sys_util::eventfd::EventFd;

use super::plain::cannot;
use super::{BlockingDisk, Completion, DiskBackend, Operation, PlainDisk, Request};
use crate::memory::GuestBuffers;
use crate::sys;
use crate::sys::uring::{Call, Ring};

/// The number of requests in flight; others block.
const RING_SIZE: u16 = 256;

/// Which requests are executed with plain system calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shortcuts {
    /// Those that are faster this way.
    Allowed,
    /// None, unless the ring cannot execute them.
    Never,
}

/// A disk with a ring of its own. If the host does not allow that, all requests are executed with plain system calls.
pub struct UringDisk {
    plain: PlainDisk,
    shortcuts: Shortcuts,
    /// Signaled by completions in the ring.
    event: EventFd,
    ring: Option<Box<Ring<GuestBuffers>>>,
    /// Whether reads and writes support RWF_NOWAIT, once known.
    reads_nowait: Option<bool>,
    writes_nowait: Option<bool>,
    /// Submitted since the last kick.
    batch: Vec<Request>,
    /// Requests of this kick that block.
    blocking: Vec<Request>,
    /// Requests in the ring, by slot; the ring has their buffers.
    in_ring: Vec<Option<InRing>>,
    done: VecDeque<Completion>,
}

/// A [`Request`] without its buffers.
struct InRing {
    token: usize,
    operation: Operation,
    offset_bytes: u64,
}

/// How a request is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Route {
    /// Without blocking, as far as possible; the rest in the ring.
    Now,
    /// Blocking.
    Plain,
    /// In the ring.
    Ring,
}

impl UringDisk {
    /// The maximum kernel memory in bytes that a guest can make the ring use: its entries and requests (1 KiB each), a
    /// copy of each request's iovecs, and kernel threads.
    pub const BUDGET_BYTES: u64 = RING_SIZE as u64 * (1024 + 2 * RING_SIZE as u64 * 16) + 8 * (64 << 10);

    /// Creates a disk that accesses the same file as `plain`, and its ring, which no thread of a confined process could
    /// create later.
    pub fn new(plain: PlainDisk, shortcuts: Shortcuts) -> io::Result<UringDisk> {
        let event = sys::event::create()?;
        let ring = Ring::new(plain.file().clone(), &event, RING_SIZE);
        if let Err(error) = &ring {
            static SAID: Once = Once::new();
            SAID.call_once(|| log::info!("io_uring is not available, so disks use blocking calls: {error}"));
        }
        Ok(UringDisk {
            plain,
            shortcuts,
            event,
            ring: ring.ok().map(Box::new),
            reads_nowait: None,
            writes_nowait: None,
            batch: Vec::new(),
            blocking: Vec::new(),
            in_ring: (0..RING_SIZE).map(|_| None).collect(),
            done: VecDeque::new(),
        })
    }

    /// Whether the host allows io_uring, or the reason why it does not.
    pub fn check(plain: &PlainDisk) -> io::Result<()> {
        Ring::<GuestBuffers>::new(plain.file().clone(), &sys::event::create()?, 1).map(drop)
    }

    /// How to execute a request; `is_alone` if there is no other one to start at the same time.
    fn route(&self, request: &Request, is_alone: bool) -> Route {
        let can_nowait = match request.operation {
            Operation::Read | Operation::Write if !self.plain.accepts(request) => return Route::Plain,
            Operation::Read | Operation::Write if self.plain.is_direct() => return Route::Ring,
            Operation::Read => self.reads_nowait,
            Operation::Write => self.writes_nowait,
            Operation::Discard { len_bytes: 0 } | Operation::WriteZeroes { len_bytes: 0, .. } => return Route::Plain,
            // There is no such operation on kernels before 6.12.
            Operation::Discard { .. } if self.plain.is_block_device() => return Route::Plain,
            Operation::Flush | Operation::Discard { .. } | Operation::WriteZeroes { .. } => return Route::Ring,
        };
        match (self.shortcuts, can_nowait) {
            (Shortcuts::Never, _) => Route::Ring,
            // The ring would use a kernel thread for each.
            (Shortcuts::Allowed, Some(false)) => Route::Plain,
            (Shortcuts::Allowed, Some(true)) if !is_alone => Route::Ring,
            (Shortcuts::Allowed, _) => Route::Now,
        }
    }

    /// Executes a read or write as far as that does not block. Returns its result, or `None` if there is more to do.
    fn try_now(&mut self, request: &mut Request) -> Option<io::Result<()>> {
        let is_read = request.operation == Operation::Read;
        while request.buffers.len_bytes() > 0 {
            let file = self.plain.file();
            let moved = if is_read {
                sys::disk::read_at_now(file, &mut request.buffers, request.offset_bytes)
            } else {
                sys::disk::write_at_now(file, &request.buffers, request.offset_bytes)
            };
            let supported = if is_read { &mut self.reads_nowait } else { &mut self.writes_nowait };
            match moved {
                Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                    *supported = Some(false);
                    return Some(self.plain.execute(request));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    *supported = Some(true);
                    return None;
                }
                Err(error) => return Some(Err(error)),
                Ok(0) => return Some(Err(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => {
                    *supported = Some(true);
                    request.advance(count);
                }
            }
        }
        Some(Ok(()))
    }

    /// Queues `request` in the ring. If there is none or it is full, the request will block.
    fn queue(&mut self, request: Request) {
        let call = match request.operation {
            Operation::Read => Call::Read,
            Operation::Write => Call::Write,
            Operation::Flush => Call::SyncData,
            Operation::Discard { len_bytes } | Operation::WriteZeroes { len_bytes, unmap: true } => {
                Call::PunchHole { len_bytes }
            }
            Operation::WriteZeroes { len_bytes, unmap: false } => Call::ZeroRange { len_bytes },
        };
        let Some(ring) = &mut self.ring else { return self.blocking.push(request) };
        let Request { token, operation, offset_bytes, buffers } = request;
        match ring.queue(call, offset_bytes, buffers) {
            Ok(slot) => self.in_ring[slot] = Some(InRing { token, operation, offset_bytes }),
            Err(buffers) => self.blocking.push(Request { token, operation, offset_bytes, buffers }),
        }
    }

    /// Collects completions of the ring, and continues short transfers.
    fn collect(&mut self) {
        while let Some(ring) = &mut self.ring
            && let Some((slot, buffers, result)) = ring.complete()
        {
            let Some(InRing { token, operation, offset_bytes }) = self.in_ring[slot].take() else { continue };
            let mut request = Request { token, operation, offset_bytes, buffers };
            match result {
                Ok(count) => {
                    request.advance(count);
                    if request.buffers.len_bytes() > 0 && count > 0 {
                        self.batch.push(request);
                        continue;
                    }
                    let is_whole = request.buffers.len_bytes() == 0;
                    let result = match operation {
                        Operation::Flush => self.plain.flushed(Ok(())),
                        _ if is_whole => Ok(()),
                        _ => Err(io::ErrorKind::UnexpectedEof.into()),
                    };
                    self.done.push_back(Completion { request, result });
                }
                Err(error) => {
                    let result = match operation {
                        _ if !is_final(&error, operation, self.plain.is_direct()) => self.plain.execute(&mut request),
                        Operation::Flush => self.plain.flushed(Err(error)),
                        _ => Err(error),
                    };
                    self.done.push_back(Completion { request, result });
                }
            }
        }
        if !self.batch.is_empty() {
            self.kick();
        }
    }
}

/// Whether a blocking call would not do better after `error` of the ring.
fn is_final(error: &io::Error, operation: Operation, is_direct: bool) -> bool {
    match (error.raw_os_error(), operation) {
        (Some(libc::EAGAIN | libc::EINTR | libc::ECANCELED), _) => false,
        (_, Operation::Discard { .. } | Operation::WriteZeroes { .. }) => !cannot(error),
        (Some(libc::EINVAL), Operation::Read | Operation::Write) => !is_direct,
        (_, Operation::Read | Operation::Write | Operation::Flush) => true,
    }
}

impl DiskBackend for UringDisk {
    fn submit(&mut self, request: Request) {
        self.batch.push(request);
    }

    fn kick(&mut self) {
        let mut batch = std::mem::take(&mut self.batch);
        let is_alone = batch.len() == 1;
        for mut request in batch.drain(..) {
            match self.route(&request, is_alone) {
                Route::Plain => self.blocking.push(request),
                Route::Ring => self.queue(request),
                Route::Now => match self.try_now(&mut request) {
                    Some(result) => self.done.push_back(Completion { request, result }),
                    None => self.queue(request),
                },
            }
        }
        self.batch = batch;
        if let Some(ring) = &mut self.ring {
            ring.submit();
        }
        let mut blocking = std::mem::take(&mut self.blocking);
        for mut request in blocking.drain(..) {
            let result = self.plain.execute(&mut request);
            self.done.push_back(Completion { request, result });
        }
        self.blocking = blocking;
    }

    fn reap(&mut self) -> Option<Completion> {
        self.collect();
        self.done.pop_front()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(sys::event_fd(&self.event))
    }

    fn drain(&mut self) {
        self.kick();
        while let Some(ring) = &mut self.ring
            && !ring.is_idle()
        {
            ring.submit_and_wait();
            self.collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Write;
    use std::os::fd::{AsRawFd, OwnedFd};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress};
    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;
    use crate::memory::{self, GuestMemory};

    /// A "disk" whose reads are in flight until something is written to the other end.
    fn pipe() -> (UringDisk, io::PipeWriter, Arc<GuestMemory>) {
        let (read_end, write_end) = io::pipe().unwrap();
        let plain = PlainDisk::new(File::from(OwnedFd::from(read_end)), false);
        (UringDisk::new(plain, Shortcuts::Never).unwrap(), write_end, Arc::new(memory::reserve(1).unwrap()))
    }

    fn read(disk: &mut UringDisk, memory: &Arc<GuestMemory>, token: usize, len_bytes: u32) {
        let mut buffers = GuestBuffers::new(memory.clone());
        buffers.push(GuestAddress(0), len_bytes / 2).unwrap();
        buffers.push(GuestAddress(0x1000), len_bytes - len_bytes / 2).unwrap();
        disk.submit(Request { token, operation: Operation::Read, offset_bytes: 0, buffers });
        disk.kick();
    }

    #[test]
    fn a_completion_is_signaled_and_a_short_transfer_is_continued() {
        let (mut disk, mut write_end, memory) = pipe();
        let epoll = Epoll::new().unwrap();
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let fd = disk.completion_fd().unwrap().as_raw_fd();
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, 0)).unwrap();
        let wait = || {
            while let Err(error) = epoll.wait(5000, &mut [EpollEvent::default()]) {
                assert_eq!(error.kind(), io::ErrorKind::Interrupted);
            }
        };
        read(&mut disk, &memory, 3, 512);
        assert!(disk.reap().is_none());
        for piece in [&[1; 100][..], &[2; 200], &[3; 212]] {
            assert!(disk.reap().is_none());
            write_end.write_all(piece).unwrap();
            wait();
        }
        let done = disk.reap().unwrap();
        assert_eq!((done.request.token, done.result.is_ok()), (3, true));
        let mut bytes = [0; 512];
        memory.read_slice(&mut bytes[..256], GuestAddress(0)).unwrap();
        memory.read_slice(&mut bytes[256..], GuestAddress(0x1000)).unwrap();
        assert_eq!(bytes, *[&[1; 100][..], &[2; 200], &[3; 212]].concat());
    }

    /// Calls `end` with a disk that has reads in flight, which end only after a while.
    fn ends_with_what_is_in_flight(end: impl FnOnce(UringDisk)) {
        let (mut disk, mut write_end, memory) = pipe();
        for token in 0..3 {
            read(&mut disk, &memory, token, 512);
        }
        let has_ended = Arc::new(AtomicBool::new(false));
        let writer = std::thread::spawn({
            let has_ended = has_ended.clone();
            move || {
                std::thread::sleep(Duration::from_millis(20));
                assert!(!has_ended.load(Ordering::Relaxed), "reads are still in flight");
                write_end.write_all(&[7; 3 * 512]).unwrap();
            }
        });
        end(disk);
        has_ended.store(true, Ordering::Relaxed);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 7);
        memory.write_obj(0_u8, GuestAddress(0)).unwrap();
        writer.join().unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0, "written after the end");
    }

    #[test]
    fn a_drain_completes_what_is_in_flight() {
        ends_with_what_is_in_flight(|mut disk| {
            disk.drain();
            assert_eq!(std::iter::from_fn(|| disk.reap()).filter(|done| done.result.is_ok()).count(), 3);
        });
    }

    #[test]
    fn buffers_in_flight_outlive_the_disk() {
        ends_with_what_is_in_flight(drop);
    }

    #[test]
    fn without_a_ring_requests_block() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let memory = Arc::new(memory::reserve(1).unwrap());
        for shortcuts in [Shortcuts::Allowed, Shortcuts::Never] {
            let plain = PlainDisk::new(file.try_clone().unwrap(), false);
            let mut disk = UringDisk { ring: None, ..UringDisk::new(plain, shortcuts).unwrap() };
            read(&mut disk, &memory, 0, 512);
            for operation in [Operation::Flush, Operation::Discard { len_bytes: 512 }] {
                let buffers = GuestBuffers::new(memory.clone());
                disk.submit(Request { token: 1, operation, offset_bytes: 0, buffers });
            }
            disk.kick();
            assert!((0..3).all(|_| disk.reap().is_some_and(|done| done.result.is_ok())));
            disk.drain();
        }
    }
}
