//! The socket device as a guest and the host's programs see it.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::credit::BUFFER_BYTES;
use super::packet::{HOST_CID, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use super::switch::CONNECTIONS_MAX;
use super::*;
use crate::config::VsockConfig;
use crate::memory::GuestMemory;
use crate::resources;
use crate::virtio::mmio::register::STATUS;
use crate::virtio::queue::GuestRange;
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE};

const CID: u64 = 5;
/// Where the guest's packets to the host are written; below it are the buffers for those to the guest.
const OUTBOX: u64 = BUFFERS + (2 << 20);
/// The guest's port, and the host's, where nothing depends on them.
const PORTS: (u32, u32) = (1000, 52);
/// As much room as a guest can say that it has.
const PLENTY: u32 = u32::MAX;

/// A guest that speaks to the device packet by packet.
struct Guest {
    driver: Driver,
    folder: tempfile::TempDir,
    /// Room for data in each receive buffer.
    room: u32,
    /// Where the buffer of each descriptor is.
    at: Vec<u64>,
}

fn range(at: u64, len_bytes: u32) -> [GuestRange; 1] {
    [GuestRange { address: GuestAddress(at), len_bytes }]
}

impl Guest {
    /// A guest with `count` receive buffers that hold `room` bytes of data each.
    fn new(count: u16, room: u32) -> Guest {
        let folder = tempfile::tempdir().unwrap();
        let config = VsockConfig { socket: folder.path().join("v.sock"), cid: CID as u32 };
        let driver = Driver::new(device(resources::vsock::open(&config).unwrap()).unwrap());
        let mut guest = Guest { driver, folder, room, at: vec![0; 256] };
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
        self.folder.path().join(format!("v.sock{suffix}"))
    }

    /// A program of the host's that serves `port`.
    fn serve(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.path(&format!("_{port}"))).unwrap()
    }

    /// A program of the host's that asks for the guest's `port`.
    fn call(&self, port: u32) -> UnixStream {
        let mut client = patient(UnixStream::connect(self.path("")).unwrap());
        client.write_all(format!("CONNECT {port}\n").as_bytes()).unwrap();
        client
    }

    /// Puts a packet on the ring as it is, `len` bytes long behind its header.
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

    /// The next packet, waited for. Its buffer is offered again.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let received = self.take();
        self.offer_at(received.2);
        self.driver.notify(RX as u32);
        (received.0, received.1)
    }

    /// The next packet, waited for, and where its buffer is.
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

    /// The next packet: it has to be of this kind, on these ports.
    #[track_caller]
    fn expect(&mut self, ports: (u32, u32), op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        assert_eq!(((header.dst_port, header.src_port), header.op), (ports, op), "{header:?}");
        (header, data)
    }

    /// All that the device has to say by now.
    fn settle(&mut self) -> Vec<(Header, Vec<u8>)> {
        const NOBODY: (u32, u32) = (u32::MAX, u32::MAX);
        let mut said = Vec::new();
        // The first answer may overtake what was due before it was asked for; the second one cannot.
        for _ in 0..2 {
            self.send(NOBODY, op::RW);
            loop {
                let (header, data) = self.receive();
                if header.dst_port == NOBODY.0 {
                    break;
                }
                said.push((header, data));
            }
        }
        said
    }

    #[track_caller]
    fn expect_nothing(&mut self) {
        assert_eq!(self.settle(), []);
    }

    /// Connects to a program of the host's. Returns its end.
    fn connect(&mut self, ports: (u32, u32), listener: &UnixListener) -> UnixStream {
        self.send(ports, op::REQUEST);
        let (header, _) = self.expect(ports, op::RESPONSE);
        assert_eq!((header.buf_alloc, header.fwd_cnt), (BUFFER_BYTES, 0));
        patient(listener.accept().unwrap().0)
    }

    fn connected() -> (Guest, UnixStream) {
        let mut guest = Guest::new(16, 4096);
        let listener = guest.serve(PORTS.1);
        let stream = guest.connect(PORTS, &listener);
        (guest, stream)
    }
}

/// A stream on which a test fails sooner than it hangs.
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

/// The same numbers in every run.
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

