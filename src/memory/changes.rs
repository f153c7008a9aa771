//! Which pages of guest memory have changed since it was the content of a file, and their content. The memory is a private mapping
//! of that file, so the kernel gives a page of its own to whoever writes: a vCPU, a device, io_uring or vhost-net.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::save::{BLOCK_BYTES, PAGE_BYTES, PageUse, parts, write_part};
use super::{GuestMemory, Region};
use crate::sys::mapping::Pages;

/// The size of a bitmap of the pages of `memory_bytes`.
pub const fn bitmap_bytes(memory_bytes: u64) -> u64 {
    memory_bytes.div_ceil(PAGE_BYTES as u64 * 8)
}

/// Makes guest memory a private mapping of `file`, to which [`write_to`](super::write_to) has just written it, so that it is known
/// which pages change from now on. `pages` applies to memory that the guest returns. No vCPU and no device may run.
pub fn track(memory: &GuestMemory, file: &File, pages: Pages) -> Result<()> {
    let mut offset_bytes = 0;
    for region in memory.iter() {
        region.mapping.become_file(file.as_fd(), offset_bytes, pages).context("map the memory of the snapshot")?;
        offset_bytes += region.len();
    }
    Ok(())
}

/// Writes the pages that have changed since `memory` was that of the file that it maps to `file`, an empty one, each at its place:
/// the rest stays a hole. Sets their bits in `changed`, from the lowest bit of the first byte, so that pages that have become zero,
/// which stay holes as well, are known. `used_pages` is as for [`write_to`](super::write_to). No vCPU and no device may run.
///
/// A page may be written that is as before. Returns the number of bytes written. Fails if the memory is not that of a file.
pub fn write_changes(memory: &GuestMemory, file: &File, used_pages: &File, changed: &File) -> Result<u64> {
    let is_tracked = memory.iter().all(|region| region.mapping.is_of_file());
    ensure!(is_tracked, "changes of its memory are not known (with --hugepages of the host's pool they never are)");
    let total_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(total_bytes).context("extend the memory file")?;
    changed.set_len(bitmap_bytes(total_bytes)).context("extend the file of changed pages")?;
    let (mut offset_bytes, mut written_bytes) = (0, 0);
    let mut buffer = vec![0; BLOCK_BYTES];
    for region in memory.iter() {
        for at in (0..region.len()).step_by(BLOCK_BYTES) {
            let mut uses = vec![0; BLOCK_BYTES.min((region.len() - at) as usize) / PAGE_BYTES];
            let first = (offset_bytes + at) / PAGE_BYTES as u64;
            used_pages.read_exact_at(&mut uses, first).context("read which memory the guest uses")?;
            note_changes(region, at, &uses, changed, first)?;
            for range in parts(&uses, |page| *page == [PageUse::Own as u8]) {
                let part = buffer.get_mut(..range.len() * PAGE_BYTES).context("a page outside of its block")?;
                let start = at + (range.start * PAGE_BYTES) as u64;
                written_bytes += write_part(region, start, offset_bytes, part, file)?;
            }
        }
        offset_bytes += region.len();
    }
    Ok(written_bytes)
}

