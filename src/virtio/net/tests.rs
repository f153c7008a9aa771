//! Tests of the device with a driver, and a socket as its other side.

mod batch;
mod pairs;
mod vhost;
mod witness;

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_HDR_GSO_TCPV4,
};
use vm_memory::{Bytes, GuestAddress};

use self::witness::Witness;
use super::pair::{RX, TX};
use super::*;
use crate::backend::net::{HEADER_BYTES, Header, StreamNet};
use crate::config::Rate;
use crate::test_log::logged;
use crate::virtio::F_VERSION_1;
use crate::virtio::contract::contract;
use crate::virtio::mmio::register::*;
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE, wait_for};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const RX_QUEUE: u32 = RX as u32;
const TX_QUEUE: u32 = TX as u32;
/// The address of the guest's frames.
const FRAME: u64 = BUFFERS + 0x10_0000;

struct Bench {
    driver: Driver,
    link: NetLink,
    peer: UnixStream,
}

fn bench_with(name: &str, features: u64) -> Bench {
    let (ours, peer) = UnixStream::pair().unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let backend = Box::new(StreamNet::new(ours).unwrap());
    let (device, link) = device_on(vec![backend], name, MAC, Some(9000)).unwrap();
    let mut driver = Driver::new(device);
    driver.start_with(features);
    Bench { driver, link, peer }
}

fn bench() -> Bench {
    bench_with("net", !0)
}

impl Bench {
    /// Sends a frame as the guest, with its header in a separate descriptor, like older Linux versions, or directly
    /// before the frame.
    fn send(&mut self, header: [u8; HEADER_BYTES], frame: &[u8], apart: bool) {
        let bytes = [&header[..], frame].concat();
        self.driver.memory.write_slice(&bytes, GuestAddress(FRAME)).unwrap();
        let (header_bytes, all) = (HEADER_BYTES as u32, bytes.len() as u32);
        let written = if apart {
            let parts = [(FRAME, header_bytes, 0), (FRAME + u64::from(header_bytes), all - header_bytes, 0)];
            self.driver.transact(TX_QUEUE, &parts)
        } else {
            self.driver.transact(TX_QUEUE, &[(FRAME, 5, 0), (FRAME + 5, all - 5, 0)])
        };
        assert_eq!(written, 0);
    }

    fn offer(&mut self, buffers: &[(u64, u32)]) -> Vec<u16> {
        let heads = buffers.iter().map(|(address, len)| {
            let head = self.driver.chain(RX_QUEUE, &[(*address, *len, WRITE)]);
            self.driver.offer(RX_QUEUE, head);
            head
        });
        let heads = heads.collect();
        self.driver.notify(RX_QUEUE);
        heads
    }

    fn arrive(&mut self, frame: &[u8]) {
        self.peer.write_all(&[&(frame.len() as u32).to_be_bytes(), frame].concat()).unwrap();
    }

    fn read_frame(&mut self) -> Vec<u8> {
        let mut length = [0; 4];
        self.peer.read_exact(&mut length).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.peer.read_exact(&mut frame).unwrap();
        frame
    }

    fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    fn status(&self) -> u8 {
        let mut status = [0xff; 2];
        self.driver.transport.read(CONFIG + 6, &mut status);
        status[0]
    }
}

fn frame(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 % 251) as u8).collect()
}

#[test]
fn the_guest_reads_its_mac_address_link_state_and_mtu() {
    let bench = bench();
    let mut config = [0xff; 16];
    bench.driver.transport.read(CONFIG, &mut config);
    assert_eq!(config, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0x28, 0x23, 0xff, 0xff, 0xff, 0xff]);
    let offered = bench.driver.offered();
    let wanted = [VIRTIO_NET_F_MAC, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_F_MRG_RXBUF];
    assert!(wanted.iter().all(|bit| offered >> bit & 1 == 1), "{offered:#x}");
    // Checksums and segmentation cannot be offloaded to a stream.
    assert_eq!(offered & (1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4), 0, "{offered:#x}");
}

