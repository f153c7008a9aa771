//! Guest memory: reserved when the machine is built, and populated page by page as the guest touches it.

mod buffers;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection,
    GuestRegionMmap, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

pub use buffers::GuestBuffers;

use crate::layout;
use crate::sys::mapping::{Mapping, Pages};

/// The size of the pieces in which memory is written to a file.
const PIECE_BYTES: usize = 64 << 10;

/// All of a guest's memory. Clones share it.
pub type GuestMemory = GuestRegionCollection<Region>;

/// A contiguous region of guest memory. Its host address is a multiple of 2 MiB, like its guest address.
#[derive(Debug)]
pub struct Region {
    view: GuestRegionMmap<()>,
    // Last, so that it is unmapped after everything that uses its address.
    mapping: Mapping,
}

impl Region {
    fn new(base: u64, len_bytes: u64, pages: Pages) -> io::Result<Region> {
        let len_bytes = usize::try_from(len_bytes).map_err(io::Error::other)?;
        Region::of(base, len_bytes, Mapping::new(len_bytes, pages)?)
    }

    #[allow(unsafe_code)]
    fn of(base: u64, len_bytes: usize, mapping: Mapping) -> io::Result<Region> {
        let builder = MmapRegionBuilder::new(len_bytes).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the address is the start of a mapping of this length, which `Region` keeps as long as the view
        // exists.
        let view = unsafe { builder.with_raw_mmap_pointer(mapping.start()) }.build();
        let view = GuestRegionMmap::new(view.map_err(io::Error::other)?, GuestAddress(base));
        let view = view.ok_or_else(|| io::Error::other("guest memory wraps"))?;
        Ok(Region { view, mapping })
    }
}

impl GuestMemoryRegion for Region {
    type B = ();

    fn len(&self) -> GuestUsize {
        self.view.len()
    }

    fn start_addr(&self) -> GuestAddress {
        self.view.start_addr()
    }

    fn bitmap(&self) -> BS<'_, ()> {
        self.view.bitmap()
    }

    fn get_host_address(&self, address: MemoryRegionAddress) -> guest_memory::Result<*mut u8> {
        self.view.get_host_address(address)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> guest_memory::Result<VolatileSlice<'_, BS<'_, ()>>> {
        self.view.get_slice(offset, count)
    }
}

impl GuestMemoryRegionBytes for Region {}

/// Reserves `memory_mib` MiB of private, anonymous guest memory around the device hole, in transparent huge pages.
pub fn reserve(memory_mib: u64) -> Result<GuestMemory> {
    create(memory_mib, Pages::Transparent, None)
}

/// Reserves `memory_mib` MiB of private, anonymous guest memory around the device hole.
///
/// With `prefault` all pages are allocated, until it returns true. Without it no page is touched: the host allocates a page when the guest first uses it. Fails if the address
/// space is unavailable, or if the host has too few huge pages.
pub fn create(memory_mib: u64, pages: Pages, prefault: Option<&dyn Fn() -> bool>) -> Result<GuestMemory> {
    let memory_bytes = memory_mib.checked_mul(1 << 20).context("memory size overflows")?;
    let ranges = layout::memory_ranges(memory_bytes);
    let regions = ranges.iter().map(|(base, len)| Region::new(*base, *len, pages)).collect::<io::Result<Vec<_>>>();
    let regions = regions.with_context(|| match pages {
        Pages::Pool(page_bytes) => no_pool(memory_mib, page_bytes, ranges.iter().map(|(_, len)| *len)),
        _ => format!("reserve {memory_mib} MiB of guest memory"),
    })?;
    if let Some(is_interrupted) = prefault {
        let populated = regions.iter().try_for_each(|region| region.mapping.populate(is_interrupted));
        let unsupported = |error: &io::Error| error.kind() == io::ErrorKind::InvalidInput;
        populated.map_err(|error| {
            let needs = if unsupported(&error) { ", which needs Linux 5.14" } else { "" };
            anyhow::Error::new(error).context(format!("allocate {memory_mib} MiB of guest memory (--prefault{needs})"))
        })?;
    }
    Ok(GuestMemory::from_regions(regions)?)
}

/// Maps `memory_mib` MiB of guest memory from a file that [`write_to`] has written. It is read as the guest accesses it, and
/// never written.
pub fn map(memory_mib: u64, file: &File) -> Result<GuestMemory> {
    let memory_bytes = memory_mib.checked_mul(1 << 20).context("memory size overflows")?;
    let found_bytes = file.metadata().context("inspect the memory of the snapshot")?.len();
    ensure!(found_bytes == memory_bytes, "the memory of the snapshot has {found_bytes} bytes, not {memory_bytes}");
    let mut offset_bytes = 0;
    let region = |(base, len): &(u64, u64)| -> io::Result<Region> {
        let len_bytes = usize::try_from(*len).map_err(io::Error::other)?;
        let mapping = Mapping::of_file(len_bytes, file.as_fd(), offset_bytes)?;
        offset_bytes += *len;
        Region::of(*base, len_bytes, mapping)
    };
    let regions = layout::memory_ranges(memory_bytes).iter().map(region).collect::<io::Result<Vec<_>>>();
    Ok(GuestMemory::from_regions(regions.context("map the memory of the snapshot")?)?)
}

