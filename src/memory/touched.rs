//! Which pages of a saved machine's memory its guest touches after it was restored, in a record of 8 bytes per run of pages.
//!
//! A machine whose memory gets these pages in advance, while it waits for KVM, has fewer and shorter VM exits: a page that was
//! written to is a copy from the start, so that it is not mapped for reading first and again afterwards.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::GuestMemory;
use super::save::PAGE_BYTES;

/// The size of a run: the number of its first page, and twice the number of its pages, plus one if they are written to.
const RUN_BYTES: usize = 8;
/// The maximum size of a record.
pub const RECORD_BYTES_MAX: usize = 8192 * RUN_BYTES;
/// The maximum number of pages that are copied in advance: 16 MiB. A machine that writes to more does so because of its command, and
/// the next command may be another one.
const WRITTEN_PAGES_MAX: u32 = 4096;
/// How many pages are provided before it is asked again whether that is to stop.
const PART_PAGES: usize = 512;

/// Adjacent pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Run {
    first: u32,
    pages: u32,
    is_written: bool,
}

/// A record that is being made.
#[derive(Debug, Default)]
pub struct Recorder {
    runs: Vec<Run>,
    written_pages: u32,
}

impl Recorder {
    /// Adds page `number`, counted from the start of the file, which is above those of all before.
    pub fn add(&mut self, number: u32, is_written: bool) {
        self.written_pages += u32::from(is_written);
        match self.runs.last_mut() {
            Some(last) if last.is_written == is_written && last.first + last.pages == number => last.pages += 1,
            _ => self.runs.push(Run { first: number, pages: 1, is_written }),
        }
    }

    /// The record. It is empty if there are too many pages.
    pub fn finish(self) -> Vec<u8> {
        if self.written_pages > WRITTEN_PAGES_MAX || self.runs.len() > RECORD_BYTES_MAX / RUN_BYTES {
            return Vec::new();
        }
        let bytes =
            |run: &Run| [run.first.to_le_bytes(), (run.pages << 1 | u32::from(run.is_written)).to_le_bytes()].concat();
        self.runs.iter().flat_map(bytes).collect()
    }
}

/// The runs of a record, which may contain anything.
fn runs(record: &[u8]) -> impl Iterator<Item = Run> {
    let (runs, _) = record.as_chunks::<RUN_BYTES>();
    runs.iter().map(|run| {
        let word = u64::from_le_bytes(*run);
        let (first, length) = (word as u32, (word >> 32) as u32);
        Run { first, pages: length >> 1, is_written: length & 1 == 1 }
    })
}

/// Provides the pages of a record in advance, until `is_stopped`: those of the file, or copies of them. Their content stays as it is.
/// What is not in the memory, or not possible on this host, is left out.
pub fn populate(memory: &GuestMemory, record: &[u8], is_stopped: impl Fn() -> bool) {
    let memory_pages = memory.iter().map(GuestMemoryRegion::len).sum::<u64>() / PAGE_BYTES as u64;
    for written in [true, false] {
        let mut left = WRITTEN_PAGES_MAX;
        for run in runs(record).filter(|run| run.is_written == written) {
            let pages = if written { run.pages.min(left) } else { run.pages };
            left = left.saturating_sub(pages);
            let first = u64::from(run.first);
            let end = memory_pages.min(first + u64::from(pages));
            for part in (first..end).step_by(PART_PAGES) {
                if is_stopped() {
                    return;
                }
                let part_end = end.min(part + PART_PAGES as u64);
                populate_range(memory, part * PAGE_BYTES as u64, part_end * PAGE_BYTES as u64, written);
            }
        }
    }
}

/// Provides the pages between two offsets in the file.
fn populate_range(memory: &GuestMemory, start: u64, end: u64, written: bool) {
    let mut base = 0;
    for region in memory.iter() {
        let (first, last) = (start.max(base), end.min(base + region.len()));
        if first < last {
            let _ = region.mapping.populate_part((first - base) as usize, (last - first) as usize, written);
        }
        base += region.len();
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    use super::*;
    use crate::memory;
    use crate::sys::mapping::Pages;

    fn record(pages: impl IntoIterator<Item = (u32, bool)>) -> Vec<u8> {
        let mut recorder = Recorder::default();
        pages.into_iter().for_each(|(number, is_written)| recorder.add(number, is_written));
        recorder.finish()
    }

    #[test]
    fn adjacent_pages_of_one_kind_are_a_run() {
        let record = record([(3, false), (4, false), (5, true), (6, true), (9, true)]);
        let found: Vec<_> = runs(&record).map(|run| (run.first, run.pages, run.is_written)).collect();
        assert_eq!(found, [(3, 2, false), (5, 2, true), (9, 1, true)]);
    }

    #[test]
    fn a_record_of_too_much_is_empty() {
        assert!(record((0..=WRITTEN_PAGES_MAX).map(|number| (number, true))).is_empty());
        assert!(record((0..=RECORD_BYTES_MAX as u32).map(|number| (number * 2, false))).is_empty());
        assert_eq!(record((0..WRITTEN_PAGES_MAX).map(|number| (number, true))).len(), RUN_BYTES);
    }

    #[test]
    fn pages_keep_their_content_and_only_those_written_to_are_copies() {
        let file = tempfile::tempfile().unwrap();
        memory::write_to(&memory::create(32, Pages::Small, None).unwrap(), &file, None).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"content", 7 * PAGE_BYTES as u64).unwrap();
        let memory = memory::map(32, &file, Pages::Small, None).unwrap();
        // The last one is beyond the memory.
        let hostile = [record([(2, false), (7, true), (8191, true)]), vec![0xff; 8], vec![1; 5]].concat();
        populate(&memory, &hostile, || false);
        let region = memory.iter().next().unwrap();
        let start = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
        let pagemap = std::fs::File::open("/proc/self/pagemap").unwrap();
        let is_copy = |page: u64| {
            let mut entry = [0; 8];
            let at = (start / PAGE_BYTES as u64 + page) * 8;
            std::os::unix::fs::FileExt::read_exact_at(&pagemap, &mut entry, at).unwrap();
            u64::from_ne_bytes(entry) >> 61 == 0b100
        };
        assert_eq!([2, 7, 9, 8191].map(is_copy), [false, true, false, true]);
        // One run is longer than what is provided at once.
        let calls = std::cell::Cell::new(0);
        populate(&memory, &record((1000..2000).map(|page| (page, true))), || calls.replace(calls.get() + 1) > 0);
        assert_eq!([1000, 1511, 1512].map(is_copy), [true, true, false]);
        let mut found = [0; 7];
        memory.read_slice(&mut found, GuestAddress(7 * PAGE_BYTES as u64)).unwrap();
        assert_eq!(&found, b"content");
    }
}
