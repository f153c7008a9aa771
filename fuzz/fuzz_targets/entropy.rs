//! Arbitrary rings for the entropy device: each turn ends, and only writable buffers are written, with at most 64 KiB for
//! a request.
//!
//! Covers: virtio/rng.rs virtio/queue.rs
#![no_main]

#[path = "../raw_rings.rs"]
mod raw_rings;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use husk::memory::GuestMemory;
use husk::virtio::{Chain, Progress, queue, rng};
use libfuzzer_sys::fuzz_target;
use raw_rings::{AVAILABLE, QUEUE_SIZE};
use vm_memory::{Bytes, GuestAddress};

const INPUT_BYTES: usize = 4 << 10;
const USED: u64 = INPUT_BYTES as u64;
const USED_BYTES: u64 = 6 + 8 * QUEUE_SIZE as u64;
const REQUEST_BYTES_MAX: u64 = 64 << 10;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    raw_rings::with_input(bytes, |memory, input| {
        memory.write_slice(&[0; USED_BYTES as usize], GuestAddress(USED)).expect("it is memory");
        serve(memory, input);
    });
});

fn serve(memory: &Arc<GuestMemory>, input: &[u8; INPUT_BYTES]) {
    // The requests as another reader sees them, before any is served.
    let (mut reader, mut chain) = (raw_rings::queue(memory, USED, false), Chain::default());
    let (mut may_change, mut requested) = (vec![false; INPUT_BYTES + USED_BYTES as usize], Vec::new());
    while let Ok(true) = reader.pop(&mut chain) {
        requested.push(queue::len_bytes(chain.writable()).min(REQUEST_BYTES_MAX));
        for range in chain.writable() {
            let start = (range.address.0 as usize).min(may_change.len());
            let end = start.saturating_add(range.len_bytes as usize).min(may_change.len());
            may_change[start..end].fill(true);
        }
    }
    let mut handler = rng::device().into_handler().expect("it has a queue");
    handler.start(1 << 32);
    let mut queues = [raw_rings::queue(memory, USED, false)];
    while let Ok(Progress::More) = handler.process(0, &mut queues) {}

    // Random bytes may have changed requests before they were served, and then have any effect.
    let (may_change_requests, may_change_used) = may_change.split_at(INPUT_BYTES);
    if may_change_requests.contains(&true) {
        return;
    }
    let mut after = [0; INPUT_BYTES];
    memory.read_slice(&mut after, GuestAddress(0)).expect("it is memory");
    assert!(input == &after, "the requests were written");
    if may_change_used.contains(&true) {
        return;
    }
    let index: u16 = memory.read_obj(GuestAddress(USED + 2)).expect("it is memory");
    assert!(usize::from(index) <= requested.len());
    for (slot, requested) in (0..u64::from(index)).zip(&requested) {
        let len: u32 = memory.read_obj(GuestAddress(USED + 8 + 8 * slot)).expect("it is memory");
        if requested == &0 {
            assert_eq!(len, 0);
        }
        assert!(u64::from(len) <= REQUEST_BYTES_MAX);
    }
}

/// Writes the initial corpus: a request of two buffers, and one of many bytes in a table.
fn write_seeds() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/entropy"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let mut bytes = vec![0; AVAILABLE as usize];
    for (slot, (address, len, flags, next)) in [
        (0x2_0000_u64, 32_u32, NEXT | WRITE, 1_u16),
        (0x3_0000, 5000, WRITE, 0),
        (0x30, 16, INDIRECT, 0),
        (0x4_0000, 1 << 20, WRITE, 0),
    ]
    .into_iter()
    .enumerate()
    {
        bytes[16 * slot..][..8].copy_from_slice(&address.to_le_bytes());
        bytes[16 * slot + 8..][..4].copy_from_slice(&len.to_le_bytes());
        bytes[16 * slot + 12..][..2].copy_from_slice(&flags.to_le_bytes());
        bytes[16 * slot + 14..][..2].copy_from_slice(&next.to_le_bytes());
    }
    // Flags, index, and the heads.
    bytes.extend([0_u16, 2, 0, 2].map(u16::to_le_bytes).concat());
    fs::write(corpus.join("requests"), bytes).expect("the corpus can be written");
}
