//! Split virtqueues (virtio 1.2 §2.7): takes descriptor chains from the available ring and returns them in the used
//! ring.
//!
//! The driver may change this memory at any time: each descriptor is read once and checked before it is passed on.

mod ranges;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::{Error as QueueError, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::memory::GuestMemory;
pub use ranges::{GuestRange, len_bytes, part, read_bytes, read_front, write_front};

/// The offset of the available ring's entries, after flags and index (virtio 1.2 §2.7.6).
const AVAILABLE_ENTRIES_AT: u64 = 4;
/// The offset and the size of the used ring's entries (virtio 1.2 §2.7.8).
const USED_ENTRIES_AT: u64 = 4;
const USED_ENTRY_BYTES: u64 = 8;

/// The driver violated the ring's rules, so the device can no longer determine the requests.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The rings are outside of memory or misaligned, or an index is invalid.
    #[error("{0}")]
    Ring(QueueError),
    /// A descriptor chain violates virtio 1.2 §2.7.5.
    #[error("invalid descriptor chain: {0}")]
    Chain(&'static str),
    /// The host's kernel, which served the queue, failed.
    #[error("the host's kernel (vhost) {0}")]
    Kernel(String),
}

impl From<QueueError> for RingError {
    fn from(error: QueueError) -> RingError {
        RingError::Ring(error)
    }
}

fn unreachable_ring(error: GuestMemoryError) -> RingError {
    RingError::Ring(QueueError::GuestMemory(error))
}

/// The state of a queue that is not running: the driver's settings and the device's progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// The maximum size.
    pub size_max: u16,
    /// The size set by the driver.
    pub size: u16,
    /// Whether the driver has enabled the queue.
    pub ready: bool,
    /// Guest physical address of the descriptor table.
    pub descriptor_table: u64,
    /// Guest physical address of the available ring.
    pub available_ring: u64,
    /// Guest physical address of the used ring.
    pub used_ring: u64,
    /// Index of the next entry to take from the available ring.
    pub next_available: u16,
    /// Index of the next entry to put into the used ring.
    pub next_used: u16,
}

impl QueueRegisters {
    /// The state after a reset.
    pub fn new(size_max: u16) -> QueueRegisters {
        QueueRegisters {
            size_max,
            size: size_max,
            ready: false,
            descriptor_table: 0,
            available_ring: 0,
            used_ring: 0,
            next_available: 0,
            next_used: 0,
        }
    }
}

/// A descriptor chain, read once. It is reused, so that taking a chain does not allocate.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Vec<GuestRange>,
    writable: Vec<GuestRange>,
}

impl Chain {
    /// Creates a chain from its parts, for tests of code that parses chains.
    pub fn from_parts(head: u16, readable: Vec<GuestRange>, writable: Vec<GuestRange>) -> Chain {
        Chain { head, readable, writable }
    }

    /// Identifies the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The device-readable part, in order.
    pub fn readable(&self) -> &[GuestRange] {
        &self.readable
    }

    /// The device-writable part, in order.
    pub fn writable(&self) -> &[GuestRange] {
        &self.writable
    }
}

