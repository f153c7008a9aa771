//! Builds the DSDT: the devices that a guest cannot enumerate.
//!
//! Processors are omitted: Linux takes them from the MADT, and uses processor devices only for power states and
//! hotplug.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name,
    Notify, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;
use anyhow::Result;

use super::acpi::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, serialized};
use crate::layout::{self, VirtioBus};

/// DSDT revision 2: integers are 64 bits wide.
const REVISION: u8 = 2;
/// The size of a table's header.
const HEADER_BYTES: u32 = 36;
/// The notification of a button press (ACPI 6.5 §5.6.6, table 5.137), and of a new generation ID.
const HAPPENED: u8 = 0x80;
/// By what a guest recognizes a generation ID, whoever made the machine.
const GENERATION_COUNTER: &str = "VM_Gen_Counter";

/// Builds the table of a machine whose virtio devices are on `bus`.
pub fn table(bus: VirtioBus) -> Result<Vec<u8>> {
    let mut body = vec![com1(), pvpanic(), power_button(), generation_id()?, event_device()];
    match bus {
        VirtioBus::Mmio { slots } => body.extend((0..slots).map(virtio_mmio).collect::<Result<Vec<_>>>()?),
        VirtioBus::Pci => body.extend([pci_bus()?, pci_ecam()?]),
    }
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&Scope::raw(Path::new("_SB_"), body.concat()));
    dsdt.append_slice(&serialized(&sleep_state_5()));
    Ok(dsdt.as_slice().to_vec())
}

/// `\_S5`: a hardware-reduced platform uses only the first element (ACPI 6.5 §7.4.2.6). If there were a second one, Nanos
/// would write to PM1 control, which does not exist, instead of the sleep control register.
fn sleep_state_5() -> impl Aml {
    Name::new(Path::new("_S5_"), &Package::new(vec![&layout::SLEEP_TYPE_S5]))
}

fn com1() -> Vec<u8> {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8);
    device("COM1", &EISAName::new("PNP0501"), 0, &[&ports, &interrupt(layout::SERIAL_GSI)], &[])
}

/// pvpanic, with the same hardware ID as in QEMU.
fn pvpanic() -> Vec<u8> {
    let port = IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, 1);
    device("PVPN", &"QEMU0001", 0, &[&port], &[])
}

fn power_button() -> Vec<u8> {
    device("PWRB", &EISAName::new("PNP0C0C"), 0, &[], &[])
}

/// The generation ID (see [`super::generation`]). Its address is in two halves of 32 bits.
fn generation_id() -> Result<Vec<u8>> {
    let cid = Name::new(Path::new("_CID"), &GENERATION_COUNTER);
    let ddn = Name::new(Path::new("_DDN"), &GENERATION_COUNTER);
    let low = u32::try_from(layout::GENERATION_ADDRESS)?;
    let address = Name::new(Path::new("ADDR"), &Package::new(vec![&low, &ZERO]));
    Ok(device("VGEN", &"HUSK0001", 0, &[], &[&cid, &ddn, &address]))
}

/// The generic event device (ACPI 6.5 §5.6.9): an edge on one of its interrupts is a power button press, one on the other
/// a new generation ID, so there is no status register.
fn event_device() -> Vec<u8> {
    let (button, generation) = (Path::new("PWRB"), Path::new("VGEN"));
    let (press, renewal) = (Notify::new(&button, &HAPPENED), Notify::new(&generation, &HAPPENED));
    let is_button = Equal::new(&Arg(0), &layout::EVENT_GSI);
    let is_generation = Equal::new(&Arg(0), &layout::GENERATION_GSI);
    let (if_button, if_generation) = (If::new(&is_button, vec![&press]), If::new(&is_generation, vec![&renewal]));
    let event = Method::new(Path::new("_EVT"), 1, true, vec![&if_button, &if_generation]);
    let lines = [layout::EVENT_GSI, layout::GENERATION_GSI].map(interrupt);
    device("GED_", &"ACPI0013", 0, &[&lines[0], &lines[1]], &[&event])
}

fn virtio_mmio(index: usize) -> Result<Vec<u8>> {
    let (base, gsi) = layout::virtio_mmio_slot(index);
    let registers = Memory32Fixed::new(true, u32::try_from(base)?, u32::try_from(layout::VIRTIO_MMIO_STRIDE)?);
    let name = format!("VR{index:02X}");
    Ok(device(&name, &"LNRO0005", u32::try_from(index)?, &[&registers, &interrupt(gsi)], &[]))
}

/// The PCI host bridge, with bus 0 and the window for BARs. No function has an interrupt pin, so there is no routing
/// table. It is not described as PCI Express, whose native features would have to be negotiated.
fn pci_bus() -> Result<Vec<u8>> {
    let (first, last) = window(layout::PCI_WINDOW, layout::PCI_WINDOW_BYTES)?;
    let ports = IO::new(layout::PCI_PORTS, layout::PCI_PORTS, 1, u8::try_from(layout::PCI_PORTS_LEN)?);
    let buses = AddressSpace::new_bus_number(0_u16, 0_u16);
    let memory = AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, first, last, None);
    Ok(device("PCI0", &EISAName::new("PNP0A03"), 0, &[&buses, &ports, &memory], &[]))
}

/// Reserves ECAM, as a resource of the motherboard (PCI Firmware Specification 3.3, §4.1.2).
fn pci_ecam() -> Result<Vec<u8>> {
    let registers = Memory32Fixed::new(true, u32::try_from(layout::PCI_ECAM)?, u32::try_from(layout::PCI_ECAM_BYTES)?);
    Ok(device("ECAM", &EISAName::new("PNP0C02"), 0, &[&registers], &[]))
}

/// The first and the last address of a range.
fn window(base: u64, len_bytes: u64) -> Result<(u32, u32)> {
    Ok((u32::try_from(base)?, u32::try_from(base + len_bytes - 1)?))
}

/// A device with its hardware ID, unique ID, resources and methods.
fn device(name: &str, hid: &dyn Aml, uid: u32, resources: &[&dyn Aml], methods: &[&dyn Aml]) -> Vec<u8> {
    let hid = Name::new(Path::new("_HID"), hid);
    let uid = Name::new(Path::new("_UID"), &uid);
    let crs = Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources.to_vec()));
    let mut children: Vec<&dyn Aml> = vec![&hid, &uid];
    if !resources.is_empty() {
        children.push(&crs);
    }
    children.extend_from_slice(methods);
    serialized(&Device::new(Path::new(name), children))
}

/// An interrupt consumed by the device: edge-triggered, active high, exclusive.
fn interrupt(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}
