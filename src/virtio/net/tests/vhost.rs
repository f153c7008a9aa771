//! Tests of offloaded queues, with a tap device in a separate network namespace.

use std::fs::File;
use std::net::UdpSocket;
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6};

use super::*;
use crate::backend::net::{TapCounts, TapNet};
use crate::resources::net::VHOST_PATH;
use crate::sys;
use crate::virtio::F_EVENT_IDX;
use crate::virtio::contract::contract;

const GUEST: ([u8; 6], [u8; 4]) = ([2, 0, 0, 0, 0, 2], [10, 9, 0, 2]);
const HOST: [u8; 4] = [10, 9, 0, 1];
/// The address of receive buffer 0, and the size of each.
const ROOM: u64 = BUFFERS;
const ROOM_BYTES: u32 = 2048;
const ROOMS: u32 = 64;
const UDP_HEADERS_BYTES: usize = 14 + 20 + 8;

fn open(path: &str) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path)
}

/// `queues` of a new tap device called `name`, with vhost-net.
fn taps(queues: usize, name: &str) -> io::Result<(Vec<Box<dyn NetBackend>>, String)> {
    let (mut backends, mut own_name): (Vec<Box<dyn NetBackend>>, _) = (Vec::new(), name.to_owned());
    for _ in 0..queues {
        let tun = open("/dev/net/tun")?;
        own_name = sys::net::attach_tap(&tun, &own_name, HEADER_BYTES, queues > 1)?;
        backends.push(Box::new(TapNet::new(tun, Some(open(VHOST_PATH)?))));
    }
    Ok((backends, own_name))
}

/// Runs `test` in a new network namespace; skips it with a visible message if that or vhost-net is unavailable.
fn in_network(test: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // A device belongs to the network namespace in which its descriptor was opened.
            if let Err(error) = sys::net::leave_network().and_then(|()| taps(1, "husk%d")) {
                assert!(std::env::var_os("HUSK_TEST_REQUIRE_VHOST").is_none(), "{error}");
                eprintln!("SKIPPED: this test needs root and {VHOST_PATH}: {error}");
                return;
            }
            test();
        });
        thread.join().unwrap();
    });
}

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().expect("scripts/deps test installs iproute2");
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
}

/// A driver, and a host socket on the other side.
struct Wire {
    driver: Driver,
    link: NetLink,
    socket: UdpSocket,
    frames: u16,
}

/// Creates a device of `queues` pairs called `name`, whose driver has accepted `features`.
fn wire(queues: usize, name: &str, features: u64) -> Wire {
    let (backends, tap) = taps(queues, "t0").unwrap();
    ip("addr add 10.9.0.1/24 dev t0");
    ip("link set t0 addrgenmode none");
    ip("link set t0 up");
    ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev t0");
    let (device, link) = device_on(backends, name, GUEST.0, None).unwrap();
    link.count_by(TapCounts::new(File::open("/proc/thread-self/net/dev").unwrap(), &tap));
    let mut driver = Driver::new(device);
    driver.start_with(features);
    let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let mut wire = Wire { driver, link, socket, frames: 0 };
    wire.offer_all();
    wire
}

/// A packet from the guest to the host's `port`, sent as a broadcast.
fn packet(port: u16, payload: &[u8]) -> Vec<u8> {
    let udp_bytes = 8 + payload.len() as u16;
    let mut ip =
        [&[0x45, 0][..], &(20 + udp_bytes).to_be_bytes(), &[0, 0, 0, 0, 64, 17, 0, 0], &GUEST.1, &HOST].concat();
    let sum: u32 = ip.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    let udp = [7_u16.to_be_bytes(), port.to_be_bytes(), udp_bytes.to_be_bytes(), [0, 0]].concat();
    [&[0xff; 6], &GUEST.0[..], &[8, 0], &ip, &udp, payload].concat()
}

impl Wire {
    fn wait_for_kernel(&self, serves: bool) {
        wait_for(|| self.link.is_served_by_kernel() == serves);
    }

    /// Makes new receive buffers available.
    fn offer_all(&mut self) {
        for room in 0..ROOMS {
            let at = ROOM + u64::from(room * ROOM_BYTES);
            let head = self.driver.chain(RX_QUEUE, &[(at, ROOM_BYTES, WRITE)]);
            assert_eq!(u32::from(head), room);
            self.driver.offer(RX_QUEUE, head);
        }
        self.driver.notify(RX_QUEUE);
    }

    /// Sends a frame from the guest in queue `tx`, and checks that it is the next to arrive, exactly once.
    fn reaches_host_by(&mut self, tx: u32) {
        self.send(tx);
        self.arrives();
    }

