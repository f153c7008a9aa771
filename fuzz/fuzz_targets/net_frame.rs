//! Arbitrary frames, buffers and commands of a guest, and an arbitrary stream of its peer: the peer receives only valid
//! frames, the guest receives each frame completely or not at all, only valid commands are executed, and the front of a
//! frame is enough to decide whether it needs a peer.
//!
//! Covers: virtio/net/mod.rs virtio/net/pair.rs virtio/net/control.rs virtio/net/link.rs backend/net/header.rs
#![no_main]

#[path = "../rings.rs"]
mod rings;

use std::cell::RefCell;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use husk::backend::net::{Attempt, FRONT_BYTES, HEADER_BYTES, NetBackend, StreamNet, expects_response};
use husk::memory::{self, GuestMemory};
use husk::virtio::net;
use libfuzzer_sys::fuzz_target;
use rings::{BUFFER_BYTES, QUEUE_SIZE, Rings, at};
use vm_memory::{Bytes, GuestAddress};

/// The size of a step. An input is a sequence of steps.
const STEP_BYTES: usize = 8;
/// The maximum number of steps: longer sequences find nothing more.
const STEPS_MAX: usize = 200;
const RX: usize = 0;
const TX: usize = 1;
/// The control queue, after the queues of two pairs, the second of which transfers no frames.
const CONTROL: usize = 4;
/// The maximum number of pending commands, each of which takes two descriptors.
const COMMANDS_MAX: u16 = QUEUE_SIZE / 2;

thread_local! {
    static MEMORY: RefCell<Option<Arc<GuestMemory>>> = const { RefCell::new(None) };
}

/// A guest.
struct Guest {
    rings: Rings,
    /// The number of used receive buffers checked so far.
    seen: u16,
    /// Frames that the peer has sent and the guest has not received yet.
    expected: std::collections::VecDeque<Vec<u8>>,
}

impl Guest {
    fn new(memory: &Arc<GuestMemory>) -> Guest {
        Guest { rings: Rings::new(memory, CONTROL + 1), seen: 0, expected: Default::default() }
    }

    /// Makes `len` bytes available: at `address`, or in the slot's own buffer.
    fn offer(&mut self, queue: usize, address: Option<u64>, len: u32) {
        if self.rings.has_room(queue) {
            self.rings.offer(queue, address, len, queue == RX);
        }
    }

    /// Makes the command `bytes` available, with `room` bytes for its status.
    fn command(&mut self, bytes: &[u8], room: u32) {
        let rings = &mut self.rings;
        if rings.offered[CONTROL].wrapping_sub(rings.used_index(CONTROL)) >= COMMANDS_MAX {
            return;
        }
        let slot = 2 * (rings.offered[CONTROL] % COMMANDS_MAX);
        let place = rings.buffer(CONTROL, slot);
        rings.memory.write_slice(bytes, GuestAddress(place)).expect("it is memory");
        rings.memory.write_obj(0xee_u8, GuestAddress(place + 0x1000)).expect("it is memory");
        let table = at(CONTROL) + 16 * u64::from(slot);
        // The flag NEXT, and the flag WRITE.
        let first = [place, bytes.len() as u64 | 1 << 32 | u64::from(slot + 1) << 48];
        let second = [place + 0x1000, u64::from(room) | 2 << 32];
        rings.memory.write_obj([first[0], first[1], second[0], second[1]], GuestAddress(table)).expect("it is memory");
        rings.publish(CONTROL, slot);
    }

    /// Checks the last command's status: only requests for one or two pairs succeed.
    fn check_answer(&self) {
        let rings = &self.rings;
        let used = rings.used_index(CONTROL);
        if used == 0 {
            return;
        }
        let [slot, written] = rings.used(CONTROL, used.wrapping_sub(1));
        let place = rings.buffer(CONTROL, slot as u16);
        let descriptor = at(CONTROL) + 16 * u64::from(slot) + 8;
        let [len, _, _, _, room, _]: [u32; 6] = rings.memory.read_obj(GuestAddress(descriptor)).expect("it is memory");
        let command: [u8; 4] = rings.memory.read_obj(GuestAddress(place)).expect("it is memory");
        let answer: u8 = rings.memory.read_obj(GuestAddress(place + 0x1000)).expect("it is memory");
        let is_good = len == 4 && matches!(command, [4, 0, 1 | 2, 0]);
        let wanted = if room == 0 { (0, 0xee) } else { (1, u8::from(!is_good)) };
        assert_eq!((written, answer), wanted, "{len} bytes: {command:?}");
    }

