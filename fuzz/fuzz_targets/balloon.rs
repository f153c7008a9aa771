//! Arbitrary rings, page numbers, reports and statistics for the balloon: each turn ends, and returns a limited amount
//! of memory.
//!
//! Covers: virtio/balloon/mod.rs virtio/balloon/statistics.rs
#![no_main]

use std::cell::OnceCell;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use husk::memory::{self, GuestMemory};
use husk::virtio::queue::QueueRegisters;
use husk::virtio::{Progress, Virtqueue, balloon};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const QUEUES: usize = 5;
const QUEUE_SIZE: u16 = 16;
/// The input without its first byte is at address 0: the descriptor table and the available ring, which all queues
/// share, and then whatever they point to.
const AVAILABLE: u64 = 16 * QUEUE_SIZE as u64;
const INPUT_BYTES: usize = 8 << 10;
/// The used rings follow it.
const USED: u64 = INPUT_BYTES as u64;
const MEMORY_MIB: u64 = 64;
/// VIRTIO_F_VERSION_1. Features of the balloon are added from the input.
const FEATURES: u64 = 1 << 32;
/// A turn ends after the first GiB; its last request may return up to another GiB.
const TURN_BYTES_MAX: u64 = 2 << 30;

thread_local! {
    static MEMORY: OnceCell<Arc<GuestMemory>> = const { OnceCell::new() };
}

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    MEMORY.with(|cell| {
        let memory = cell.get_or_init(|| Arc::new(memory::reserve(MEMORY_MIB).expect("memory can be had")));
        let mut input = [0; INPUT_BYTES];
        input.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        memory.write_slice(&input, GuestAddress(0)).expect("the input fits");
        memory.write_slice(&[0; 4096], GuestAddress(USED)).expect("it is memory");
        serve(memory, usize::from(*first) % QUEUES, u64::from(*first >> 3));
    });
});

fn serve(memory: &Arc<GuestMemory>, index: usize, features: u64) {
    let (device, control) = balloon::device(balloon::Options {
        memory_mib: MEMORY_MIB,
        target_mib: MEMORY_MIB / 2,
        deflates_on_oom: false,
        reports_free_pages: true,
    })
    .expect("a descriptor can be had");
    let queue = |queue: u64| {
        let registers = QueueRegisters {
            ready: true,
            available_ring: AVAILABLE,
            used_ring: USED + 256 * queue,
            ..QueueRegisters::new(QUEUE_SIZE)
        };
        Virtqueue::new(&registers, memory, false).expect("the rings are good")
    };
    let mut queues: Vec<Virtqueue> = (0..QUEUES as u64).map(queue).collect();
    let mut handler = device.into_handler().expect("it has queues");
    handler.start(FEATURES | features << 1);
    for turn in 0..8 {
        let before = control.returned_bytes();
        let left = handler.process(index, &mut queues);
        assert!(control.returned_bytes() - before <= TURN_BYTES_MAX);
        match left {
            Ok(Progress::More) => {}
            Ok(Progress::Blocked) if turn % 2 == 0 => control.ask_for_statistics(),
            _ => return,
        }
    }
    let _ = control.statistics();
}

/// Writes the initial corpus: a request with page numbers, a report, and statistics.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/balloon"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let data = AVAILABLE + 256;
    for (name, queue, flags, address, content) in [
        ("inflate", 0_u8, 0_u16, data, [256_u32, 257, 300].map(u32::to_le_bytes).concat()),
        ("report", 4, 2, 1 << 20, Vec::new()),
        ("statistics", 2, 0, data, [&4_u16.to_le_bytes()[..], &77_u64.to_le_bytes()].concat()),
    ] {
        let len = if content.is_empty() { 1 << 20 } else { content.len() as u32 };
        let mut bytes = vec![0; data as usize];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[AVAILABLE as usize + 2] = 1;
        bytes.extend(content);
        let first = queue | 0b10001 << 3;
        // The queue is the first byte modulo five.
        let first = (0..=u8::MAX).find(|byte| byte >> 3 == first >> 3 && byte % 5 == queue).unwrap_or(first);
        fs::write(corpus.join(name), [&[first], &bytes[..]].concat()).expect("the corpus can be written");
    }
}
