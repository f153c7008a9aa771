//! Virtio devices (virtio 1.2), independent of the transport.
//!
//! A device is plain data and one [`QueueHandler`]. [`session`] keeps the driver's negotiation, [`worker`] is the
//! thread that runs the handler, [`queue`] implements the rings, and [`mmio`] and [`pci`] are the transports.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use anyhow::Result;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

pub mod balloon;
pub mod block;
pub mod config_space;
pub mod fs;
pub mod log_rate;
pub mod mmio;
pub mod net;
pub mod pci;
pub mod queue;
pub mod rng;
pub mod session;
mod vacant;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod contract;
#[cfg(test)]
pub(crate) mod test_driver;

pub use config_space::ConfigSpace;
pub use mmio::{MmioState, MmioTransport};
pub use pci::{PciState, PciTransport};
pub use queue::{Chain, RingError, Virtqueue};
pub use vacant::Vacant;

/// VIRTIO_F_INDIRECT_DESC (virtio 1.2 §6): a descriptor may refer to a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX (virtio 1.2 §6): each side specifies the index at which it wants to be notified.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1 (virtio 1.2 §6): every device offers it and every driver must accept it.
pub const F_VERSION_1: u64 = 1 << 32;

/// The features that every device offers.
const COMMON_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// A feature that depends on another one (the "feature bit requirements" of virtio 1.2 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureNeed {
    /// The feature, as a mask.
    pub feature: u64,
    /// At least one of these features is required.
    pub any_of: u64,
}

impl FeatureNeed {
    /// Whether the requirement is met by `features`.
    pub fn is_met_by(&self, features: u64) -> bool {
        features & self.feature == 0 || features & self.any_of != 0
    }
}

/// A device as used by a transport: the properties visible to a driver, and the handler of its queues.
pub struct VirtioDevice {
    /// Device ID (virtio 1.2 §5).
    pub device_type: u32,
    /// The prefix of log lines, and the name of the worker thread (truncated to 15 bytes).
    pub name: String,
    /// Features offered.
    pub features: u64,
    /// Dependencies between features. A driver that violates them is denied FEATURES_OK. Disks, sockets, the balloon
    /// and the entropy device have none.
    pub feature_needs: &'static [FeatureNeed],
    /// Device-specific configuration.
    pub config: Arc<ConfigSpace>,
    /// Its queues with their handlers, in queue order.
    pub queue_groups: Vec<QueueGroup>,
}

impl VirtioDevice {
    /// How many queues the device has.
    pub fn queue_count(&self) -> usize {
        self.queue_groups.iter().map(|group| group.sizes.len()).sum()
    }

    /// The handler of the first group, for a caller that does not use a worker.
    pub fn into_handler(self) -> Option<Box<dyn QueueHandler>> {
        self.queue_groups.into_iter().next().map(|group| group.handler)
    }
}

/// Queues served by one worker thread. The driver may disable one without stopping other groups.
pub struct QueueGroup {
    /// The largest size of each queue, a power of two up to 32768.
    pub sizes: Vec<u16>,
    /// Serves the queues while the device is running; it counts them from the group's first.
    pub handler: Box<dyn QueueHandler>,
}

/// The result of processing a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The queue is empty and needs the driver's next doorbell.
    Drained,
    /// There is more work than fits into a turn. The queue has another turn after the other queues.
    More,
    /// The next request cannot be handled yet. One of [`QueueHandler::wake_fds`] signals when it can; no doorbell is
    /// needed until then.
    Blocked,
}

/// A saved state that does not match the device.
#[derive(Debug, thiserror::Error)]
#[error("the saved device has another state than this one can have")]
pub struct StateMismatch;

/// The device side of the queues.
///
/// Once the device has a transport, it is called and dropped only on its worker thread. A run lasts from
/// [`QueueHandler::start`] to [`QueueHandler::drain`]. An error means that a ring is broken, and the device then needs
/// a reset.
pub trait QueueHandler: Send {
    /// Starts a run with the features accepted by the driver. There may be several runs without a reset in between.
    fn start(&mut self, features: u64);

    /// Offloads queues to the host's kernel or takes them back, as required. Called at the beginning of a run and
    /// whenever [`QueueHandler::offload_is_current`] returns false.
    fn update_offload(&mut self, _queues: &mut [Virtqueue], _notifiers: &Notifiers) -> Result<(), RingError> {
        Ok(())
    }

