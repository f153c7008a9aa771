//! Properties of queues that hold for any driver, checked with pseudorandom ones and a model of each.

use std::collections::VecDeque;

use super::*;
use crate::memory;

const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const TABLES: u64 = 0x8000;
const DRIVERS: u64 = 300;

/// The model of a driver: it makes chains available, and knows what is in them.
struct Model {
    random: fastrand::Rng,
    memory: Arc<GuestMemory>,
    size: u16,
    available: u16,
    /// The chains that the device has not taken yet: head, readable and writable ranges.
    waiting: VecDeque<(u16, Vec<GuestRange>, Vec<GuestRange>)>,
}

impl Model {
    fn new(seed: u64, event_idx: bool) -> (Model, Virtqueue) {
        let mut random = fastrand::Rng::with_seed(seed);
        let memory = Arc::new(memory::reserve(1).unwrap());
        // Indexes wrap soon.
        let (size, start) = (1 << random.u32(..8), 0_u16.wrapping_sub(random.u16(..300)));
        let registers = QueueRegisters {
            size,
            ready: true,
            available_ring: AVAILABLE,
            used_ring: USED,
            next_available: start,
            next_used: start,
            ..QueueRegisters::new(256)
        };
        let queue = Virtqueue::new(&registers, &memory, event_idx).unwrap();
        let model = Model { random, memory, size, available: start, waiting: VecDeque::new() };
        model.memory.write_obj(start, GuestAddress(AVAILABLE + 2)).unwrap();
        model.memory.write_obj(start, GuestAddress(USED + 2)).unwrap();
        (model, queue)
    }

    fn write(&self, table: u64, index: u16, range: GuestRange, flags: u32, next: u16) {
        let len_and_rest = u64::from(range.len_bytes) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.memory.write_obj([range.address.0, len_and_rest], GuestAddress(table + 16 * u64::from(index))).unwrap();
    }

