//! Tests of the vsock device from the guest's and the host's side.

mod connections;
mod flow;
mod moves;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::budget::{CONNECTIONS_MAX, Share};
use super::credit::BUFFER_BYTES;
use super::packet::{HOST_CID, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::*;
use crate::config::VsockConfig;
use crate::memory::GuestMemory;
use crate::resources;
use crate::virtio::mmio::register::STATUS;
use crate::virtio::queue::GuestRange;
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE};

const CID: u64 = 5;
/// The buffers of packets to the host; those of packets to the guest are below.
const OUTBOX: u64 = BUFFERS + (2 << 20);
/// The guest's and the host's port, where they do not matter.
const PORTS: (u32, u32) = (1000, 52);
/// The maximum buffer space that a guest can advertise.
const PLENTY: u32 = u32::MAX;

/// A guest that communicates with the device packet by packet.
struct Guest {
    driver: Driver,
    dir: tempfile::TempDir,
    /// The data size of each receive buffer.
    room: u32,
    /// The address of each descriptor's buffer.
    at: Vec<u64>,
}

fn range(at: u64, len_bytes: u32) -> [GuestRange; 1] {
    [GuestRange { address: GuestAddress(at), len_bytes }]
}

impl Guest {
    /// Moves the guest to another device, which is paused. Its host programs stay behind.
    fn moved(self) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let config = VsockConfig { socket: dir.path().join("v.sock"), cid: CID as u32 };
        let driver = self.driver.moved_to(device(resources::vsock::open(&config).unwrap()).unwrap());
        Guest { driver, dir, ..self }
    }

    /// Creates a guest with `count` receive buffers for `room` bytes of data each.
    fn new(count: u16, room: u32) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let config = VsockConfig { socket: dir.path().join("v.sock"), cid: CID as u32 };
        let driver = Driver::new(device(resources::vsock::open(&config).unwrap()).unwrap());
        let mut guest = Guest { driver, dir, room, at: vec![0; 256] };
        guest.driver.start();
        guest.offer(count);
        guest
    }

    fn offer(&mut self, count: u16) {
        (0..u64::from(count)).for_each(|index| self.offer_at(BUFFERS + index * u64::from(self.room + 64)));
        self.driver.notify(RX as u32);
    }

    fn offer_at(&mut self, at: u64) {
        let head = self.driver.chain(RX as u32, &[(at, HEADER_BYTES as u32 + self.room, WRITE)]);
        self.at[usize::from(head)] = at;
        self.driver.offer(RX as u32, head);
    }

    fn memory(&self) -> &GuestMemory {
        &self.driver.memory
    }

    fn path(&self, suffix: &str) -> PathBuf {
        self.dir.path().join(format!("v.sock{suffix}"))
    }

    /// Starts a host program that listens on `port`.
    fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("_{port}"))).unwrap()
    }

    /// Connects a host program to the guest's `port`.
    fn call(&self, port: u32) -> UnixStream {
        let mut client = patient(UnixStream::connect(self.path("")).unwrap());
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client
    }

    /// Puts a packet with `len` bytes of data on the ring.
    fn post(&mut self, header: Header, len: u32) -> u16 {
        assert!(header.write(&self.driver.memory, &range(OUTBOX, HEADER_BYTES as u32)));
        let head = self.driver.chain(TX as u32, &[(OUTBOX, HEADER_BYTES as u32, 0), (OUTBOX + 64, len, 0)]);
        self.driver.offer(TX as u32, head);
        self.driver.notify(TX as u32);
        head
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.memory().write_slice(data, GuestAddress(OUTBOX + 64)).unwrap();
        let head = self.post(header, data.len() as u32);
        assert_eq!(self.driver.used(TX as u32), (head, 0));
    }

    fn send(&mut self, ports: (u32, u32), op: u16) {
        self.send_raw(packet(ports, op), &[]);
    }

    /// Waits for the next packet. Its buffer is made available again.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let received = self.take();
        self.offer_at(received.2);
        self.driver.notify(RX as u32);
        (received.0, received.1)
    }

    /// Waits for the next packet; also returns its buffer.
    fn take(&mut self) -> (Header, Vec<u8>, u64) {
        let (head, len) = self.driver.used(RX as u32);
        let at = self.at[usize::from(head)];
        let header = Header::read(self.memory(), &range(at, HEADER_BYTES as u32)).unwrap();
        assert_eq!(len, HEADER_BYTES as u32 + header.len_bytes);
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (HOST_CID, CID, TYPE_STREAM));
        let mut data = vec![0; header.len_bytes as usize];
        self.memory().read_slice(&mut data, GuestAddress(at + HEADER_BYTES as u64)).unwrap();
        (header, data, at)
    }

    /// Waits for the next packet, which must have this operation and these ports.
    #[track_caller]
    fn expect(&mut self, ports: (u32, u32), op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(((header.dst_port, header.src_port), header.op), (ports, op), "{header:?}");
        (header, data)
    }

    /// All packets that the device has sent by now.
    fn settle(&mut self) -> Vec<(Header, Vec<u8>)> {
        const NOBODY: (u32, u32) = (u32::MAX, u32::MAX);
        let mut packets = Vec::new();
        // The first response may overtake earlier packets; the second one cannot.
        for _ in 0..2 {
            self.send(NOBODY, op::RW);
            loop {
                let (header, data) = self.receive();
                if header.dst_port == NOBODY.0 {
                    break;
                }
                packets.push((header, data));
            }
        }
        packets
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        assert_eq!(self.settle(), []);
    }

    /// Connects to a host program. Returns the program's stream.
    fn connect(&mut self, ports: (u32, u32), listener: &UnixListener) -> UnixStream {
        self.send(ports, op::REQUEST);
        let (header, _) = self.expect(ports, op::RESPONSE);
        let shares = [Share::LARGE, Share::SMALL].map(|share| share.backlog_bytes);
        assert!(shares.contains(&header.buf_alloc) && header.fwd_cnt == 0, "{header:?}");
        patient(listener.accept().unwrap().0)
    }

    fn connected() -> (Guest, UnixStream) {
        let mut guest = Guest::new(16, 4096);
        let listener = guest.serve(PORTS.1);
        let stream = guest.connect(PORTS, &listener);
        (guest, stream)
    }
}

/// Sets timeouts so that a test fails instead of hanging.
fn patient(stream: UnixStream) -> UnixStream {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn packet((src_port, dst_port): (u32, u32), op: u16) -> Header {
    let (src_cid, dst_cid) = (CID, HOST_CID);
    Header { src_cid, dst_cid, src_port, dst_port, kind: TYPE_STREAM, op, buf_alloc: PLENTY, ..Header::default() }
}

fn data(len: usize) -> Header {
    Header { len_bytes: len as u32, ..packet(PORTS, op::RW) }
}

fn shutdown(flags: u32) -> Header {
    Header { flags, ..packet(PORTS, op::SHUTDOWN) }
}

/// A deterministic sequence.
fn pattern(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed), |x| Some(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1)))
        .map(|x| x >> 33)
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    pattern(seed).map(|x| x as u8).take(len).collect()
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}
