//! A queue whose rings are the input, at guest address 0: the descriptor table, the available ring, and then whatever they
//! point to. The used ring follows it, so that used entries do not change later requests. `rings` are valid.

use std::cell::OnceCell;
use std::sync::Arc;

use husk::memory::{self, GuestMemory};
use husk::virtio::Virtqueue;
use husk::virtio::queue::QueueRegisters;
use vm_memory::{Bytes, GuestAddress};

pub const QUEUE_SIZE: u16 = 16;
pub const AVAILABLE: u64 = 16 * QUEUE_SIZE as u64;

thread_local! {
    static MEMORY: OnceCell<Arc<GuestMemory>> = const { OnceCell::new() };
}

/// Calls `serve` with guest memory that begins with `bytes`, cut or padded with zeroes to the length of the input.
pub fn with_input<const INPUT_BYTES: usize>(bytes: &[u8], serve: impl FnOnce(&Arc<GuestMemory>, &[u8; INPUT_BYTES])) {
    MEMORY.with(|cell| {
        let memory = cell.get_or_init(|| Arc::new(memory::reserve(1).expect("1 MiB can be had")));
        let mut input = [0; INPUT_BYTES];
        input.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        memory.write_slice(&input, GuestAddress(0)).expect("the input fits");
        serve(memory, &input);
    });
}

/// The queue as a device finds it, with its used ring at `used`.
pub fn queue(memory: &Arc<GuestMemory>, used: u64, event_idx: bool) -> Virtqueue {
    let registers =
        QueueRegisters { ready: true, available_ring: AVAILABLE, used_ring: used, ..QueueRegisters::new(QUEUE_SIZE) };
    Virtqueue::new(&registers, memory, event_idx).expect("the rings are good")
}
