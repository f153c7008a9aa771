//! Pages of a guest's memory and of the file behind it, as the ways to restore memory need them: advice, replacing, reading, and a thread
//! that answers page faults (userfaultfd).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use husk::sys::mapping::{Mapping, Pages};

pub const PAGE: usize = 4096;

/// Memory that a guest could run in, mapped before anything else is done for it.
pub struct Memory {
    mapping: Mapping,
    len_bytes: usize,
    answering: Option<JoinHandle<Result<()>>>,
}

impl Memory {
    /// As husk restores it.
    pub fn of_file(file: &File, len_bytes: usize) -> Result<Memory> {
        let mapping = Mapping::of_file(len_bytes, file.as_fd(), 0, Pages::Transparent)?;
        Ok(Memory { mapping, len_bytes, answering: None })
    }

    /// Anonymous memory. A thread copies the `at_once` pages around each one that is accessed first from the file (userfaultfd(2)).
    pub fn answered(file: &File, len_bytes: usize, at_once: usize) -> Result<Memory> {
        let faults = Userfaultfd::new()?;
        let mapping = Mapping::new(len_bytes + PAGE, Pages::Small)?;
        let source = Mapping::of_file(len_bytes, file.as_fd(), 0, Pages::Small)?;
        let start = mapping.start().addr();
        faults.register(start..start + len_bytes + PAGE)?;
        let answer = move || faults.answer(start, &source, len_bytes, at_once * PAGE);
        let answering = Some(thread::spawn(answer));
        Ok(Memory { mapping, len_bytes, answering })
    }

    /// Reads the first number of a page, and changes the second one if it `is_written`.
    pub fn touch(&self, page: usize, is_written: bool) -> u64 {
        assert!((page + 1) * PAGE <= self.len_bytes);
        let at = self.mapping.start().wrapping_byte_add(page * PAGE).cast::<u64>();
        // SAFETY: both are in the mapping, aligned, and accessed by no other thread; volatile, because the access is what counts.
        unsafe {
            if is_written {
                ptr::write_volatile(at.wrapping_add(1), 1);
            }
            ptr::read_volatile(at)
        }
    }