/// Writes all guest memory to an empty file, regions one after another. Pages that were never used, or are zero, become
/// holes. No vCPU and no device may run.
pub fn write_to(memory: &GuestMemory, file: &File) -> Result<()> {
    let total_bytes = memory.iter().map(GuestMemoryRegion::len).sum();
    file.set_len(total_bytes).context("extend the memory file")?;
    let (mut offset_bytes, mut piece) = (0, vec![0; PIECE_BYTES]);
    for region in memory.iter() {
        let mut at = 0;
        while at < region.len() {
            let len = PIECE_BYTES.min((region.len() - at) as usize);
            let piece = &mut piece[..len];
            region.read_slice(piece, MemoryRegionAddress(at))?;
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, offset_bytes + at).context("write the memory file")?;
            }
            at += len as u64;
        }
        offset_bytes += region.len();
    }
    Ok(())
}

/// Whether `memory` consists of pages from the host's pool.
pub fn is_of_pool(memory: &GuestMemory) -> bool {
    memory.iter().any(|region| !region.mapping.can_give_back())
}

/// Tells the user how many huge pages are missing.
fn no_pool(memory_mib: u64, page_bytes: u64, regions: impl Iterator<Item = u64>) -> String {
    let pages: u64 = regions.map(|len_bytes| len_bytes.div_ceil(page_bytes)).sum();
    let dir = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes >> 10);
    let count = |name: &str| {
        let text = std::fs::read_to_string(format!("{dir}/{name}")).ok()?;
        text.trim().parse::<u64>().ok()
    };
    let size = if page_bytes >= 1 << 30 { "1 GiB" } else { "2 MiB" };
    let what = format!("reserve {memory_mib} MiB of guest memory in {pages} huge pages of {size}");
    let all = count("nr_hugepages").zip(count("free_hugepages")).zip(count("resv_hugepages"));
    let Some(((total, free), reserved)) = all else {
        return format!("{what}, which this host does not have: remove --hugepages");
    };
    let missing = pages.saturating_sub(free.saturating_sub(reserved));
    format!(
        "{what}, of which the host lacks {missing}: add them with `echo {} | sudo tee {dir}/nr_hugepages`, or remove --hugepages",
        total.saturating_add(missing)
    )
}

