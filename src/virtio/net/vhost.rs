//! vhost-net: offloads a queue pair to the host's kernel, which serves it in place of the worker.
//!
//! ```text
//! guest's doorbell ─ ioeventfd ─> the kernel's thread ─ rings in guest memory, frames of the tap device ─ irqfd ─> guest
//! ```
//!
//! No thread of husk is involved. The kernel does not support rate limits, counters and link state: when they are
//! needed the worker takes the queues back and continues where the kernel stopped.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::memory::GuestMemory;
use crate::sys;
use crate::sys::event;
use crate::virtio::queue::QueueRegisters;
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};

/// Features that concern rings and the header's length, and therefore the kernel; checksums and segmentation concern
/// the tap device.
const RING_FEATURES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// The vhost-net instance of a queue pair.
pub struct Vhost {
    file: File,
    /// Signaled by the kernel on an invalid ring.
    errors: EventFd,
    /// Stands in for a doorbell while the kernel must not receive one.
    silence: EventFd,
    has_memory: bool,
    /// For each direction, whether the kernel serves the queue.
    serves: [bool; 2],
}

/// A queue to be offloaded, with its notifications.
pub struct Ring<'a> {
    /// Its state, as returned by [`crate::virtio::Virtqueue::offload`].
    pub registers: QueueRegisters,
    /// Written when the driver rings.
    pub doorbell: &'a EventFd,
    /// Written to when there are used buffers.
    pub used_event: &'a EventFd,
}

impl Vhost {
    /// Creates an instance from `file`, an unused open /dev/vhost-net.
    pub fn new(file: File) -> std::io::Result<Vhost> {
        let (errors, silence) = (event::create()?, event::create()?);
        Ok(Vhost { file, errors, silence, has_memory: false, serves: [false; 2] })
    }

    /// Makes the kernel serve `rings`, in the order of the directions, with the frames of `tap`, for a driver that
    /// accepted `features`. After an error it may serve one of them; [`Vhost::stop`] handles that.
    pub fn start(
        &mut self,
        tap: BorrowedFd<'_>,
        features: u64,
        memory: &Arc<GuestMemory>,
        rings: &[Ring<'_>; 2],
    ) -> Result<()> {
        let device = Device { file: &self.file, memory };
        let (offered, wanted) = (device.get_features().context("VHOST_GET_FEATURES")?, features & RING_FEATURES);
        ensure!(wanted & !offered == 0, "the kernel lacks features: {:#x}", wanted & !offered);
        if !self.has_memory {
            // Deferred until here, so that a machine without network traffic does not cost a kernel thread.
            device.set_owner().context("VHOST_SET_OWNER")?;
            device.set_mem_table(&regions(memory)?).context("VHOST_SET_MEM_TABLE")?;
            self.has_memory = true;
        }
        device.set_features(wanted).context("VHOST_SET_FEATURES")?;
        // Left over from an earlier driver, or detected again.
        let _ = self.errors.read();
        for (direction, Ring { registers, doorbell, used_event }) in rings.iter().enumerate() {
            device.set_vring_num(direction, registers.size).context("VHOST_SET_VRING_NUM")?;
            device.set_vring_addr(direction, &addresses(registers)).context("VHOST_SET_VRING_ADDR")?;
            device.set_vring_base(direction, registers.next_available).context("VHOST_SET_VRING_BASE")?;
            device.set_vring_call(direction, used_event).context("VHOST_SET_VRING_CALL")?;
            device.set_vring_err(direction, &self.errors).context("VHOST_SET_VRING_ERR")?;
            device.set_vring_kick(direction, doorbell).context("VHOST_SET_VRING_KICK")?;
        }
        for (direction, Ring { doorbell, .. }) in rings.iter().enumerate() {
            sys::net::set_vhost_backend(&self.file, direction, Some(tap)).context("VHOST_NET_SET_BACKEND")?;
            self.serves[direction] = true;
            // Earlier doorbells are unknown.
            let _ = doorbell.write(1);
        }
        Ok(())
    }

    /// Stops serving the queue of `direction`. On return the kernel no longer accesses it, and all chains taken from it
    /// are used. Returns the index of the next available one; `None` if the kernel did not serve the queue. After an
    /// error it may still do so, until this is dropped.
    pub fn stop(&mut self, direction: usize, memory: &Arc<GuestMemory>) -> Result<Option<u16>> {
        if !std::mem::take(&mut self.serves[direction]) {
            return Ok(None);
        }
        let device = Device { file: &self.file, memory };
        sys::net::set_vhost_backend(&self.file, direction, None).context("VHOST_NET_SET_BACKEND")?;
        device.set_vring_kick(direction, &self.silence).context("VHOST_SET_VRING_KICK")?;
        let next = device.get_vring_base(direction).context("VHOST_GET_VRING_BASE")?;
        Ok(Some(u16::try_from(next)?))
    }

    /// Whether the kernel reported an invalid ring since the last call.
    pub fn has_refused(&self) -> bool {
        self.errors.read().is_ok()
    }

    /// Readable when the kernel reports an invalid ring.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        sys::event_fd(&self.errors)
    }
}

fn regions(memory: &GuestMemory) -> Result<Vec<VhostUserMemoryRegionInfo>> {
    let region = |region: &crate::memory::Region| {
        Ok(VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.get_host_address(MemoryRegionAddress(0))? as u64,
            ..VhostUserMemoryRegionInfo::default()
        })
    };
    memory.iter().map(region).collect()
}

fn addresses(registers: &QueueRegisters) -> VringConfigData {
    VringConfigData {
        queue_max_size: registers.size_max,
        queue_size: registers.size,
        desc_table_addr: registers.descriptor_table,
        used_ring_addr: registers.used_ring,
        avail_ring_addr: registers.available_ring,
        ..VringConfigData::default()
    }
}

/// The implementation of the vhost crate's traits.
struct Device<'a> {
    file: &'a File,
    memory: &'a Arc<GuestMemory>,
}

impl AsRawFd for Device<'_> {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl VhostKernBackend for Device<'_> {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Arc<GuestMemory> {
        self.memory
    }

    /// The rings were validated when the queue was activated, and the crate's own check rejects a ring that ends at the
    /// end of memory.
    fn is_valid(&self, _rings: &VringConfigData) -> bool {
        true
    }
}