    /// Whether the queues that should be offloaded are. Checked between turns, after anything that may change it.
    fn offload_is_current(&mut self) -> Result<bool, RingError> {
        Ok(true)
    }

    /// Processes the available buffers of queue `index` and completes any requests, in any queue, that are done.
    ///
    /// Called when the queue's doorbell rang, when one of [`QueueHandler::wake_fds`] was signaled, and once at each
    /// start. A call does a bounded amount of work, so that a stop request is noticed soon.
    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError>;

    /// Whether the worker may poll for some microseconds before it sleeps: no other queue and no host event has to wait
    /// meanwhile.
    fn may_poll(&self) -> bool {
        false
    }

    /// File descriptors that become readable or writable on events of the host side. They are watched edge-triggered
    /// until the next [`QueueHandler::update_offload`] or the end of the run.
    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// Whether also room for output at [`QueueHandler::wake_fds`] wakes the worker. A socket has some again whenever the other
    /// side takes a message.
    fn waits_for_room(&self) -> bool {
        true
    }

    /// Ends a run: takes back all queues and completes all requests in flight. After it returns, even with an error,
    /// guest memory is no longer accessed.
    fn drain(&mut self, _queues: &mut [Virtqueue]) -> Result<(), RingError> {
        Ok(())
    }

    /// Discards all state set by the driver, after a reset.
    fn reset(&mut self) {}

    /// Saves the state that the driver set through the queues. Called between runs.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Restores the state returned by [`QueueHandler::save`]. Called between runs. Fails without any change on a state
    /// that `save` cannot have returned.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateMismatch> {
        if state.is_empty() { Ok(()) } else { Err(StateMismatch) }
    }
}

/// The notifications of a queue group, by the queue's index in the group, for the worker and for code that serves
/// queues in its place.
#[derive(Clone)]
pub struct Notifiers {
    /// One for each of the device's queues, in order: written when the driver rings.
    all_doorbells: Arc<Vec<EventFd>>,
    /// The group's range within them.
    queues: Range<usize>,
    interrupt: Arc<dyn Interrupt>,
}

impl Notifiers {
    /// One per queue of the group, in order.
    pub fn doorbells(&self) -> &[EventFd] {
        self.all_doorbells.get(self.queues.clone()).unwrap_or_default()
    }

    /// [`Interrupt::queue_used`].
    pub fn queue_used(&self, index: usize) {
        self.interrupt.queue_used(self.queues.start + index);
    }

    /// [`Interrupt::used_event`].
    pub fn used_event(&self, index: usize) -> &EventFd {
        self.interrupt.used_event(self.queues.start + index)
    }

    /// [`Interrupt::share`].
    pub fn share(&self, shared: bool) {
        self.interrupt.share(shared);
    }
}

/// A device on a bus. Dropping it stops the device.
pub trait Transport: Send + Sync {
    /// One eventfd per queue, written when the driver rings.
    fn doorbells(&self) -> &[EventFd];

    /// Pauses the device after completing requests in flight. The vCPUs must be stopped first.
    fn pause(&self);

    /// Resumes the device. The vCPUs must be started afterwards.
    fn resume(&self);

    /// Saves the state visible to the driver. A running device is stopped temporarily; for a state consistent with
    /// guest memory, pause the device before saving both.
    fn save(&self) -> TransportState;

    /// Restores a saved state and leaves the device paused.
    ///
    /// Fails without any change if the state belongs to another version, device or transport.
    fn restore(&self, state: &TransportState) -> Result<()>;
}

/// The saved state of a transport and its device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransportState {
    /// Of MMIO.
    Mmio(MmioState),
    /// Of PCI.
    Pci(PciState),
}

/// The transport's interrupt, which notifies the driver. Called from any thread.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers for which the driver wants a notification.
    fn queue_used(&self, index: usize);
    /// The configuration or the device's status has changed.
    fn config_changed(&self);
    /// Writing to this eventfd is equivalent to [`Interrupt::queue_used`] for queue `index`, while the interrupt is
    /// shared.
    fn used_event(&self, index: usize) -> &EventFd;
    /// Starts or stops sharing the interrupt with an agent that writes to [`Interrupt::used_event`]. Before sharing
    /// stops, [`Interrupt::queue_used`] must be called, since the last write may have been missed.
    fn share(&self, shared: bool);
}
