//! The guest's memory: reserved when the machine is built, backed by the host page by page as the guest touches it.

use anyhow::{Context, Result};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryRegion, GuestMemoryRegionBytes, GuestRegionCollection, GuestRegionMmap, GuestUsize,
    MemoryRegionAddress, VolatileSlice,
};

use crate::machine::layout;
use crate::sys::mapping::Mapping;

/// All of a guest's memory. Cloning shares it.
pub type GuestMemory = GuestRegionCollection<Region>;

/// A contiguous part of a guest's memory, at a host address that is a multiple of 2 MiB, as the guest's is.
#[derive(Debug)]
pub struct Region {
    view: GuestRegionMmap<()>,
    // Last, so that it goes after what has its address.
    _mapping: Mapping,
}

impl Region {
    #[allow(unsafe_code)]
    fn new(base: u64, len_bytes: u64) -> Result<Region> {
        let len_bytes = usize::try_from(len_bytes)?;
        let mapping = Mapping::new(len_bytes)?;
        let builder = MmapRegionBuilder::new(len_bytes).with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        // SAFETY: the address is that of a mapping of this length, which `Region` keeps for as long as the view exists.
        let view = unsafe { builder.with_raw_mmap_pointer(mapping.start()) }.build()?;
        let view = GuestRegionMmap::new(view, GuestAddress(base)).context("guest memory wraps")?;
        Ok(Region { view, _mapping: mapping })
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

/// Reserves `memory_mib` MiB of private, anonymous guest memory around the hole for devices.
///
/// Nothing is touched: the host gives a page when the guest first uses it. Fails where the address space cannot be had.
pub fn reserve(memory_mib: u64) -> Result<GuestMemory> {
    let memory_bytes = memory_mib.checked_mul(1 << 20).context("memory size overflows")?;
    let regions = layout::memory_ranges(memory_bytes)
        .into_iter()
        .map(|(base, len)| Region::new(base, len))
        .collect::<Result<Vec<_>>>()
        .with_context(|| format!("reserve {memory_mib} MiB of guest memory"))?;
    Ok(GuestMemory::from_regions(regions)?)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryBackend};

    use super::*;

    #[test]
    fn huge_pages_of_guest_and_host_coincide() {
        const HUGE_PAGE_BYTES: u64 = 2 << 20;
        // Whatever stands beside them: a mapping of an odd size moves the next one.
        let memories = [33, 1, 6 << 10, 35].map(|memory_mib| reserve(memory_mib).unwrap());
        for region in memories.iter().flat_map(|memory| memory.iter()) {
            let host = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
            assert_eq!((host % HUGE_PAGE_BYTES, region.start_addr().0 % HUGE_PAGE_BYTES), (0, 0));
        }
    }

    #[test]
    fn all_of_it_can_be_used_and_nothing_beyond() {
        let memory = reserve(33).unwrap();
        memory.write_obj(7_u8, GuestAddress((33 << 20) - 1)).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress((33 << 20) - 1)).unwrap(), 7);
        assert!(memory.read_obj::<u8>(GuestAddress(33 << 20)).is_err());
    }
}
