//! Mappings of guest memory.
#![allow(unsafe_code)]

mod replaced;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use replaced::APART_MAX;
use replaced::Replaced;

/// The size of a transparent huge page, which a page directory entry maps.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The amount that is allocated at once. Of larger pages, those that it touches.
const POPULATE_BYTES: usize = 64 << 20;

/// The pages of a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Transparent huge pages where possible.
    Transparent,
    /// Small pages only.
    Small,
    /// Pages of this size from the host's pool (MAP_HUGETLB).
    Pool(u64),
}

/// Private memory, aligned to 2 MiB. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len_bytes: usize,
    kind: Mutex<Kind>,
}

/// What is mapped, which determines how pages are returned to the host.
#[derive(Debug)]
enum Kind {
    /// Zeroed memory. Pages that are returned are zeroed again.
    Anonymous,
    /// Zeroed pages of a pool. One that is returned to it may be taken by another process before it is accessed again.
    Pool,
    /// A file. A page that is returned would come back as it is in the file, so it is replaced by anonymous memory, with
    /// this advice about the size of its pages.
    File { replaced: Replaced, advice: libc::c_int },
}

// SAFETY: it consists of an address and a length; accesses to the memory must be synchronized by its users on any
// thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference allows no changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len_bytes`, which the host populates on first access (mmap(2)).
    ///
    /// Pages of a pool are reserved, so that the first access does not fail unless a cgroup or a memory policy forbids it;
    /// the length is rounded up to whole ones. Fails if the pool has too few.
    pub fn new(len_bytes: usize, pages: Pages) -> io::Result<Mapping> {
        match pages {
            Pages::Pool(page_bytes) => Mapping::of_pool(len_bytes, page_bytes),
            Pages::Transparent | Pages::Small => {
                let mapping = Mapping::aligned(len_bytes)?;
                advise(mapping.start(), len_bytes, advice(pages));
                Ok(mapping)
            }
        }
    }

    /// Maps `len_bytes` of `file` from `offset_bytes`, a multiple of 2 MiB, privately: the file is read on first access, and
    /// writes do not reach it. It must not change, nor become shorter, as long as the mapping exists.
    ///
    /// The file system determines the size of its pages, and `pages` that of memory which was given back; they cannot be of a
    /// pool.
    pub fn of_file(len_bytes: usize, file: BorrowedFd<'_>, offset_bytes: u64, pages: Pages) -> io::Result<Mapping> {
        let mapping = Mapping::aligned(len_bytes)?;
        mapping.become_file(file, offset_bytes, pages)?;
        Ok(mapping)
    }

    /// Makes the mapping one of a file, as [`Mapping::of_file`] does, at the same address; its own pages are returned to the host.
    /// `file` must have the content that the mapping has. Fails without any change if its pages are of a pool.
    pub fn become_file(&self, file: BorrowedFd<'_>, offset_bytes: u64, pages: Pages) -> io::Result<()> {
        let offset = libc::off_t::try_from(offset_bytes).map_err(io::Error::other)?;
        let mut kind = self.kind();
        if matches!(*kind, Kind::Pool) {
            return Err(io::Error::other("its pages are of the host's pool"));
        }
        replace(self.start(), self.len_bytes, 0, file.as_raw_fd(), offset)?;
        *kind = Kind::File { replaced: Replaced::default(), advice: advice(pages) };
        Ok(())
    }

    /// If never written pages are those of a file: whether the page at this offset has become one of zeroes, whether it was written
    /// since or not, because it was given back.
    pub fn is_replaced(&self, offset_bytes: usize) -> bool {
        match &*self.kind() {
            Kind::File { replaced, .. } => replaced.contains(offset_bytes, offset_bytes + 1),
            _ => false,
        }
    }

    fn kind(&self) -> MutexGuard<'_, Kind> {
        self.kind.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn of_pool(len_bytes: usize, page_bytes: u64) -> io::Result<Mapping> {
        let size = page_bytes.trailing_zeros().cast_signed() << libc::MAP_HUGE_SHIFT;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | size;
        let page_bytes = usize::try_from(page_bytes).map_err(io::Error::other)?;
        let len_bytes = len_bytes.checked_next_multiple_of(page_bytes).ok_or(io::ErrorKind::OutOfMemory)?;
        let start = map(len_bytes, flags)?;
        Ok(Mapping {
            start: NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?,
            len_bytes,
            kind: Mutex::new(Kind::Pool),
        })
    }

    /// Kernels before 6.7 choose addresses that need not be aligned to huge pages. Such a mapping could never be mapped
    /// for the guest with huge pages, so a larger range is mapped and the excess unmapped immediately.
    fn aligned(len_bytes: usize) -> io::Result<Mapping> {
        let all_bytes = len_bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let all = map(all_bytes, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)?;
        let before = all.align_offset(HUGE_PAGE_BYTES);
        let start = all.wrapping_byte_add(before);
        unmap(all, before);
        unmap(start.wrapping_byte_add(len_bytes), HUGE_PAGE_BYTES - before);
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, len_bytes, kind: Mutex::new(Kind::Anonymous) })
    }

    /// Whether pages that were never written are those of a file.
    pub fn is_of_file(&self) -> bool {
        matches!(*self.kind(), Kind::File { .. })
    }

    /// Allocates all pages (madvise(2), MADV_POPULATE_WRITE, since Linux 5.14), those of a file with its content, in steps:
    /// between them, it stops if `is_stopped`.
    pub fn populate(&self, is_stopped: impl Fn() -> bool) -> io::Result<()> {
        let mut done = 0;
        while done < self.len_bytes && !is_stopped() {
            let step = POPULATE_BYTES.min(self.len_bytes - done);
            let at = self.start().wrapping_byte_add(done);
            // SAFETY: it accesses pages of this mapping without changing their content.
            if unsafe { libc::madvise(at.cast(), step, libc::MADV_POPULATE_WRITE) } != 0 {
                return Err(io::Error::last_os_error());
            }
            done += step;
        }
        Ok(())
    }

    /// Provides the pages of `len_bytes` at `offset_bytes`, both whole pages (madvise(2), since Linux 5.14): as they are, or copies of those of a
    /// file as if they were `written` to. Parts outside of the mapping are left out.
    pub fn populate_part(&self, offset_bytes: usize, len_bytes: usize, written: bool) -> io::Result<()> {
        let start = offset_bytes.min(self.len_bytes);
        let len_bytes = len_bytes.min(self.len_bytes - start);
        let advice = if written { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
        // SAFETY: it accesses pages of this mapping without changing their content.
        match unsafe { libc::madvise(self.start().wrapping_byte_add(start).cast(), len_bytes, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Returns the pages of `len_bytes` at `offset_bytes` to the host; they read as zeroes on the next access. The start is
    /// rounded up and the end rounded down to whole host pages, and parts outside of the mapping are ignored. The result is
    /// the number of bytes.
    ///
    /// Pages of a pool are kept with their content, and so are those of a file if many ranges of it, apart from each other,
    /// were returned before ([`APART_MAX`]).
    pub fn give_back(&self, offset_bytes: usize, len_bytes: usize) -> io::Result<usize> {
        let page_bytes = page_bytes();
        let end = offset_bytes.saturating_add(len_bytes).min(self.len_bytes) / page_bytes * page_bytes;
        let Some(start) = offset_bytes.checked_next_multiple_of(page_bytes).filter(|start| *start < end) else {
            return Ok(0);
        };
        let (at, len_bytes) = (self.start().wrapping_byte_add(start), end - start);
        match &mut *self.kind() {
            Kind::Pool => return Ok(0),
            Kind::Anonymous => discard(at, len_bytes)?,
            Kind::File { replaced, advice } => {
                if replaced.contains(start, end) {
                    discard(at, len_bytes)?;
                } else if replaced.has_room(start, end) {
                    replace(at, len_bytes, libc::MAP_ANONYMOUS, -1, 0)?;
                    advise(at, len_bytes, *advice);
                    replaced.insert(start, end);
                } else {
                    return Ok(0);
                }
            }
        }
        Ok(len_bytes)
    }

    /// The first byte. Users of the pointer must keep the mapping alive.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.start().cast(), self.len_bytes);
    }
}

/// The advice that makes the kernel use such pages, if they are not of a pool.
fn advice(pages: Pages) -> libc::c_int {
    if pages == Pages::Transparent { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE }
}

/// Advises the kernel about pages of a mapping. A kernel without transparent huge pages ignores it.
fn advise(start: *mut u8, len_bytes: usize, advice: libc::c_int) {
    // SAFETY: the advice affects the size of pages, not their content (madvise(2)).
    unsafe { libc::madvise(start.cast(), len_bytes, advice) };
}

/// Discards the content of whole pages of a mapping (madvise(2), MADV_DONTNEED).
fn discard(start: *mut u8, len_bytes: usize) -> io::Result<()> {
    // SAFETY: `Mapping` passes only parts of itself. They are guest memory that changes at any time: Rust holds no
    // references to it, and readers must handle any content.
    match unsafe { libc::madvise(start.cast(), len_bytes, libc::MADV_DONTNEED) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Replaces whole pages of a mapping by those of a file, or by anonymous ones.
fn replace(start: *mut u8, len_bytes: usize, flags: libc::c_int, file: RawFd, offset: libc::off_t) -> io::Result<()> {
    let flags = flags | libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: as in `discard`. For other threads, one mapping replaces the other at once.
    let mapped = unsafe { libc::mmap(start.cast(), len_bytes, protection, flags, file, offset) };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Maps readable and writable memory.
fn map(len_bytes: usize, flags: libc::c_int) -> io::Result<*mut libc::c_void> {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: a new mapping at an address chosen by the kernel affects no existing one.
    let start = unsafe { libc::mmap(ptr::null_mut(), len_bytes, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start) }
}

/// The host's page size.
fn page_bytes() -> usize {
    // SAFETY: sysconf accesses no memory.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // Required by POSIX, so it is always available.
    usize::try_from(size).ok().filter(|size| *size > 0).unwrap_or(4096)
}

/// Unmaps an unused part of a mapping created in this file.
fn unmap(start: *mut libc::c_void, len_bytes: usize) {
    if len_bytes > 0 {
        // SAFETY: `Mapping` passes only parts of its own mapping: parts that were never exposed, and the rest when it
        // is dropped, which users of its `start` must not outlive.
        unsafe { libc::munmap(start, len_bytes) };
    }
}
