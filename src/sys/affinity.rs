//! CPU affinity of threads.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of_val;

/// The maximum number of CPUs in Linux (CONFIG_NR_CPUS is at most 8192).
const CPUS_MAX: usize = 8192;
const WORD_BITS: usize = 64;

/// A set of CPUs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuMask([u64; CPUS_MAX / WORD_BITS]);

impl CpuMask {
    /// The set of these CPUs; numbers out of range are ignored.
    pub fn of(cpus: &[u32]) -> CpuMask {
        let mut mask = CpuMask::default();
        for cpu in cpus.iter().map(|cpu| *cpu as usize) {
            if let Some(word) = mask.0.get_mut(cpu / WORD_BITS) {
                *word |= 1 << (cpu % WORD_BITS);
            }
        }
        mask
    }

    /// Whether it contains the CPU.
    pub fn has(&self, cpu: u32) -> bool {
        let cpu = cpu as usize;
        self.0.get(cpu / WORD_BITS).is_some_and(|word| word >> (cpu % WORD_BITS) & 1 == 1)
    }
}

impl Default for CpuMask {
    fn default() -> CpuMask {
        CpuMask([0; CPUS_MAX / WORD_BITS])
    }
}

/// The affinity of a thread (sched_getaffinity(2)); 0 is the calling thread.
pub fn get(thread: i32) -> io::Result<CpuMask> {
    let mut mask = CpuMask::default();
    // SAFETY: the kernel writes at most the given number of bytes, which is the size of the mask.
    let result = unsafe { libc::sched_getaffinity(thread, size_of_val(&mask.0), mask.0.as_mut_ptr().cast()) };
    if result == 0 { Ok(mask) } else { Err(io::Error::last_os_error()) }
}

/// Sets the affinity of a thread; unavailable CPUs are ignored (sched_setaffinity(2)).
pub fn set(thread: i32, mask: &CpuMask) -> io::Result<()> {
    // SAFETY: the kernel reads at most the given number of bytes, which is the size of the mask.
    let result = unsafe { libc::sched_setaffinity(thread, size_of_val(&mask.0), mask.0.as_ptr().cast()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
