//! The guest's memory: reserved when the machine is built, backed by the host page by page as the guest touches it.

use anyhow::{Context, Result};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::machine::layout;

/// All of a guest's memory. Cloning shares it.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Reserves `memory_mib` MiB of private, anonymous guest memory around the hole for devices.
///
/// Nothing is touched: the host gives a page when the guest first uses it. Fails where the address space cannot be had.
pub fn reserve(memory_mib: u64) -> Result<GuestMemory> {
    let memory_bytes = memory_mib.checked_mul(1 << 20).context("memory size overflows")?;
    let regions = layout::memory_ranges(memory_bytes)
        .into_iter()
        .map(|(base, len)| region(base, len))
        .collect::<Result<Vec<_>>>()
        .with_context(|| format!("reserve {memory_mib} MiB of guest memory"))?;
    Ok(GuestMemory::from_regions(regions)?)
}

fn region(base: u64, len_bytes: u64) -> Result<GuestRegionMmap<()>> {
    let mapping = MmapRegionBuilder::new(usize::try_from(len_bytes)?)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()?;
    GuestRegionMmap::new(mapping, GuestAddress(base)).context("guest memory wraps")
}
