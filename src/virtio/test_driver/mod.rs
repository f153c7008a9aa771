//! A driver for tests: configures a device through its registers and submits requests to its rings, as a guest does.

mod bus;

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

pub use bus::{BUSES, Bus, MESSAGE_CONTROL, OnBus, TestRouting};

use super::mmio::register::*;
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, VirtioDevice};
use crate::memory::{self, GuestMemory};

/// The address of request buffers.
pub const BUFFERS: u64 = 0x10_0000;
/// Descriptor flags (virtio 1.2 §2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// The addresses of queue `index`'s descriptor table, available ring and used ring.
fn rings(index: u32) -> (u64, u64, u64) {
    let base = 0x1_0000 * (u64::from(index) + 1);
    (base, base + 0x4000, base + 0x8000)
}

pub struct Driver {
    pub transport: Box<dyn OnBus>,
    pub memory: GuestMemory,
    bus: Bus,
    pub event_idx: bool,
    sizes: Vec<u16>,
    next_available: Vec<u16>,
    next_used: Vec<u16>,
    next_descriptor: Vec<u16>,
}

impl Driver {
    /// Creates a driver for an uninitialized device on MMIO, with 4 MiB of memory.
    pub fn new(device: VirtioDevice) -> Driver {
        Driver::on(Bus::Mmio, device)
    }

    /// The same on any bus.
    pub fn on(bus: Bus, device: VirtioDevice) -> Driver {
        Driver::with_memory(bus, device, memory::reserve(4).unwrap())
    }

    pub fn with_memory(bus: Bus, device: VirtioDevice, memory: GuestMemory) -> Driver {
        crate::test_log::start();
        let transport = bus.attach(device, memory.clone());
        let count = transport.doorbells().len();
        let zeroes = vec![0; count];
        Driver {
            transport,
            memory,
            bus,
            event_idx: false,
            sizes: zeroes.clone(),
            next_available: zeroes.clone(),
            next_used: zeroes.clone(),
            next_descriptor: zeroes,
        }
    }

    /// Moves the driver to another device in the same state.
    pub fn moved_to(self, device: VirtioDevice) -> Driver {
        let transport = self.bus.attach(device, self.memory.clone());
        transport.restore(&self.transport.save()).unwrap();
        Driver { transport, ..self }
    }

    /// Takes the interrupts since the last call.
    pub fn take_interrupts(&self) -> u64 {
        self.transport.take_interrupts()
    }

    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// Performs all of virtio 1.2 §3.1.1, accepting all offered features.
    pub fn start(&mut self) {
        self.start_with(!0);
    }

    /// The same, accepting only the offered features in `mask`, and VERSION_1.
    pub fn start_with(&mut self, mask: u64) {
        let features = self.offered() & (mask | F_VERSION_1);
        self.negotiate(features);
        for index in 0..self.sizes.len() as u32 {
            self.set_up_queue(index, u16::MAX);
        }
        self.event_idx = features & F_EVENT_IDX != 0;
        self.write(STATUS, 15);
        assert_eq!(self.read(STATUS), 15);
    }

    pub fn offered(&self) -> u64 {
        self.write(DEVICE_FEATURES_SEL, 1);
        let high = u64::from(self.read(DEVICE_FEATURES)) << 32;
        self.write(DEVICE_FEATURES_SEL, 0);
        let offered = high | u64::from(self.read(DEVICE_FEATURES));
        assert_eq!(offered & F_INDIRECT_DESC, F_INDIRECT_DESC);
        offered
    }

