//! Parsing of a block request from its descriptor chain.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use husk::memory::GuestBuffers;
use husk::memory::{self, GuestMemory};
use husk::virtio::block::request::{BlockRequest, DiskShape};
use husk::virtio::queue::QueueRegisters;
use husk::virtio::{Chain, Virtqueue};
use vm_memory::{Bytes, GuestAddress};

use crate::{Target, median, report};

const QUEUE_SIZE: u16 = 256;
const REQUESTS: u32 = 1_000_000;
const RUNS: usize = 5;
/// Guest addresses of the rings, a header, 4 KiB of data and a status byte.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;

/// Parses a 4 KiB read of three descriptors, popped from the ring once.
pub fn block_requests() -> Result<()> {
    let memory = Arc::new(memory::reserve(32)?);
    let chain = chain(&memory)?;
    let shape = DiskShape { capacity_bytes: 1 << 30, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
    let mut buffers = GuestBuffers::new(memory);
    let mut runs_ns = Vec::new();
    for _ in 0..RUNS {
        let start = Instant::now();
        for _ in 0..REQUESTS {
            let request = BlockRequest::parse(black_box(&chain), &shape, &mut buffers)?;
            ensure!(black_box(request).action.is_ok(), "the request is refused");
            buffers.clear();
        }
        runs_ns.push(start.elapsed().as_nanos() as f64 / f64::from(REQUESTS));
    }
    report("block request parse", median(runs_ns), "ns", Target::None);
    Ok(())
}

/// Puts the request into an available ring and pops it, as the device does.
fn chain(memory: &Arc<GuestMemory>) -> Result<Chain> {
    const NEXT: u16 = 1;
    const WRITE: u16 = 2;
    for (at, (address, len_bytes, flags)) in
        (0u16..).zip([(HEADER, 16u32, NEXT), (DATA, 4096, NEXT | WRITE), (STATUS, 1, WRITE)])
    {
        let descriptor =
            [&address.to_le_bytes()[..], &len_bytes.to_le_bytes(), &flags.to_le_bytes(), &(at + 1).to_le_bytes()];
        memory.write_slice(&descriptor.concat(), GuestAddress(DESCRIPTORS + 16 * u64::from(at)))?;
    }
    // Flags, index and the first entry.
    memory.write_slice(&[0u16, 1, 0].map(u16::to_le_bytes).concat(), GuestAddress(AVAILABLE))?;
    let registers = QueueRegisters {
        ready: true,
        descriptor_table: DESCRIPTORS,
        available_ring: AVAILABLE,
        used_ring: USED,
        ..QueueRegisters::new(QUEUE_SIZE)
    };
    let mut chain = Chain::default();
    let taken = Virtqueue::new(&registers, memory, false)?.pop(&mut chain)?;
    ensure!(taken, "the ring is empty");
    Ok(chain)
}