#[test]
fn the_guests_frames_arrive_unchanged() {
    let mut bench = bench();
    for (len, apart) in [(14, true), (60, false), (1514, true), (65535, false)] {
        bench.send([0; HEADER_BYTES], &frame(len), apart);
        assert!(bench.read_frame() == frame(len), "{len}");
    }
    let counts = bench.link.counts();
    assert_eq!((counts.tx_packets, counts.tx_bytes, counts.tx_dropped), (4, 14 + 60 + 1514 + 65535, 0));
    assert_eq!((counts.rx_packets, counts.rx_bytes), (0, 0));
}

#[test]
fn only_invalid_frames_are_dropped() {
    let mut bench = bench();
    let mut checksum = [0; HEADER_BYTES];
    checksum[0] = 1;
    let mut segments = checksum;
    segments[1] = VIRTIO_NET_HDR_GSO_TCPV4 as u8;
    bench.send(checksum, &frame(60), true);
    bench.send(segments, &frame(60), true);
    bench.send([0; HEADER_BYTES], &frame(13), true);
    bench.send([0; HEADER_BYTES], &frame(65536), true);
    bench.driver.transact(TX_QUEUE, &[(FRAME, 11, 0)]);
    bench.driver.transact(TX_QUEUE, &[(FRAME, 12, 0), (u64::MAX - 20, 60, 0)]);
    bench.driver.transact(TX_QUEUE, &[(1 << 50, 60, 0)]);
    bench.driver.transact(TX_QUEUE, &[(FRAME, 100, WRITE)]);
    bench.send([0; HEADER_BYTES], &frame(100), true);
    assert_eq!(bench.read_frame(), frame(100));
    assert_eq!((bench.link.counts().tx_dropped, bench.link.counts().tx_packets), (8, 1));
}

#[test]
fn a_frame_for_the_guest_takes_as_many_buffers_as_it_needs() {
    let mut bench = bench();
    let heads = bench.offer(&[(BUFFERS, 1000), (BUFFERS + 0x1000, 1000), (BUFFERS + 0x2000, 1000)]);
    bench.arrive(&frame(1500));
    assert_eq!(bench.driver.used(RX_QUEUE), (heads[0], 1000));
    assert_eq!(bench.driver.used(RX_QUEUE), (heads[1], 512));
    let header = bench.bytes(BUFFERS, HEADER_BYTES);
    assert_eq!(header, [2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0], "checked, in two buffers");
    let content = [bench.bytes(BUFFERS + 12, 988), bench.bytes(BUFFERS + 0x1000, 512)].concat();
    assert!(content == frame(1500));
    // The third is left for the next.
    bench.arrive(&frame(60));
    assert_eq!(bench.driver.used(RX_QUEUE), (heads[2], 72));
    assert_eq!(bench.bytes(BUFFERS + 0x2000 + 12, 60), frame(60));
    assert_eq!((bench.link.counts().rx_packets, bench.link.counts().rx_bytes), (2, 1560));
}

#[test]
fn without_mergeable_buffers_a_frame_must_fit_one_buffer() {
    let mut bench = bench_with("net", !(1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_GUEST_CSUM));
    let heads = bench.offer(&[(BUFFERS, 200), (BUFFERS + 0x1000, 4000)]);
    bench.arrive(&frame(500));
    wait_for(|| bench.link.counts().rx_dropped == 1);
    bench.arrive(&frame(188));
    assert_eq!(bench.driver.used(RX_QUEUE), (heads[0], 200));
    assert_eq!(bench.bytes(BUFFERS, HEADER_BYTES), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "not checked, one buffer");
    bench.arrive(&frame(500));
    assert_eq!(bench.driver.used(RX_QUEUE), (heads[1], 512));
}