    /// Makes a chain at `head` available whose descriptors are in a table of their own, in any order there.
    fn offer(&mut self, head: u16) {
        let count = 1 + self.random.u16(..self.size.min(16));
        let mut places: Vec<u16> = (1..count).collect();
        self.random.shuffle(&mut places);
        places.insert(0, 0);
        let (table, readable_count) = (TABLES + 0x100 * u64::from(head), self.random.u16(..=count));
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for (step, place) in (0..).zip(&places) {
            let len_bytes = self.random.u32(..) * u32::from(self.random.u8(..8) > 0);
            let range = GuestRange { address: GuestAddress(self.random.u64(..)), len_bytes };
            let (ranges, write) =
                if step < readable_count { (&mut readable, 0) } else { (&mut writable, VRING_DESC_F_WRITE) };
            // Empty ones count only towards the chain's length.
            ranges.extend((len_bytes > 0).then_some(range));
            let next = places.get(usize::from(step) + 1);
            let flags = write | next.map_or(0, |_| VRING_DESC_F_NEXT);
            self.write(table, *place, range, flags, next.copied().unwrap_or_else(|| self.random.clone().u16(..)));
        }
        let indirect = GuestRange { address: GuestAddress(table), len_bytes: 16 * u32::from(count) };
        self.write(0, head, indirect, VRING_DESC_F_INDIRECT, 0);
        let slot = u64::from(self.available % self.size);
        self.memory.write_obj(head, GuestAddress(AVAILABLE + 4 + 2 * slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.write_obj(self.available, GuestAddress(AVAILABLE + 2)).unwrap();
        self.waiting.push_back((head, readable, writable));
    }
}

#[test]
fn each_chain_is_taken_once_in_order_and_as_it_was_written() {
    for seed in 0..DRIVERS {
        let (mut model, mut queue) = Model::new(seed, false);
        let mut free: VecDeque<u16> = (0..model.size).collect();
        let mut chain = Chain::default();
        for step in 0..200 {
            let is_empty = model.waiting.is_empty();
            assert_eq!(queue.has_available(), !is_empty, "seed {seed}, step {step}");
            match model.random.u8(..4) {
                0 => assert_eq!(queue.enable_notification().unwrap(), !is_empty, "seed {seed}, step {step}"),
                1 if !free.is_empty() => (0..=model.random.usize(..free.len())).for_each(|_| {
                    let head = free.pop_front().unwrap();
                    model.offer(head);
                }),
                _ => {
                    assert_eq!(queue.pop(&mut chain).unwrap(), !is_empty, "seed {seed}, step {step}");
                    if !is_empty && model.random.u8(..4) == 0 {
                        queue.put_back();
                    } else if let Some((head, readable, writable)) = model.waiting.pop_front() {
                        let taken = (chain.head(), chain.readable(), chain.writable());
                        assert_eq!(taken, (head, &readable[..], &writable[..]), "seed {seed}, step {step}");
                        queue.push(head, 0).unwrap();
                        free.push_back(head);
                    }
                }
            }
        }
    }
}

#[test]
fn chains_pushed_together_are_as_if_pushed_one_by_one() {
    for seed in 0..DRIVERS {
        let ((mut model, mut together), (other, mut single)) = (Model::new(seed, true), Model::new(seed, true));
        // Without wrapping, for the model's decision about interrupts.
        let mut pushed = u64::from(together.queue.next_used()) + (1 << 16);
        for step in 0..50 {
            let before = pushed;
            let used_event = before.wrapping_add_signed(model.random.i64(-3..300));
            let place = GuestAddress(AVAILABLE + 4 + 2 * u64::from(model.size));
            [&model, &other].iter().for_each(|driver| driver.memory.write_obj(used_event as u16, place).unwrap());
            for _ in 0..model.random.u8(..3) {
                let count = model.random.usize(..=usize::from(model.size));
                let chains: Vec<_> =
                    (0..count).map(|_| (model.random.u16(..model.size), model.random.u32(..))).collect();
                together.push_together(&chains).unwrap();
                chains.iter().for_each(|(head, written_bytes)| single.push(*head, *written_bytes).unwrap());
                pushed += count as u64;
            }
            let wanted = (before..pushed).contains(&used_event);
            let asked = [&mut together, &mut single].map(|queue| queue.needs_interrupt().unwrap());
            assert_eq!(asked, [wanted; 2], "seed {seed}, step {step}");
            let rings = [&model, &other].map(|driver| {
                let mut ring = vec![0; 4096];
                driver.memory.read_slice(&mut ring, GuestAddress(USED)).unwrap();
                ring
            });
            assert!(rings[0] == rings[1], "seed {seed}, step {step}");
            assert_eq!(rings[0][2..4], (pushed as u16).to_le_bytes(), "seed {seed}, step {step}");
        }
    }
}

#[test]
fn parts_of_ranges_are_what_a_list_of_all_bytes_has_there() {
    for seed in 0..2000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let ranges: Vec<_> = (0..random.usize(..6))
            .map(|_| GuestRange { address: GuestAddress(random.u64(..1 << 40)), len_bytes: random.u32(..20) })
            .collect();
        let bytes = |ranges: &[GuestRange]| -> Vec<u64> {
            ranges.iter().flat_map(|range| range.address.0..range.address.0 + u64::from(range.len_bytes)).collect()
        };
        let all = bytes(&ranges);
        assert_eq!(len_bytes(&ranges), all.len() as u64, "seed {seed}");
        for _ in 0..20 {
            let (skip, len) = (random.usize(..=all.len() + 2), random.usize(..=all.len() + 2));
            let cut: Vec<_> = part(&ranges, skip as u64, len as u64).collect();
            let wanted: Vec<u64> = all.iter().copied().skip(skip).take(len).collect();
            assert_eq!(bytes(&cut), wanted, "seed {seed}: {len} after {skip} of {ranges:?}");
            assert!(cut.iter().all(|range| range.len_bytes > 0), "seed {seed}");
        }
    }
}

#[test]
fn the_front_of_ranges_is_read_however_they_are_split() {
    let memory = memory::reserve(1).unwrap();
    let random_bytes: Vec<u8> = (0..4096).map(|at| (at * 7 % 251) as u8).collect();
    memory.write_slice(&random_bytes, GuestAddress(0)).unwrap();
    for seed in 0..2000 {
        let mut random = fastrand::Rng::with_seed(seed);
        let ranges: Vec<_> = (0..random.usize(..8))
            .map(|_| GuestRange { address: GuestAddress(random.u64(..4000)), len_bytes: random.u32(..8) })
            .collect();
        let bytes = |range: &GuestRange| {
            let start = range.address.0 as usize;
            random_bytes[start..start + range.len_bytes as usize].to_vec()
        };
        let all: Vec<u8> = ranges.iter().flat_map(bytes).collect();
        assert_eq!(read_front::<16>(&memory, &ranges).as_ref(), all.first_chunk(), "seed {seed}: {ranges:?}");
        assert_eq!(read_front::<1>(&memory, &ranges).as_ref(), all.first_chunk(), "seed {seed}: {ranges:?}");
    }
}
