//! Which pages of a machine's memory are in use, as its supervisor sees them.
//!
//! The monitor gets only that: to whoever root opens it for, /proc/PID/pagemap also tells physical addresses.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::memory::PageUse;
use crate::memory::touched::Recorder;
use crate::sys;

const PAGE_BYTES: u64 = 4096;
/// Bits of an entry (Linux, Documentation/admin-guide/mm/pagemap.rst): the page is in memory, or in swap.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;
/// It is a page of a file, or shared: nobody has written to it through a private mapping.
const OF_FILE: u64 = 1 << 61;
const ENTRY_BYTES: u64 = size_of::<u64>() as u64;
/// The number of entries that are read together.
const ENTRIES: u64 = 64 << 10;

/// Writes a byte for each page of `ranges`, the addresses of guest memory in process `pid`, one after another: what
/// [`PageUse`] says. The process must not run meanwhile, or its guest must be paused.
pub fn of(pid: u32, ranges: &[Range<u64>]) -> io::Result<File> {
    let mut used = sys::memory_file(c"used-pages")?;
    look_at(pid, ranges, |uses| used.write_all(&uses.iter().map(|page| *page as u8).collect::<Vec<u8>>()))?;
    Ok(used)
}

/// A record of the pages that were touched, of memory that is mapped from a file (`memory/touched.rs`). The guest may run meanwhile.
pub fn touched(pid: u32, ranges: &[Range<u64>]) -> io::Result<Vec<u8>> {
    let (mut recorder, mut number) = (Recorder::default(), 0);
    look_at(pid, ranges, |uses| {
        for page in uses {
            if *page != PageUse::None {
                recorder.add(number, *page == PageUse::Own);
            }
            number += 1;
        }
        Ok(())
    })?;
    Ok(recorder.finish())
}

/// Passes the use of all pages of `ranges` to `take`, in order, many at once.
fn look_at(pid: u32, ranges: &[Range<u64>], mut take: impl FnMut(&[PageUse]) -> io::Result<()>) -> io::Result<()> {
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    for range in ranges {
        for start in (range.start..range.end).step_by((ENTRIES * PAGE_BYTES) as usize) {
            let pages = ENTRIES.min((range.end - start) / PAGE_BYTES);
            let mut entries = vec![0; (pages * ENTRY_BYTES) as usize];
            pagemap.read_exact_at(&mut entries, start / PAGE_BYTES * ENTRY_BYTES)?;
            let (entries, _) = entries.as_chunks();
            let use_of = |entry: &[u8; 8]| match u64::from_ne_bytes(*entry) {
                entry if entry & PRESENT_OR_SWAPPED == 0 => PageUse::None,
                entry if entry & OF_FILE != 0 => PageUse::OfFile,
                _ => PageUse::Own,
            };
            take(&entries.iter().map(use_of).collect::<Vec<_>>())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, SeekFrom};

    use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

    use super::*;
    use crate::memory;
    use crate::sys::mapping::Pages;

    #[test]
    fn only_pages_that_were_touched_are_in_use() {
        let memory = memory::create(512, Pages::Small, None).unwrap();
        for page in [0, 7, 131_071] {
            memory.write_obj(1_u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        }
        let start = memory.iter().next().unwrap().get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
        let range = start..start + (512 << 20);
        let mut used = of(std::process::id(), std::slice::from_ref(&range)).unwrap();
        let mut bytes = Vec::new();
        used.seek(SeekFrom::Start(0)).unwrap();
        used.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 131_072);
        let found: Vec<usize> = (0..bytes.len()).filter(|page| bytes[*page] == PageUse::Own as u8).collect();
        assert_eq!(found, [0, 7, 131_071]);
    }
}
