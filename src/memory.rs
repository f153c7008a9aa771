//! Guest memory: reserved when the machine is built, and populated page by page as the guest touches it.

mod buffers;
mod changes;
mod save;
pub mod touched;

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
pub use changes::{bitmap_bytes, track, write_changes};
pub use save::{PageUse, write_to};

use crate::layout;
use crate::sys::mapping::{Mapping, Pages};

/// The size of the pieces in which memory is read from a file.
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
/// With `prefault` all pages are allocated, until it returns true. Without it no page is touched: the host allocates a page
/// when the guest first uses it. Fails if the address space is unavailable, or if the host has too few huge pages.
pub fn create(memory_mib: u64, pages: Pages, prefault: Option<&dyn Fn() -> bool>) -> Result<GuestMemory> {
    let memory_bytes = memory_mib.checked_mul(1 << 20).context("memory size overflows")?;
    let ranges = layout::memory_ranges(memory_bytes);
    let regions = ranges.iter().map(|(base, len)| Region::new(*base, *len, pages)).collect::<io::Result<Vec<_>>>();
    let regions = regions.with_context(|| match pages {
        Pages::Pool(page_bytes) => no_pool(memory_mib, page_bytes, ranges.iter().map(|(_, len)| *len)),
        _ => format!("reserve {memory_mib} MiB of guest memory"),
    })?;
    finish(memory_mib, regions, prefault)
}

/// Allocates the pages of `regions` if `prefault` is given, until it returns true.
fn finish(memory_mib: u64, regions: Vec<Region>, prefault: Option<&dyn Fn() -> bool>) -> Result<GuestMemory> {
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

/// Provides `memory_mib` MiB of guest memory with the content of a file that [`write_to`] has written, and never writes to it.
///
/// The file is mapped: it is read as the guest accesses it, in the pages of its file system; `pages` applies to memory that
/// the guest has returned. With `prefault` all of it is read and copied, until it returns true. Pages of a pool cannot be
/// mapped from a file, so all of it is read into them.
pub fn map(memory_mib: u64, file: &File, pages: Pages, prefault: Option<&dyn Fn() -> bool>) -> Result<GuestMemory> {
    let memory_bytes = memory_mib.checked_mul(1 << 20).context("memory size overflows")?;
    let found_bytes = file.metadata().context("inspect the memory of the snapshot")?.len();
    ensure!(found_bytes == memory_bytes, "the memory of the snapshot has {found_bytes} bytes, not {memory_bytes}");
    if matches!(pages, Pages::Pool(_)) {
        let memory = create(memory_mib, pages, prefault)?;
        read_from(&memory, file).context("read the memory of the snapshot")?;
        return Ok(memory);
    }
    let mut offset_bytes = 0;
    let region = |(base, len): &(u64, u64)| -> io::Result<Region> {
        let len_bytes = usize::try_from(*len).map_err(io::Error::other)?;
        let mapping = Mapping::of_file(len_bytes, file.as_fd(), offset_bytes, pages)?;
        offset_bytes += *len;
        Region::of(*base, len_bytes, mapping)
    };
    let regions = layout::memory_ranges(memory_bytes).iter().map(region).collect::<io::Result<Vec<_>>>();
    finish(memory_mib, regions.context("map the memory of the snapshot")?, prefault)
}

/// Fills zeroed guest memory from a file. Pieces that are zero are not touched.
fn read_from(memory: &GuestMemory, file: &File) -> Result<()> {
    let (mut piece, mut offset_bytes) = (vec![0; PIECE_BYTES], 0);
    for region in memory.iter() {
        for at in (0..region.len()).step_by(PIECE_BYTES) {
            let bytes = piece.get_mut(..PIECE_BYTES.min((region.len() - at) as usize)).unwrap_or_default();
            file.read_exact_at(bytes, offset_bytes + at)?;
            if bytes.iter().any(|byte| *byte != 0) {
                region.write_slice(bytes, MemoryRegionAddress(at))?;
            }
        }
        offset_bytes += region.len();
    }
    Ok(())
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
/// afterwards. The result is the number of bytes. Pages that [`Mapping::give_back`] keeps retain their content. Parts that
/// are not memory are skipped, so any range from a guest may be passed.
pub fn give_back(memory: &GuestMemory, address: GuestAddress, len_bytes: u64) -> io::Result<u64> {
    let end = address.0.saturating_add(len_bytes);
    let mut returned_bytes = 0;
    for region in memory.iter() {
        let base = region.start_addr().0;
        let (first, last) = (address.0.max(base), end.min(base.saturating_add(region.len())));
        if first < last {
            // Both casts are lossless, since the region is mapped.
            returned_bytes += region.mapping.give_back((first - base) as usize, (last - first) as usize)? as u64;
        }
    }
    Ok(returned_bytes)
}

#[cfg(test)]
mod tests;
