//! The PCI identity of each kind of device.

use crate::pci::Identity;

/// The vendor of virtio devices (virtio 1.2 §4.1.2).
const VENDOR: u16 = 0x1af4;
/// The device ID of device type 0; the type is added (§4.1.2.1).
const DEVICE_BASE: u16 = 0x1040;
/// Devices without a legacy interface have revision 1 or higher, and a subsystem ID of 0x40 or higher (§4.1.2.1).
const REVISION: u8 = 1;
const SUBSYSTEM: u16 = 0x40;

/// The class codes of PCI Local Bus Specification 3.0, appendix D, which drivers of virtio ignore.
const CLASS_STORAGE_OTHER: u32 = 0x01_80_00;
const CLASS_ETHERNET: u32 = 0x02_00_00;
const CLASS_COMMUNICATION_OTHER: u32 = 0x07_80_00;
const CLASS_OTHER: u32 = 0xff_00_00;

/// The identity of a device of type `device_type` (§5).
pub fn of(device_type: u32) -> Identity {
    let class = match device_type {
        1 => CLASS_ETHERNET,
        2 => CLASS_STORAGE_OTHER,
        19 => CLASS_COMMUNICATION_OTHER,
        _ => CLASS_OTHER,
    };
    Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + device_type as u16,
        revision: REVISION,
        class,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
    }
}