    fn reaches_host(&mut self) {
        self.reaches_host_by(TX_QUEUE);
    }

    fn send(&mut self, tx: u32) {
        self.frames += 1;
        let frame = packet(self.socket.local_addr().unwrap().port(), &self.frames.to_be_bytes());
        let bytes = [&[0; HEADER_BYTES][..], &frame].concat();
        self.driver.memory.write_slice(&bytes, GuestAddress(FRAME)).unwrap();
        assert_eq!(self.driver.transact(tx, &[(FRAME, bytes.len() as u32, 0)]), 0);
    }

    #[track_caller]
    fn arrives(&self) {
        let mut payload = [0; 64];
        let count = self.socket.recv(&mut payload).unwrap();
        assert_eq!(payload[..count], self.frames.to_be_bytes());
    }

    /// Sends a frame to the guest, and checks that it is the next to arrive, apart from the host's own traffic.
    fn reaches_guest(&mut self) {
        self.frames += 1;
        self.socket.send_to(&self.frames.to_be_bytes(), "10.9.0.2:7").unwrap();
        loop {
            let (head, len) = self.driver.used(RX_QUEUE);
            let at = ROOM + u64::from(u32::from(head) * ROOM_BYTES);
            let mut bytes = vec![0; len as usize];
            self.driver.memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            self.driver.offer(RX_QUEUE, head);
            self.driver.notify(RX_QUEUE);
            let (header, frame) = bytes.split_at(HEADER_BYTES);
            assert_eq!(Header::decode(header.try_into().unwrap()).buffers, 1);
            if frame[12..14] == [8, 0] && frame[23] == 17 {
                assert_eq!((&frame[..6], &frame[UDP_HEADERS_BYTES..]), (&GUEST.0[..], &self.frames.to_be_bytes()[..]));
                return;
            }
        }
    }

    fn both_ways(&mut self) {
        self.reaches_host();
        self.reaches_guest();
        self.reaches_host();
    }
}

#[test]
fn the_kernel_moves_frames_raises_interrupts_and_counts() {
    in_network(|| {
        let mut wire = wire(1, "vhost", !0);
        wire.wait_for_kernel(true);
        let before = wire.link.counts();
        wire.driver.take_interrupts();
        for _ in 0..200 {
            wire.reaches_guest();
            wire.reaches_host();
        }
        wait_for(|| wire.driver.take_interrupts() > 0);
        assert_eq!(wire.driver.read(INTERRUPT_STATUS), 1);
        wire.driver.write(INTERRUPT_ACK, 1);
        let counts = wire.link.counts();
        let frames = [counts.rx_packets - before.rx_packets, counts.tx_packets - before.tx_packets];
        assert!(frames[0] >= 200 && frames[1] == 200, "{frames:?}");
        assert_eq!(counts.tx_bytes - before.tx_bytes, 200 * (UDP_HEADERS_BYTES as u64 + 2));
        wire.driver.transport.pause();
        assert!(!wire.link.is_served_by_kernel());
        assert_eq!(wire.link.counts().tx_packets, counts.tx_packets, "nothing is counted twice, or forgotten");
    });
}

#[test]
fn the_worker_takes_over_when_the_kernel_lacks_a_feature() {
    in_network(|| {
        for features in [!0, !F_EVENT_IDX] {
            let mut wire = wire(1, "vhost-turns", features);
            let rate = Rate { bytes_per_second: Some(100 << 20), ..Rate::default() };
            for turn in 0..40 {
                wire.wait_for_kernel(true);
                wire.both_ways();
                match turn % 4 {
                    0 => {
                        wire.link.set_rate(rate);
                        wire.wait_for_kernel(false);
                        wire.both_ways();
                        wire.link.set_rate(Rate::default());
                    }
                    1 => {
                        wire.link.set_up(false);
                        wire.wait_for_kernel(false);
                        let dropped = wire.link.counts().tx_dropped;
                        wire.send(TX_QUEUE);
                        assert_eq!(wire.link.counts().tx_dropped, dropped + 1);
                        assert_eq!(wire.status(), 0);
                        wire.link.set_up(true);
                    }
                    2 => {
                        wire.driver.transport.pause();
                        assert!(!wire.link.is_served_by_kernel());
                        let state = wire.driver.transport.save();
                        assert_eq!(wire.driver.transport.save(), state);
                        wire.driver.transport.resume();
                    }
                    _ => {
                        wire.driver.start_with(features);
                        wire.offer_all();
                    }
                }
            }
            drop(wire);
        }
    });
}

