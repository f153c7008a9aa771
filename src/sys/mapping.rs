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

/// Unmaps a part of a mapping that this file made and that nobody uses any more.
fn unmap(start: *mut libc::c_void, len_bytes: usize) {
    if len_bytes > 0 {
        // SAFETY: `Mapping` gives parts of its own mapping only: those whose addresses nobody ever had, and the rest when
        // it is dropped, which those who took its `start` must not outlive.
        unsafe { libc::munmap(start, len_bytes) };
    }
}
