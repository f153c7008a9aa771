//! Translates guest buffers to the arguments of vectored system calls, without copying.
#![allow(unsafe_code)]

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError, VolatileSlice};

use super::GuestMemory;
use crate::sys::{IOV_MAX, IoVecs};

/// An ordered list of guest memory ranges to be read or written, consumed from the front.
#[derive(Debug)]
pub struct GuestBuffers {
    memory: Arc<GuestMemory>,
    iovecs: Vec<libc::iovec>,
    /// Ranges before this index are consumed.
    first: usize,
    len_bytes: u64,
}

// SAFETY: the pointers refer to the mapping that `memory` keeps alive, which may be accessed from any thread.
unsafe impl Send for GuestBuffers {}

// SAFETY: all parts belong to the mapping that `memory` keeps alive. Rust holds no references to it, since it is guest
// memory.
unsafe impl IoVecs for GuestBuffers {
    /// The remaining ranges, up to the limit of one call.
    fn iovecs(&self) -> &[libc::iovec] {
        let rest = &self.iovecs[self.first..];
        &rest[..rest.len().min(IOV_MAX)]
    }
}

impl GuestBuffers {
    /// Creates an empty list for ranges in `memory`.
    pub fn new(memory: Arc<GuestMemory>) -> GuestBuffers {
        GuestBuffers { memory, iovecs: Vec::new(), first: 0, len_bytes: 0 }
    }

    /// The memory that the buffers lie in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// Removes all buffers and keeps the allocation.
    pub fn clear(&mut self) {
        self.iovecs.clear();
        (self.first, self.len_bytes) = (0, 0);
    }

