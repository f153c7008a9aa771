//! The configuration space of a function: identity, command register, BAR and capabilities.

use serde::{Deserialize, Serialize};

use super::CONFIG_BYTES;

// Offsets of registers (PCI Local Bus Specification 3.0, §6.1, figure 6-1).
const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION_ID: usize = 0x08;
const CLASS_CODE: usize = 0x09;
const BAR0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// The end of the header, where capabilities may start.
const HEADER_BYTES: usize = 0x40;

/// Command register: responds to memory accesses (§6.2.2).
const COMMAND_MEMORY: u8 = 1 << 1;
/// The writable bits: memory space, bus master, and the disabling of the interrupt pin, which does not exist.
const COMMAND_WRITABLE: [u8; 2] = [1 << 1 | 1 << 2, 1 << 2];
/// Status register: there are capabilities (§6.2.3).
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// The host bridge: vendor 0x1b36 and device 0x0008, for which no kernel applies quirks.
const HOST_BRIDGE: Identity =
    Identity { vendor: 0x1b36, device: 0x0008, revision: 0, class: 0x06_00_00, subsystem_vendor: 0, subsystem: 0 };

/// Identifies a function to drivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class, subclass and programming interface, from the highest byte down.
    pub class: u32,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

impl Identity {
    fn write(&self, bytes: &mut [u8; CONFIG_BYTES as usize]) {
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(VENDOR_ID, &self.vendor.to_le_bytes());
        put(DEVICE_ID, &self.device.to_le_bytes());
        put(REVISION_ID, &[self.revision]);
        put(CLASS_CODE, &self.class.to_le_bytes()[..3]);
        put(SUBSYSTEM_VENDOR_ID, &self.subsystem_vendor.to_le_bytes());
        put(SUBSYSTEM_ID, &self.subsystem.to_le_bytes());
    }
}

/// The registers of a function with a header of type 0 and a 32-bit memory BAR.
///
/// Every register is bytes of which a guest can write some bits. So the size of the BAR follows from its read-only bits
/// (§6.2.5.1), without a special case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES as usize],
    writable: [u8; CONFIG_BYTES as usize],
    /// The address of the pointer to the next capability.
    last_pointer: usize,
    /// The end of the last capability.
    end: usize,
}

/// The bytes of a [`ConfigSpace`], of which only what a guest can write is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConfigState(Vec<u8>);

impl ConfigSpace {
    /// Creates the registers of a function that responds to memory accesses at `bar_address`, a multiple of
    /// `bar_bytes`, which is a power of two of at least 4 KiB.
    pub fn new(identity: Identity, bar_address: u32, bar_bytes: u32) -> ConfigSpace {
        debug_assert!(bar_bytes.is_power_of_two() && bar_bytes >= 4096 && bar_address.is_multiple_of(bar_bytes));
        let mut bytes = [0; CONFIG_BYTES as usize];
        let mut writable = [0; CONFIG_BYTES as usize];
        identity.write(&mut bytes);
        bytes[COMMAND] = COMMAND_MEMORY;
        bytes[BAR0..BAR0 + 4].copy_from_slice(&bar_address.to_le_bytes());
        writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE);
        writable[BAR0..BAR0 + 4].copy_from_slice(&(!(bar_bytes - 1)).to_le_bytes());
        // Scratch space for operating systems, without any effect.
        writable[INTERRUPT_LINE] = 0xff;
        ConfigSpace { bytes, writable, last_pointer: CAPABILITIES_POINTER, end: HEADER_BYTES }
    }

    /// Adds a capability: its ID and what follows the pointer to the next one, of which the guest can write the bits in
    /// `writable`. Returns its offset. There must be room for it.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.end;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[self.last_pointer] = at as u8;
        self.bytes[at] = id;
        self.bytes[at + 2..at + 2 + body.len()].copy_from_slice(body);
        self.writable[at + 2..at + 2 + writable.len()].copy_from_slice(writable);
        self.last_pointer = at + 1;
        self.end = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Fills `data` from `offset`; bytes beyond the end are left unchanged.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.iter_mut().zip(self.bytes.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
    }

    /// Writes `data` at `offset`; read-only bits and bytes beyond the end are ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable).skip(offset as usize);
        registers.zip(data).for_each(|((byte, writable), value)| *byte = *byte & !writable | value & writable);
    }

    /// The register of `N` bytes at `offset`, as the guest reads it.
    pub fn register<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset as u64, &mut bytes);
        bytes
    }

    /// The address of the BAR, whether or not the function responds to it.
    pub fn bar_register(&self) -> u32 {
        u32::from_le_bytes(self.register(BAR0))
    }

    /// The bits of the BAR that a guest can write: it reads them after it has written ones to find the size.
    pub fn bar_size_mask(&self) -> u32 {
        let [a, b, c, d, ..] = &self.writable[BAR0..] else { return 0 };
        u32::from_le_bytes([*a, *b, *c, *d])
    }

    /// Whether the function responds to memory accesses.
    pub fn responds(&self) -> bool {
        self.bytes[COMMAND] & COMMAND_MEMORY != 0
    }

    /// Saves what a guest can write.
    pub fn save(&self) -> ConfigState {
        let masked = |(byte, writable): (&u8, &u8)| byte & writable;
        ConfigState(self.bytes.iter().zip(&self.writable).map(masked).collect())
    }

    /// Restores what [`ConfigSpace::save`] returned.
    pub fn restore(&mut self, state: &ConfigState) {
        self.write(0, &state.0);
    }
}