/// Sets the bits of pages of a block: those with content of their own, and those that were given back. `first` is the first page.
fn note_changes(region: &Region, at: u64, uses: &[u8], changed: &File, first: u64) -> Result<()> {
    let mut bits = vec![0_u8; uses.len().div_ceil(8)];
    for (index, page) in uses.iter().enumerate() {
        let offset_bytes = at as usize + index * PAGE_BYTES;
        let is_changed = *page == PageUse::Own as u8 || region.mapping.is_replaced(offset_bytes);
        if let Some(byte) = bits.get_mut(index / 8) {
            *byte |= u8::from(is_changed) << (index % 8);
        }
    }
    if bits.iter().any(|byte| *byte != 0) {
        // Blocks begin at multiples of their size, so that no two share a byte.
        changed.write_all_at(&bits, first / 8).context("write the file of changed pages")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    use super::*;
    use crate::memory::{self, give_back, write_to};
    use crate::sys;

    const PAGES: u64 = 1024;
    const MEMORY_MIB: u64 = 4;

    /// What `monitor/used_pages.rs` finds, for this process.
    fn used(memory: &GuestMemory) -> File {
        let pagemap = File::open("/proc/self/pagemap").unwrap();
        let file = sys::memory_file(c"used").unwrap();
        let start = memory.iter().next().unwrap().get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
        for page in 0..PAGES {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, (start / 4096 + page) * 8).unwrap();
            let entry = u64::from_ne_bytes(entry);
            let used = if entry >> 62 == 0 { PageUse::None } else { PageUse::Own };
            let used = if used == PageUse::Own && entry >> 61 & 1 == 1 { PageUse::OfFile } else { used };
            file.write_all_at(&[used as u8], page).unwrap();
        }
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    /// Changes that a guest makes, or a device, or the balloon.
    fn change(memory: &GuestMemory, random: &mut fastrand::Rng) {
        for _ in 0..40 {
            let page = random.u64(..PAGES);
            let at = GuestAddress(page * 4096);
            match random.u8(..5) {
                0 => drop(give_back(memory, at, random.u64(1..6) * 4096).unwrap()),
                1 => memory.write_slice(&[0; 4096], at).unwrap(),
                2 => assert!(memory.read_obj::<u8>(at).is_ok()),
                // As io_uring and vhost-net do, by the kernel.
                3 => {
                    let slice = memory.get_slice(at, 4096).unwrap();
                    let mut zeroes = std::io::repeat(random.u8(..)).take(100);
                    let mut bytes = [0; 100];
                    zeroes.read_exact(&mut bytes).unwrap();
                    slice.write_slice(&bytes, 0).unwrap();
                }
                _ => memory.write_obj(random.u64(..), at).unwrap(),
            }
        }
    }

    #[test]
    fn the_file_with_all_changes_is_the_memory() {
        for seed in 0..40 {
            let mut random = fastrand::Rng::with_seed(seed);
            let memory = memory::reserve(MEMORY_MIB).unwrap();
            change(&memory, &mut random);
            let base = sys::memory_file(c"base").unwrap();
            write_to(&memory, &base, Some(&used(&memory))).unwrap();
            track(&memory, &base, Pages::Transparent).unwrap();
            for _ in 0..3 {
                change(&memory, &mut random);
                let [diff, changed, whole] =
                    [c"diff", c"changed", c"whole"].map(|name| sys::memory_file(name).unwrap());
                let written_bytes = write_changes(&memory, &diff, &used(&memory), &changed).unwrap();
                write_to(&memory, &whole, None).unwrap();
                let (bits, changes) = (content(&changed), content(&diff));
                assert_eq!(bits.len() as u64, bitmap_bytes(MEMORY_MIB << 20));
                let mut merged = content(&base);
                for page in (0..PAGES as usize).filter(|page| bits[page / 8] >> (page % 8) & 1 == 1) {
                    let range = page * 4096..(page + 1) * 4096;
                    merged[range.clone()].copy_from_slice(&changes[range]);
                }
                assert!(merged == content(&whole), "seed {seed}");
                let count: u32 = bits.iter().map(|byte| byte.count_ones()).sum();
                assert!(written_bytes <= u64::from(count) * 4096 && count < 500, "seed {seed}: {count} pages");
            }
        }
    }

    #[test]
    fn changes_of_memory_that_is_not_tracked_are_not_known() {
        let memory = memory::reserve(MEMORY_MIB).unwrap();
        let file = || sys::memory_file(c"file").unwrap();
        let error = write_changes(&memory, &file(), &file(), &file()).unwrap_err().to_string();
        assert!(error.starts_with("changes of its memory are not known"), "{error}");
    }
}