#[test]
fn a_guest_reaches_a_program_and_both_talk() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(data(5), b"hello");
    assert_eq!(read(&mut stream, 5), b"hello");
    stream.write_all(b"good day").unwrap();
    let (header, data) = guest.expect(PORTS, op::RW);
    assert_eq!((&*data, header.fwd_cnt, header.buf_alloc), (&b"good day"[..], 5, BUFFER_BYTES));
}

#[test]
fn a_program_reaches_the_guest_and_both_talk() {
    let mut guest = Guest::new(16, 4096);
    let mut client = guest.call(7);
    // It does not wait for the answer.
    client.write_all(b"early").unwrap();
    let (request, _) = guest.receive();
    let ports = (7, request.src_port);
    assert_eq!((request.op, request.dst_port, request.buf_alloc), (op::REQUEST, 7, BUFFER_BYTES));
    guest.expect_nothing();
    guest.send(ports, op::RESPONSE);
    let ok = format!("OK {}\n", request.src_port);
    assert_eq!(read(&mut client, ok.len()), ok.as_bytes());
    assert_eq!(guest.expect(ports, op::RW).1, b"early");
    let other = guest.call(7);
    assert_ne!(guest.receive().0.src_port, request.src_port, "each has a port of its own");
    drop(other);
}

#[test]
fn a_program_that_the_guest_refuses_is_let_go() {
    let mut guest = Guest::new(16, 4096);
    let mut client = guest.call(7);
    let (request, _) = guest.receive();
    guest.send((7, request.src_port), op::RST);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    guest.expect_nothing();
}

#[test]
fn a_program_that_speaks_otherwise_is_let_go() {
    let guest = Guest::new(16, 4096);
    for line in ["GET / HTTP/1.1\n", "CONNECT none\n", &"C".repeat(100)] {
        let mut client = patient(UnixStream::connect(guest.path("")).unwrap());
        client.write_all(line.as_bytes()).unwrap();
        let ended = client.read(&mut [0; 8]);
        assert!(matches!(&ended, Ok(0)) || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset), "{line:?}");
    }
}

#[test]
fn a_program_that_goes_before_the_guest_answers_leaves_nothing() {
    let mut guest = Guest::new(16, 4096);
    let client = guest.call(7);
    let ports = (7, guest.receive().0.src_port);
    drop(client);
    guest.expect(ports, op::RST);
    guest.send(ports, op::RESPONSE);
    guest.expect(ports, op::RST);
    // One that goes while it says what it wants.
    drop(guest.call(8));
    let (request, _) = guest.receive();
    guest.send((8, request.src_port), op::RESPONSE);
    guest.expect((8, request.src_port), op::RST);
}

#[test]
fn a_port_that_nobody_serves_is_refused() {
    let mut guest = Guest::new(16, 4096);
    guest.send(PORTS, op::REQUEST);
    guest.expect(PORTS, op::RST);
    // Nor one whose program is gone and left its socket.
    drop(guest.serve(PORTS.1));
    guest.send(PORTS, op::REQUEST);
    guest.expect(PORTS, op::RST);
}

#[test]
fn what_belongs_to_no_connection_is_reset_but_a_reset_never_is() {
    let mut guest = Guest::new(16, 4096);
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, u16::MAX] {
        guest.send(PORTS, op);
        guest.expect(PORTS, op::RST);
    }
    guest.send(PORTS, op::RST);
    guest.send_raw(Header { dst_cid: 9, ..packet(PORTS, op::RST) }, &[]);
    guest.expect_nothing();
}

#[test]
fn only_streams_between_this_guest_and_the_host_are_known() {
    let (mut guest, mut stream) = Guest::connected();
    for wrong in [
        Header { kind: 2, ..packet(PORTS, op::REQUEST) },
        Header { kind: 0, ..data(1) },
        Header { dst_cid: CID, ..data(1) },
        Header { dst_cid: HOST_CID | 1 << 32, ..packet((1, 52), op::REQUEST) },
    ] {
        guest.send_raw(wrong, b"x");
        guest.expect((wrong.src_port, PORTS.1), op::RST);
    }
    guest.send_raw(Header { src_cid: CID + 1, ..data(1) }, b"x");
    guest.expect_nothing();
    // None of that was this connection's.
    guest.send_raw(data(2), b"ok");
    assert_eq!(read(&mut stream, 2), b"ok");
}

