//! Writes the `hvm_start_info` of a PVH kernel, with its memory map, initrd and command line (Xen's
//! `public/arch-x86/hvm/start_info.h`).

use anyhow::Result;
use linux_loader::start_info::{XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::{Extent, memory_map::memory_map};
use crate::layout;
use crate::memory::GuestMemory;

/// The first version with a memory map: with older ones the kernel would ask a hypervisor that does not exist.
const VERSION_WITH_MEMORY_MAP: u32 = 1;

/// Writes the start info, its module list and its memory map; returns the start info's address.
pub fn write(memory: &GuestMemory, initrd: Option<Extent>) -> Result<u64> {
    let info_address = layout::PVH_INFO_ADDRESS;
    let module_address = info_address + size_of::<hvm_start_info>() as u64;
    let map_address = module_address + size_of::<hvm_modlist_entry>() as u64;

    let map: Vec<u8> = memory_map(memory)
        .into_iter()
        .map(|(extent, kind)| hvm_memmap_table_entry {
            addr: extent.start,
            size: extent.len(),
            type_: kind as u32,
            reserved: 0,
        })
        .flat_map(|entry| entry.as_slice().to_vec())
        .collect();
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: VERSION_WITH_MEMORY_MAP,
        flags: 0,
        nr_modules: initrd.iter().count() as u32,
        modlist_paddr: module_address,
        cmdline_paddr: layout::CMDLINE_ADDRESS,
        rsdp_paddr: layout::ACPI_ADDRESS,
        memmap_paddr: map_address,
        memmap_entries: (map.len() / size_of::<hvm_memmap_table_entry>()) as u32,
        reserved: 0,
    };
    super::write(memory, info_address, info.as_slice())?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.start, size: initrd.len(), ..Default::default() };
        super::write(memory, module_address, module.as_slice())?;
    }
    super::write(memory, map_address, &map)?;
    Ok(info_address)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    #[test]
    fn the_start_info_leads_to_initrd_tables_and_memory() {
        let memory = memory::reserve(6 << 10).unwrap();
        let initrd = Extent { start: 0x7000_0000, end: 0x7000_1234 };
        let address = write(&memory, Some(initrd)).unwrap();

        let info: hvm_start_info = memory.read_obj(GuestAddress(address)).unwrap();
        assert_eq!((info.magic, info.version, info.nr_modules), (0x336e_c578, 1, 1));
        assert_eq!((info.cmdline_paddr, info.rsdp_paddr), (layout::CMDLINE_ADDRESS, layout::ACPI_ADDRESS));
        let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!((module.paddr, module.size, module.cmdline_paddr), (0x7000_0000, 0x1234, 0));
        let last = info.memmap_paddr + u64::from(info.memmap_entries - 1) * 24;
        let entry: hvm_memmap_table_entry = memory.read_obj(GuestAddress(last)).unwrap();
        assert_eq!((entry.addr, entry.size, entry.type_), (4 << 30, 3 << 30, 1));
        assert!(last + 24 <= layout::ZERO_PAGE_ADDRESS);
    }

    #[test]
    fn without_an_initrd_there_is_no_module() {
        let memory = memory::reserve(32).unwrap();
        let address = write(&memory, None).unwrap();
        let info: hvm_start_info = memory.read_obj(GuestAddress(address)).unwrap();
        assert_eq!((info.nr_modules, info.memmap_entries), (0, 4));
    }
}
