//! A driver for tests: sets a device up through its MMIO registers and puts requests on its rings, as a guest would.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::mmio::register::*;
use super::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1, MmioTransport, VirtioDevice};
use crate::bus::Device;
use crate::irq::IrqLine;
use crate::memory::{self, GuestMemory};

/// Where buffers for requests may stand.
pub const BUFFERS: u64 = 0x10_0000;
/// Descriptor flags (virtio 1.2 §2.7.5).
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Where queue `index`'s descriptor table, available ring and used ring stand.
fn rings(index: u32) -> (u64, u64, u64) {
    let base = 0x1_0000 * (u64::from(index) + 1);
    (base, base + 0x4000, base + 0x8000)
}

pub struct Driver {
    pub transport: MmioTransport,
    pub memory: GuestMemory,
    pub irq: IrqLine,
    pub event_idx: bool,
    sizes: Vec<u16>,
    next_available: Vec<u16>,
    next_used: Vec<u16>,
    next_descriptor: Vec<u16>,
}

impl Driver {
    /// A device that no driver has spoken to yet, and 4 MiB of memory.
    pub fn new(device: VirtioDevice) -> Driver {
        Driver::with_memory(device, memory::reserve(4).unwrap())
    }

    pub fn with_memory(device: VirtioDevice, memory: GuestMemory) -> Driver {
        crate::test_log::start();
        let irq = IrqLine::new(6).unwrap();
        let transport = MmioTransport::new(device, memory.clone(), irq.try_clone().unwrap()).unwrap();
        let count = transport.doorbells().len();
        let zeroes = vec![0; count];
        Driver {
            transport,
            memory,
            irq,
            event_idx: false,
            sizes: zeroes.clone(),
            next_available: zeroes.clone(),
            next_used: zeroes.clone(),
            next_descriptor: zeroes,
        }
    }

    /// The same driver, in front of another device that is in the same state.
    pub fn moved_to(self, device: VirtioDevice) -> Driver {
        let irq = IrqLine::new(6).unwrap();
        let transport = MmioTransport::new(device, self.memory.clone(), irq.try_clone().unwrap()).unwrap();
        transport.restore(&self.transport.save()).unwrap();
        Driver { transport, irq, ..self }
    }

    pub fn read(&self, offset: u64) -> u32 {
        let mut data = [0xff; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    /// The whole of virtio 1.2 §3.1.1, accepting all that is offered.
    pub fn start(&mut self) {
        self.start_with(!0);
    }

    /// The same, accepting of what is offered only what is in `mask`, and VERSION_1.
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

    /// Up to FEATURES_OK. Returns the status that is then read.
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

    /// Makes queue `index` as large as it can be, but not larger than `size_max`, with empty rings.
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

    /// Writes one descriptor, as it is.
    pub fn descriptor(&self, queue: u32, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        self.descriptor_at(rings(queue).0 + 16 * u64::from(index), address, len, flags, next);
    }

    /// Writes one descriptor of a table that begins elsewhere.
    pub fn descriptor_at(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Puts a chain of `(address, len, WRITE or 0)` into the table, to be made available. Returns its head.
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

    /// Makes the chain at `head` available, without a word to the device.
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

    /// Where the driver says from which used entry on it wants an interrupt.
    pub fn set_used_event(&self, queue: u32, index: u16) {
        let size = u64::from(self.sizes[queue as usize]);
        self.memory.store(index, GuestAddress(rings(queue).1 + 4 + 2 * size), Ordering::SeqCst).unwrap();
    }

    /// The available ring's flags.
    pub fn set_available_flags(&self, queue: u32, flags: u16) {
        self.memory.store(flags, GuestAddress(rings(queue).1), Ordering::SeqCst).unwrap();
    }

    /// The next used entry, waited for: its head and length.
    pub fn used(&mut self, queue: u32) -> (u16, u32) {
        let at = queue as usize;
        wait_for(|| self.used_index(queue) != self.next_used[at]);
        let slot = u64::from(self.next_used[at] % self.sizes[at]);
        let entry: [u32; 2] = self.memory.read_obj(GuestAddress(rings(queue).2 + 4 + 8 * slot)).unwrap();
        self.next_used[at] = self.next_used[at].wrapping_add(1);
        (entry[0] as u16, entry[1])
    }

    /// One chain there and back: returns the length in its used entry.
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

/// Waits for something that is to happen soon.
pub fn wait_for(happened: impl Fn() -> bool) {
    let begin = Instant::now();
    while !happened() {
        assert!(begin.elapsed() < Duration::from_secs(10), "did not happen within ten seconds");
        std::thread::yield_now();
    }
}
