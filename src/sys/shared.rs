//! Memory that a process shares with a copy of itself.
#![allow(unsafe_code)]

use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, Ordering};

/// The size of the mapping: a page.
const LEN_BYTES: usize = 4096;

/// A flag that is also visible in copies of this process made later (mmap(2), MAP_SHARED).
#[derive(Debug)]
pub struct SharedFlag(NonNull<AtomicBool>);

// SAFETY: it is a reference to an atomic variable, which any thread may use.
unsafe impl Send for SharedFlag {}
// SAFETY: as above.
unsafe impl Sync for SharedFlag {}

impl SharedFlag {
    /// Creates a flag that is not set.
    pub fn new() -> io::Result<SharedFlag> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice affects no other memory.
        let address = unsafe { libc::mmap(ptr::null_mut(), LEN_BYTES, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(address.cast()).map(SharedFlag).ok_or_else(|| io::ErrorKind::OutOfMemory.into())
    }

    fn flag(&self) -> &AtomicBool {
        // SAFETY: the mapping starts with a zero, is aligned to pages and exists as long as `self`.
        unsafe { self.0.as_ref() }
    }

    /// Whether it is set.
    pub fn is_set(&self) -> bool {
        self.flag().load(Ordering::Acquire)
    }

    /// Sets or clears it. Returns whether it was set.
    pub fn swap(&self, set: bool) -> bool {
        self.flag().swap(set, Ordering::AcqRel)
    }
}

impl Drop for SharedFlag {
    fn drop(&mut self) {
        // SAFETY: the mapping has this length, and nothing refers to it any more.
        unsafe { libc::munmap(self.0.as_ptr().cast(), LEN_BYTES) };
    }
}
