//! Arbitrary packets of a guest and actions of host programs for the vsock device: its packets to the guest are valid
//! and within the guest's credit.
//!
//! Covers: virtio/vsock
#![no_main]

#[path = "../rings.rs"]
mod rings;

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use husk::config::VsockConfig;
use husk::memory::{self, GuestMemory};
use husk::resources;
use husk::virtio::queue::GuestRange;
use husk::virtio::vsock::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use husk::virtio::{QueueHandler, vsock};
use libfuzzer_sys::fuzz_target;
use rings::{BUFFER_BYTES, QUEUE_SIZE, Rings};
use vm_memory::GuestAddress;

const CID: u64 = 3;
/// The size of a step. An input is a sequence of steps.
const STEP_BYTES: usize = 16;
/// The maximum number of steps: longer sequences find nothing more.
const STEPS_MAX: usize = 200;
const RX: usize = 0;
const TX: usize = 1;

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// The state shared by all inputs.
struct Host {
    dir: tempfile::TempDir,
    listener: UnixListener,
    memory: Arc<GuestMemory>,
    handler: Box<dyn QueueHandler>,
}

impl Host {
    fn new() -> Host {
        let dir = tempfile::tempdir().expect("a directory can be had");
        let config = VsockConfig { socket: dir.path().join("v"), cid: CID as u32 };
        let socket = resources::vsock::open(&config).expect("a socket can be had");
        let listener = UnixListener::bind(dir.path().join("v_1")).expect("a socket can be had");
        listener.set_nonblocking(true).expect("it is a socket");
        let memory = Arc::new(memory::reserve(1).expect("1 MiB can be had"));
        let device = vsock::device(socket).expect("a device can be made");
        Host { dir, listener, memory, handler: device.into_handler().expect("it has queues") }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("v")
    }
}

/// A guest.
struct Guest {
    rings: Rings,
    /// The number of used receive buffers checked so far.
    used: u16,
    /// By ports: the largest buffer space that the guest has advertised, and the number of bytes sent to it.
    rooms: HashMap<(u32, u32), (u64, u64)>,
}

impl Guest {
    fn new(memory: &Arc<GuestMemory>) -> Guest {
        Guest { rings: Rings::new(memory, 3), used: 0, rooms: HashMap::new() }
    }

    fn send(&mut self, header: Header, len: u32) {
        if !self.rings.has_room(TX) {
            return;
        }
        let place = self.rings.buffer(TX, self.rings.offered[TX] % QUEUE_SIZE);
        let range = [GuestRange { address: GuestAddress(place), len_bytes: HEADER_BYTES as u32 }];
        assert!(header.write(&self.rings.memory, &range));
        let room = self.rooms.entry((header.src_port, header.dst_port)).or_default();
        room.0 = room.0.max(u64::from(header.buf_alloc));
        if header.op == op::REQUEST {
            room.1 = 0;
        }
        self.rings.offer(TX, None, HEADER_BYTES as u32 + len, false);
    }

    /// Checks the packets that the device has sent.
    fn check(&mut self) {
        while self.used != self.rings.used_index(RX) {
            let [slot, len] = self.rings.used(RX, self.used);
            let place = self.rings.buffer(RX, slot as u16);
            let range = [GuestRange { address: GuestAddress(place), len_bytes: len }];
            let header = Header::read(&self.rings.memory, &range).expect("it has a header");
            assert_eq!(len, HEADER_BYTES as u32 + header.len_bytes, "{header:?}");
            assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
            assert!((op::REQUEST..=op::CREDIT_REQUEST).contains(&header.op), "{header:?}");
            assert!(header.len_bytes == 0 || header.op == op::RW, "{header:?}");
            let (room, sent) = self.rooms.entry((header.dst_port, header.src_port)).or_default();
            // Forwarded counts from the guest never allow more than the largest buffer space it has advertised.
            assert!(u64::from(header.len_bytes) <= *room, "{header:?}");
            *sent += u64::from(header.len_bytes);
            self.used = self.used.wrapping_add(1);
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    HOST.with_borrow_mut(|host| {
        let host = host.get_or_insert_with(Host::new);
        let mut guest = Guest::new(&host.memory);
        let mut streams = Vec::new();
        host.handler.reset();
        host.handler.start(1 << 32);
        for step in bytes.chunks_exact(STEP_BYTES).take(STEPS_MAX) {
            take(step, host, &mut guest, &mut streams);
            for _ in 0..2 {
                for index in 0..3 {
                    if host.handler.process(index, &mut guest.rings.queues).is_err() {
                        return;
                    }
                }
            }
            guest.check();
        }
    });
});

fn take(step: &[u8], host: &Host, guest: &mut Guest, streams: &mut Vec<UnixStream>) {
    let [what, a, b, c, rest @ ..] = step else { return };
    let number = |from: usize| rest.get(from..from + 4).map_or(0, |n| u32::from_le_bytes([n[0], n[1], n[2], n[3]]));
    let stream = streams.len().checked_sub(1).map(|last| usize::from(*a).min(last));
    let stream = stream.and_then(|index| streams.get_mut(index));
    match what % 8 {
        0..=2 => {
            let ports = (u32::from(b % 3), if c % 4 == 3 { 1 << 30 | u32::from(c / 4) } else { u32::from(c % 4) });
            let len = number(8) % (BUFFER_BYTES as u32 - HEADER_BYTES as u32);
            let header = Header {
                src_cid: if a & 0x80 == 0 { CID } else { number(0).into() },
                dst_cid: if a & 0x40 == 0 { HOST_CID } else { number(4).into() },
                src_port: ports.0,
                dst_port: ports.1,
                len_bytes: if a & 0x20 == 0 { len } else { number(8) },
                kind: if a & 0x10 == 0 { TYPE_STREAM } else { number(0) as u16 },
                op: u16::from(a % 9),
                flags: number(0) >> 16,
                buf_alloc: number(0),
                fwd_cnt: if b & 0x80 == 0 { number(4) % 10_000 } else { number(4) },
            };
            guest.send(header, len);
        }
        3 => (0..=a % QUEUE_SIZE as u8).for_each(|_| {
            if guest.rings.has_room(RX) {
                guest.rings.offer(RX, None, HEADER_BYTES as u32 + 1 + number(0) % 4000, true);
            }
        }),
        4 => {
            if let Ok((stream, _)) = host.listener.accept() {
                stream.set_nonblocking(true).expect("it is a stream");
                streams.push(stream);
            }
        }
        5 => {
            if let Ok(mut stream) = UnixStream::connect(host.socket()) {
                stream.set_nonblocking(true).expect("it is a stream");
                let line = if b % 8 == 0 { rest.to_vec() } else { format!("CONNECT {}\n", b % 3).into_bytes() };
                let _ = stream.write(&line);
                streams.push(stream);
            }
        }
        6 => drop(stream.map(|stream| stream.write(&vec![*c; 100 * usize::from(*b)]))),
        _ => match b % 4 {
            0 => drop(stream.map(|stream| stream.read(&mut [0; 5000]))),
            1 => drop(stream.map(|stream| stream.shutdown(Shutdown::Write))),
            2 => drop(stream.map(|stream| stream.shutdown(Shutdown::Read))),
            _ if streams.is_empty() => {}
            _ => drop(streams.swap_remove(usize::from(*a) % streams.len())),
        },
    }
}