/// Returns the whole pages within `len_bytes` of guest memory from `address` to the host; the guest reads zeroes
/// afterwards. Pages of the host's pool are kept with their content. Parts that are not memory are skipped, so any range
/// from a guest may be passed.
pub fn give_back(memory: &GuestMemory, address: GuestAddress, len_bytes: u64) -> io::Result<()> {
    let end = address.0.saturating_add(len_bytes);
    for region in memory.iter() {
        let base = region.start_addr().0;
        let (first, last) = (address.0.max(base), end.min(base.saturating_add(region.len())));
        if first < last {
            // Both casts are lossless, since the region is mapped.
            region.mapping.give_back((first - base) as usize, (last - first) as usize)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use vm_memory::Bytes;

    use super::*;
    use crate::sys::smaps;

    #[test]
    fn huge_pages_of_guest_and_host_coincide() {
        const HUGE_PAGE_BYTES: u64 = 2 << 20;
        // With odd sizes in between, which shift the following mapping.
        let memories = [33, 1, 6 << 10, 35].map(|memory_mib| reserve(memory_mib).unwrap());
        for region in memories.iter().flat_map(|memory| memory.iter()) {
            let host = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
            assert_eq!((host % HUGE_PAGE_BYTES, region.start_addr().0 % HUGE_PAGE_BYTES), (0, 0));
        }
    }

    #[test]
    fn all_memory_is_usable_and_nothing_beyond() {
        let memory = reserve(33).unwrap();
        memory.write_obj(7_u8, GuestAddress((33 << 20) - 1)).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress((33 << 20) - 1)).unwrap(), 7);
        assert!(memory.read_obj::<u8>(GuestAddress(33 << 20)).is_err());
    }

    /// The sizes of the pages that back `memory` (proc_pid_smaps(5)): the value of `name` in bytes.
    fn backing_bytes(memory: &GuestMemory, name: &str) -> u64 {
        let region = memory.iter().next().unwrap();
        smaps::bytes_at(region.get_host_address(MemoryRegionAddress(0)).unwrap() as usize, name)
    }

    #[test]
    fn prefaulted_memory_is_allocated_and_other_memory_is_not() {
        for (prefault, expected) in [(None, 0), (Some(&(|| false) as &dyn Fn() -> bool), 6 << 20)] {
            let memory = create(6, Pages::Small, prefault).unwrap();
            // The kernel may merge the mapping with one of another test.
            assert!(backing_bytes(&memory, "Rss:") >= expected);
            assert_eq!(backing_bytes(&memory, "AnonHugePages:"), 0);
        }
    }

    #[test]
    fn transparent_huge_pages_back_memory_unless_the_host_has_none() {
        let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
        if enabled.is_empty() || enabled.contains("[never]") {
            eprintln!("SKIPPED: this host has no transparent huge pages");
            return;
        }
        let memory = create(64, Pages::Transparent, Some(&|| false)).unwrap();
        // The host may have few contiguous pages.
        assert!(backing_bytes(&memory, "AnonHugePages:") > 0);
    }

    #[test]
    fn a_pool_without_huge_pages_is_an_error_that_says_how_to_add_them() {
        // More than any host's pool has.
        let error = format!("{:#}", create(64 << 20, Pages::Pool(2 << 20), None).unwrap_err());
        assert!(error.starts_with("reserve 67108864 MiB of guest memory in 33554432 huge pages of 2 MiB, "), "{error}");
        assert!(error.contains("remove --hugepages: "), "{error}");
        if std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
            assert!(error.contains("/hugepages-2048kB/nr_hugepages`, or remove"), "{error}");
        }
    }

    /// Counts the host pages that back the first `pages` of guest memory.
    fn backed(memory: &GuestMemory, pages: u64) -> usize {
        let is_backed = |page: &u64| {
            // Only a page that was returned reads as zeroes.
            memory.read_obj::<u8>(GuestAddress(page * 4096)).unwrap() != 0
        };
        (0..pages).filter(is_backed).count()
    }

    #[test]
    fn returned_memory_is_whole_pages_and_reads_as_zeroes() {
        let memory = reserve(1).unwrap();
        for page in 0..16 {
            memory.write_obj(1_u8, GuestAddress(page * 4096)).unwrap();
        }
        give_back(&memory, GuestAddress(4096), 2 * 4096).unwrap();
        assert_eq!(backed(&memory, 16), 14);
        // Partial pages stay.
        give_back(&memory, GuestAddress(4 * 4096 + 1), 4095).unwrap();
        give_back(&memory, GuestAddress(4 * 4096), 4095).unwrap();
        give_back(&memory, GuestAddress(4 * 4096 + 1), 2 * 4096 - 2).unwrap();
        assert_eq!(backed(&memory, 16), 14);
        give_back(&memory, GuestAddress(4 * 4096 + 1), 2 * 4096 - 1).unwrap();
        assert_eq!(backed(&memory, 16), 13);
    }

    #[test]
    fn addresses_outside_of_memory_are_not_returned() {
        let memory = reserve(1).unwrap();
        memory.write_obj(1_u8, GuestAddress((1 << 20) - 4096)).unwrap();
        for (address, len_bytes) in
            [(1 << 20, 4096), (u64::MAX, u64::MAX), (u64::MAX - 4095, 4096), (0, 0), (1 << 19, 0)]
        {
            give_back(&memory, GuestAddress(address), len_bytes).unwrap();
        }
        assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 20) - 4096)).unwrap(), 1);
        give_back(&memory, GuestAddress((1 << 20) - 4096), u64::MAX).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 20) - 4096)).unwrap(), 0);
    }

    #[test]
    fn a_range_across_the_hole_is_returned_on_both_sides() {
        const HOLE: (u64, u64) = (layout::MMIO_HOLE_START, layout::MMIO_HOLE_END);
        let memory = reserve(3073).unwrap();
        let places = [HOLE.0 - 8192, HOLE.0 - 4096, HOLE.1, HOLE.1 + 4096].map(GuestAddress);
        places.iter().for_each(|place| memory.write_obj(1_u8, *place).unwrap());
        give_back(&memory, places[1], HOLE.1 + 4096 - places[1].0).unwrap();
        assert_eq!(places.map(|place| memory.read_obj::<u8>(place).unwrap()), [1, 0, 0, 1]);
    }

    #[test]
    fn any_range_returns_the_whole_pages_within_it_and_no_others() {
        const HOLE: (u64, u64) = (layout::MMIO_HOLE_START, layout::MMIO_HOLE_END);
        const PAGE_BYTES: u64 = 4096;
        let memory = reserve(3073).unwrap();
        // On both sides of the hole.
        let pages: Vec<u64> =
            (1..=8).map(|n| HOLE.0 - n * PAGE_BYTES).chain((0..8).map(|n| HOLE.1 + n * PAGE_BYTES)).collect();
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            pages.iter().for_each(|page| memory.write_slice(&[1; PAGE_BYTES as usize], GuestAddress(*page)).unwrap());
            let mut place = || {
                let page = random.choice(&pages).copied().unwrap() + PAGE_BYTES * random.u64(..2);
                page.saturating_add_signed(random.i64(-2..3))
            };
            let (start, end) = (place(), place());
            let (start, end) = (start.min(end), if random.u8(..8) == 0 { u64::MAX } else { start.max(end) });
            give_back(&memory, GuestAddress(start), end - start).unwrap();
            for page in &pages {
                let is_within = start <= *page && page + PAGE_BYTES <= end;
                let mut bytes = [0; PAGE_BYTES as usize];
                memory.read_slice(&mut bytes, GuestAddress(*page)).unwrap();
                let expected = if is_within { 0 } else { 1 };
                assert!(bytes == [expected; PAGE_BYTES as usize], "seed {seed}: {page:#x} of {start:#x}..{end:#x}");
            }
        }
    }
}
