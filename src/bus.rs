//! The port I/O and MMIO address spaces, which dispatch accesses to devices.
//!
//! A [`Bus`] is built before the first vCPU runs and never changes, so a lookup takes a binary search and no lock.

use std::sync::Arc;

/// A device accessed through port I/O or MMIO.
///
/// Called on vCPU threads, concurrently: a device guards its own state. Every access that a guest can make is passed
/// on, with any width from 1 to 8 bytes and at any offset in the device's range. An invalid access must be ignored
/// (writes) or return all-ones, and must never panic.
pub trait Device: Send + Sync {
    /// Fills `data` from the registers at `offset` in the device's range. On entry `data` contains all-ones.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the registers at `offset` in the device's range.
    fn write(&self, offset: u64, data: &[u8]);
    /// Whether the vCPU that has just written must wait for the device to catch up before the guest continues.
    fn is_behind(&self) -> bool {
        false
    }
}

/// An address range that cannot be assigned to a device.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// It overlaps with another device, is empty or wraps around.
    #[error("addresses {base:#x}+{len:#x} are empty, wrap or overlap another device's")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
}

struct Range {
    base: u64,
    last: u64,
    device: Arc<dyn Device>,
}

/// An address space (ports or memory) with its devices.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Assigns `len` bytes of address space starting at `base` to `device`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn Device>) -> Result<(), BusError> {
        let bad = BusError::BadRange { base, len };
        let Some(last) = len.checked_sub(1).and_then(|n| base.checked_add(n)) else {
            return Err(bad);
        };
        let at = self.ranges.partition_point(|r| r.base < base);
        let clear_below = at == 0 || self.ranges[at - 1].last < base;
        let clear_above = self.ranges.get(at).is_none_or(|next| last < next.base);
        if !(clear_below && clear_above) {
            return Err(bad);
        }
        self.ranges.insert(at, Range { base, last, device });
        Ok(())
    }

    /// Reads at `address`. Without a device there, `data` keeps its all-ones, as on a floating bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Writes at `address`. Returns whether the device is behind. Writes to unassigned addresses are dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.find(address, data.len()).is_some_and(|(device, offset)| {
            device.write(offset, data);
            device.is_behind()
        })
    }

    /// The device whose range includes all of `len` bytes at `address`, and the offset in it.
    fn find(&self, address: u64, len: usize) -> Option<(&dyn Device, u64)> {
        let last = address.checked_add((len as u64).checked_sub(1)?)?;
        let at = self.ranges.partition_point(|r| r.base <= address);
        let range = self.ranges.get(at.checked_sub(1)?)?;
        (last <= range.last).then(|| (&*range.device, address - range.base))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Device for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn bus() -> (Bus, Arc<Recorder>) {
        let device = Arc::new(Recorder::default());
        let mut bus = Bus::default();
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        (bus, device)
    }

    #[test]
    fn an_access_reaches_the_device_at_its_offset() {
        let (bus, device) = bus();
        let mut data = [0; 2];
        bus.read(0x104, &mut data);
        bus.write(0x10f, &[7]);
        assert_eq!(data, [4, 4]);
        assert_eq!(*device.0.lock().unwrap(), [(0xf, vec![7])]);
    }

    #[test]
    fn holes_and_accesses_across_an_edge_read_all_ones() {
        let (bus, device) = bus();
        for address in [0, 0xff, 0x10f, 0x110, u64::MAX - 3, u64::MAX] {
            let mut data = [0; 4];
            bus.read(address, &mut data);
            bus.write(address, &[0; 4]);
            assert_eq!(data, [0xff; 4], "at {address:#x}");
        }
        assert!(device.0.lock().unwrap().is_empty());
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let (mut bus, device) = bus();
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xff, 2), (0xf0, 0x100), (0x200, 0), (u64::MAX, 2)] {
            assert!(bus.insert(base, len, device.clone()).is_err(), "{base:#x}+{len:#x}");
        }
        bus.insert(0x110, 0x10, device.clone()).unwrap();
        bus.insert(0xf0, 0x10, device).unwrap();
    }
}