#[test]
fn a_guest_that_has_sent_all_still_receives() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(data(3), b"end");
    guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"end");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(PORTS, op::RW).1, b"answer");
    drop(stream);
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_program_that_has_sent_all_still_receives() {
    let (mut guest, mut stream) = Guest::connected();
    stream.write_all(b"end").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(PORTS, op::RW).1, b"end");
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.send_raw(data(6), b"answer");
    assert_eq!(read(&mut stream, 6), b"answer");
    guest.expect_nothing();
}

#[test]
fn a_guest_that_receives_no_more_still_sends() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(shutdown(SHUTDOWN_RECEIVE), &[]);
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send_raw(data(5), b"still");
    assert_eq!(read(&mut stream, 5), b"still");
}

#[test]
fn a_program_that_receives_no_more_still_sends() {
    let (mut guest, mut stream) = Guest::connected();
    stream.shutdown(Shutdown::Read).unwrap();
    guest.send_raw(data(4), b"lost");
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_RECEIVE);
    stream.write_all(b"still").unwrap();
    let (header, data) = guest.expect(PORTS, op::RW);
    assert_eq!((&*data, header.fwd_cnt), (&b"still"[..], 4), "what nobody reads takes no room");
}

#[test]
fn a_guest_that_ends_a_connection_is_answered_and_may_use_its_ports_again() {
    let mut guest = Guest::new(16, 4096);
    let listener = guest.serve(PORTS.1);
    for word in [b"first", b"again"] {
        let mut stream = guest.connect(PORTS, &listener);
        guest.send_raw(data(5), word);
        guest.send_raw(shutdown(SHUTDOWN_BOTH), &[]);
        guest.expect(PORTS, op::RST);
        assert_eq!(read(&mut stream, 5), word);
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    }
    guest.send_raw(data(1), b"x");
    guest.expect(PORTS, op::RST);
}

#[test]
fn a_program_that_ends_a_connection_is_read_to_its_end() {
    let (mut guest, mut stream) = Guest::connected();
    let sent = bytes(1, 100_000);
    stream.write_all(&sent).unwrap();
    drop(stream);
    let mut received = Vec::new();
    let flags = loop {
        let (header, data) = guest.receive();
        match header.op {
            op::RW => received.extend(data),
            op::SHUTDOWN if header.flags != SHUTDOWN_RECEIVE => break header.flags,
            _ => {}
        }
    };
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
    assert_eq!(flags, SHUTDOWN_BOTH);
    guest.send(PORTS, op::RST);
    guest.send(PORTS, op::CREDIT_REQUEST);
    guest.expect(PORTS, op::RST);
}

/// Fills a connection whose reader reads nothing, as far as its credit goes. Returns what was sent, and what of it has
/// left the device.
fn fill(guest: &mut Guest) -> (Vec<u8>, u32) {
    const CHUNK: usize = 32 << 10;
    let mut sent = Vec::new();
    loop {
        guest.send(PORTS, op::CREDIT_REQUEST);
        let (update, _) = guest.settle().pop().unwrap();
        assert_eq!(update.op, op::CREDIT_UPDATE);
        let room = (BUFFER_BYTES - (sent.len() as u32 - update.fwd_cnt)) as usize;
        if room == 0 {
            return (sent, update.fwd_cnt);
        }
        let chunk = bytes(sent.len() as u64, room.min(CHUNK));
        guest.send_raw(data(chunk.len()), &chunk);
        sent.extend(chunk);
    }
}

#[test]
fn a_program_that_does_not_read_stops_the_guest_and_one_that_reads_lets_it_go_on() {
    let (mut guest, mut stream) = Guest::connected();
    let (mut sent, forwarded) = fill(&mut guest);
    assert_eq!(sent.len() as u32 - forwarded, BUFFER_BYTES);
    assert!(read(&mut stream, sent.len()) == sent);
    // Unasked, in steps that are worth a packet.
    let mut told = forwarded;
    while sent.len() as u32 - told >= BUFFER_BYTES / 4 {
        let (update, _) = guest.expect(PORTS, op::CREDIT_UPDATE);
        assert!(update.fwd_cnt - told >= BUFFER_BYTES / 4);
        told = update.fwd_cnt;
    }
    guest.send_raw(data(4), b"more");
    sent.extend(b"more");
    assert_eq!(read(&mut stream, 4), b"more");
    guest.send(PORTS, op::CREDIT_REQUEST);
    assert_eq!(guest.settle().pop().unwrap().0.fwd_cnt, sent.len() as u32);
}

