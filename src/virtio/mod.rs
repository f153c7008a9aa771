//! From a doorbell to the used ring: virtio devices (virtio 1.2) that know no transport.
//!
//! A device is plain data and one [`QueueHandler`]. A driver's negotiation is kept by [`session`], the thread that runs
//! the handler by [`worker`], the rings by [`queue`]; [`mmio`] is the way a guest reaches all of it.

use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

pub mod balloon;
pub mod block;
pub mod config_space;
mod log_rate;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rng;
pub mod session;
pub mod vsock;
pub mod worker;

#[cfg(test)]
mod contract;
#[cfg(test)]
pub(crate) mod test_driver;

pub use config_space::ConfigSpace;
pub use mmio::{MmioTransport, TransportState};
pub use queue::{Chain, RingError, Virtqueue};

/// VIRTIO_F_INDIRECT_DESC (virtio 1.2 §6): a descriptor may point to a table of descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// VIRTIO_F_EVENT_IDX (virtio 1.2 §6): each side says at which index it wants to hear from the other.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// VIRTIO_F_VERSION_1 (virtio 1.2 §6): every device offers it and every driver must accept it.
pub const F_VERSION_1: u64 = 1 << 32;

/// What every device here offers, whatever it does.
const COMMON_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// A feature that means something only beside another one (the "feature bit requirements" of virtio 1.2 §5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureNeed {
    /// The feature, as a mask.
    pub feature: u64,
    /// Of these it needs one at least.
    pub any_of: u64,
}

impl FeatureNeed {
    /// Whether somebody who accepted `features` keeps to it.
    pub fn is_met_by(&self, features: u64) -> bool {
        features & self.feature == 0 || features & self.any_of != 0
    }
}

/// A device as a transport takes it: what a driver can read about it, and the code that serves its queues.
pub struct VirtioDevice {
    /// Device ID (virtio 1.2 §5).
    pub device_type: u32,
    /// Begins log lines, and names the worker thread as far as 15 bytes go.
    pub name: String,
    /// Features offered.
    pub features: u64,
    /// Which of them mean nothing without others. A driver that accepts one without is refused FEATURES_OK. Of what disks,
    /// sockets, the balloon and the entropy device offer, nothing does.
    pub feature_needs: &'static [FeatureNeed],
    /// Device-specific configuration.
    pub config: Arc<ConfigSpace>,
    /// Its queues and what serves them, in the order of the queues.
    pub queue_groups: Vec<QueueGroup>,
}

impl VirtioDevice {
    /// How many queues the device has.
    pub fn queue_count(&self) -> usize {
        self.queue_groups.iter().map(|group| group.sizes.len()).sum()
    }

    /// What serves the first group, for a caller that does without a worker.
    pub fn into_handler(self) -> Option<Box<dyn QueueHandler>> {
        self.queue_groups.into_iter().next().map(|group| group.handler)
    }
}

/// Queues of a device that one worker thread serves. Their driver may take one out of use without stopping other groups.
pub struct QueueGroup {
    /// The largest size of each queue, a power of two up to 32768.
    pub sizes: Vec<u16>,
    /// Serves the queues while the device runs, and counts them from the group's first.
    pub handler: Box<dyn QueueHandler>,
}

/// How far a handler got with a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The queue is empty. The driver's next doorbell is wanted.
    Drained,
    /// There is more in it than one turn may take. It has another turn after the other queues had theirs.
    More,
    /// What is next in it cannot be taken now. One of [`QueueHandler::wake_fds`] tells when; no doorbell is wanted until then.
    Blocked,
}

/// A saved state that does not fit the device.
#[derive(Debug, thiserror::Error)]
#[error("the saved device has another state than this one can have")]
pub struct StateMismatch;

/// The device's side of its queues.
///
/// Once the device has its transport, it is called on its worker thread only, and dropped there. A run lasts from
/// [`QueueHandler::start`] to [`QueueHandler::drain`]. An error from it is a broken ring: the device then needs a reset.
pub trait QueueHandler: Send {
    /// A run begins, with the features that the driver accepted. Runs may follow each other with no reset in between.
    fn start(&mut self, features: u64);

    /// Offloads queues to the host's kernel, or takes them back, whichever is due. Called at the beginning of a run, and again
    /// whenever [`QueueHandler::offload_is_current`] returns false.
    fn update_offload(&mut self, _queues: &mut [Virtqueue], _notifiers: &Notifiers) -> Result<(), RingError> {
        Ok(())
    }

    /// Whether each queue is offloaded, or not, as it should be. Asked between turns, after everything that may change it.
    fn offload_is_current(&mut self) -> Result<bool, RingError> {
        Ok(true)
    }

    /// Takes what is available in queue `index` and completes what can be completed, in any queue.
    ///
    /// Called when the queue's doorbell rang, when one of [`QueueHandler::wake_fds`] had something to tell, and once at each
    /// start. A call does a bounded amount of work, so that a stop is never far away.
    fn process(&mut self, index: usize, queues: &mut [Virtqueue]) -> Result<Progress, RingError>;

    /// File descriptors that become readable or writable when the host side has something to tell. They are watched
    /// edge-triggered, until the next [`QueueHandler::update_offload`] or the end of the run.
    fn wake_fds(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// A run ends: takes back all queues, waits for everything in flight and completes it. When this returns, with an error too, nothing touches
    /// guest memory any more.
    fn drain(&mut self, _queues: &mut [Virtqueue]) -> Result<(), RingError> {
        Ok(())
    }

    /// The driver reset the device: forgets all that it said.
    fn reset(&mut self) {}

    /// What the driver said through its queues and the device keeps, between two runs.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Puts back what [`QueueHandler::save`] returned, between two runs. Fails, with nothing changed, on what it would not
    /// have returned for any driver.
    fn restore(&mut self, state: &[u8]) -> Result<(), StateMismatch> {
        if state.is_empty() { Ok(()) } else { Err(StateMismatch) }
    }
}

/// What notifies of work in the queues of a group, and of their used buffers, by the queue's index in the group: for the
/// worker, and for whatever serves queues in its place.
#[derive(Clone)]
pub struct Notifiers {
    /// One for each of the device's queues, in order: written when the driver rings.
    all_doorbells: Arc<Vec<EventFd>>,
    /// The group's queues among them.
    queues: Range<usize>,
    interrupt: Arc<dyn Interrupt>,
}

impl Notifiers {
    /// One for each queue of the group, in order.
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

/// How a device gets the driver's attention: the transport's part of an interrupt. Called from any thread.
pub trait Interrupt: Send + Sync {
    /// Queue `index` has used buffers that the driver wants to hear of.
    fn queue_used(&self, index: usize);
    /// The configuration, or the device's status, changed.
    fn config_changed(&self);
    /// Writing this is as good as [`Interrupt::queue_used`] for queue `index`, while the interrupt is shared.
    fn used_event(&self, index: usize) -> &EventFd;
    /// Shares the interrupt with somebody who writes [`Interrupt::used_event`], or no longer. Whoever ends it says
    /// [`Interrupt::queue_used`] before, since what was written last may not have been seen.
    fn share(&self, shared: bool);
}
