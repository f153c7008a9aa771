//! The valid rings of a guest, with a buffer for each descriptor. `virtio_mmio` fuzzes invalid rings.

use std::sync::Arc;

use husk::memory::GuestMemory;
use husk::virtio::Virtqueue;
use husk::virtio::queue::QueueRegisters;
use vm_memory::{Bytes, GuestAddress};

pub const QUEUE_SIZE: u16 = 16;
/// The space of a queue: its three rings, and the buffers.
pub const QUEUE_BYTES: u64 = 0x4_0000;
pub const BUFFER_BYTES: u64 = 0x2000;

/// The guest address of a queue.
pub fn at(queue: usize) -> u64 {
    QUEUE_BYTES * queue as u64
}

pub struct Rings {
    pub memory: Arc<GuestMemory>,
    pub queues: Vec<Virtqueue>,
    /// The available index of each queue: the number of chains made available so far.
    pub offered: Vec<u16>,
}

impl Rings {
    /// Creates `count` queues, and clears their memory.
    pub fn new(memory: &Arc<GuestMemory>, count: usize) -> Rings {
        memory.write_slice(&vec![0; count * QUEUE_BYTES as usize], GuestAddress(0)).expect("it is memory");
        let queue = |index: usize| {
            let registers = QueueRegisters {
                ready: true,
                descriptor_table: at(index),
                available_ring: at(index) + 0x1000,
                used_ring: at(index) + 0x2000,
                ..QueueRegisters::new(QUEUE_SIZE)
            };
            Virtqueue::new(&registers, memory, false).expect("the rings are good")
        };
        Rings { memory: memory.clone(), queues: (0..count).map(queue).collect(), offered: vec![0; count] }
    }

    pub fn buffer(&self, queue: usize, slot: u16) -> u64 {
        at(queue) + 0x4000 + BUFFER_BYTES * u64::from(slot)
    }

    pub fn used_index(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(at(queue) + 0x2002)).expect("it is memory")
    }

    /// The descriptor and the length in used entry `index`.
    pub fn used(&self, queue: usize, index: u16) -> [u32; 2] {
        let entry = GuestAddress(at(queue) + 0x2004 + 8 * u64::from(index % QUEUE_SIZE));
        self.memory.read_obj(entry).expect("it is memory")
    }

    pub fn has_room(&self, queue: usize) -> bool {
        self.offered[queue].wrapping_sub(self.used_index(queue)) < QUEUE_SIZE
    }

    /// Makes a descriptor of `len` bytes available, device-writable if `to_write`: at `address`, or in the slot's own
    /// buffer.
    pub fn offer(&mut self, queue: usize, address: Option<u64>, len: u32, to_write: bool) {
        let slot = self.offered[queue] % QUEUE_SIZE;
        let flags = if to_write { 2_u64 } else { 0 };
        let descriptor = [address.unwrap_or(self.buffer(queue, slot)), u64::from(len) | flags << 32];
        self.memory.write_obj(descriptor, GuestAddress(at(queue) + 16 * u64::from(slot))).expect("it is memory");
        self.publish(queue, slot);
    }

    /// Makes the chain that begins with descriptor `head` available.
    pub fn publish(&mut self, queue: usize, head: u16) {
        let ring = at(queue) + 0x1000;
        let entry = GuestAddress(ring + 4 + 2 * u64::from(self.offered[queue] % QUEUE_SIZE));
        self.memory.write_obj(head, entry).expect("it is memory");
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        self.memory.write_obj(self.offered[queue], GuestAddress(ring + 2)).expect("it is memory");
    }
}