/// Fills `data` from the host bridge's registers, which are all read-only.
pub fn read_host_bridge(offset: u64, data: &mut [u8]) {
    let mut bytes = [0; CONFIG_BYTES as usize];
    HOST_BRIDGE.write(&mut bytes);
    data.iter_mut().zip(bytes.iter().skip(offset as usize)).for_each(|(to, from)| *to = *from);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: 0x01_02_03,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
        };
        ConfigSpace::new(identity, 0xd000_8000, 0x8000)
    }

    #[test]
    fn the_header_has_the_specified_layout() {
        let space = space();
        assert_eq!(space.register(0), [0xf4, 0x1a, 0x42, 0x10]);
        assert_eq!(space.register(0x08), [1, 3, 2, 1], "revision and class");
        assert_eq!(space.register(0x2c), [0xf4, 0x1a, 0x40, 0]);
        assert_eq!(space.register(0x0e), [0], "header type 0, one function");
        assert_eq!(space.register(0x3d), [0], "no interrupt pin");
        assert_eq!((space.register(0x06), space.register(0x34)), ([0, 0], [0]), "no capabilities");
    }

    #[test]
    fn a_guest_finds_the_size_of_the_bar_and_moves_it() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        assert_eq!(space.bar_register(), 0xffff_8000);
        assert_eq!(space.bar_size_mask(), 0xffff_8000);
        space.write(0x10, &0xd123_4567_u32.to_le_bytes());
        assert_eq!(space.bar_register(), 0xd123_0000);
        for bar in 1..6 {
            space.write(0x10 + 4 * bar, &[0xff; 4]);
            assert_eq!(space.register(0x10 + 4 * bar as usize), [0; 4], "there is no other BAR");
        }
        assert!(space.responds());
        space.write(0x04, &[0; 2]);
        assert!(!space.responds());
        space.write(0x04, &[0xff; 2]);
        assert_eq!(space.register(0x04), [6, 4]);
    }

    #[test]
    fn capabilities_are_linked_and_read_only_where_they_are() {
        let mut space = space();
        let first = space.add_capability(0x11, &[1, 2, 3], &[0, 0xf0]);
        let second = space.add_capability(0x09, &[4], &[]);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!((space.register(0x34), space.register(0x06)), ([0x40], [0x10, 0]));
        assert_eq!(space.register(0x40), [0x11, 0x48, 1, 2, 3]);
        assert_eq!(space.register(0x48), [0x09, 0, 4]);
        space.write(0x40, &[0xff; 4]);
        space.write(0x44, &[0xff; 4]);
        assert_eq!(space.register(0x40), [0x11, 0x48, 1, 0xf2, 3]);
    }

    #[test]
    fn saving_and_restoring_keeps_what_a_guest_can_write() {
        let mut space = space();
        space.write(0x04, &[0, 4]);
        space.write(0x10, &[0, 0, 0x55, 0xd5]);
        let mut other = self::space();
        other.restore(&space.save());
        assert_eq!(other, space);
        other.restore(&ConfigState(vec![0xff; 1000]));
        assert_eq!(other.register(0), [0xf4, 0x1a], "read-only");
    }

    #[test]
    fn accesses_beyond_the_end_are_ignored() {
        let mut space = space();
        let before = space.clone();
        space.write(255, &[0xff; 4]);
        space.write(u64::MAX, &[0xff; 4]);
        assert_eq!(space, before);
        let mut data = [0xee; 4];
        space.read(254, &mut data);
        assert_eq!(data, [0, 0, 0xee, 0xee]);
    }
}
