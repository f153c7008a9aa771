//! The configuration ports of the bus: mechanism 1 (PCI Local Bus Specification 3.0, §3.2.2.3.2).
//!
//! They exist in machines without PCI functions as well, for kernels with PCI support, which would otherwise log an
//! error at every boot.

use std::sync::atomic::{AtomicU32, Ordering};

use super::Functions;
use crate::bus::Device;

/// The offset of the configuration address, followed by that of the data.
const ADDRESS: u64 = 0;
const DATA: u64 = 4;
/// Bit 31 of the address: enables configuration accesses.
const ENABLE: u32 = 1 << 31;
/// The writable bits of the address: enable, bus, device and function, register.
const WRITABLE: u32 = ENABLE | 0x00ff_fffc;

/// The eight ports. Their only state is the address; concurrent accesses of several vCPUs are atomic.
#[derive(Default)]
pub struct Ports {
    address: AtomicU32,
    functions: Functions,
}

impl Ports {
    /// Creates the ports for a bus.
    pub fn new(functions: Functions) -> Ports {
        Ports { address: AtomicU32::new(0), functions }
    }

    /// The address as in ECAM of byte `offset` of the data, if accesses are enabled. Register numbers have 8 bits here,
    /// and are followed by the function's number at once.
    fn target(&self, offset: u64) -> Option<u64> {
        let address = self.address.load(Ordering::Relaxed);
        let function = u64::from(address & 0x00ff_ff00) << 4;
        (address & ENABLE != 0).then_some(function | u64::from(address & 0xfc) | offset)
    }
}

impl Device for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (ADDRESS, 4) => data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes()),
            (DATA.., _) => {
                if let Some(target) = self.target(offset - DATA) {
                    self.functions.read_config(target, data);
                }
            }
            // Not a port of the address by itself: on a PC, 0xcf9 and 0xcfb belong to other devices.
            _ => {}
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            (ADDRESS, Ok(bytes)) => self.address.store(u32::from_le_bytes(bytes) & WRITABLE, Ordering::Relaxed),
            (DATA.., _) => {
                if let Some(target) = self.target(offset - DATA) {
                    self.functions.write_config(target, data);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(ports: &Ports, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        ports.read(offset, &mut data);
        data
    }

    /// The check for a bus in Linux, arch/x86/pci/direct.c.
    #[test]
    fn a_kernel_detects_the_bus() {
        let ports = Ports::default();
        ports.write(3, &[1]);
        ports.write(ADDRESS, &ENABLE.to_le_bytes());
        assert_eq!(read(&ports, ADDRESS), ENABLE.to_le_bytes());
        ports.write(ADDRESS, &(ENABLE | 8).to_le_bytes());
        assert_eq!(read(&ports, DATA + 2), [0x00, 0x06], "the first function is a host bridge");
        ports.write(ADDRESS, &ENABLE.to_le_bytes());
        assert_eq!(read(&ports, DATA), [0x36, 0x1b, 0x08, 0x00]);
    }

    #[test]
    fn an_empty_bus_has_only_a_host_bridge() {
        let ports = Ports::default();
        for function in (1 << 8..1 << 24).step_by(1 << 8) {
            ports.write(ADDRESS, &(ENABLE | function).to_le_bytes());
            assert_eq!(read(&ports, DATA), [0xff; 4], "{function:#x}");
        }
        ports.write(ADDRESS, &[0; 4]);
        assert_eq!(read(&ports, DATA), [0xff; 4], "not enabled");
    }

    #[test]
    fn invalid_accesses_are_ignored() {
        let ports = Ports::default();
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