#[test]
fn frames_wait_for_buffers_in_order() {
    let mut bench = bench();
    for len in [60, 3000, 80] {
        bench.arrive(&frame(len));
    }
    let first = bench.offer(&[(BUFFERS, 1000), (BUFFERS + 0x1000, 1000)]);
    assert_eq!(bench.driver.used(RX_QUEUE), (first[0], 72));
    // One buffer is not enough for the second frame, and stays unused.
    bench.driver.transport.pause();
    assert_eq!(bench.driver.used_index(RX_QUEUE), 1);
    bench.driver.transport.resume();
    let more = bench.offer(&[(BUFFERS + 0x2000, 3000), (BUFFERS + 0x3000, 1000)]);
    assert_eq!(bench.driver.used(RX_QUEUE), (first[1], 1000));
    assert_eq!(bench.driver.used(RX_QUEUE), (more[0], 2012));
    assert_eq!(bench.driver.used(RX_QUEUE), (more[1], 92));
}

#[test]
fn a_slow_host_loses_nothing_and_needs_no_doorbell() {
    let mut bench = bench();
    let (len, count) = (30_000, 100_u8);
    let mut sent = 0_u8;
    // Until the device accepts no more.
    for number in 0..count {
        let slot = FRAME + 0x8000 * u64::from(number % 16);
        bench.driver.memory.write_slice(&vec![number; HEADER_BYTES + len], GuestAddress(slot)).unwrap();
        bench.driver.memory.write_slice(&[0; HEADER_BYTES], GuestAddress(slot)).unwrap();
        let head = bench.driver.chain(TX_QUEUE, &[(slot, (HEADER_BYTES + len) as u32, 0)]);
        bench.driver.offer(TX_QUEUE, head);
        bench.driver.notify(TX_QUEUE);
        sent += 1;
        std::thread::sleep(std::time::Duration::from_millis(2));
        if bench.driver.used_index(TX_QUEUE) < u16::from(sent) {
            break;
        }
    }
    assert!(sent < count, "a socket has no end");
    for number in 0..sent {
        assert!(bench.read_frame() == vec![number; len], "{number}");
    }
    wait_for(|| bench.driver.used_index(TX_QUEUE) == u16::from(sent));
    assert_eq!(bench.link.counts().tx_packets, u64::from(sent));
}

#[test]
fn a_link_change_is_reported_to_the_driver() {
    let mut bench = bench();
    assert_eq!((bench.status(), bench.link.is_up()), (1, true));
    bench.driver.write(INTERRUPT_ACK, 3);
    bench.link.set_up(false);
    assert_eq!((bench.status(), bench.driver.read(INTERRUPT_STATUS)), (0, 2));
    assert_eq!(bench.driver.read(CONFIG_GENERATION), 1);
    // Frames in both directions are dropped meanwhile.
    bench.send([0; HEADER_BYTES], &frame(60), true);
    bench.offer(&[(BUFFERS, 2000)]);
    bench.arrive(&frame(61));
    wait_for(|| bench.link.counts().rx_dropped == 1 && bench.link.counts().tx_dropped == 1);
    bench.driver.write(INTERRUPT_ACK, 3);
    bench.link.set_up(true);
    assert_eq!((bench.status(), bench.driver.read(INTERRUPT_STATUS)), (1, 2));
    bench.send([0; HEADER_BYTES], &frame(62), true);
    assert_eq!(bench.read_frame(), frame(62));
    bench.arrive(&frame(63));
    assert_eq!(bench.driver.used(RX_QUEUE).1, 12 + 63);
}

