//! System calls that map a guest's memory.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};

/// What the processor maps with one entry of a page directory; the size of the host's transparent huge pages.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Zeroed private memory of this process at a multiple of 2 MiB. Unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: it is an address and a length; who uses the memory there has to synchronize, whatever thread holds this.
unsafe impl Send for Mapping {}
// SAFETY: as above, nothing can be changed through a shared reference.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len_bytes`, of which the host backs none before they are touched (mmap(2)).
    ///
    /// Kernels before 6.7 take any address, and one out of step with the guest's own addresses can never be mapped for
    /// the guest by huge pages: so more is asked for, and what is too much goes back at once.
    pub fn new(len_bytes: usize) -> io::Result<Mapping> {
        let all_bytes = len_bytes.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: a new mapping at an address of the kernel's choice changes none that exists.
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

    /// Gives the host back what backs `len_bytes` from `offset_bytes` on; it reads as zeroes when it is next touched
    /// (madvise(2), MADV_DONTNEED). The start is rounded up and the end down to whole pages of the host's, and what is not
    /// in the mapping is left out.
    pub fn give_back(&self, offset_bytes: usize, len_bytes: usize) -> io::Result<()> {
        let page_bytes = page_bytes();
        let end = offset_bytes.saturating_add(len_bytes).min(self.len_bytes) / page_bytes * page_bytes;
        let Some(start) = offset_bytes.checked_next_multiple_of(page_bytes).filter(|start| *start < end) else {
            return Ok(());
        };
        let at = self.start().wrapping_byte_add(start);
        // SAFETY: the range lies in this mapping. It is memory of a guest's, which changes it at any time: Rust has no
        // references to it, and who reads there has to bear whatever is found.
        match unsafe { libc::madvise(at.cast(), end - start, libc::MADV_DONTNEED) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its first byte. Whoever uses it keeps the mapping for as long.
    pub fn start(&self) -> *mut u8 {
        self.start.as_ptr()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        unmap(self.start().cast(), self.len_bytes);
    }
}

/// The size of the host's pages.
fn page_bytes() -> usize {
    // SAFETY: sysconf reads and writes no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // It is part of POSIX, so that it is always known.
    usize::try_from(size).ok().filter(|size| *size > 0).unwrap_or(4096)
}

/// Unmaps a part of a mapping that this file made and that nobody uses any more.
fn unmap(start: *mut libc::c_void, len_bytes: usize) {
    if len_bytes > 0 {
        // SAFETY: `Mapping` gives parts of its own mapping only: those whose addresses nobody ever had, and the rest when
        // it is dropped, which those who took its `start` must not outlive.
        unsafe { libc::munmap(start, len_bytes) };
    }
}