    /// Initializes the device up to FEATURES_OK. Returns the resulting status.
    pub fn negotiate(&self, features: u64) -> u32 {
        self.write(STATUS, 0);
        self.write(STATUS, 1);
        self.write(STATUS, 3);
        for (select, value) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(DRIVER_FEATURES_SEL, select);
            self.write(DRIVER_FEATURES, value);
        }
        self.write(STATUS, 11);
        self.read(STATUS)
    }

    /// Sets up queue `index` with the maximum size, limited by `size_max`, and empty rings.
    pub fn set_up_queue(&mut self, index: u32, size_max: u16) {
        let (table, available, used) = rings(index);
        self.memory.write_slice(&[0; 0x1_0000], GuestAddress(table)).unwrap();
        self.write(QUEUE_SEL, index);
        let size = (self.read(QUEUE_NUM_MAX) as u16).min(size_max);
        self.write(QUEUE_NUM, size.into());
        for (low, address) in [(QUEUE_DESC_LOW, table), (QUEUE_DRIVER_LOW, available), (QUEUE_DEVICE_LOW, used)] {
            self.write(low, address as u32);
            self.write(low + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        let at = index as usize;
        (self.sizes[at], self.next_available[at], self.next_used[at], self.next_descriptor[at]) = (size, 0, 0, 0);
    }

    pub fn size(&self, queue: u32) -> u16 {
        self.sizes[queue as usize]
    }

    /// Writes one descriptor.
    pub fn descriptor(&self, queue: u32, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(rings(queue).0 + 16 * u64::from(index), address, len, flags, next);
    }

    /// Writes one descriptor of a table at another address.
    pub fn descriptor_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Writes a chain of `(address, len, WRITE or 0)` to the table, without making it available. Returns its head.
    pub fn chain(&mut self, queue: u32, parts: &[(u64, u32, u16)]) -> u16 {
        let size = self.sizes[queue as usize];
        let head = self.next_descriptor[queue as usize];
        for (step, (address, len, flags)) in (0..).zip(parts) {
            let index = (head + step) % size;
            let last = usize::from(step) + 1 == parts.len();
            let next = if last { (0, 0) } else { (NEXT, (index + 1) % size) };
            self.descriptor(queue, index, *address, *len, flags | next.0, next.1);
        }
        self.next_descriptor[queue as usize] = (head + parts.len() as u16) % size;
        head
    }

    /// Makes the chain at `head` available without notifying the device.
    pub fn offer(&mut self, queue: u32, head: u16) {
        let at = queue as usize;
        let (_, available, _) = rings(queue);
        let slot = u64::from(self.next_available[at] % self.sizes[at]);
        self.memory.write_obj(head, GuestAddress(available + 4 + 2 * slot)).unwrap();
        self.next_available[at] = self.next_available[at].wrapping_add(1);
        self.set_available_index(queue, self.next_available[at]);
    }

    pub fn set_available_index(&self, queue: u32, index: u16) {
        self.memory.store(index, GuestAddress(rings(queue).1 + 2), Ordering::Release).unwrap();
    }

    pub fn notify(&self, queue: u32) {
        self.write(QUEUE_NOTIFY, queue);
    }

    pub fn used_index(&self, queue: u32) -> u16 {
        self.memory.load(GuestAddress(rings(queue).2 + 2), Ordering::Acquire).unwrap()
    }

    /// Sets the used entry from which the driver wants an interrupt.
    pub fn set_used_event(&self, queue: u32, index: u16) {
        let size = u64::from(self.sizes[queue as usize]);
        self.memory.store(index, GuestAddress(rings(queue).1 + 4 + 2 * size), Ordering::SeqCst).unwrap();
    }

    /// The available ring's flags.
    pub fn set_available_flags(&self, queue: u32, flags: u16) {
        self.memory.store(flags, GuestAddress(rings(queue).1), Ordering::SeqCst).unwrap();
    }

    /// Waits for the next used entry and returns its head and length.
    pub fn used(&mut self, queue: u32) -> (u16, u32) {
        let at = queue as usize;
        wait_for(|| self.used_index(queue) != self.next_used[at]);
        let slot = u64::from(self.next_used[at] % self.sizes[at]);
        let entry: [u32; 2] = self.memory.read_obj(GuestAddress(rings(queue).2 + 4 + 8 * slot)).unwrap();
        self.next_used[at] = self.next_used[at].wrapping_add(1);
        (entry[0] as u16, entry[1])
    }

    /// Submits one chain and returns the length in its used entry.
    pub fn transact(&mut self, queue: u32, parts: &[(u64, u32, u16)]) -> u32 {
        let head = self.chain(queue, parts);
        self.offer(queue, head);
        self.notify(queue);
        let (id, len) = self.used(queue);
        assert_eq!(id, head);
        len
    }

    /// Waits until the device has asked for a reset.
    pub fn wait_for_needs_reset(&self) {
        wait_for(|| self.read(STATUS) & 0x40 != 0);
    }
}

/// Waits for a condition that is expected soon.
pub fn wait_for(happened: impl Fn() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(begin.elapsed() < Duration::from_secs(10), "did not happen within ten seconds");
        std::thread::yield_now();
    }
}
