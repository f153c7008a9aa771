//! PCI configuration ports for an empty bus: a host bridge and no other device.
//!
//! The machine has no PCI devices. The ports exist for kernels with PCI support, which would otherwise log an error at
//! every boot. They implement configuration mechanism 1 (PCI Local Bus Specification 3.0, §3.2.2.3.2).

use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::Device;

/// The offset of the configuration address, followed by that of the data.
const ADDRESS: u64 = 0;
const DATA: u64 = 4;
/// Bit 31 of the address: enables configuration accesses.
const ENABLE: u32 = 1 << 31;
/// The writable bits of the address: enable, bus, device and function, register.
const WRITABLE: u32 = ENABLE | 0x00ff_fffc;
/// Bits 8 to 23: bus, device and function. The bridge's are 0.
const FUNCTION: u32 = 0x00ff_ff00;
/// The bridge's registers: vendor 0x1b36 and device 0x0008, for which no kernel applies quirks; at 8 revision 0 of
/// class 6, subclass 0, a host bridge.
const BRIDGE_ID: u32 = 0x0008_1b36;
const BRIDGE_CLASS: u32 = 0x0600_0000;

/// The eight ports. Their only state is the address; concurrent accesses of several vCPUs are atomic.
#[derive(Debug, Default)]
pub struct PciPorts {
    address: AtomicU32,
}

impl PciPorts {
    /// The register at the address, if a device exists there.
    fn register(&self) -> Option<u32> {
        let address = self.address.load(Ordering::Relaxed);
        if address & ENABLE == 0 || address & FUNCTION != 0 {
            return None;
        }
        Some(match address & 0xfc {
            0 => BRIDGE_ID,
            8 => BRIDGE_CLASS,
            _ => 0,
        })
    }
}

impl Device for PciPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (ADDRESS, 4) => data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes()),
            (DATA.., _) => {
                let bytes = self.register().map(u32::to_le_bytes);
                let from = (offset - DATA) as usize;
                if let Some(bytes) = bytes.as_ref().and_then(|bytes| bytes.get(from..from + data.len())) {
                    data.copy_from_slice(bytes);
                }
            }
            // Not a port of the address by itself: on a PC, 0xcf9 and 0xcfb belong to other devices.
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // All of the bridge's registers are read-only.
        if let (ADDRESS, Ok(bytes)) = (offset, data.try_into()) {
            self.address.store(u32::from_le_bytes(bytes) & WRITABLE, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(ports: &PciPorts, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        ports.read(offset, &mut data);
        data
    }

    /// The check for a bus in Linux, arch/x86/pci/direct.c.
    #[test]
    fn a_kernel_detects_the_bus() {
        let ports = PciPorts::default();
        ports.write(3, &[1]);
        ports.write(ADDRESS, &ENABLE.to_le_bytes());
        assert_eq!(read(&ports, ADDRESS), ENABLE.to_le_bytes());
        ports.write(ADDRESS, &(ENABLE | 8).to_le_bytes());
        assert_eq!(read(&ports, DATA + 2), [0x00, 0x06], "the first function is a host bridge");
        ports.write(ADDRESS, &ENABLE.to_le_bytes());
        assert_eq!(read(&ports, DATA), [0x36, 0x1b, 0x08, 0x00]);
    }

    #[test]
    fn the_bus_has_only_a_host_bridge() {
        let ports = PciPorts::default();
        for function in (1 << 8..1 << 24).step_by(1 << 8) {
            ports.write(ADDRESS, &(ENABLE | function).to_le_bytes());
            assert_eq!(read(&ports, DATA), [0xff; 4], "{function:#x}");
        }
        ports.write(ADDRESS, &[0; 4]);
        assert_eq!(read(&ports, DATA), [0xff; 4], "not enabled");
    }

    #[test]
    fn invalid_accesses_are_ignored() {
        let ports = PciPorts::default();
        ports.write(ADDRESS, &u32::MAX.to_le_bytes());
        assert_eq!(read(&ports, ADDRESS), WRITABLE.to_le_bytes());
        ports.write(ADDRESS, &ENABLE.to_le_bytes());
        for (offset, len) in [(0, 1), (0, 2), (1, 1), (2, 2), (3, 4), (4, 4), (7, 1), (0, 8), (4, 8)] {
            ports.write(offset, &vec![0; len]);
            assert_eq!(read(&ports, ADDRESS), ENABLE.to_le_bytes(), "{offset} {len}");
        }
        assert_eq!((read(&ports, 1), read(&ports, 6), read(&ports, 7)), ([0xff], [0x08, 0x00], [0x00]));
        assert_eq!((read(&ports, 7), read(&ports, 4)), ([0xff; 2], [0xff; 8]), "across the end");
    }
}
