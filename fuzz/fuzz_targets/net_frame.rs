//! From arbitrary bytes as a guest's frames and buffers, and as a peer's stream, to the network device: what goes out is in
//! frames that a peer survives, and what comes in arrives whole or not at all.
#![no_main]

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use husk::backend::net::{HEADER_BYTES, StreamNet};
use husk::memory::{self, GuestMemory};
use husk::virtio::queue::QueueRegisters;
use husk::virtio::{Virtqueue, net};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const QUEUE_SIZE: u16 = 16;
/// An input is a row of these.
const STEP_BYTES: usize = 8;
/// More steps find nothing that fewer do not.
const STEPS_MAX: usize = 200;
/// Where queue `index` stands: its three rings, and a buffer for each descriptor.
const QUEUE_BYTES: u64 = 0x4_0000;
const BUFFER_BYTES: u64 = 0x2000;
const RX: usize = 0;
const TX: usize = 1;

thread_local! {
    static MEMORY: RefCell<Option<Arc<GuestMemory>>> = const { RefCell::new(None) };
}

/// A guest and its rings, which are good: bad ones are another target's.
struct Guest {
    memory: Arc<GuestMemory>,
    queues: Vec<Virtqueue>,
    offered: [u16; 2],
    seen: u16,
    /// What the peer sent to the guest and the guest has not been given yet, frame by frame.
    expected: std::collections::VecDeque<Vec<u8>>,
}

fn at(queue: usize) -> u64 {
    QUEUE_BYTES * queue as u64
}

impl Guest {
    fn new(memory: &Arc<GuestMemory>) -> Guest {
        memory.write_slice(&vec![0; 2 * QUEUE_BYTES as usize], GuestAddress(0)).expect("it is memory");
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
        let queues = (0..2).map(queue).collect();
        Guest { memory: memory.clone(), queues, offered: [0; 2], seen: 0, expected: Default::default() }
    }

    fn buffer(&self, queue: usize, slot: u16) -> u64 {
        at(queue) + 0x4000 + BUFFER_BYTES * u64::from(slot)
    }

    fn used_index(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(at(queue) + 0x2002)).expect("it is memory")
    }

    /// Makes `len` bytes from `address` on available, or of the slot's own buffer.
    fn offer(&mut self, queue: usize, address: Option<u64>, len: u32) {
        if self.offered[queue].wrapping_sub(self.used_index(queue)) >= QUEUE_SIZE {
            return;
        }
        let slot = self.offered[queue] % QUEUE_SIZE;
        let flags = if queue == RX { 2_u64 } else { 0 };
        let descriptor = [address.unwrap_or(self.buffer(queue, slot)), u64::from(len) | flags << 32];
        self.memory.write_obj(descriptor, GuestAddress(at(queue) + 16 * u64::from(slot))).expect("it is memory");
        let ring = at(queue) + 0x1000;
        self.memory.write_obj(slot, GuestAddress(ring + 4 + 2 * u64::from(slot))).expect("it is memory");
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        self.memory.write_obj(self.offered[queue], GuestAddress(ring + 2)).expect("it is memory");
    }

    /// Looks at what the device has given the guest: with all offered features merged as its header says.
    fn check(&mut self) {
        while self.seen != self.used_index(RX) {
            let (mut bytes, mut count) = (Vec::new(), 1);
            while count > 0 {
                assert_ne!(self.seen, self.used_index(RX), "a frame that is not whole");
                let entry = GuestAddress(at(RX) + 0x2004 + 8 * u64::from(self.seen % QUEUE_SIZE));
                let [slot, len]: [u32; 2] = self.memory.read_obj(entry).expect("it is memory");
                let mut piece = vec![0; len as usize];
                self.memory.read_slice(&mut piece, GuestAddress(self.buffer(RX, slot as u16))).expect("it is memory");
                if bytes.is_empty() {
                    count = u16::from_le_bytes([piece[10], piece[11]]);
                }
                bytes.extend(piece);
                count -= 1;
                self.seen = self.seen.wrapping_add(1);
            }
            let frame = self.expected.pop_front().expect("nobody sent it");
            assert!(bytes[HEADER_BYTES..] == frame[..], "another frame than was sent");
        }
    }
}

/// Reads what came out and checks that it is a row of frames, the last of which may not be whole.
fn drain(peer: &mut UnixStream, received: &mut Vec<u8>) {
    let mut buffer = [0; 0x4000];
    loop {
        match peer.read(&mut buffer) {
            Ok(count) if count > 0 => received.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            other => panic!("the device hung up: {other:?}"),
        }
    }
    while let Some((length, rest)) = received.split_first_chunk::<4>() {
        let len = u32::from_be_bytes(*length) as usize;
        assert!((14..=0xffff).contains(&len), "a frame of {len} bytes");
        if rest.len() < len {
            break;
        }
        received.drain(..4 + len);
    }
}

fuzz_target!(|bytes: &[u8]| {
    MEMORY.with_borrow_mut(|memory| {
        let memory = memory.get_or_insert_with(|| Arc::new(memory::reserve(1).expect("1 MiB can be had")));
        let (ours, mut peer) = UnixStream::pair().expect("a socket can be had");
        peer.set_nonblocking(true).expect("it is a socket");
        let backend = Box::new(StreamNet::new(ours).expect("it is a socket"));
        let (device, link) = net::device_on(backend, "net", [2, 0, 0, 0, 0, 1], None).unwrap();
        let mut handler = device.handler;
        handler.start(device.features | 1 << 32);
        let (mut guest, mut received) = (Guest::new(memory), Vec::new());
        for step in bytes.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
            let [what, a, b, c, rest @ ..] = step else { continue };
            let len = u32::from(u16::from_le_bytes([*b, *c]));
            match what % 6 {
                0 => {
                    let place = guest.buffer(TX, guest.offered[TX] % QUEUE_SIZE);
                    let header = if a & 1 == 0 { [0; 8] } else { [rest[0], rest[1], rest[2], rest[3], *a, *b, *c, 0] };
                    guest.memory.write_slice(&header, GuestAddress(place)).expect("it is memory");
                    guest.offer(TX, None, len);
                }
                1 => guest.offer(TX, Some(u64::from(u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]))), len),
                // With room for a header, so that the count in it is found.
                2 | 3 => guest.offer(RX, None, (len % BUFFER_BYTES as u32).max(HEADER_BYTES as u32)),
                4 => {
                    let frame = vec![*a; len as usize % 20_000];
                    let all = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
                    // Whole or not at all, as far as there is room.
                    match peer.write(&all) {
                        Ok(count) if count == all.len() => guest.expected.push_back(frame),
                        Ok(_) => return,
                        Err(_) => {}
                    }
                }
                _ => drain(&mut peer, &mut received),
            }
            for index in [RX, TX, RX] {
                if handler.process(index, &mut guest.queues).is_err() {
                    return;
                }
            }
            guest.check();
        }
        assert!(link.is_up(), "the device gave its peer up");
    });
});