    /// Advises the kernel about some pages (madvise(2)).
    pub fn advise(&self, pages: &Range<usize>, advice: Advice) -> Result<()> {
        let advice = match advice {
            Advice::PopulateRead => libc::MADV_POPULATE_READ,
            Advice::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Advice::WillNeed => libc::MADV_WILLNEED,
        };
        let (at, len_bytes) = self.part(pages);
        // SAFETY: the pages are of this mapping, and none of the advice changes what is in them.
        let result = unsafe { libc::madvise(at, len_bytes, advice) };
        ensure!(result == 0, "madvise: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Replaces some pages by anonymous memory and reads them from their place in the file.
    pub fn read(&self, file: &File, pages: &Range<usize>, is_huge: bool) -> Result<()> {
        let (at, len_bytes) = self.part(pages);
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        // SAFETY: the pages are of this mapping, to which there are no references.
        let mapped = unsafe { libc::mmap(at, len_bytes, protection, flags, -1, 0) };
        ensure!(mapped != libc::MAP_FAILED, "mmap: {}", io::Error::last_os_error());
        if is_huge {
            // SAFETY: the advice affects the size of pages, not their content.
            unsafe { libc::madvise(at, len_bytes, libc::MADV_HUGEPAGE) };
        }
        // SAFETY: as for mmap; the kernel writes to these pages only.
        let count = unsafe { libc::pread(file.as_raw_fd(), at, len_bytes, (pages.start * PAGE).try_into()?) };
        ensure!(usize::try_from(count) == Ok(len_bytes), "pread: {count}, {}", io::Error::last_os_error());
        Ok(())
    }

    fn part(&self, pages: &Range<usize>) -> (*mut libc::c_void, usize) {
        assert!(pages.start <= pages.end && pages.end * PAGE <= self.len_bytes);
        (self.mapping.start().wrapping_byte_add(pages.start * PAGE).cast(), pages.len() * PAGE)
    }

    /// Ends the thread that answers page faults, and says whether it could answer all of them.
    pub fn finish(mut self) -> Result<()> {
        let Some(answering) = self.answering.take() else { return Ok(()) };
        // SAFETY: the page after the memory is of the mapping, too; an access to it tells the thread to end.
        unsafe { ptr::read_volatile(self.mapping.start().wrapping_byte_add(self.len_bytes)) };
        answering.join().map_err(|_| anyhow::anyhow!("the thread that answers page faults has panicked"))?
    }
}

/// Fails if the process may not answer page faults.
pub fn may_answer() -> Result<()> {
    Userfaultfd::new().map(drop)
}

/// What the kernel is told about pages: nothing that changes what is in them.
#[derive(Clone, Copy)]
pub enum Advice {
    PopulateRead,
    PopulateWrite,
    WillNeed,
}

/// Page faults that this process answers itself. When it is dropped, the kernel answers them with pages of zeroes.
struct Userfaultfd(OwnedFd);

/// The structures of linux/userfaultfd.h.
#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;

/// A request number of linux/userfaultfd.h that reads and writes a `T`.
const fn request<T>(number: u64) -> libc::Ioctl {
    (3 << 30 | (size_of::<T>() as u64) << 16 | UFFD_API << 8 | number) as libc::Ioctl
}

impl Userfaultfd {
    /// Fails if the process may not (`vm.unprivileged_userfaultfd`), or if the kernel does not support it.
    fn new() -> Result<Userfaultfd> {
        // SAFETY: it accesses no memory, and the result is a new file descriptor or an error.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        ensure!(fd >= 0, "userfaultfd: {}", io::Error::last_os_error());
        // SAFETY: nothing else owns it.
        let faults = Userfaultfd(unsafe { OwnedFd::from_raw_fd(i32::try_from(fd)?) });
        faults.ask(0x3f, &mut Api { api: UFFD_API, features: 0, ioctls: 0 }).context("UFFDIO_API")?;
        Ok(faults)
    }

    fn register(&self, range: Range<usize>) -> Result<()> {
        let (start, len) = (range.start as u64, range.len() as u64);
        let mut register = Register { start, len, mode: UFFDIO_REGISTER_MODE_MISSING, ioctls: 0 };
        self.ask(0, &mut register).context("UFFDIO_REGISTER")
    }

    fn ask<T>(&self, number: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: the request is one of those above, each with the structure that it is made for. Copying writes only to registered
        // memory, where nothing was: it belongs to a `Memory`, which holds no references to it.
        match unsafe { libc::ioctl(self.0.as_raw_fd(), request::<T>(number), ptr::from_mut(argument)) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Answers the faults of `len_bytes` at `start` from `source`, in pieces of `piece_bytes`, until there is one behind it.
    fn answer(&self, start: usize, source: &Mapping, len_bytes: usize, piece_bytes: usize) -> Result<()> {
        loop {
            let message = self.next()?;
            ensure!(message.event == UFFD_EVENT_PAGEFAULT, "an event of another kind: {}", message.event);
            let offset = usize::try_from(message.address)? - start;
            let is_end = offset >= len_bytes;
            // Pieces never overlap, so that no page of one is there already.
            let (offset, from, len) = match is_end {
                true => (len_bytes, source.start().addr(), PAGE),
                false => {
                    let offset = offset / piece_bytes * piece_bytes;
                    (offset, source.start().addr() + offset, piece_bytes.min(len_bytes - offset))
                }
            };
            let to = (start + offset) as u64;
            self.ask(3, &mut Copy { to, from: from as u64, len: len as u64, mode: 0, copied: 0 })
                .context("UFFDIO_COPY")?;
            if is_end {
                return Ok(());
            }
        }
    }

    fn next(&self) -> Result<Message> {
        let mut message = Message::default();
        let size = size_of::<Message>();
        // SAFETY: the kernel writes at most `size` bytes, any of which are a valid message.
        let count = unsafe { libc::read(self.0.as_raw_fd(), ptr::from_mut(&mut message).cast(), size) };
        ensure!(usize::try_from(count) == Ok(size), "read of userfaultfd: {}", io::Error::last_os_error());
        Ok(message)
    }
}

/// How many of `pages` of a file are in the page cache.
pub fn cached(file: &File, pages: &Range<usize>) -> Result<usize> {
    let len_bytes = pages.len() * PAGE;
    let mapping = Mapping::of_file(len_bytes, file.as_fd(), (pages.start * PAGE) as u64, Pages::Small)?;
    let mut present = vec![0_u8; pages.len()];
    // SAFETY: the kernel writes a byte for each page of the mapping.
    let result = unsafe { libc::mincore(mapping.start().cast(), len_bytes, present.as_mut_ptr()) };
    ensure!(result == 0, "mincore: {}", io::Error::last_os_error());
    Ok(present.into_iter().filter(|state| state & 1 != 0).count())
}

/// The page faults of this process so far: those that needed no disk, and those that did.
pub fn faults() -> Result<[i64; 2]> {
    // SAFETY: all zeroes are a valid structure, and the kernel writes to nothing else.
    let usage = unsafe {
        let mut usage: libc::rusage = mem::zeroed();
        ensure!(libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) == 0, "getrusage: {}", io::Error::last_os_error());
        usage
    };
    Ok([usage.ru_minflt, usage.ru_majflt])
}
