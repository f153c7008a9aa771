//! Writes guest memory to a file, from which [`map`](super::map) maps it again, and leaves out what the guest does not use.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::{GuestMemory, Region};

pub(super) const PAGE_BYTES: usize = 4096;
/// The amount that is looked at together.
pub(super) const BLOCK_BYTES: usize = 2 << 20;

/// What the host has for a page of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageUse {
    /// Nothing: it is zero, or that of the file which is mapped.
    None = 0,
    /// A page of the file that is mapped, in the page cache.
    OfFile = 1,
    /// A page of its own, in memory or in swap.
    Own = 2,
}

/// Writes all guest memory to an empty file, regions one after another. No vCPU and no device may run.
///
/// Pages that are zero become holes. `used_pages` has a byte for each page, in order: those with [`PageUse::None`], which the guest has
/// never used or has given back, are not even read, which would allocate page tables for them. Returns the number of bytes written.
pub fn write_to(memory: &GuestMemory, file: &File, used_pages: Option<&File>) -> Result<u64> {
    let total_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(total_bytes).context("extend the memory file")?;
    let (mut offset_bytes, mut written_bytes) = (0, 0);
    let mut block = vec![0; BLOCK_BYTES];
    for region in memory.iter() {
        // What is not present in a mapping of a file is the file's content.
        let used_pages = used_pages.filter(|_| !region.mapping.is_of_file());
        for at in (0..region.len()).step_by(BLOCK_BYTES) {
            let pages = BLOCK_BYTES.min((region.len() - at) as usize) / PAGE_BYTES;
            let first = (offset_bytes + at) / PAGE_BYTES as u64;
            let used = used_parts(first, pages, used_pages).context("read which memory the guest uses")?;
            for range in used {
                let content = block.get_mut(range.clone()).context("a page outside of its block")?;
                written_bytes += write_part(region, at + range.start as u64, offset_bytes, content, file)?;
            }
        }
        offset_bytes += region.len();
    }
    Ok(written_bytes)
}

/// Writes the part of a region at `at` that `buffer` has room for to the file, where the region begins at `offset_bytes`, except for
/// pages that are zero. Returns the number of bytes written.
pub(super) fn write_part(region: &Region, at: u64, offset_bytes: u64, buffer: &mut [u8], file: &File) -> Result<u64> {
    region.read_slice(buffer, MemoryRegionAddress(at))?;
    let mut written_bytes = 0;
    for part in parts(buffer, |page| *page != [0; PAGE_BYTES]) {
        let bytes = buffer.get(part.clone()).unwrap_or_default();
        file.write_all_at(bytes, offset_bytes + at + part.start as u64).context("write the memory file")?;
        written_bytes += bytes.len() as u64;
    }
    Ok(written_bytes)
}

/// The ranges of bytes that may have content, within a block of `pages` pages, of which `first` is the first.
fn used_parts(first: u64, pages: usize, used_pages: Option<&File>) -> io::Result<Vec<Range<usize>>> {
    let all = 0..pages * PAGE_BYTES;
    let Some(used_pages) = used_pages else { return Ok(vec![all]) };
    let mut bytes = vec![0; pages];
    used_pages.read_exact_at(&mut bytes, first)?;
    let scale = |range: Range<usize>| range.start * PAGE_BYTES..range.end * PAGE_BYTES;
    Ok(parts(&bytes, |byte| *byte != [0]).into_iter().map(scale).collect())
}

/// The ranges of consecutive elements of `N` bytes that are `wanted`.
pub(super) fn parts<const N: usize>(bytes: &[u8], wanted: impl Fn(&[u8; N]) -> bool) -> Vec<Range<usize>> {
    let mut parts: Vec<Range<usize>> = Vec::new();
    let (elements, _) = bytes.as_chunks::<N>();
    for (index, _) in elements.iter().enumerate().filter(|(_, element)| wanted(element)) {
        let (start, end) = (index * N, (index + 1) * N);
        match parts.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => parts.push(start..end),
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::{self, give_back};
    use crate::sys;
    use crate::sys::mapping::Pages;

    fn map(memory_mib: u64, file: &File) -> Result<GuestMemory> {
        memory::map(memory_mib, file, Pages::Transparent, None)
    }

    fn saved(memory: &GuestMemory, used_pages: Option<&File>) -> (File, u64) {
        let file = sys::memory_file(c"saved").unwrap();
        let written_bytes = write_to(memory, &file, used_pages).unwrap();
        (file, written_bytes)
    }

    #[test]
    fn memory_is_saved_whether_it_is_known_which_is_used_or_not() {
        let memory = memory::reserve(3073).unwrap();
        let hole = (crate::layout::MMIO_HOLE_START, crate::layout::MMIO_HOLE_END);
        let places = [0, 4096, 12 << 20, hole.0 - 4096, hole.1, hole.1 + (1 << 20) - 1].map(GuestAddress);
        for (value, place) in (1_u8..).zip(places) {
            memory.write_obj(value, place).unwrap();
        }
        memory.write_obj(0_u8, GuestAddress(64 << 20)).unwrap();
        memory.write_obj(9_u8, GuestAddress(20 << 20)).unwrap();
        give_back(&memory, GuestAddress(20 << 20), 4096).unwrap();
        let used = sys::memory_file(c"used").unwrap();
        used.set_len((3073 << 20) / 4096).unwrap();
        for place in places {
            let above = place.0.checked_sub(hole.1).map_or(place.0, |above| hole.0 + above);
            used.write_all_at(&[1], above / 4096).unwrap();
        }
        for used_pages in [Some(&used), None] {
            let (file, written_bytes) = saved(&memory, used_pages);
            assert_eq!((written_bytes, file.metadata().unwrap().len()), (6 * 4096, 3073 << 20));
            assert!(file.metadata().unwrap().blocks() * 512 <= 64 << 10);
            let restored = map(3073, &file).unwrap();
            assert_eq!(places.map(|place| restored.read_obj::<u8>(place).unwrap()), [1, 2, 3, 4, 5, 6]);
            assert_eq!(restored.read_obj::<u8>(GuestAddress(20 << 20)).unwrap(), 0);
        }
    }

    #[test]
    fn restored_memory_is_saved_with_what_was_never_read() {
        let memory = memory::reserve(4).unwrap();
        memory.write_obj(1_u8, GuestAddress(8192)).unwrap();
        let restored = map(4, &saved(&memory, None).0).unwrap();
        restored.write_obj(2_u8, GuestAddress(1 << 20)).unwrap();
        let none = sys::memory_file(c"used").unwrap();
        none.set_len(1024).unwrap();
        let again = map(4, &saved(&restored, Some(&none)).0).unwrap();
        assert_eq!([8192, 1 << 20].map(|at| again.read_obj::<u8>(GuestAddress(at)).unwrap()), [1, 2]);
    }

    #[test]
    fn parts_are_the_longest_that_are_wanted() {
        let of = |bytes: &[u8]| parts(bytes, |element: &[u8; 2]| element[0] == 1);
        assert_eq!(of(&[1, 0, 1, 0, 0, 0, 1, 9]), [0..4, 6..8]);
        assert_eq!(of(&[0, 1, 1]), []);
        assert_eq!(of(&[1, 1]), std::slice::from_ref(&(0..2)));
    }
}
