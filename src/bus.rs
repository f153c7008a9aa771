//! From a vCPU's exit to the device that answers it: the two address spaces, frozen before the first vCPU runs.
//!
//! A [`Bus`] is built once and never changes, so finding a device takes a binary search and no lock.

use std::sync::Arc;

/// What a guest reaches through port I/O or memory-mapped I/O.
///
/// Called on vCPU threads, several at a time: a device that has state guards it itself. Every access that a guest can
/// make arrives here, of any width from 1 to 8 bytes and at any offset inside the device's range: an access that makes no sense
/// is to be ignored (writes) or answered with all-ones, never with a panic.
pub trait Device: Send + Sync {
    /// Fills `data` from the registers at `offset` bytes into the device's range. `data` holds all-ones on entry.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` to the registers at `offset` bytes into the device's range.
    fn write(&self, offset: u64, data: &[u8]);
    /// Whether who has just written is to wait until the device has caught up, before the guest runs on.
    fn is_behind(&self) -> bool {
        false
    }
}

/// An address range cannot be given to a device.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// Another device answers at some of these addresses, or the range is empty or wraps.
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

/// One address space (ports or memory) and the devices in it.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl Bus {
    /// Gives `len` bytes of address space from `base` to `device`.
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

    /// Reads at `address`. Where no device answers, `data` is left all-ones, as on a bus that nobody drives.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// Writes at `address`, and returns whether the device is behind; a write that no device takes is dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        self.find(address, data.len()).is_some_and(|(device, offset)| {
            device.write(offset, data);
            device.is_behind()
        })
    }

    /// The device that owns all of `len` bytes at `address`, and the offset in it.
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