#[test]
fn a_limit_holds_in_each_direction_and_loses_nothing() {
    let mut bench = bench();
    // Five at once, and then one every 20 ms.
    bench.link.set_rate(Rate { ops_per_second: Some(50), ..Rate::default() });
    let started = Instant::now();
    for _ in 0..16 {
        bench.arrive(&frame(100));
    }
    bench.offer(&(0..16).map(|n| (BUFFERS + n * 0x1000, 2000)).collect::<Vec<_>>());
    for _ in 0..16 {
        bench.send([0; HEADER_BYTES], &frame(100), true);
        assert_eq!(bench.read_frame(), frame(100));
    }
    wait_for(|| bench.driver.used_index(RX_QUEUE) == 16);
    let took = started.elapsed();
    assert!((Duration::from_millis(195)..Duration::from_secs(2)).contains(&took), "{took:?}");
    let counts = bench.link.counts();
    assert_eq!((counts.rx_packets, counts.tx_packets, counts.rx_dropped + counts.tx_dropped), (16, 16, 0));
    // Waiting frames pass when the limit is removed.
    bench.link.set_rate(Rate { bytes_per_second: Some(1), ..Rate::default() });
    bench.send([0; HEADER_BYTES], &frame(100), true);
    let link = bench.link.clone();
    let lifted = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        link.set_rate(Rate::default());
    });
    bench.send([0; HEADER_BYTES], &frame(100), true);
    lifted.join().unwrap();
    assert_eq!((bench.read_frame(), bench.read_frame()), (frame(100), frame(100)));
}

#[test]
fn a_disconnected_host_takes_the_link_down_permanently() {
    let name = "net-gone";
    let mut bench = bench_with(name, !0);
    bench.peer = UnixStream::pair().unwrap().0;
    wait_for(|| bench.status() == 0);
    bench.send([0; HEADER_BYTES], &frame(60), true);
    bench.link.set_up(true);
    assert_eq!((bench.status(), bench.link.is_up(), bench.link.counts().tx_dropped), (0, false, 1));
    bench.driver.start();
    bench.send([0; HEADER_BYTES], &frame(60), true);
    bench.driver.transport.pause();
    assert_eq!(logged(&format!("{name}: the network is gone: ")).len(), 1);
}

#[test]
fn a_failed_host_is_retried_at_a_reset_and_does_not_flood_the_log() {
    use std::sync::atomic::Ordering;
    let name = "net-fails";
    let witness = Witness::new(1 << VIRTIO_NET_F_CSUM);
    witness.refuses_features.store(true, Ordering::SeqCst);
    let (device, link) = device_on(vec![Box::new(witness.clone())], name, MAC, None).unwrap();
    let mut driver = Driver::new(device);
    for _ in 0..100 {
        driver.start();
        // Ensures that the worker has started.
        driver.transport.pause();
        assert!(!link.is_up());
        driver.transport.resume();
    }
    // One per second.
    let lines = logged(&format!("{name}: the network fails: ")).len();
    assert!((1..10).contains(&lines), "{lines} lines");
    witness.refuses_features.store(false, Ordering::SeqCst);
    driver.start();
    assert!(link.is_up());
    driver.memory.write_slice(&[0; HEADER_BYTES], GuestAddress(FRAME)).unwrap();
    driver.transact(TX_QUEUE, &[(FRAME, 12 + 60, 0)]);
    assert_eq!(witness.sent.lock().unwrap().len(), 1);
}

#[test]
fn features_are_rejected_without_their_dependencies() {
    use virtio_bindings::virtio_net::*;
    let bits = |bits: &[u32]| bits.iter().fold(F_VERSION_1, |features, bit| features | 1 << bit);
    let tap = bits(&[
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_GUEST_CSUM,
        VIRTIO_NET_F_GUEST_TSO4,
        VIRTIO_NET_F_GUEST_TSO6,
        VIRTIO_NET_F_GUEST_ECN,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
    ]);
    let device = || {
        let backends: [Box<dyn NetBackend>; 2] = [Box::new(Witness::new(tap)), Box::new(Witness::new(tap))];
        device_on(backends.into(), "net", MAC, None).unwrap().0
    };
    contract(device);
    let driver = Driver::new(device());
    let (refused, accepted) = (3, 11);
    for (features, status) in [
        (&[][..], accepted),
        (&[VIRTIO_NET_F_GUEST_ECN], refused),
        (&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN], refused),
        (&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO6], accepted),
        (&[VIRTIO_NET_F_GUEST_TSO4], refused),
        (&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_TSO4], refused),
        (&[VIRTIO_NET_F_HOST_TSO4], refused),
        (&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN], refused),
        (&[VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4], accepted),
        (&[VIRTIO_NET_F_MQ], refused),
        (&[VIRTIO_NET_F_MQ, VIRTIO_NET_F_CTRL_VQ], accepted),
    ] {
        assert_eq!(driver.negotiate(bits(features)), status, "{features:?}");
    }
}

