//! Builds the ACPI tables: RSDP, XSDT, FADT, MADT, DSDT, and MCFG if there is a PCI bus.
//!
//! The platform is hardware-reduced (ACPI 6.5 §4.1): no PM timer, no SCI, no fixed events. With that and the boot
//! architecture flags Linux does not probe for PIC, PIT, CMOS clock, keyboard controller and VGA.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use anyhow::{Context, Result, ensure};

use super::dsdt;
use crate::layout::{self, VirtioBus};

pub(super) const OEM_ID: [u8; 6] = *b"HUSK  ";
pub(super) const OEM_TABLE_ID: [u8; 8] = *b"HUSKVM  ";
pub(super) const OEM_REVISION: u32 = 1;

/// IAPC_BOOT_ARCH (ACPI 6.5 §5.2.9.3). Cleared bits mean: no legacy devices (0), no 8042 (1).
const VGA_NOT_PRESENT: u16 = 1 << 2;
/// In the same field: no clock at ports 0x70 and 0x71.
const CMOS_RTC_NOT_PRESENT: u16 = 1 << 5;

/// The ID that KVM's I/O APIC reports.
const IOAPIC_ID: u8 = 0;
/// The broadcast ID: processors with a higher local APIC ID would need x2APIC entries, but this machine has fewer.
const XAPIC_BROADCAST_ID: u32 = 255;

/// All tables, to be written at [`layout::ACPI_ADDRESS`], starting with the RSDP.
///
/// Processors have the local APIC IDs `0..cpus`; virtio devices are on `bus`.
pub fn tables(cpus: u32, bus: VirtioBus) -> Result<Vec<u8>> {
    ensure!(cpus <= XAPIC_BROADCAST_ID, "{cpus} vCPUs are more than xAPIC ids");
    if let VirtioBus::Mmio { slots } = bus {
        ensure!(
            slots <= layout::VIRTIO_MMIO_MAX,
            "{slots} virtio devices are more than the {} interrupt lines for them",
            layout::VIRTIO_MMIO_MAX
        );
    }
    let mut tables = Tables { bytes: vec![0; Rsdp::len()] };
    let dsdt = tables.append(&dsdt::table(bus)?);
    let fadt = tables.append(&fadt(dsdt));
    let madt = tables.append(&madt(cpus)?);
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if bus == VirtioBus::Pci {
        xsdt.add_entry(tables.append(&mcfg()));
    }
    let xsdt = tables.append(&serialized(&xsdt));
    tables.bytes.splice(..Rsdp::len(), serialized(&Rsdp::new(OEM_ID, xsdt)));
    let room = layout::ACPI_END - layout::ACPI_ADDRESS;
    ensure!(tables.bytes.len() as u64 <= room, "ACPI tables of {} bytes do not fit", tables.bytes.len());
    Ok(tables.bytes)
}

struct Tables {
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends `table`, aligned to 8 bytes; returns its guest address.
    fn append(&mut self, table: &[u8]) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
        let address = layout::ACPI_ADDRESS + self.bytes.len() as u64;
        self.bytes.extend_from_slice(table);
        address
    }
}

pub(super) fn serialized(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Both buttons are devices in the DSDT or do not exist; they are not fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Wbinvd)
        .dsdt_64(dsdt);
    fadt.iapc_boot_arch = (VGA_NOT_PRESENT | CMOS_RTC_NOT_PRESENT).into();
    fadt.reset_reg = byte_port(layout::RESET_PORT);
    fadt.reset_value = layout::RESET_VALUE;
    fadt.sleep_control_reg = byte_port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(layout::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"husk\0\0\0\0").into();
    serialized(&fadt.finalize())
}

/// The MCFG (PCI Firmware Specification 3.3, §4.1.2): ECAM of bus 0 in segment 0.
fn mcfg() -> Vec<u8> {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::PCI_ECAM, 0, 0, 0);
    serialized(&mcfg)
}

fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

/// The MADT (ACPI 6.5 §5.2.12) with all flags clear: no PC/AT PIC to mask. ISA interrupt lines are mapped one to one,
/// so there are no overrides.
fn madt(cpus: u32) -> Result<Vec<u8>> {
    let local_apic = LocalInterruptController::Address(layout::LAPIC_ADDRESS);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local_apic);
    for cpu in 0..cpus {
        let id = u8::try_from(cpu).context("xAPIC id")?;
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IOAPIC_ID, layout::IOAPIC_ADDRESS, 0));
    Ok(serialized(&madt))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn le<const N: usize>(bytes: &[u8], at: usize) -> u64 {
        let mut value = [0; 8];
        value[..N].copy_from_slice(&bytes[at..at + N]);
        u64::from_le_bytes(value)
    }

    /// The table whose 8-byte address is at `at`.
    fn follow(tables: &[u8], from: &[u8], at: usize) -> Vec<u8> {
        let start = (le::<8>(from, at) - layout::ACPI_ADDRESS) as usize;
        let len = le::<4>(tables, start + 4) as usize;
        tables[start..start + len].to_vec()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    const fn mmio(slots: usize) -> VirtioBus {
        VirtioBus::Mmio { slots }
    }

    /// The tables RSDP, XSDT, FADT, MADT and DSDT, located as a guest would.
    fn walk(cpus: u32, bus: VirtioBus) -> [Vec<u8>; 5] {
        let tables = tables(cpus, bus).unwrap();
        let rsdp = tables[..36].to_vec();
        let xsdt = follow(&tables, &rsdp, 24);
        assert_eq!(xsdt.len(), 36 + if bus == VirtioBus::Pci { 3 } else { 2 } * 8);
        let fadt = follow(&tables, &xsdt, 36);
        let madt = follow(&tables, &xsdt, 44);
        let dsdt = follow(&tables, &fadt, 140);
        [rsdp, xsdt, fadt, madt, dsdt]
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        for (cpus, bus) in [(1, mmio(0)), (2, mmio(1)), (32, mmio(layout::VIRTIO_MMIO_MAX)), (1, VirtioBus::Pci)] {
            let [rsdp, rest @ ..] = walk(cpus, bus);
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
            for (table, signature) in rest.iter().zip([b"XSDT", b"FACP", b"APIC", b"DSDT"]) {
                assert_eq!(&table[..4], signature);
                assert_eq!(sum(table), 0, "{signature:?}");
            }
        }
    }

    #[test]
    fn the_fadt_names_the_ports_that_sleep_and_reset() {
        let [_, _, fadt, ..] = walk(1, mmio(0));
        assert_eq!((fadt.len(), fadt[8]), (276, 6));
        assert_eq!(le::<2>(&fadt, 109), 0x24, "IAPC_BOOT_ARCH: no VGA, no CMOS clock, no 8042");
        assert_eq!(le::<4>(&fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4 | 1, "flags");
        // Address space 1 is I/O; 8 bits wide, byte access.
        let port = |at: usize| (fadt[at..at + 4].to_vec(), le::<8>(&fadt, at + 4));
        assert_eq!(port(116), (vec![1, 8, 0, 1], 0x602), "reset");
        assert_eq!(fadt[128], layout::RESET_VALUE);
        assert_eq!(port(244), (vec![1, 8, 0, 1], 0x600), "sleep control");
        assert_eq!(port(256), (vec![1, 8, 0, 1], 0x601), "sleep status");
    }

    #[test]
    fn the_madt_lists_each_processor_and_the_io_apic() {
        let [_, _, _, madt, _] = walk(3, mmio(0));
        assert_eq!((le::<4>(&madt, 36), le::<4>(&madt, 40)), (0xfee0_0000, 0), "local APIC address, flags");
        let entries: Vec<_> = madt[44..].chunks(8).take(3).map(<[u8]>::to_vec).collect();
        assert_eq!(entries, [[0, 8, 0, 0, 1, 0, 0, 0], [0, 8, 1, 1, 1, 0, 0, 0], [0, 8, 2, 2, 1, 0, 0, 0]]);
        assert_eq!(madt[68..], [1, 12, 0, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]);
    }

    #[test]
    fn more_devices_than_interrupt_lines_are_rejected() {
        assert!(tables(1, mmio(layout::VIRTIO_MMIO_MAX + 1)).is_err());
        assert!(tables(256, mmio(0)).is_err());
    }

    #[test]
    fn the_mcfg_lists_the_registers_of_one_bus() {
        let tables = tables(1, VirtioBus::Pci).unwrap();
        let mcfg = follow(&tables, &follow(&tables, &tables[..36], 24), 52);
        assert_eq!((&mcfg[..4], mcfg.len(), sum(&mcfg)), (&b"MCFG"[..], 60, 0));
        assert_eq!((le::<8>(&mcfg, 44), le::<2>(&mcfg, 52), &mcfg[54..56]), (0xe000_0000, 0, &[0, 0][..]));
    }

    /// Verified by ACPICA: it disassembles all tables, and its interpreter runs the DSDT.
    #[test]
    fn acpica_reads_every_table() {
        let missing = |program: &str| Command::new(program).arg("-v").output().is_err();
        if missing("iasl") || missing("acpiexec") {
            eprintln!("SKIPPED: acpica_reads_every_table needs iasl and acpiexec (Debian package acpica-tools)");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let run = |program: &str, args: &[&str]| {
            let output = Command::new(program).args(args).current_dir(dir.path()).output().unwrap();
            let text = [output.stdout, output.stderr].concat();
            (output.status.success(), String::from_utf8_lossy(&text).into_owned())
        };
        let [_, xsdt, fadt, madt, dsdt] = walk(4, mmio(layout::VIRTIO_MMIO_MAX));
        let [.., pci] = walk(4, VirtioBus::Pci);
        for (name, table) in [("xsdt", xsdt), ("facp", fadt), ("apic", madt), ("dsdt", dsdt), ("pci", pci)] {
            std::fs::write(dir.path().join(format!("{name}.dat")), table).unwrap();
            let (success, text) = run("iasl", &["-d", &format!("{name}.dat")]);
            assert!(success && !text.contains("rror") && !text.contains("arning"), "{name}: {text}");
            let source = std::fs::read_to_string(dir.path().join(format!("{name}.dsl"))).unwrap();
            assert!(!source.contains("Invalid") && !source.contains("ncorrect"), "{source}");
        }
        for source in ["dsdt.dsl", "pci.dsl"] {
            let (_, text) = run("iasl", &["-p", "again", source]);
            assert!(text.contains("0 Errors, 0 Warnings"), "{text}");
        }
        let (_, text) = run("acpiexec", &["-b", "resources \\_SB.PCI0; resources \\_SB.ECAM", "pci.dat"]);
        assert!(text.contains("DFFFFFFF") && text.contains("E0000000"), "{text}");
        let (_, text) = run("acpiexec", &["-b", "execute \\_SB.GED_._EVT 5; resources \\_SB.VR11", "dsdt.dat"]);
        assert!(text.contains("PWRB") && text.contains("0x80"), "{text}");
        assert!(text.contains("D0011000"), "{text}");
        let (_, text) = run("acpiexec", &["-b", "execute \\_SB.GED_._EVT 3; execute \\_SB.VGEN.ADDR", "dsdt.dat"]);
        assert!(text.contains("VGEN") && text.contains("0x80") && text.contains("FF000"), "{text}");
        let (_, text) = run("acpiexec", &["-b", "execute \\_S5", "dsdt.dat"]);
        assert!(text.contains("Contains 1 Elements"), "{text}");
    }
}
