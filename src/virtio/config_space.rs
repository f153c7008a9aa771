//! The device configuration space (virtio 1.2 §2.5).

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Interrupt;

/// A device's configuration bytes. Shared by the device, which may change them, and the transport, which exposes them.
pub struct ConfigSpace {
    writable: Range<usize>,
    fresh: Vec<u8>,
    now: Mutex<Contents>,
}

struct Contents {
    bytes: Vec<u8>,
    generation: u32,
    /// Notifies the driver of changes, while one is attached.
    listener: Option<Arc<dyn Interrupt>>,
}

impl ConfigSpace {
    /// Creates a space with the content `bytes`; the driver may write the range `writable`, clipped to the space.
    pub fn new(bytes: Vec<u8>, writable: Range<usize>) -> ConfigSpace {
        let writable = writable.start.min(bytes.len())..writable.end.min(bytes.len());
        let fresh = bytes.clone();
        ConfigSpace { writable, fresh, now: Mutex::new(Contents { bytes, generation: 0, listener: None }) }
    }

    /// Fills `data` from `offset`. Bytes beyond the end are left unchanged.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let contents = self.lock();
        let rest = usize::try_from(offset).ok().and_then(|at| contents.bytes.get(at..)).unwrap_or_default();
        data.iter_mut().zip(rest).for_each(|(to, from)| *to = *from);
    }

    /// Writes `data` from the driver at `offset`; read-only bytes are ignored.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = usize::try_from(offset) else { return };
        for ((at, byte), value) in self.lock().bytes.iter_mut().enumerate().skip(offset).zip(data) {
            if self.writable.contains(&at) {
                *byte = *value;
            }
        }
    }

    /// Changes the configuration from the device side, on any thread. A driver that has set DRIVER_OK is notified.
    pub fn update(&self, offset: usize, data: &[u8]) {
        let mut contents = self.lock();
        contents.bytes.iter_mut().skip(offset).zip(data).for_each(|(to, from)| *to = *from);
        contents.generation = contents.generation.wrapping_add(1);
        let listener = contents.listener.clone();
        drop(contents);
        if let Some(listener) = listener {
            listener.config_changed();
        }
    }

    /// Sets the receiver of change notifications (virtio 1.2 §3.1.1: none before DRIVER_OK).
    pub fn listen(&self, listener: Option<Arc<dyn Interrupt>>) {
        self.lock().listener = listener;
    }

    /// The number of changes by the device, so that a driver can detect inconsistent reads.
    pub fn generation(&self) -> u32 {
        self.lock().generation
    }

    /// Resets the bytes written by the driver.
    pub fn reset(&self) {
        self.set_driver_bytes(&self.fresh[self.writable.clone()]);
    }

    /// The current content of the writable bytes.
    pub fn driver_bytes(&self) -> Vec<u8> {
        self.lock().bytes[self.writable.clone()].to_vec()
    }

    /// Restores the bytes returned by [`ConfigSpace::driver_bytes`].
    pub fn set_driver_bytes(&self, bytes: &[u8]) {
        self.lock().bytes[self.writable.clone()].iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    /// Restores the generation, so that a restored driver never sees one twice.
    pub fn set_generation(&self, generation: u32) {
        self.lock().generation = generation;
    }

    fn lock(&self) -> MutexGuard<'_, Contents> {
        self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(space: &ConfigSpace, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        space.read(offset, &mut data);
        data
    }

    #[test]
    fn reads_beyond_the_end_leave_all_ones() {
        let space = ConfigSpace::new(vec![1, 2, 3], 0..0);
        assert_eq!(read(&space, 1), [2, 3, 0xff, 0xff]);
        assert_eq!(read(&space, u64::MAX), [0xff; 8]);
    }

    #[test]
    fn a_driver_writes_only_writable_bytes() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4], 1..3);
        space.write(0, &[9; 8]);
        space.write(u64::MAX, &[9; 8]);
        assert_eq!(read(&space, 0), [1, 9, 9, 4]);
        assert_eq!(space.generation(), 0);
        space.reset();
        assert_eq!(read(&space, 0), [1, 2, 3, 4]);
    }

    #[test]
    fn a_change_by_the_device_is_a_new_generation_and_outlives_a_reset() {
        let space = ConfigSpace::new(vec![1, 2], 1..2);
        space.update(0, &[7, 8, 9]);
        space.reset();
        assert_eq!((read(&space, 0), space.generation()), ([7, 2], 1));
    }
}