#[test]
fn what_a_guest_sent_before_it_ended_is_delivered_late_readers_or_not() {
    for end in [shutdown(SHUTDOWN_BOTH), packet(PORTS, op::RST)] {
        let (mut guest, mut stream) = Guest::connected();
        let (sent, _) = fill(&mut guest);
        guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
        guest.send_raw(end, &[]);
        if end.op == op::SHUTDOWN {
            guest.expect(PORTS, op::RST);
        }
        // Its ports are free while the old data still wait.
        let next = guest.serve(77);
        drop(guest.connect((PORTS.0, 77), &next));
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert!(all == sent, "{} of {} bytes", all.len(), sent.len());
    }
}

#[test]
fn a_reset_by_the_guest_drops_what_it_had_not_ended() {
    let (mut guest, mut stream) = Guest::connected();
    let (sent, forwarded) = fill(&mut guest);
    guest.send(PORTS, op::RST);
    guest.expect_nothing();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, sent[..forwarded as usize]);
}

#[test]
fn a_guest_without_room_is_asked_for_it_once_and_sent_no_more_than_it_has() {
    let (mut guest, mut stream) = Guest::connected();
    let tell = |buf_alloc, fwd_cnt| Header { buf_alloc, fwd_cnt, ..packet(PORTS, op::CREDIT_UPDATE) };
    guest.send_raw(tell(1000, 0), &[]);
    stream.write_all(&bytes(3, 2500)).unwrap();
    let mut received = guest.expect(PORTS, op::RW).1;
    assert_eq!(received.len(), 1000);
    guest.expect(PORTS, op::CREDIT_REQUEST);
    guest.send_raw(tell(1000, 0), &[]);
    guest.expect_nothing();
    guest.send_raw(tell(1000, 400), &[]);
    received.extend(guest.expect(PORTS, op::RW).1);
    assert_eq!(received.len(), 1400);
    guest.expect(PORTS, op::CREDIT_REQUEST);
    guest.send_raw(tell(5000, 1400), &[]);
    received.extend(guest.expect(PORTS, op::RW).1);
    assert!(received == bytes(3, 2500));
    guest.expect_nothing();
}

#[test]
fn a_guest_that_does_not_read_stops_the_program_that_writes() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(Header { buf_alloc: 0, ..packet(PORTS, op::CREDIT_UPDATE) }, &[]);
    stream.set_nonblocking(true).unwrap();
    let chunk = [0; 4096];
    let mut written = 0;
    while let Ok(count) = stream.write(&chunk) {
        written += count;
    }
    assert!(written < 1 << 20, "{written} bytes are held somewhere");
    guest.expect(PORTS, op::CREDIT_REQUEST);
    guest.send(PORTS, op::CREDIT_UPDATE);
    let mut received = 0;
    while received < written {
        received += guest.expect(PORTS, op::RW).1.len();
    }
    assert_eq!(received, written);
}