/// A descriptor as read (virtio 1.2 §2.7.5).
struct Descriptor {
    address: u64,
    len_bytes: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &GuestMemory, address: u64) -> Result<Descriptor, RingError> {
        let bytes: [u8; 16] = read_bytes(memory, GuestAddress(address))
            .map_err(|_| RingError::Chain("a table of descriptors outside of memory"))?;
        let all = u128::from_le_bytes(bytes);
        Ok(Descriptor {
            address: all as u64,
            len_bytes: (all >> 64) as u32,
            flags: (all >> 96) as u16,
            next: (all >> 112) as u16,
        })
    }

    fn has(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// A running queue with the memory it is in. A queue that the driver has not enabled is empty.
pub struct Virtqueue {
    queue: Queue,
    memory: Arc<GuestMemory>,
    /// Whether the queue is served elsewhere and must not be touched here.
    is_offloaded: bool,
    /// The number of chains pushed since the driver's notification setting was last checked, saturating.
    added: u16,
}

impl Virtqueue {
    /// Activates a queue at the state in `registers`.
    ///
    /// Fails on invalid settings: a size that is too large or not a power of two, or rings that are misaligned or
    /// outside of memory (virtio 1.2 §2.7).
    pub fn new(registers: &QueueRegisters, memory: &Arc<GuestMemory>, event_idx: bool) -> Result<Virtqueue, RingError> {
        let mut queue = Queue::new(registers.size_max)?;
        if registers.ready {
            queue.try_set_size(registers.size)?;
            queue.try_set_desc_table_address(GuestAddress(registers.descriptor_table))?;
            queue.try_set_avail_ring_address(GuestAddress(registers.available_ring))?;
            queue.try_set_used_ring_address(GuestAddress(registers.used_ring))?;
            // The same checks as `Queue::is_valid`, which logs each failure; a driver could repeat that endlessly.
            let size = usize::from(registers.size);
            for (address, len_bytes) in [
                (registers.descriptor_table, 16 * size),
                (registers.available_ring, 6 + 2 * size),
                (registers.used_ring, 6 + 8 * size),
            ] {
                if !GuestMemoryBackend::check_range(&**memory, GuestAddress(address), len_bytes) {
                    return Err(RingError::Ring(QueueError::FindMemoryRegion));
                }
            }
            queue.set_next_avail(registers.next_available);
            queue.set_next_used(registers.next_used);
            queue.set_event_idx(event_idx);
            queue.set_ready(true);
        }
        Ok(Virtqueue { queue, memory: memory.clone(), is_offloaded: false, added: 0 })
    }

    /// Saves the queue's progress.
    pub fn leave(&self, registers: &mut QueueRegisters) {
        if self.queue.ready() {
            registers.next_available = self.queue.next_avail();
            registers.next_used = self.queue.next_used();
        }
    }

    /// Whether the driver has enabled the queue.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Whether the queue is offloaded.
    pub fn is_offloaded(&self) -> bool {
        self.is_offloaded
    }

    /// Offloads the queue and returns its state, as validated by [`Virtqueue::new`]. Until it is taken back, the queue
    /// appears empty.
    pub fn offload(&mut self) -> QueueRegisters {
        self.is_offloaded = true;
        QueueRegisters {
            size_max: self.queue.max_size(),
            size: self.queue.size(),
            ready: self.queue.ready(),
            descriptor_table: self.queue.desc_table(),
            available_ring: self.queue.avail_ring(),
            used_ring: self.queue.used_ring(),
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    /// Takes the queue back. `next` is the index of the next entry of both rings, since as many chains were used as
    /// were taken. `None` means that nothing was processed.
    pub fn take_back(&mut self, next: Option<u16>) {
        self.is_offloaded = false;
        if let Some(next) = next {
            self.queue.set_next_avail(next);
            self.queue.set_next_used(next);
        }
    }

    /// The memory that the queue and its buffers lie in.
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// The maximum number of available chains.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain into `chain`. Returns whether there was one.
    ///
    /// Fails on an invalid available index, and on a chain with an index outside of its table, longer than the queue
    /// (which includes loops), with an invalid table of indirect descriptors, or with a readable part after a writable
    /// one.
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, RingError> {
        if !self.is_served() {
            return Ok(false);
        }
        let Some(descriptors) = self.queue.iter(&*self.memory)?.next() else { return Ok(false) };
        chain.head = descriptors.head_index();
        // Walked here, because the iterator of virtio-queue ends silently at an invalid descriptor.
        self.walk(chain)?;
        Ok(true)
    }

    /// Returns the chain that was popped last to the available ring. It must not have been processed. May not be called
    /// more often than there are chains that were popped and not pushed.
    pub fn put_back(&mut self) {
        self.queue.set_next_avail(self.queue.next_avail().wrapping_sub(1));
    }

    /// Reads the descriptors of `chain` starting at its head.
    fn walk(&self, chain: &mut Chain) -> Result<(), RingError> {
        chain.readable.clear();
        chain.writable.clear();
        let (mut table, mut table_len) = (self.queue.desc_table(), u32::from(self.queue.size()));
        let (mut index, mut in_indirect, mut write_only) = (chain.head, false, false);
        let mut left = self.queue.size();
        loop {
            if u32::from(index) >= table_len {
                return Err(RingError::Chain("an index outside of its table"));
            }
            let descriptor = Descriptor::read(&self.memory, table.saturating_add(16 * u64::from(index)))?;
            if descriptor.has(VRING_DESC_F_INDIRECT) {
                let whole = descriptor.len_bytes.is_multiple_of(16) && !descriptor.has(VRING_DESC_F_NEXT);
                if in_indirect || !whole {
                    return Err(RingError::Chain("a bad table of indirect descriptors"));
                }
                (table, table_len, index, in_indirect) = (descriptor.address, descriptor.len_bytes / 16, 0, true);
                continue;
            }
            left = left.checked_sub(1).ok_or(RingError::Chain("longer than the queue"))?;
            if write_only && !descriptor.has(VRING_DESC_F_WRITE) {
                return Err(RingError::Chain("a readable part behind a writable one"));
            }
            write_only = descriptor.has(VRING_DESC_F_WRITE);
            if descriptor.len_bytes > 0 {
                let ranges = if write_only { &mut chain.writable } else { &mut chain.readable };
                let address = GuestAddress(descriptor.address);
                ranges.push(GuestRange { address, len_bytes: descriptor.len_bytes });
            }
            if !descriptor.has(VRING_DESC_F_NEXT) {
                return Ok(());
            }
            index = descriptor.next;
        }
    }

    /// Returns chain `head` to the driver with `written_bytes` written.
    pub fn push(&mut self, head: u16, written_bytes: u32) -> Result<(), RingError> {
        self.queue.add_used(&*self.memory, head, written_bytes)?;
        self.added = self.added.saturating_add(1);
        Ok(())
    }

    /// Returns several chains, `(head, written_bytes)` each, which become visible to the driver together.
    pub fn push_together(&mut self, chains: &[(u16, u32)]) -> Result<(), RingError> {
        let Some((last, before)) = chains.split_last() else { return Ok(()) };
        let first_slot = self.queue.next_used();
        for (step, (head, written_bytes)) in (0..self.queue.size()).zip(before) {
            // Sizes are powers of two, so slots continue correctly when the index wraps.
            let slot = u64::from(first_slot.wrapping_add(step) % self.queue.size());
            let entry = [u32::from(*head).to_le(), written_bytes.to_le()];
            let at = self.queue.used_ring().saturating_add(USED_ENTRIES_AT + USED_ENTRY_BYTES * slot);
            self.memory.write_obj(entry, GuestAddress(at)).map_err(unreachable_ring)?;
        }
        // The index is written once, after the last chain.
        self.queue.set_next_used(first_slot.wrapping_add(before.len() as u16));
        self.added = self.added.saturating_add(before.len() as u16);
        self.push(last.0, last.1)
    }

    /// Whether the driver wants an interrupt for the chains pushed since the last call (virtio 1.2 §2.7.7).
    pub fn needs_interrupt(&mut self) -> Result<bool, RingError> {
        let added = std::mem::take(&mut self.added);
        if added == 0 {
            return Ok(false);
        }
        // Pushed chains must be visible before the driver's setting is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let load = |offset| -> Result<u16, RingError> {
            let at = GuestAddress(available.saturating_add(offset));
            self.memory.load(at, Ordering::Relaxed).map(u16::from_le).map_err(unreachable_ring)
        };
        if self.queue.event_idx_enabled() {
            let used_event = load(AVAILABLE_ENTRIES_AT + 2 * u64::from(self.queue.size()))?;
            // Whether that index is among those just passed.
            return Ok(self.queue.next_used().wrapping_sub(used_event).wrapping_sub(1) < added);
        }
        Ok(u32::from(load(0)?) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Whether chains are available. False if the ring is broken, which is reported when the next chain is taken.
    pub fn has_available(&self) -> bool {
        let index = || self.queue.avail_idx(&*self.memory, Ordering::Acquire);
        self.is_served() && index().is_ok_and(|index| index.0 != self.queue.next_avail())
    }

    /// Disables notifications from the driver while the queue is being processed.
    pub fn disable_notification(&mut self) -> Result<(), RingError> {
        if self.is_served() {
            self.queue.disable_notification(&*self.memory)?;
        }
        Ok(())
    }

    /// Requests notifications from the driver. Returns whether chains became available before the driver could see
    /// that.
    pub fn enable_notification(&mut self) -> Result<bool, RingError> {
        if self.is_served() { Ok(self.queue.enable_notification(&*self.memory)?) } else { Ok(false) }
    }

    /// Requests a notification of the next chain that becomes available, for a device that leaves those that already are.
    /// Returns the index of the available ring: if it changes, a chain has become available.
    pub fn notify_of_next(&mut self) -> Result<u16, RingError> {
        let next = self.queue.next_avail();
        if !self.is_served() {
            return Ok(next);
        }
        let available = self.queue.avail_idx(&*self.memory, Ordering::Acquire)?;
        self.queue.set_next_avail(available.0);
        let enabled = self.queue.enable_notification(&*self.memory);
        self.queue.set_next_avail(next);
        enabled?;
        Ok(self.queue.avail_idx(&*self.memory, Ordering::Acquire)?.0)
    }

    fn is_served(&self) -> bool {
        self.queue.ready() && !self.is_offloaded
    }
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    const SIZE: u16 = 4;

    /// A queue of size four whose used index is about to wrap and whose chains are all available.
    fn queue(event_idx: bool) -> Virtqueue {
        let memory = Arc::new(memory::reserve(1).unwrap());
        for slot in 0..SIZE {
            memory.write_obj(slot, GuestAddress(0x1004 + 2 * u64::from(slot))).unwrap();
        }
        memory.write_obj(2_u16, GuestAddress(0x1002)).unwrap();
        let registers = QueueRegisters {
            ready: true,
            available_ring: 0x1000,
            used_ring: 0x2000,
            next_available: 0xfffe,
            next_used: 0xfffe,
            ..QueueRegisters::new(SIZE)
        };
        Virtqueue::new(&registers, &memory, event_idx).unwrap()
    }

    fn used(queue: &Virtqueue) -> (u16, Vec<[u32; 2]>) {
        let read = |slot: u64| queue.memory.read_obj(GuestAddress(0x2004 + 8 * slot)).unwrap();
        (queue.memory.read_obj(GuestAddress(0x2002)).unwrap(), (0..4).map(read).collect())
    }

    #[test]
    fn chains_pushed_together_wrap_around() {
        let mut queue = queue(false);
        queue.push_together(&[]).unwrap();
        assert!(!queue.needs_interrupt().unwrap());
        queue.push_together(&[(3, 30), (2, 20), (1, 10)]).unwrap();
        assert_eq!(used(&queue), (1, vec![[1, 10], [0, 0], [3, 30], [2, 20]]));
        queue.push(0, 5).unwrap();
        assert_eq!(used(&queue), (2, vec![[1, 10], [0, 5], [3, 30], [2, 20]]));
        assert!(queue.needs_interrupt().unwrap() && !queue.needs_interrupt().unwrap());
    }

    #[test]
    fn the_used_event_is_detected_within_a_batch() {
        for (used_event, wanted) in [(0xfffd_u16, false), (0xfffe, true), (0xffff, true), (0, true), (1, false)] {
            let mut queue = queue(true);
            queue.memory.write_obj(used_event, GuestAddress(0x1004 + 2 * u64::from(SIZE))).unwrap();
            queue.push_together(&[(0, 0), (1, 0), (2, 0)]).unwrap();
            assert_eq!(queue.needs_interrupt().unwrap(), wanted, "{used_event:#x}");
        }
    }

    #[test]
    fn the_driver_notifies_of_the_next_chain_although_others_are_left() {
        let mut queue = queue(true);
        let mut chain = Chain::default();
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!(queue.notify_of_next().unwrap(), 2);
        let avail_event: u16 = queue.memory.read_obj(GuestAddress(0x2004 + 8 * u64::from(SIZE))).unwrap();
        assert_eq!(avail_event, 2);
        assert!(queue.pop(&mut chain).unwrap());
        assert_eq!(chain.head(), 3, "no chain was skipped");
    }

    #[test]
    fn a_part_of_ranges_is_cut_at_both_ends() {
        let range = |at, len_bytes| GuestRange { address: GuestAddress(at), len_bytes };
        let ranges = [range(100, 10), range(200, 10), range(300, 10)];
        let cut = |skip, len| part(&ranges, skip, len).collect::<Vec<_>>();
        assert_eq!(cut(0, u64::MAX), ranges);
        assert_eq!(cut(5, 10), [range(105, 5), range(200, 5)]);
        assert_eq!(cut(10, 10), [range(200, 10)]);
        assert_eq!(cut(29, 10), [range(309, 1)]);
        assert_eq!(cut(30, 10), []);
        assert_eq!(cut(u64::MAX, u64::MAX), []);
        assert_eq!(cut(12, 0), []);
        assert_eq!(part(&[range(u64::MAX - 1, 10)], 5, 5).collect::<Vec<_>>(), [range(u64::MAX, 5)]);
    }
}