    /// Checks the frames that the guest has received. With all offered features, a frame spans the number of buffers in
    /// its header.
    fn check(&mut self) {
        let rings = &self.rings;
        while self.seen != rings.used_index(RX) {
            let (mut bytes, mut count) = (Vec::new(), 1);
            while count > 0 {
                assert_ne!(self.seen, rings.used_index(RX), "a frame that is not whole");
                let [slot, len] = rings.used(RX, self.seen);
                let mut piece = vec![0; len as usize];
                rings.memory.read_slice(&mut piece, GuestAddress(rings.buffer(RX, slot as u16))).expect("it is memory");
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

/// Reads the device's output, and checks that it consists of valid frames, the last of which may be incomplete.
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

/// Only the front of a frame decides whether it needs a response and opens a connection; and if it needs a response
/// without IPv6, it does with it.
fn check_front(frame: &[u8]) {
    let front = frame.get(..FRONT_BYTES).unwrap_or(frame);
    for has_ipv6 in [false, true] {
        assert_eq!(expects_response(frame, has_ipv6), expects_response(front, has_ipv6));
    }
    assert_eq!(Attempt::of(frame), Attempt::of(front));
    assert!(expects_response(frame, true) || !expects_response(frame, false));
}

fuzz_target!(|bytes: &[u8]| {
    check_front(bytes);
    MEMORY.with_borrow_mut(|memory| {
        let memory = memory.get_or_insert_with(|| Arc::new(memory::reserve(2).expect("2 MiB can be had")));
        let (ours, mut peer) = UnixStream::pair().expect("a socket can be had");
        peer.set_nonblocking(true).expect("it is a socket");
        let (second, _silent) = UnixStream::pair().expect("a socket can be had");
        let backend = |socket| -> Box<dyn NetBackend> { Box::new(StreamNet::new(socket).expect("it is a socket")) };
        let (device, link) =
            net::device_on([ours, second].map(backend).into(), "net", [2, 0, 0, 0, 0, 1], None).unwrap();
        let features = device.features;
        let mut handler = device.into_handler().expect("it has queues");
        handler.start(features | 1 << 32);
        let (mut guest, mut received) = (Guest::new(memory), Vec::new());
        for step in bytes.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
            let [what, a, b, c, rest @ ..] = step else { continue };
            let len = u32::from(u16::from_le_bytes([*b, *c]));
            match what % 7 {
                0 => {
                    let place = guest.rings.buffer(TX, guest.rings.offered[TX] % QUEUE_SIZE);
                    let header = if a & 1 == 0 { [0; 8] } else { [rest[0], rest[1], rest[2], rest[3], *a, *b, *c, 0] };
                    guest.rings.memory.write_slice(&header, GuestAddress(place)).expect("it is memory");
                    guest.offer(TX, None, len);
                }
                1 => guest.offer(TX, Some(u64::from(u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]))), len),
                // With room for a header, since the check reads the number of buffers from it.
                2 | 3 => guest.offer(RX, None, (len % BUFFER_BYTES as u32).max(HEADER_BYTES as u32)),
                4 => {
                    let frame = vec![*a; len as usize % 20_000];
                    let all = [&(frame.len() as u32).to_be_bytes()[..], &frame].concat();
                    // Frames for which the socket has no room are not sent; a partial one ends the run.
                    match peer.write(&all) {
                        Ok(count) if count == all.len() => guest.expected.push_back(frame),
                        Ok(_) => return,
                        Err(_) => {}
                    }
                }
                5 => {
                    let command = [*a, *b, *c, rest[0], rest[1], rest[2], rest[3]];
                    // Most commands have a valid length, class and type.
                    match rest[3] % 4 {
                        0 => guest.command(&command[..usize::from(rest[2]) % 8], rest[1].into()),
                        1 => guest.command(&command[..4], 1),
                        _ => guest.command(&[4, 0, *a, b & 1], 1),
                    }
                }
                _ => drain(&mut peer, &mut received),
            }
            for index in [CONTROL, RX, TX, RX, RX + 2, TX + 2] {
                if handler.process(index, &mut guest.rings.queues).is_err() {
                    return;
                }
            }
            guest.check();
            guest.check_answer();
        }
        assert!(link.is_up(), "the device gave its peer up");
    });
});
