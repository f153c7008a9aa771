//! The guest's memory map, for the e820 table and PVH.

use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Extent;
use crate::layout;
use crate::memory::GuestMemory;

/// The type of a range. The numbers of ACPI 6.5 §15, table 15.14, are shared by e820 and PVH.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Usable memory.
    Ram = 1,
    /// Memory that the guest does not use unless it is told what is there.
    Reserved = 2,
    /// ACPI tables.
    AcpiReclaimable = 3,
}

/// The ranges in ascending order. Other addresses are unused, or devices.
pub fn memory_map(memory: &GuestMemory) -> Vec<(Extent, Kind)> {
    let mut map = vec![
        (Extent { start: 0, end: layout::LOW_MEMORY_END }, Kind::Ram),
        (Extent { start: layout::ACPI_ADDRESS, end: layout::ACPI_END }, Kind::AcpiReclaimable),
        (Extent { start: layout::ACPI_END, end: layout::HIGH_MEMORY_START }, Kind::Reserved),
    ];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY_START);
        let end = region.start_addr().0 + region.len();
        if start < end {
            map.push((Extent { start, end }, Kind::Ram));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn ram_mib(map: &[(Extent, Kind)]) -> u64 {
        map.iter().filter(|(_, kind)| *kind == Kind::Ram).map(|(extent, _)| extent.len()).sum::<u64>() >> 20
    }

    #[test]
    fn the_map_of_six_gib_excludes_the_hole() {
        let map = memory_map(&memory::reserve(6 << 10).unwrap());
        let ranges: Vec<_> = map.iter().map(|(e, kind)| (e.start, e.end, *kind)).collect();
        assert_eq!(
            ranges,
            [
                (0, 0x9_fc00, Kind::Ram),
                (0xe_0000, 0xf_f000, Kind::AcpiReclaimable),
                (0xf_f000, 0x10_0000, Kind::Reserved),
                (0x10_0000, 0xc000_0000, Kind::Ram),
                (0x1_0000_0000, 0x1_c000_0000, Kind::Ram),
            ]
        );
        // Everything except the 385 KiB that a PC reserves below 1 MiB.
        assert_eq!(ram_mib(&map), (6 << 10) - 1);
    }

    #[test]
    fn the_map_of_small_memory_ends_with_it() {
        let map = memory_map(&memory::reserve(32).unwrap());
        assert_eq!(map.last(), Some(&(Extent { start: 0x10_0000, end: 32 << 20 }, Kind::Ram)));
        assert_eq!(ram_mib(&map), 31);
    }
}
