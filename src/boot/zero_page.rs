//! Writes `struct boot_params`, the zero page, with the memory map, initrd and command line (boot.rst, zero-page.rst).

use anyhow::Result;
use linux_loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued;

use super::{Extent, memory_map::memory_map};
use crate::layout;
use crate::memory::GuestMemory;

/// `boot_flag`, at the end of the boot sector.
const BOOT_FLAG: u16 = 0xaa55;
/// `header`: "HdrS".
pub const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// `type_of_loader` of a boot loader without an assigned number.
const LOADER_UNREGISTERED: u8 = 0xff;
/// Protocol version 2.12, the first with `xloadflags` and therefore a 64-bit entry point.
const VERSION_WITH_64_BIT_ENTRY: u16 = 0x020c;

/// The setup header for an ELF image, which has none.
pub fn header_for_elf() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: VERSION_WITH_64_BIT_ENTRY,
        loadflags: LOADED_HIGH,
        ..Default::default()
    }
}

/// Writes the zero page: `header` completed with the fields of a boot loader, and the memory map. Returns its address.
///
/// `initrd` ends below 4 GiB.
pub fn write(memory: &GuestMemory, header: setup_header, cmdline_bytes: usize, initrd: Option<Extent>) -> Result<u64> {
    let mut page = boot_params { hdr: header, acpi_rsdp_addr: layout::ACPI_ADDRESS, ..Default::default() };
    page.hdr.type_of_loader = LOADER_UNREGISTERED;
    // The file's setup_data list is not in guest memory.
    page.hdr.setup_data = 0;
    page.hdr.cmd_line_ptr = u32::try_from(layout::CMDLINE_ADDRESS)?;
    page.hdr.cmdline_size = u32::try_from(cmdline_bytes)?;
    if let Some(initrd) = initrd {
        page.hdr.ramdisk_image = u32::try_from(initrd.start)?;
        page.hdr.ramdisk_size = u32::try_from(initrd.len())?;
    }
    let map = memory_map(memory);
    let mut table = page.e820_table;
    for (slot, (extent, kind)) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry { addr: extent.start, size: extent.len(), r#type: *kind as u32 };
    }
    page.e820_table = table;
    page.e820_entries = u8::try_from(map.len())?;
    super::write(memory, layout::ZERO_PAGE_ADDRESS, page.as_slice())?;
    Ok(layout::ZERO_PAGE_ADDRESS)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    #[test]
    fn the_zero_page_leads_to_initrd_cmdline_tables_and_memory() {
        let memory = memory::reserve(6 << 10).unwrap();
        let initrd = Extent { start: 0x7000_0000, end: 0x7000_1234 };
        let address = write(&memory, header_for_elf(), 11, Some(initrd)).unwrap();

        // Offsets from zero-page.rst and boot.rst.
        let at = |offset: u64| memory.read_obj::<u32>(GuestAddress(address + offset)).unwrap();
        assert_eq!(at(0x070), 0xe_0000, "acpi_rsdp_addr");
        assert_eq!(at(0x1e8) & 0xff, 5, "e820_entries");
        assert_eq!(at(0x1fe) & 0xffff, 0xaa55, "boot_flag");
        assert_eq!(at(0x202).to_le_bytes(), *b"HdrS");
        assert_eq!(at(0x210) & 0xff, 0xff, "type_of_loader");
        assert_eq!((at(0x218), at(0x21c)), (0x7000_0000, 0x1234), "ramdisk_image, ramdisk_size");
        assert_eq!((at(0x228), at(0x238)), (0x2_0000, 11), "cmd_line_ptr, cmdline_size");
        let entry = |n: u64| (at(0x2d0 + n * 20), at(0x2d4 + n * 20), at(0x2dc + n * 20), at(0x2e0 + n * 20));
        assert_eq!(entry(1), (0xe_0000, 0, 0, 3));
        assert_eq!(entry(2), (0xf_f000, 0, 0, 2));
        assert_eq!(entry(4), (0, 1, 0, 1), "4 GiB, high half of the size, RAM");
        assert_eq!(at(0x2d0 + 4 * 20 + 8), 0xc000_0000, "3 GiB");
    }

    #[test]
    fn a_files_setup_data_is_not_followed() {
        let memory = memory::reserve(32).unwrap();
        let header = setup_header { setup_data: 0x1234, ..header_for_elf() };
        let address = write(&memory, header, 0, None).unwrap();
        assert_eq!(memory.read_obj::<u64>(GuestAddress(address + 0x250)).unwrap(), 0);
    }
}