#[test]
fn bad_receive_buffers_need_a_reset() {
    let mut bench = bench();
    let head = bench.driver.chain(RX_QUEUE, &[(BUFFERS, 20, WRITE), (1 << 40, 2000, WRITE)]);
    bench.driver.offer(RX_QUEUE, head);
    bench.driver.notify(RX_QUEUE);
    bench.arrive(&frame(60));
    bench.driver.wait_for_needs_reset();
    // The frame is not lost.
    bench.driver.start();
    bench.offer(&[(BUFFERS, 2000)]);
    assert_eq!(bench.driver.used(RX_QUEUE).1, 12 + 60);
}

/// The CPU time of the thread `name`.
fn processor_time_ms(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let read = |task: &std::fs::DirEntry, file| std::fs::read_to_string(task.path().join(file)).unwrap_or_default();
    let thread = tasks.into_iter().find(|task| read(task, "comm").trim() == name).unwrap();
    // Ticks of 10 ms, in the 12th and 13th field after the name.
    let stat = read(&thread, "stat");
    let ticks = stat.rsplit(") ").next().unwrap().split(' ').skip(11).take(2);
    ticks.map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum()
}

#[test]
fn empty_buffers_do_not_keep_the_device_busy() {
    let name = "net-idle";
    let mut bench = bench_with(name, !0);
    for index in 0..256_u16 {
        bench.driver.descriptor(RX_QUEUE, index, BUFFERS, 0, WRITE, 0);
        bench.driver.offer(RX_QUEUE, index);
    }
    bench.driver.notify(RX_QUEUE);
    bench.arrive(&frame(60));
    bench.send([0; HEADER_BYTES], &frame(70), true);
    assert_eq!(bench.read_frame(), frame(70));
    let before = processor_time_ms(name);
    std::thread::sleep(std::time::Duration::from_millis(400));
    let busy = processor_time_ms(name) - before;
    assert!(busy < 100, "{busy} of 400 ms");
    bench.driver.transport.pause();
    assert_eq!((bench.driver.used_index(RX_QUEUE), bench.driver.read(STATUS)), (0, 15));
}

#[test]
fn only_negotiated_offloads_are_passed_to_the_host() {
    let all = 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4;
    let witness = Witness::new(all);
    let (device, link) = device_on(vec![Box::new(witness.clone())], "net", MAC, None).unwrap();
    let mut driver = Driver::new(device);
    driver.start();
    let header = Header {
        flags: 1,
        segments: 1,
        headers_bytes: 54,
        segment_bytes: 1460,
        checksum_start: 34,
        checksum_offset: 16,
        buffers: 0,
    };
    let send = |driver: &mut Driver| {
        driver.memory.write_slice(&header.encode(), GuestAddress(FRAME)).unwrap();
        driver.transact(TX_QUEUE, &[(FRAME, 12 + 4000, 0)]);
    };
    send(&mut driver);
    assert_eq!(*witness.sent.lock().unwrap(), [(header, 4000)]);
    driver.start_with(1 << VIRTIO_NET_F_CSUM);
    send(&mut driver);
    assert_eq!((witness.sent.lock().unwrap().len(), link.counts().tx_dropped), (1, 1));
    assert_eq!(*witness.accepted.lock().unwrap(), [all, 1 << VIRTIO_NET_F_CSUM]);
    let mut mtu = [0xff; 2];
    driver.transport.read(CONFIG + 10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 1500);
}
