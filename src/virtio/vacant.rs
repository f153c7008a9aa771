//! Places for devices on the memory-mapped bus that have none (virtio 1.2 §4.2.2: a device with the ID 0 is a placeholder). A machine
//! that was saved may get devices there when it is restored.

use super::mmio::{MAGIC, VERSION_2, register};
use crate::bus::Device;
use crate::layout;

/// All vacant places, one behind the other.
pub struct Vacant;

impl Device for Vacant {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let value: u32 = match offset % layout::VIRTIO_MMIO_STRIDE {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION_2,
            register::DEVICE_ID | register::VENDOR_ID => 0,
            _ => return,
        };
        *data = value.to_le_bytes();
    }

    fn write(&self, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_finds_no_device_in_any_place() {
        for slot in [0, 3 * layout::VIRTIO_MMIO_STRIDE] {
            let read = |offset| {
                let mut data = [0xff; 4];
                Vacant.read(slot + offset, &mut data);
                u32::from_le_bytes(data)
            };
            assert_eq!([0, 4, 8, 12].map(read), [MAGIC, 2, 0, 0]);
            assert_eq!(read(0x100), u32::MAX);
        }
        let mut byte = [0xff];
        Vacant.read(0, &mut byte);
        assert_eq!(byte, [0xff]);
    }
}