    /// Adds `len_bytes` of guest memory from `address`. If that is not all memory it fails, and the list must be
    /// discarded.
    pub fn push(&mut self, address: GuestAddress, len_bytes: u32) -> Result<(), GuestMemoryError> {
        // It may cross from one region into the next.
        for slice in GuestMemoryBackend::get_slices(&*self.memory, address, len_bytes as usize) {
            let slice = slice?;
            self.iovecs.push(libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() });
            self.len_bytes += slice.len() as u64;
        }
        Ok(())
    }

    /// The number of remaining bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// The remaining ranges as volatile slices.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'_>> {
        let rest = self.iovecs[self.first..].iter();
        // SAFETY: each part is mapped guest memory, kept alive by `self` while it is borrowed.
        rest.map(|iovec| unsafe { VolatileSlice::new(iovec.iov_base.cast(), iovec.iov_len) })
    }

    /// Removes the first `len_bytes`, or as many as there are, and returns them as a separate list.
    pub fn split_front(&mut self, len_bytes: u64) -> GuestBuffers {
        let mut front = GuestBuffers::new(self.memory.clone());
        while front.len_bytes < len_bytes
            && let Some(iovec) = self.iovecs.get(self.first)
        {
            let step = iovec.iov_len.min((len_bytes - front.len_bytes) as usize);
            front.iovecs.push(libc::iovec { iov_base: iovec.iov_base, iov_len: step });
            front.len_bytes += step as u64;
            self.advance(step);
        }
        front
    }

    /// Copies the first bytes to `bytes` without consuming them, and returns their number.
    pub fn peek(&self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in self.slices() {
            done += slice.copy_to(&mut bytes[done..]);
        }
        done
    }

    /// Writes `bytes` to the front of the buffers and consumes what was written.
    pub fn fill(&mut self, bytes: &[u8]) {
        let mut done = 0;
        for slice in self.slices() {
            let rest = &bytes[done..];
            let step = rest.len().min(slice.len());
            // Always within the slice.
            let _ = slice.write_slice(&rest[..step], 0);
            done += step;
            if done == bytes.len() {
                break;
            }
        }
        self.advance(done);
    }

    /// Consumes the first `count` bytes, or as many as there are.
    pub fn advance(&mut self, mut count: usize) {
        while let Some(iovec) = self.iovecs.get_mut(self.first) {
            let step = count.min(iovec.iov_len);
            count -= step;
            self.len_bytes -= step as u64;
            if step < iovec.iov_len {
                iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
                iovec.iov_len -= step;
                return;
            }
            self.first += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn consumed_ranges_are_not_returned_again() {
        let mut buffers = GuestBuffers::new(Arc::new(memory::reserve(1).unwrap()));
        for (address, len) in [(0x1000, 10), (0x3000, 20), (0x5000, 30)] {
            buffers.push(GuestAddress(address), len).unwrap();
        }
        let base = buffers.iovecs()[0].iov_base as usize;
        let seen = |buffers: &GuestBuffers| -> Vec<(usize, usize)> {
            buffers.iovecs().iter().map(|iovec| (iovec.iov_base as usize - base, iovec.iov_len)).collect()
        };
        buffers.advance(4);
        assert_eq!((seen(&buffers), buffers.len_bytes()), (vec![(4, 6), (0x2000, 20), (0x4000, 30)], 56));
        buffers.advance(6);
        assert_eq!((seen(&buffers), buffers.len_bytes()), (vec![(0x2000, 20), (0x4000, 30)], 50));
        buffers.advance(45);
        assert_eq!((seen(&buffers), buffers.len_bytes()), (vec![(0x4000 + 25, 5)], 5));
        buffers.advance(100);
        assert_eq!((seen(&buffers), buffers.len_bytes()), (vec![], 0));
        buffers.clear();
        assert!(buffers.push(GuestAddress((1 << 20) - 8), 9).is_err());
        assert!(buffers.push(GuestAddress(u64::MAX - 4), 9).is_err());
    }

    #[test]
    fn a_split_front_and_the_rest_are_complete() {
        let mut buffers = GuestBuffers::new(Arc::new(memory::reserve(1).unwrap()));
        for (address, len) in [(0x1000, 10), (0x3000, 20)] {
            buffers.push(GuestAddress(address), len).unwrap();
        }
        let mut front = buffers.split_front(13);
        assert_eq!((front.len_bytes(), buffers.len_bytes()), (13, 17));
        front.fill(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        assert_eq!(front.len_bytes(), 1);
        front.fill(&[13]);
        buffers.fill(&[14]);
        let mut bytes = [0; 4];
        buffers.memory().read_slice(&mut bytes, GuestAddress(0x3000)).unwrap();
        assert_eq!((bytes, front.len_bytes()), ([11, 12, 13, 14], 0));
        let mut peeked = [0xff; 20];
        assert_eq!((buffers.peek(&mut peeked[..2]), buffers.peek(&mut peeked), buffers.len_bytes()), (2, 16, 16));
        assert_eq!((peeked[0], peeked[15], peeked[16]), (0, 0, 0xff));
        assert_eq!(buffers.split_front(100).len_bytes(), 16);
        assert_eq!(buffers.len_bytes(), 0);
    }

    #[test]
    fn one_call_gets_at_most_iov_max_parts() {
        let mut buffers = GuestBuffers::new(Arc::new(memory::reserve(1).unwrap()));
        for _ in 0..1500 {
            buffers.push(GuestAddress(0), 2).unwrap();
        }
        assert_eq!(buffers.iovecs().len(), 1024);
        buffers.advance(2048);
        assert_eq!((buffers.iovecs().len(), buffers.len_bytes()), (476, 952));
    }

    #[test]
    fn buffers_are_consumed_like_a_list_of_all_bytes() {
        let memory = Arc::new(memory::reserve(1).unwrap());
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut buffers = GuestBuffers::new(memory.clone());
            // The guest addresses of the bytes that are left.
            let mut left = Vec::new();
            for _ in 0..30 {
                match random.u8(..5) {
                    0 | 1 => {
                        let (address, len) = (random.u64(..8192), random.u32(..40));
                        buffers.push(GuestAddress(address), len).unwrap();
                        left.extend(address..address + u64::from(len));
                    }
                    2 => {
                        let count = random.usize(..60);
                        buffers.advance(count);
                        left.drain(..count.min(left.len()));
                    }
                    3 => {
                        let count = random.usize(..60);
                        let front = buffers.split_front(count as u64);
                        let taken: Vec<u64> = left.drain(..count.min(left.len())).collect();
                        assert_eq!(addresses(&front), taken, "seed {seed}");
                        assert_eq!(front.len_bytes(), taken.len() as u64, "seed {seed}");
                    }
                    _ => {
                        let bytes: Vec<u8> = (0..random.usize(..60)).map(|_| random.u8(..)).collect();
                        buffers.fill(&bytes);
                        let places: Vec<u64> = left.drain(..bytes.len().min(left.len())).collect();
                        // What is written last stays, where buffers overlap.
                        let last: std::collections::HashMap<_, _> = places.iter().zip(&bytes).collect();
                        for (place, byte) in last {
                            assert_eq!(memory.read_obj::<u8>(GuestAddress(*place)).unwrap(), *byte, "seed {seed}");
                        }
                    }
                }
                assert_eq!(addresses(&buffers), left, "seed {seed}");
                assert_eq!(buffers.len_bytes(), left.len() as u64, "seed {seed}");
                let mut front = [0; 16];
                let count = buffers.peek(&mut front);
                assert_eq!(count, left.len().min(16), "seed {seed}");
                for (place, byte) in left.iter().zip(&front[..count]) {
                    assert_eq!(memory.read_obj::<u8>(GuestAddress(*place)).unwrap(), *byte, "seed {seed}");
                }
            }
        }
    }

    /// The guest addresses of all remaining bytes.
    fn addresses(buffers: &GuestBuffers) -> Vec<u64> {
        let base = buffers.memory().get_host_address(GuestAddress(0)).unwrap() as u64;
        let start = |iovec: &libc::iovec| iovec.iov_base as u64 - base;
        let rest = buffers.iovecs().iter();
        rest.flat_map(|iovec| start(iovec)..start(iovec) + iovec.iov_len as u64).collect()
    }
}
