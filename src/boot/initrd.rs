//! Loads the initrd to the highest address that the kernel supports.

use anyhow::{Context, Result, bail};
use vm_memory::GuestMemoryBackend;

use super::Extent;
use super::part::Part;
use crate::layout;
use crate::memory::GuestMemory;

const PAGE_BYTES: u64 = 4096;

/// Reads `initrd` once, to the highest pages between `kernel_end` and `address_max` (inclusive), below the hole.
pub fn load(memory: &GuestMemory, initrd: &Part, kernel_end: u64, address_max: u64) -> Result<Extent> {
    let len = initrd.len_bytes();
    if len == 0 {
        bail!("the initrd is empty");
    }
    let memory_end = memory.last_addr().0.min(layout::MMIO_HOLE_START - 1) + 1;
    let top = memory_end.min(address_max.saturating_add(1));
    let start = top.checked_sub(len).map(|start| start & !(PAGE_BYTES - 1)).filter(|start| *start >= kernel_end);
    let Some(start) = start else {
        bail!(
            "the initrd of {} does not fit: the kernel ends at {}, and the initrd has to end below {}: increase --memory, or \
             use a smaller initrd",
            mib(len),
            mib(kernel_end),
            mib(top)
        );
    };
    initrd.copy_to(memory, start, 0, len).context("read initrd")?;
    Ok(Extent { start, end: start + len })
}

/// Formats `bytes` in MiB, rounded up.
fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes.div_ceil(1 << 20))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::boot::sample;
    use crate::memory;

    fn file(len: usize) -> Part {
        Part::whole(sample::file(&vec![0x5a; len])).unwrap()
    }

    #[test]
    fn only_the_given_part_of_a_file_is_read() {
        let memory = memory::reserve(32).unwrap();
        let part = Part::of(&sample::file(b"before070701after"), 6, 6).unwrap();
        let extent = load(&memory, &part, 0x20_0000, u64::MAX).unwrap();
        let mut bytes = [0; 7];
        memory.read_slice(&mut bytes, GuestAddress(extent.start)).unwrap();
        assert_eq!((&bytes, extent.len()), (b"070701\0", 6));
    }

    #[test]
    fn the_initrd_ends_in_the_last_page_of_memory() {
        let memory = memory::reserve(32).unwrap();
        let extent = load(&memory, &file(5000), 0x20_0000, u64::MAX).unwrap();
        assert_eq!(extent, Extent { start: (32 << 20) - 8192, end: (32 << 20) - 8192 + 5000 });
        let mut last = [0; 2];
        memory.read_slice(&mut last, GuestAddress(extent.end - 1)).unwrap();
        assert_eq!(last, [0x5a, 0]);
    }

    #[test]
    fn the_initrd_is_below_the_hole_and_the_kernels_limit() {
        let memory = memory::reserve(6 << 10).unwrap();
        assert_eq!(load(&memory, &file(4096), 0x20_0000, u64::MAX).unwrap().end, 0xc000_0000);
        assert_eq!(load(&memory, &file(4096), 0x20_0000, 0x7fff_ffff).unwrap().end, 0x8000_0000);
    }

    #[test]
    fn the_initrd_does_not_overlap_the_kernel() {
        let memory = memory::reserve(32).unwrap();
        let kernel_end = (32 << 20) - 4096;
        load(&memory, &file(4096), kernel_end, u64::MAX).unwrap();
        for (len, kernel_end) in [(4097, kernel_end), (1, kernel_end + 1), (33 << 20, 0)] {
            let error = load(&memory, &file(len), kernel_end, u64::MAX).unwrap_err().to_string();
            assert!(error.contains("--memory"), "{error}");
        }
    }

    #[test]
    fn an_empty_initrd_is_rejected() {
        let memory = memory::reserve(32).unwrap();
        assert_eq!(load(&memory, &file(0), 0, u64::MAX).unwrap_err().to_string(), "the initrd is empty");
    }
}
