//! The common configuration structure (virtio 1.2 §4.1.4.3).

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;

use crate::pci::Msix;
use crate::virtio::ConfigSpace;
use crate::virtio::queue::QueueRegisters;
use crate::virtio::session::DeviceSession;

/// Offsets of the fields.
pub mod field {
    /// Selects which 32 bits of the offered features are read.
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    /// 32 bits of the offered features.
    pub const DEVICE_FEATURE: u64 = 0x04;
    /// Selects which 32 bits of the accepted features are accessed.
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    /// 32 bits of the accepted features.
    pub const DRIVER_FEATURE: u64 = 0x0c;
    /// The vector of configuration changes.
    pub const CONFIG_MSIX_VECTOR: u64 = 0x10;
    /// The number of queues.
    pub const NUM_QUEUES: u64 = 0x12;
    /// Device status.
    pub const DEVICE_STATUS: u64 = 0x14;
    /// Counts changes of the configuration.
    pub const CONFIG_GENERATION: u64 = 0x15;
    /// Selects the queue that the fields below refer to.
    pub const QUEUE_SELECT: u64 = 0x16;
    /// The queue's size; 0 if it does not exist.
    pub const QUEUE_SIZE: u64 = 0x18;
    /// The queue's vector.
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    /// Whether the queue is in use.
    pub const QUEUE_ENABLE: u64 = 0x1c;
    /// The index of the queue's doorbell.
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    /// The descriptor table's address.
    pub const QUEUE_DESC: u64 = 0x20;
    /// The available ring's address.
    pub const QUEUE_DRIVER: u64 = 0x28;
    /// The used ring's address.
    pub const QUEUE_DEVICE: u64 = 0x30;
    /// What to write to the doorbell, if the driver accepts a feature that husk does not offer.
    pub const QUEUE_NOTIFY_DATA: u64 = 0x38;
    /// Resets a queue, likewise.
    pub const QUEUE_RESET: u64 = 0x3a;
}
use field::*;

/// The selector fields: those that belong to the transport.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommonConfig {
    /// device_feature_select.
    pub device_feature_select: u32,
    /// driver_feature_select.
    pub driver_feature_select: u32,
    /// queue_select.
    pub queue_select: u16,
}

/// Where 64-bit fields are: each half may be accessed separately (§4.1.3.1).
const ADDRESSES: std::ops::Range<u64> = QUEUE_DESC..QUEUE_NOTIFY_DATA;

impl CommonConfig {
    /// Fills `data` from the field at `offset`, which has that width.
    pub fn read(&self, offset: u64, data: &mut [u8], msix: &Msix, session: &DeviceSession, config: &ConfigSpace) {
        let queue = session.queue(self.queue_select.into());
        let index = usize::from(self.queue_select);
        let value: [u8; 8] = match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => wide(self.device_feature_select),
            (DEVICE_FEATURE, 4) => wide(session.device_features(self.device_feature_select)),
            (DRIVER_FEATURE_SELECT, 4) => wide(self.driver_feature_select),
            (DRIVER_FEATURE, 4) => wide(session.driver_features(self.driver_feature_select)),
            (CONFIG_MSIX_VECTOR, 2) => wide(msix.vector(session.queue_count())),
            (NUM_QUEUES, 2) => wide(session.queue_count() as u16),
            (DEVICE_STATUS, 1) => wide(session.status()),
            (CONFIG_GENERATION, 1) => wide(config.generation()),
            (QUEUE_SELECT, 2) => wide(self.queue_select),
            (QUEUE_SIZE, 2) => wide(queue.map_or(0, |queue| queue.size)),
            (QUEUE_MSIX_VECTOR, 2) => wide(if queue.is_some() { msix.vector(index) } else { crate::pci::NO_VECTOR }),
            (QUEUE_ENABLE, 2) => wide(u16::from(queue.is_some_and(|queue| queue.ready))),
            (QUEUE_NOTIFY_OFF, 2) => wide(self.queue_select),
            (QUEUE_NOTIFY_DATA | QUEUE_RESET, 2) => wide(0_u16),
            (offset, 4 | 8) if ADDRESSES.contains(&offset) => {
                let Some((address, shift)) = queue.and_then(|queue| address(queue, offset, data.len())) else { return };
                (address >> shift).to_le_bytes()
            }
            _ => return,
        };
        data.iter_mut().zip(value).for_each(|(to, from)| *to = from);
    }

    /// Writes `data` to the field at `offset`, which has that width. Returns whether the device was reset.
    pub fn write(&mut self, offset: u64, data: &[u8], msix: &mut Msix, session: &mut DeviceSession) -> bool {
        let mut bytes = [0; 8];
        bytes.iter_mut().zip(data).for_each(|(to, from)| *to = *from);
        let value = u64::from_le_bytes(bytes);
        let queue_select = u32::from(self.queue_select);
        match (offset, data.len()) {
            (DEVICE_FEATURE_SELECT, 4) => self.device_feature_select = value as u32,
            (DRIVER_FEATURE_SELECT, 4) => self.driver_feature_select = value as u32,
            (DRIVER_FEATURE, 4) => session.set_driver_features(self.driver_feature_select, value as u32),
            (CONFIG_MSIX_VECTOR, 2) => msix.set_vector(session.queue_count(), value as u16),
            (DEVICE_STATUS, 1) => {
                if value as u32 & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
                    msix.settle();
                }
                session.set_status(value as u32);
                if value == 0 {
                    *self = CommonConfig::default();
                    msix.reset_vectors();
                    return true;
                }
            }
            (QUEUE_SELECT, 2) => self.queue_select = value as u16,
            (QUEUE_MSIX_VECTOR, 2) if session.queue(queue_select).is_some() => {
                msix.set_vector(usize::from(self.queue_select), value as u16);
            }
            // Drivers cannot disable queues by themselves (§4.1.4.3.2).
            (QUEUE_ENABLE, 2) if value == 1 => session.set_queue_ready(queue_select, true),
            (QUEUE_SIZE, 2) => {
                if let Some(queue) = session.queue_to_set_up(queue_select) {
                    queue.size = value as u16;
                }
            }
            (offset, len @ (4 | 8)) if ADDRESSES.contains(&offset) => {
                if let Some(queue) = session.queue_to_set_up(queue_select) {
                    set_address(queue, offset, len, value);
                }
            }
            _ => {}
        }
        false
    }
}

fn wide(value: impl Into<u64>) -> [u8; 8] {
    value.into().to_le_bytes()
}

/// The address in the field with an access of `len` bytes at `offset`, and the bit where that starts.
fn address(queue: &QueueRegisters, offset: u64, len: usize) -> Option<(u64, u32)> {
    let (start, shift) = place(offset, len)?;
    let address = match start {
        QUEUE_DESC => queue.descriptor_table,
        QUEUE_DRIVER => queue.available_ring,
        _ => queue.used_ring,
    };
    Some((address, shift))
}

fn set_address(queue: &mut QueueRegisters, offset: u64, len: usize, value: u64) {
    let Some((start, shift)) = place(offset, len) else { return };
    let address = match start {
        QUEUE_DESC => &mut queue.descriptor_table,
        QUEUE_DRIVER => &mut queue.available_ring,
        _ => &mut queue.used_ring,
    };
    let mask = if len == 8 { u64::MAX } else { 0xffff_ffff << shift };
    *address = *address & !mask | value << shift;
}

/// The 64-bit field that an aligned access is in, and the bit where the access starts.
fn place(offset: u64, len: usize) -> Option<(u64, u32)> {
    let at = offset % 8;
    (at.is_multiple_of(len as u64)).then_some((offset - at, at as u32 * 8))
}
