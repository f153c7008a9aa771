//! The layout of the guest's physical address space, I/O ports and interrupt lines.
//!
//! Memory occupies 0 to 3 GiB and continues at 4 GiB: the last GiB below 4 GiB is used by devices, the I/O APIC and the
//! local APICs.

/// The start of the device hole.
pub const MMIO_HOLE_START: u64 = 0xc000_0000;
/// The end of the device hole, where memory continues.
pub const MMIO_HOLE_END: u64 = 0x1_0000_0000;

/// The initial global descriptor table (PVH and 64-bit entry).
pub const GDT_ADDRESS: u64 = 0x500;
/// PVH `hvm_start_info`, its module list and its memory map.
pub const PVH_INFO_ADDRESS: u64 = 0x6000;
/// `struct boot_params`, the zero page (boot.rst, 64-bit boot protocol).
pub const ZERO_PAGE_ADDRESS: u64 = 0x7000;
/// The top of the stack that a kernel starts with, of almost 4 KiB. No boot protocol promises one, but Nanos calls functions
/// before it has its own.
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
/// Page tables that identity-map the first 4 GiB: PML4, PDPT and four page directories.
pub const PAGE_TABLE_ADDRESS: u64 = 0x9000;
/// The kernel's command line.
pub const CMDLINE_ADDRESS: u64 = 0x2_0000;
/// The maximum length of a command line in x86 Linux, including the final NUL (COMMAND_LINE_SIZE).
pub const CMDLINE_MAX_BYTES: usize = 2048;
/// The start of the area reserved for a BIOS, up to 1 MiB.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// The root system description pointer, followed by the ACPI tables (ACPI 6.5 §5.2.5.1 starts the search here).
pub const ACPI_ADDRESS: u64 = 0xe_0000;
/// The end of the ACPI tables. The rest of the area, up to [`HIGH_MEMORY_START`], is reserved.
pub const ACPI_END: u64 = 0xf_f000;
/// The generation ID, 16 bytes, in memory that the guest does not use otherwise.
pub const GENERATION_ADDRESS: u64 = 0xf_f000;
/// The start address of a PC's BIOS, F000:FFF0 in real mode: a guest that jumps there resets.
pub const RESET_VECTOR_ADDRESS: u64 = 0xf_fff0;
/// The end of the ACPI and reserved areas, where usable memory continues.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// The first virtio-mmio device; device `n` is at `VIRTIO_MMIO_BASE + n * VIRTIO_MMIO_STRIDE`.
pub const VIRTIO_MMIO_BASE: u64 = 0xd000_0000;
/// Distance between two virtio-mmio devices, in bytes.
pub const VIRTIO_MMIO_STRIDE: u64 = 0x1000;
/// The window for the BARs of PCI functions, in machines whose virtio devices are on a PCI bus instead.
pub const PCI_WINDOW: u64 = 0xd000_0000;
/// Its size in bytes.
pub const PCI_WINDOW_BYTES: u64 = 0x1000_0000;
/// The size of each function's BAR; at first, that of function `n` (from 0) is at `PCI_WINDOW + n * PCI_BAR_BYTES`.
pub const PCI_BAR_BYTES: u64 = 0x8000;
/// The configuration registers of PCI functions, as memory.
pub const PCI_ECAM: u64 = 0xe000_0000;
/// Its size in bytes: one bus.
pub const PCI_ECAM_BYTES: u64 = 0x10_0000;
/// I/O APIC registers (KVM's in-kernel one, fixed).
pub const IOAPIC_ADDRESS: u32 = 0xfec0_0000;
/// Local APIC registers (architectural default).
pub const LAPIC_ADDRESS: u32 = 0xfee0_0000;
/// One page that KVM needs on Intel hosts for real mode (KVM_SET_IDENTITY_MAP_ADDR).
pub const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel hosts for real mode (KVM_SET_TSS_ADDR).
pub const TSS_ADDRESS: u64 = 0xfffb_d000;

