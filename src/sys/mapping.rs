//! Mappings of guest memory.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};

/// The size of a transparent huge page, which a page directory entry maps.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed private memory, aligned to 2 MiB. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: it consists of an address and a length; accesses to the memory must be synchronized by its users on any
// thread.
unsafe impl Send for Mapping {}
// SAFETY: as above; a shared reference allows no changes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len_bytes`, which the host populates on first access (mmap(2)).
    ///
    /// Kernels before 6.7 choose addresses that need not be aligned to huge pages. Such a mapping could never be mapped
    /// for the guest with huge pages, so a larger range is mapped and the excess unmapped immediately.
    pub fn new(len_bytes: usize) -> io::Result<Mapping> {
        let all_bytes = len_bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address chosen by the kernel affects no existing one.
        let all = unsafe { libc::mmap(ptr::null_mut(), all_bytes, protection, flags, -1, 0) };
        if all == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let before = all.align_offset(HUGE_PAGE_BYTES);
        let start = all.wrapping_byte_add(before);
        unmap(all, before);
        unmap(start.wrapping_byte_add(len_bytes), HUGE_PAGE_BYTES - before);
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Mapping { start, len_bytes })
    }

    /// Returns the pages of `len_bytes` at `offset_bytes` to the host; they read as zeroes on the next access
    /// (madvise(2), MADV_DONTNEED). The start is rounded up and the end rounded down to whole host pages. Parts outside
    /// of the mapping are ignored.
    pub fn give_back(&self, offset_bytes: usize, len_bytes: usize) -> io::Result<()> {
        let page_bytes = page_bytes();
        let end = offset_bytes.saturating_add(len_bytes).min(self.len_bytes) / page_bytes * page_bytes;
        let Some(start) = offset_bytes.checked_next_multiple_of(page_bytes).filter(|start| *start < end) else {
            return Ok(());
        };
        let at = self.start().wrapping_byte_add(start);
        // SAFETY: the range is within this mapping. It is guest memory that changes at any time: Rust holds no
        // references to it, and readers must handle any content.
        match unsafe { libc::madvise(at.cast(), end - start, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
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