#[test]
fn a_guest_that_lies_loses_its_connection_and_no_other() {
    let more_than_room = Header { len_bytes: BUFFER_BYTES + 1, ..packet(PORTS, op::RW) };
    let more_than_there_is = Header { len_bytes: 11, ..packet(PORTS, op::RW) };
    let far_more = Header { len_bytes: u32::MAX, ..packet(PORTS, op::RW) };
    let took_what_was_not_sent = Header { fwd_cnt: 1, ..packet(PORTS, op::CREDIT_UPDATE) };
    let second = packet(PORTS, op::REQUEST);
    let answer = packet(PORTS, op::RESPONSE);
    let unknown = packet(PORTS, 99);
    let mut guest = Guest::new(16, 4096);
    let listener = guest.serve(PORTS.1);
    let mut other = guest.connect((1, PORTS.1), &listener);
    for lie in [more_than_there_is, far_more, took_what_was_not_sent, second, answer, unknown] {
        let mut stream = guest.connect(PORTS, &listener);
        guest.send_raw(lie, &[0; 10]);
        guest.expect(PORTS, op::RST);
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "{lie:?}");
    }
    let mut stream = guest.connect(PORTS, &listener);
    guest.send_raw(more_than_room, &vec![0; BUFFER_BYTES as usize + 1]);
    guest.expect(PORTS, op::RST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    let mut stream = guest.connect(PORTS, &listener);
    guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
    guest.send_raw(data(1), b"x");
    guest.expect(PORTS, op::RST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    other.write_all(b"fine").unwrap();
    assert_eq!(guest.expect((1, PORTS.1), op::RW).1, b"fine");
}

#[test]
fn data_outside_of_memory_end_the_connection() {
    let (mut guest, mut stream) = Guest::connected();
    assert!(data(100).write(guest.memory(), &range(OUTBOX, HEADER_BYTES as u32)));
    let parts = [(OUTBOX, HEADER_BYTES as u32, 0), (OUTBOX + 64, 50, 0), (1 << 40, 50, 0)];
    assert_eq!(guest.driver.transact(TX as u32, &parts), 0);
    guest.expect(PORTS, op::RST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_packet_with_no_header_and_a_buffer_with_no_room_need_a_reset() {
    for (queue, parts) in [
        (TX, vec![(OUTBOX, 43, 0)]),
        (TX, vec![(OUTBOX, 44, WRITE)]),
        (TX, vec![(1 << 40, 44, 0)]),
        (RX, vec![(BUFFERS, 44, WRITE)]),
        (RX, vec![(BUFFERS, 4096, 0)]),
        (RX, vec![(1 << 40, 4096, WRITE)]),
    ] {
        let mut guest = Guest::new(0, 4096);
        let head = guest.driver.chain(queue as u32, &parts);
        guest.driver.offer(queue as u32, head);
        guest.driver.notify(queue as u32);
        if queue == RX {
            guest.send(PORTS, op::RW);
        }
        guest.driver.wait_for_needs_reset();
    }
}

#[test]
fn connections_are_limited_and_those_beyond_are_refused() {
    crate::sys::allow_many_files().unwrap();
    let mut guest = Guest::new(16, 4096);
    let listener = guest.serve(PORTS.1);
    let mut streams: Vec<_> =
        (0..CONNECTIONS_MAX as u32).map(|port| guest.connect((port, PORTS.1), &listener)).collect();
    guest.send((9999, PORTS.1), op::REQUEST);
    guest.expect((9999, PORTS.1), op::RST);
    let mut client = patient(UnixStream::connect(guest.path("")).unwrap());
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    for (port, stream) in (0..).zip(&mut streams) {
        stream.write_all(&[port as u8]).unwrap();
        assert_eq!(guest.expect((port, PORTS.1), op::RW).1, [port as u8]);
    }
    streams.pop();
    let last = (CONNECTIONS_MAX as u32 - 1, PORTS.1);
    guest.expect(last, op::SHUTDOWN);
    guest.send(last, op::RST);
    guest.connect((9999, PORTS.1), &listener);
}

#[test]
fn a_guest_that_takes_no_answers_is_held_up_and_goes_on_when_it_does() {
    let mut guest = Guest::new(0, 64);
    for port in 0..400 {
        let at = OUTBOX + 64 * u64::from(port);
        assert!(packet((port, 9), op::RW).write(guest.memory(), &range(at, 64)));
        let head = guest.driver.chain(TX as u32, &[(at, HEADER_BYTES as u32, 0)]);
        guest.driver.offer(TX as u32, head);
        guest.driver.notify(TX as u32);
        if port < 256 {
            assert_eq!(guest.driver.used(TX as u32), (head, 0));
        }
    }
    guest.driver.transport.pause();
    assert_eq!(guest.driver.used_index(TX as u32), 256, "answers that are kept for the guest have a limit");
    guest.driver.transport.resume();
    guest.offer(100);
    let answered: Vec<u32> = (0..400).map(|_| guest.receive().0.dst_port).collect();
    assert!(answered.iter().copied().eq(0..400), "{answered:?}");
}

#[test]
fn connections_have_their_turns_one_by_one() {
    let mut guest = Guest::new(4, 1000);
    let listener = guest.serve(PORTS.1);
    let mut streams: Vec<_> = (0..3).map(|port| guest.connect((port, PORTS.1), &listener)).collect();
    guest.driver.transport.pause();
    for stream in &mut streams {
        stream.write_all(&[1; 50_000]).unwrap();
    }
    guest.driver.transport.resume();
    let order: Vec<u32> = (0..150).map(|_| guest.receive().0.dst_port).collect();
    for three in order.chunks(3) {
        let mut three = three.to_vec();
        three.sort_unstable();
        assert_eq!(three, [0, 1, 2], "{order:?}");
    }
}

#[test]
fn a_pause_keeps_connections_and_a_reset_of_the_device_ends_them() {
    let (mut guest, mut stream) = Guest::connected();
    let mut early = patient(UnixStream::connect(guest.path("")).unwrap());
    guest.driver.transport.pause();
    stream.write_all(b"in the meantime").unwrap();
    guest.driver.transport.resume();
    assert_eq!(guest.expect(PORTS, op::RW).1, b"in the meantime");
    guest.driver.write(STATUS, 0);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    guest.driver.start();
    guest.offer(16);
    guest.send_raw(data(1), b"x");
    guest.expect(PORTS, op::RST);
    // Who had not said what it wants may have been let in before the reset or after it.
    let _ = early.write_all(
        b"CONNECT 7
",
    );
    let mut client = guest.call(8);
    let request = loop {
        let (request, _) = guest.receive();
        if request.dst_port == 8 {
            break request;
        }
    };
    guest.send((8, request.src_port), op::RESPONSE);
    assert_eq!(read(&mut client, 3), b"OK ");
}

#[test]
fn megabytes_arrive_as_they_were_sent_both_ways_at_once() {
    const TOTAL: usize = 4 << 20;
    for room in [100, 4096, 65536 - 64] {
        let mut guest = Guest::new(8, room);
        let listener = guest.serve(PORTS.1);
        let stream = guest.connect(PORTS, &listener);
        let total = TOTAL.min(room as usize * 10_000);
        let (out, back) = (bytes(1, total), bytes(2, total));
        let (mut writer, expected) = (stream.try_clone().unwrap(), out.clone());
        let writing = std::thread::spawn({
            let back = back.clone();
            move || {
                let mut sizes = pattern(3).map(|x| 1 + x as usize % 100_000);
                let mut rest = &back[..];
                while !rest.is_empty() {
                    let (piece, behind) = rest.split_at(rest.len().min(sizes.next().unwrap()));
                    writer.write_all(piece).unwrap();
                    rest = behind;
                }
                writer.shutdown(Shutdown::Write).unwrap();
            }
        });
        let reading = std::thread::spawn(move || {
            let (mut stream, mut all) = (stream, Vec::<u8>::new());
            let mut sizes = pattern(4).map(|x| 1 + x as usize % 50_000);
            let mut piece = vec![0; 50_000];
            loop {
                let size = sizes.next().unwrap();
                match stream.read(&mut piece[..size]).unwrap() {
                    0 => return all == expected,
                    count => all.extend(&piece[..count]),
                }
            }
        });
        let received = exchange(&mut guest, &out);
        assert!(received == back, "{room}: {} of {} bytes", received.len(), back.len());
        guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
        assert!(reading.join().unwrap(), "{room}");
        writing.join().unwrap();
    }
}

/// Sends `out` within the credit that the device gives, and receives until the host has sent all.
fn exchange(guest: &mut Guest, out: &[u8]) -> Vec<u8> {
    // Room for a few packets, taken back into account as they are read.
    const ROOM: u32 = 40_000;
    let (mut received, mut sent, mut forwarded, mut told, mut ended) = (Vec::new(), 0, 0, 0, false);
    let mut sizes = pattern(5).map(|x| 1 + x as u32 % 60_000);
    let says = |header: Header, received: usize| Header { buf_alloc: ROOM, fwd_cnt: received as u32, ..header };
    guest.send_raw(says(packet(PORTS, op::CREDIT_UPDATE), 0), &[]);
    while !ended || sent < out.len() {
        let room = BUFFER_BYTES - (sent as u32 - forwarded);
        let len = (room.min(sizes.next().unwrap()) as usize).min(out.len() - sent);
        if len > 0 {
            guest.send_raw(says(data(len), received.len()), &out[sent..sent + len]);
            (sent, told) = (sent + len, received.len());
        }
        if ended && room > 0 {
            continue;
        }
        let (header, data) = guest.receive();
        forwarded = header.fwd_cnt;
        ended |= header.op == op::SHUTDOWN;
        received.extend(data);
        if header.op == op::CREDIT_REQUEST || received.len() - told > ROOM as usize / 2 {
            guest.send_raw(says(packet(PORTS, op::CREDIT_UPDATE), received.len()), &[]);
            told = received.len();
        }
    }
    received
}
