//! Parses block requests from arbitrary rings: each request is within the disk and guest memory, or is rejected.
//!
//! Covers: virtio/block/request.rs virtio/queue.rs
#![no_main]

#[path = "../raw_rings.rs"]
mod raw_rings;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use husk::backend::disk::{Operation, SECTOR_BYTES};
use husk::memory::{GuestBuffers, GuestMemory};
use husk::virtio::block::request::{Action, BlockRequest, DiskShape, REQUEST_BYTES_MAX};
use husk::virtio::Chain;
use libfuzzer_sys::fuzz_target;
use raw_rings::{AVAILABLE, QUEUE_SIZE};

const INPUT_BYTES: usize = 8 << 10;
const CAPACITY_BYTES: u64 = 3 << 40;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    raw_rings::with_input::<INPUT_BYTES>(bytes, |memory, _| serve(memory, bytes.len() % 2 == 0));
});

fn serve(memory: &Arc<GuestMemory>, event_idx: bool) {
    let mut queue = raw_rings::queue(memory, INPUT_BYTES as u64, event_idx);
    let mut chain = Chain::default();
    let mut buffers = GuestBuffers::new(memory.clone());
    while let Ok(true) = queue.pop(&mut chain) {
        assert!(chain.readable().len() + chain.writable().len() <= usize::from(QUEUE_SIZE));
        for readonly in [false, true] {
            buffers.clear();
            let shape = DiskShape { capacity_bytes: CAPACITY_BYTES, readonly, block_bytes: 512, physical_block_bytes: 4096 };
            let Ok(BlockRequest { action, .. }) = BlockRequest::parse(&chain, &shape, &mut buffers) else { return };
            if let Ok(Action::Disk { operation, offset_bytes }) = action {
                check(operation, offset_bytes, &buffers, readonly);
            }
        }
        if queue.push(chain.head(), 1).is_err() || queue.needs_interrupt().is_err() {
            return;
        }
    }
}

fn check(operation: Operation, offset_bytes: u64, buffers: &GuestBuffers, readonly: bool) {
    let len_bytes = match operation {
        Operation::Read | Operation::Write => buffers.len_bytes(),
        Operation::Flush => 0,
        Operation::Discard { len_bytes } | Operation::WriteZeroes { len_bytes, .. } => len_bytes,
    };
    assert!(offset_bytes + len_bytes <= CAPACITY_BYTES, "{operation:?} of {len_bytes:#x} at {offset_bytes:#x}");
    assert!(offset_bytes % SECTOR_BYTES == 0 && len_bytes % SECTOR_BYTES == 0, "{operation:?}");
    assert!(buffers.len_bytes() <= REQUEST_BYTES_MAX);
    assert!(!readonly || matches!(operation, Operation::Read | Operation::Flush), "{operation:?} on a read-only disk");
}

/// Writes the initial corpus: a valid request of each type.
fn write_seeds() {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    const INDIRECT: u16 = 4;
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/block_request"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    for (name, kind, data_flags, data_len) in [
        ("read", 0u32, WRITE, 512u32),
        ("write", 1, 0, 512),
        ("flush", 4, 0, 0),
        ("get-id", 8, WRITE, 20),
        ("discard", 11, 0, 16),
        ("write-zeroes", 13, 0, 16),
    ] {
        let (header, data, status) = (0x140u64, 0x180u64, 0x400u64);
        let mut table = Vec::new();
        for (address, len, flags, next) in [
            (header, 16u32, NEXT, 1u16),
            (data, data_len, NEXT | data_flags, 2),
            (status, 1, WRITE, 0),
            (0, 48, INDIRECT, 0),
        ] {
            table.extend(address.to_le_bytes());
            table.extend(len.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        let mut bytes = vec![0; 0x200];
        bytes[..64].copy_from_slice(&table);
        // Flags, index, and two entries: the chain, and an indirect table with the same chain.
        for (at, value) in (0..).zip([0u16, 2, 0, 3]) {
            bytes[AVAILABLE as usize + 2 * at..][..2].copy_from_slice(&value.to_le_bytes());
        }
        for (at, value) in [(0x140, kind), (0x148, 8), (0x180, 8), (0x188, 8)] {
            bytes[at..][..4].copy_from_slice(&value.to_le_bytes());
        }
        fs::write(corpus.join(name), &bytes).expect("the corpus can be written");
    }
}
