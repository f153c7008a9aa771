//! From a pair's queues to the host's kernel, which serves them in the worker's place: vhost-net.
//!
//! ```text
//! guest's doorbell ─ ioeventfd ─> the kernel's thread ─ rings in guest memory, frames of the tap device ─ irqfd ─> guest
//! ```
//!
//! No thread of ours has a part in it. What the kernel cannot do, it is not asked for: it keeps no limits and counts nothing,
//! and it does not know of links. For those the worker takes the queues back, and goes on where the kernel left them.

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vhost::vhost_kern::VhostKernBackend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::GuestMemory;
use crate::sys;
use crate::virtio::queue::QueueRegisters;
use crate::virtio::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};

/// The features that are about rings and the header's length, and so are the kernel's affair; checksums and segments are
/// the tap device's.
const RING_FEATURES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF | F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// The kernel's hands for one pair of queues.
pub struct Vhost {
    file: File,
    /// Written by the kernel when a ring makes no sense.
    errors: EventFd,
    /// Stands for a doorbell while the kernel is not to hear one.
    silence: EventFd,
    has_memory: bool,
    /// By direction, whether the kernel serves the queue.
    serves: [bool; 2],
}

/// A queue to be served, and what connects it with its driver.
pub struct Ring<'a> {
    /// Where it stands, as [`crate::virtio::Virtqueue::offload`] returned it.
    pub registers: QueueRegisters,
    /// Written when the driver rings.
    pub doorbell: &'a EventFd,
    /// To be written for used buffers.
    pub used_event: &'a EventFd,
}

impl Vhost {
    /// On `file`, an open /dev/vhost-net that was used for nothing yet.
    pub fn new(file: File) -> std::io::Result<Vhost> {
        let (errors, silence) = (EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        Ok(Vhost { file, errors, silence, has_memory: false, serves: [false; 2] })
    }

    /// Has the kernel serve `rings`, in the order of the directions, with frames of `tap`, for a driver that accepted
    /// `features`. After an error it may serve one of them: [`Vhost::stop`] tells.
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
            // Only now: a machine that is never up costs no thread of the kernel's.
            device.set_owner().context("VHOST_SET_OWNER")?;
            device.set_mem_table(&regions(memory)?).context("VHOST_SET_MEM_TABLE")?;
            self.has_memory = true;
        }
        device.set_features(wanted).context("VHOST_SET_FEATURES")?;
        // Of an earlier driver, or of what it will find again.
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
            // One that rang before is not remembered.
            let _ = doorbell.write(1);
        }
        Ok(())
    }

    /// Has the kernel serve the queue of `direction` no more. When this returns the kernel no longer touches it, and as many
    /// of its chains were used as were taken. Returns the index of the next available one; `None` where the kernel did not
    /// serve the queue. After an error it may still do so, until this is dropped.
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

    /// Whether the kernel found a ring to make no sense since this was last asked.
    pub fn has_refused(&self) -> bool {
        self.errors.read().is_ok()
    }

    /// Becomes readable when the kernel finds that.
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

/// What the library's calls are made on.
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

    /// They were checked when the queue was taken up, and the library's own check refuses a ring that ends where memory does.
    fn is_valid(&self, _rings: &VringConfigData) -> bool {
        true
    }
}