impl Wire {
    fn status(&self) -> u8 {
        let mut status = [0xff; 2];
        self.driver.transport.read(CONFIG + 6, &mut status);
        status[0]
    }
}

#[test]
fn frames_before_the_first_buffer_are_not_lost() {
    in_network(|| {
        let mut wire = wire(1, "vhost-room", !0);
        wire.link.set_rate(Rate { bytes_per_second: Some(100 << 20), ..Rate::default() });
        wire.wait_for_kernel(false);
        // The worker finds a frame without a buffer for it, and keeps the queues until there is one.
        let features = wire.driver.offered();
        wire.driver.start_with(features);
        wire.frames += 1;
        wire.socket.send_to(&wire.frames.to_be_bytes(), "10.9.0.2:7").unwrap();
        std::thread::sleep(Duration::from_millis(50));
        wire.link.set_rate(Rate::default());
        std::thread::sleep(Duration::from_millis(50));
        assert!(!wire.link.is_served_by_kernel());
        wire.offer_all();
        wire.wait_for_kernel(true);
        let (head, _) = wire.driver.used(RX_QUEUE);
        let at = ROOM + u64::from(u32::from(head) * ROOM_BYTES) + (HEADER_BYTES + UDP_HEADERS_BYTES) as u64;
        assert_eq!(wire.driver.memory.read_obj::<[u8; 2]>(GuestAddress(at)).unwrap(), wire.frames.to_be_bytes());
    });
}

#[test]
fn a_driver_without_checksum_offload_is_served_by_the_worker() {
    in_network(|| {
        // Nor any feature that depends on them.
        let without =
            [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN];
        let mut wire = wire(1, "vhost-plain", without.iter().fold(!0, |features, bit| features & !(1 << bit)));
        wire.both_ways();
        assert!(!wire.link.is_served_by_kernel());
    });
}

#[test]
fn a_ring_rejected_by_the_kernel_is_repaired_by_a_reset() {
    in_network(|| {
        let mut wire = wire(1, "vhost-refuses", !0);
        for round in 1..=3 {
            wire.wait_for_kernel(true);
            wire.both_ways();
            let head = match round {
                1 => wire.driver.chain(TX_QUEUE, &[(1 << 50, 100, 0)]),
                2 => wire.driver.size(TX_QUEUE) + 7,
                _ => {
                    // Writable, where readable is expected.
                    wire.driver.chain(TX_QUEUE, &[(FRAME, 100, WRITE)])
                }
            };
            wire.driver.offer(TX_QUEUE, head);
            wire.driver.notify(TX_QUEUE);
            wire.driver.wait_for_needs_reset();
            wait_for(|| !wire.link.is_served_by_kernel());
            assert_eq!(wire.driver.read(INTERRUPT_STATUS) & 2, 2, "round {round}");
            wire.driver.start();
            wire.offer_all();
        }
        // Whether it is detected before a pause or not, the next driver is not affected.
        for _ in 0..20 {
            wire.wait_for_kernel(true);
            let head = wire.driver.chain(TX_QUEUE, &[(1 << 50, 100, 0)]);
            wire.driver.offer(TX_QUEUE, head);
            wire.driver.notify(TX_QUEUE);
            wire.driver.transport.pause();
            wire.driver.transport.resume();
            wire.driver.start();
            wire.offer_all();
        }
        wire.wait_for_kernel(true);
        wire.both_ways();
        assert_eq!(wire.driver.read(STATUS), 15);
        assert!(!logged("vhost-refuses: device needs a reset: the host's kernel (vhost) found").is_empty());
    });
}

#[test]
fn each_pair_in_use_is_offloaded() {
    in_network(|| {
        let mut wire = wire(2, "vhost-pairs", !0);
        wire.wait_for_kernel(true);
        wire.both_ways();
        for count in [2_u8, 1, 2, 2] {
            wire.driver.memory.write_slice(&[4, 0, count, 0], GuestAddress(FRAME)).unwrap();
            wire.driver.transact(4, &[(FRAME, 4, 0), (FRAME + 8, 1, WRITE)]);
            assert_eq!(wire.driver.memory.read_obj::<u8>(GuestAddress(FRAME + 8)).unwrap(), 0);
            wire.wait_for_kernel(true);
            wire.reaches_host();
            if count == 2 {
                wire.reaches_host_by(3);
            }
        }
    });
}

#[test]
fn the_contract_is_kept() {
    in_network(|| {
        contract(|| device_on(taps(1, "husk%d").unwrap().0, "vhost-contract", MAC, None).unwrap().0);
        contract(|| device_on(taps(2, "husk%d").unwrap().0, "vhost-contract", MAC, None).unwrap().0);
    });
}