/// COM1: eight 16550 registers.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The generic event device's interrupt that says that the generation ID has changed.
pub const GENERATION_GSI: u32 = 3;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// The keyboard controller's command port, which implements only the reset line.
pub const I8042_COMMAND_PORT: u16 = 0x64;
/// PCI configuration ports: four bytes of address and four bytes of data.
pub const PCI_PORTS: u16 = 0xcf8;
/// The number of these ports.
pub const PCI_PORTS_LEN: u64 = 8;
/// pvpanic: the guest reports a kernel panic.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control register (ACPI 6.5 §4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// The sleep type in `\_S5`.
pub const SLEEP_TYPE_S5: u8 = 5;
/// ACPI reset register: writing [`RESET_VALUE`] resets the machine.
pub const RESET_PORT: u16 = 0x602;
/// The value that resets.
pub const RESET_VALUE: u8 = 1;
/// Boot progress markers, written by the guest for `--timings`: see `device::power`.
pub const MARKER_PORT: u16 = 0x603;
/// Exit status, written by the guest: ends the machine with that exit code.
pub const EXIT_PORT: u16 = 0x604;
/// The generic event device's interrupt (power button).
pub const EVENT_GSI: u32 = 5;
/// First interrupt line of the virtio-mmio devices.
pub const VIRTIO_FIRST_GSI: u32 = 6;
/// The I/O APIC has pins 0 to 23.
pub const GSI_COUNT: u32 = 24;
/// The maximum number of virtio-mmio devices, limited by the available interrupt lines.
pub const VIRTIO_MMIO_MAX: usize = (GSI_COUNT - VIRTIO_FIRST_GSI) as usize;

/// The maximum number of PCI functions besides the host bridge: one per device number of a bus.
pub const PCI_FUNCTIONS_MAX: usize = 31;

/// The bus of the virtio devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VirtioBus {
    /// Fixed addresses and interrupt lines: see [`virtio_mmio_slot`].
    Mmio {
        /// The number of places for devices, of which the last ones may be empty.
        slots: usize,
    },
    /// PCI, where a guest finds the devices by itself.
    Pci,
}

/// Address and interrupt line of virtio-mmio device `index`.
pub fn virtio_mmio_slot(index: usize) -> (u64, u32) {
    debug_assert!(index < VIRTIO_MMIO_MAX);
    (VIRTIO_MMIO_BASE + index as u64 * VIRTIO_MMIO_STRIDE, VIRTIO_FIRST_GSI + index as u32)
}

/// The address ranges of `memory_bytes` of guest memory: one range, or two around the hole.
pub fn memory_ranges(memory_bytes: u64) -> Vec<(u64, u64)> {
    if memory_bytes <= MMIO_HOLE_START {
        vec![(0, memory_bytes)]
    } else {
        vec![(0, MMIO_HOLE_START), (MMIO_HOLE_END, memory_bytes - MMIO_HOLE_START)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_beyond_three_gib_continues_at_four() {
        const GIB: u64 = 1 << 30;
        assert_eq!(memory_ranges(512 << 20), [(0, 512 << 20)]);
        assert_eq!(memory_ranges(3 * GIB), [(0, 3 * GIB)]);
        assert_eq!(memory_ranges(6 * GIB), [(0, 3 * GIB), (4 * GIB, 3 * GIB)]);
    }

    #[test]
    fn memory_of_any_size_is_complete_and_leaves_the_hole_free() {
        let mut random = fastrand::Rng::with_seed(1);
        let near = [MMIO_HOLE_START - 1, MMIO_HOLE_START, MMIO_HOLE_START + 1, MMIO_HOLE_END];
        let sizes = (0..10_000).map(|_| (random.u64(..) >> random.u32(12..64)).max(1));
        for memory_bytes in sizes.chain(near) {
            let ranges = memory_ranges(memory_bytes);
            assert_eq!(ranges.iter().map(|(_, len)| len).sum::<u64>(), memory_bytes);
            assert_eq!(ranges[0].0, 0, "{memory_bytes:#x}");
            let mut free_from = 0;
            for (start, len) in ranges {
                assert!(len > 0 && start >= free_from, "{memory_bytes:#x}");
                free_from = start + len;
                assert!(free_from <= MMIO_HOLE_START || start >= MMIO_HOLE_END, "{memory_bytes:#x}");
            }
        }
    }

    #[test]
    fn devices_of_a_bus_neither_overlap_nor_leave_the_hole() {
        let slots: Vec<_> = (0..VIRTIO_MMIO_MAX).map(virtio_mmio_slot).collect();
        for ((address, line), next) in slots.iter().zip(slots.iter().skip(1)) {
            assert!(address + VIRTIO_MMIO_STRIDE <= next.0 && *line < next.1);
        }
        let (address, line) = slots[VIRTIO_MMIO_MAX - 1];
        assert!(slots[0].0 >= MMIO_HOLE_START && address + VIRTIO_MMIO_STRIDE <= IOAPIC_ADDRESS.into());
        assert!(slots[0].1 > EVENT_GSI && line < GSI_COUNT);
        const { assert!(PCI_WINDOW >= MMIO_HOLE_START && PCI_WINDOW + PCI_WINDOW_BYTES <= PCI_ECAM) };
        const { assert!(PCI_FUNCTIONS_MAX as u64 * PCI_BAR_BYTES <= PCI_WINDOW_BYTES) };
        const { assert!(PCI_ECAM + PCI_ECAM_BYTES <= IOAPIC_ADDRESS as u64) };
    }
}
