//! From arbitrary bytes as a guest's packets and as programs of the host's to the socket device: what it sends to the guest
//! is well-formed and within what the guest has room for.
#![no_main]

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
use husk::virtio::queue::{GuestRange, QueueRegisters};
use husk::virtio::vsock::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use husk::virtio::{QueueHandler, Virtqueue, vsock};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const CID: u64 = 3;
const QUEUE_SIZE: u16 = 16;
/// An input is a row of these.
const STEP_BYTES: usize = 16;
/// More steps find nothing that fewer do not.
const STEPS_MAX: usize = 200;
/// Where queue `index` stands: its three rings, and a buffer for each descriptor.
const QUEUE_BYTES: u64 = 0x4_0000;
const BUFFER_BYTES: u64 = 0x2000;

thread_local! {
    static HOST: RefCell<Option<Host>> = const { RefCell::new(None) };
}

/// What is the same for all inputs.
struct Host {
    folder: tempfile::TempDir,
    listener: UnixListener,
    memory: Arc<GuestMemory>,
    handler: Box<dyn QueueHandler>,
}

impl Host {
    fn new() -> Host {
        let folder = tempfile::tempdir().expect("a folder can be had");
        let config = VsockConfig { socket: folder.path().join("v"), cid: CID as u32 };
        let socket = resources::vsock::open(&config).expect("a socket can be had");
        let listener = UnixListener::bind(folder.path().join("v_1")).expect("a socket can be had");
        listener.set_nonblocking(true).expect("it is a socket");
        let memory = Arc::new(memory::reserve(1).expect("1 MiB can be had"));
        Host { folder, listener, memory, handler: vsock::device(socket).expect("a device can be made").handler }
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("v")
    }
}

/// A guest and its rings, which are good: bad ones are another target's.
struct Guest {
    memory: Arc<GuestMemory>,
    queues: Vec<Virtqueue>,
    /// Of the ring to the guest, and of that from it.
    offered: [u16; 2],
    used: u16,
    /// By ports: the room that the guest told of at most, and what it was sent.
    rooms: HashMap<(u32, u32), (u64, u64)>,
}

fn at(queue: usize) -> u64 {
    QUEUE_BYTES * queue as u64
}

impl Guest {
    fn new(memory: &Arc<GuestMemory>) -> Guest {
        memory.write_slice(&vec![0; 3 * QUEUE_BYTES as usize], GuestAddress(0)).expect("it is memory");
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
        let queues = (0..3).map(queue).collect();
        Guest { memory: memory.clone(), queues, offered: [0; 2], used: 0, rooms: HashMap::new() }
    }

    fn buffer(&self, queue: usize, slot: u16) -> u64 {
        at(queue) + 0x4000 + BUFFER_BYTES * u64::from(slot)
    }

    /// Makes a buffer of `len` bytes available.
    fn offer(&mut self, queue: usize, len: u32) {
        let slot = self.offered[queue] % QUEUE_SIZE;
        let flags = if queue == 0 { 2_u64 } else { 0 };
        let descriptor = [self.buffer(queue, slot), u64::from(len) | flags << 32];
        self.memory.write_obj(descriptor, GuestAddress(at(queue) + 16 * u64::from(slot))).expect("it is memory");
        let ring = at(queue) + 0x1000;
        self.memory.write_obj(slot, GuestAddress(ring + 4 + 2 * u64::from(slot))).expect("it is memory");
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        self.memory.write_obj(self.offered[queue], GuestAddress(ring + 2)).expect("it is memory");
    }

    fn used_index(&self, queue: usize) -> u16 {
        self.memory.read_obj(GuestAddress(at(queue) + 0x2002)).expect("it is memory")
    }

    fn has_room(&self, queue: usize) -> bool {
        self.offered[queue].wrapping_sub(self.used_index(queue)) < QUEUE_SIZE
    }

    fn send(&mut self, header: Header, len: u32) {
        if !self.has_room(1) {
            return;
        }
        let place = self.buffer(1, self.offered[1] % QUEUE_SIZE);
        let range = [GuestRange { address: GuestAddress(place), len_bytes: HEADER_BYTES as u32 }];
        assert!(header.write(&self.memory, &range));
        let room = self.rooms.entry((header.src_port, header.dst_port)).or_default();
        room.0 = room.0.max(u64::from(header.buf_alloc));
        if header.op == op::REQUEST {
            room.1 = 0;
        }
        self.offer(1, HEADER_BYTES as u32 + len);
    }

    /// Looks at what the device has sent.
    fn check(&mut self) {
        while self.used != self.used_index(0) {
            let entry = GuestAddress(at(0) + 0x2004 + 8 * u64::from(self.used % QUEUE_SIZE));
            let [slot, len]: [u32; 2] = self.memory.read_obj(entry).expect("it is memory");
            let place = self.buffer(0, slot as u16);
            let range = [GuestRange { address: GuestAddress(place), len_bytes: len }];
            let header = Header::read(&self.memory, &range).expect("it has a header");
            assert_eq!(len, HEADER_BYTES as u32 + header.len_bytes, "{header:?}");
            assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
            assert!((op::REQUEST..=op::CREDIT_REQUEST).contains(&header.op), "{header:?}");
            assert!(header.len_bytes == 0 || header.op == op::RW, "{header:?}");
            let (room, sent) = self.rooms.entry((header.dst_port, header.src_port)).or_default();
            // What it says to have taken makes no more room than it ever told of.
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
                    if host.handler.process(index, &mut guest.queues).is_err() {
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
            if guest.has_room(0) {
                guest.offer(0, HEADER_BYTES as u32 + 1 + number(0) % 4000);
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
