//! Frames through a tap device, with the checksum and segmentation offloads that were negotiated.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::FileExt;

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, Header, NetBackend};
use crate::memory::GuestBuffers;
use crate::sys;
use crate::sys::net::TapOffloads;

/// A queue of a tap device, with virtio headers.
pub struct TapNet {
    tap: File,
    /// A header and a frame.
    buffer: Vec<u8>,
    /// The length of its content; 0 without a frame.
    filled: usize,
    enabled: bool,
    /// The offloads last set for frames to the guest.
    offloads: Option<TapOffloads>,
    vhost: Option<File>,
}

impl TapNet {
    /// Creates a back end for `tap`, an attached, nonblocking queue whose frames have headers of [`HEADER_BYTES`]. With
    /// `vhost`, an open /dev/vhost-net, the kernel may serve a guest's queues with it.
    pub fn new(tap: File, vhost: Option<File>) -> TapNet {
        let buffer = vec![0; HEADER_BYTES + FRAME_BYTES_MAX];
        TapNet { tap, buffer, filled: 0, enabled: true, offloads: None, vhost }
    }
}

/// The kernel's counters of a tap device, independent of where its frames go.
#[derive(Debug)]
pub struct TapCounts {
    /// /proc/net/dev of the device's network namespace.
    devices: File,
    name: String,
}

/// Traffic through a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// Bytes from the host's network to the device's user.
    pub out_bytes: u64,
    /// The corresponding number of frames.
    pub out_packets: u64,
    /// Bytes from the device's user to the host's network.
    pub in_bytes: u64,
    /// The corresponding number of frames.
    pub in_packets: u64,
}

impl AsRawFd for TapCounts {
    fn as_raw_fd(&self) -> RawFd {
        self.devices.as_raw_fd()
    }
}

impl TapCounts {
    /// The counters of the device `name` in `devices`, the open file /proc/net/dev.
    pub fn new(devices: File, name: &str) -> TapCounts {
        TapCounts { devices, name: name.to_owned() }
    }

    /// The traffic since the device was created. `None` if it no longer exists.
    pub fn read(&self) -> Option<Passed> {
        let mut text = Vec::new();
        let mut chunk = [0; 4096];
        loop {
            match self.devices.read_at(&mut chunk, text.len() as u64) {
                Ok(0) => break,
                Ok(count) => text.extend_from_slice(chunk.get(..count)?),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        passed(&String::from_utf8_lossy(&text), &self.name)
    }
}

/// Parses the line of the device `name` in /proc/net/dev (proc(5)): bytes, packets and six others received, then the
/// same sent.
fn passed(text: &str, name: &str) -> Option<Passed> {
    let line = text.lines().find_map(|line| line.trim_start().strip_prefix(name)?.strip_prefix(':'))?;
    let numbers: Vec<u64> = line.split_whitespace().map_while(|number| number.parse().ok()).collect();
    let at = |index: usize| numbers.get(index).copied();
    Some(Passed { in_bytes: at(0)?, in_packets: at(1)?, out_bytes: at(8)?, out_packets: at(9)? })
}

impl NetBackend for TapNet {
    fn features(&self) -> u64 {
        [
            VIRTIO_NET_F_CSUM,
            VIRTIO_NET_F_GUEST_CSUM,
            VIRTIO_NET_F_GUEST_TSO4,
            VIRTIO_NET_F_GUEST_TSO6,
            VIRTIO_NET_F_GUEST_ECN,
            VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_F_HOST_ECN,
        ]
        .iter()
        .fold(0, |features, bit| features | 1 << bit)
    }

    fn accept(&mut self, features: u64) -> io::Result<()> {
        let accepted = |bit: u32| features >> bit & 1 != 0;
        // No feature without its dependencies (virtio 1.2 §5.1.3.1): the kernel would reject it.
        let checksum = accepted(VIRTIO_NET_F_GUEST_CSUM);
        let tso4 = checksum && accepted(VIRTIO_NET_F_GUEST_TSO4);
        let tso6 = checksum && accepted(VIRTIO_NET_F_GUEST_TSO6);
        let ecn = (tso4 || tso6) && accepted(VIRTIO_NET_F_GUEST_ECN);
        let offloads = TapOffloads { checksum, tso4, tso6, ecn };
        // The kernel announces a change to the whole network namespace, under a global lock.
        if self.offloads != Some(offloads) {
            self.offloads = None;
            sys::net::set_tap_offloads(&self.tap, offloads)?;
            self.offloads = Some(offloads);
        }
        Ok(())
    }

    fn set_enabled(&mut self, enabled: bool) -> io::Result<()> {
        if enabled != self.enabled {
            sys::net::set_tap_queue(&self.tap, enabled)?;
            self.enabled = enabled;
        }
        Ok(())
    }

    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()> {
        let frame_bytes = usize::try_from(frame.len_bytes()).unwrap_or(usize::MAX);
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame_bytes) {
            return Err(ErrorKind::InvalidInput.into());
        }
        // The frame is written completely or not at all.
        sys::net::write(&self.tap, &header.encode(), frame).map(drop)
    }

    fn receive(&mut self) -> io::Result<bool> {
        while self.filled < HEADER_BYTES {
            match self.tap.read(&mut self.buffer) {
                Ok(count) => self.filled = count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn frame(&self) -> Option<(Header, &[u8])> {
        let (header, frame) = self.buffer.get(..self.filled)?.split_first_chunk::<HEADER_BYTES>()?;
        Some((Header::decode(*header), frame))
    }

    fn consume(&mut self) {
        self.filled = 0;
    }

    fn take_vhost(&mut self) -> Option<File> {
        self.vhost.take()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }

    fn fds(&self) -> Vec<RawFd> {
        [Some(&self.tap), self.vhost.as_ref()].into_iter().flatten().map(AsRawFd::as_raw_fd).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::Command;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const UDP_HEADERS_BYTES: usize = 14 + 20 + 8;

    fn ip(words: &str) {
        let output = Command::new("ip").args(words.split(' ')).output().expect("scripts/deps test installs iproute2");
        assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// Runs `test` on a tap device in a new network namespace, with 10.9.0.1 as the host and 10.9.0.2 as the guest;
    /// skips it with a visible message if that is not permitted.
    fn on_tap(test: impl FnOnce(TapNet) + Send) {
        on_taps(1, |mut taps| test(taps.remove(0)));
    }

    /// The same, with `queues` queues.
    fn on_taps(queues: usize, test: impl FnOnce(Vec<TapNet>) + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // A device belongs to the network namespace in which its descriptor was opened.
                let left = sys::net::leave_network();
                let open =
                    || File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
                let tuns: io::Result<Vec<File>> = (0..queues).map(|_| open()).collect();
                let (Ok(()), Ok(tuns)) = (left, tuns) else {
                    eprintln!("SKIPPED: only root makes networks");
                    return;
                };
                for tun in &tuns {
                    sys::net::attach_tap(tun, "t0", HEADER_BYTES, queues > 1).unwrap();
                }
                ip("addr add 10.9.0.1/24 dev t0");
                ip("link set t0 mtu 65521 up");
                ip("neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev t0");
                test(tuns.into_iter().map(|tun| TapNet::new(tun, None)).collect());
            });
            thread.join().unwrap();
        });
    }

    /// The next UDP packet for the guest, ignoring other traffic that a kernel sends on a new interface.
    fn next_udp(net: &mut TapNet) -> (Header, Vec<u8>) {
        let started = Instant::now();
        loop {
            assert!(started.elapsed() < Duration::from_secs(10), "no packet came");
            if !net.receive().unwrap() {
                std::thread::yield_now();
                continue;
            }
            let (header, frame) = net.frame().map(|(header, frame)| (header, frame.to_vec())).unwrap();
            net.consume();
            if frame[12..14] == [8, 0] && frame[23] == 17 && frame[30..34] == [10, 9, 0, 2] {
                return (header, frame);
            }
        }
    }

    #[test]
    fn checksums_are_offloaded_to_a_guest_only_if_it_accepts_that() {
        on_tap(|mut net| {
            let socket = UdpSocket::bind("10.9.0.1:0").unwrap();
            for accepted in [true, false] {
                net.accept(if accepted { net.features() } else { 0 }).unwrap();
                socket.send_to(&[7; 3000], "10.9.0.2:7").unwrap();
                let (header, frame) = next_udp(&mut net);
                assert_eq!(header.flags & 1 == 1, accepted, "{header:?}");
                assert_eq!((frame[..6].to_vec(), frame.len()), (GUEST_MAC.to_vec(), UDP_HEADERS_BYTES + 3000));
            }
            assert!(!net.receive().unwrap() || net.frame().is_some());
        });
    }

    #[test]
    fn offloads_are_set_only_if_supported_and_changed() {
        on_tap(|mut net| {
            // ECN without segmentation, and segmentation without checksums: a driver cannot negotiate that, and the
            // kernel would reject it.
            let bits = |bits: &[u32]| bits.iter().fold(0, |features, bit| features | 1 << bit);
            net.accept(bits(&[VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN])).unwrap();
            net.accept(bits(&[VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_ECN])).unwrap();
            net.accept(net.features()).unwrap();
            // From now on the kernel reports that the device does not exist.
            ip("link del t0");
            net.accept(net.features()).unwrap();
            assert!(crate::backend::net::is_end(&net.accept(0).unwrap_err()));
        });
    }

    #[test]
    fn an_offloaded_checksum_is_filled_in_and_a_wrong_one_detected() {
        on_tap(|mut net| {
            net.accept(net.features()).unwrap();
            let socket = UdpSocket::bind("10.9.0.1:7").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let out = UdpSocket::bind("10.9.0.1:0").unwrap();
            // The host's own packet, reversed.
            out.send_to(b"there and back", "10.9.0.2:7").unwrap();
            let (header, mut frame) = next_udp(&mut net);
            assert_eq!((header.flags, header.checksum_start, header.checksum_offset), (1, 34, 6));
            let host_mac: [u8; 6] = frame[6..12].try_into().unwrap();
            frame[..6].copy_from_slice(&host_mac);
            frame[6..12].copy_from_slice(&GUEST_MAC);
            let (from, to): ([u8; 4], [u8; 4]) = (frame[26..30].try_into().unwrap(), frame[30..34].try_into().unwrap());
            frame[26..30].copy_from_slice(&to);
            frame[30..34].copy_from_slice(&from);
            let memory = Arc::new(memory::reserve(1).unwrap());
            memory.write_slice(&frame, GuestAddress(0x1000)).unwrap();
            let frame_in_memory = || {
                let mut buffers = GuestBuffers::new(memory.clone());
                buffers.push(GuestAddress(0x1000), 20).unwrap();
                buffers.push(GuestAddress(0x1014), frame.len() as u32 - 20).unwrap();
                buffers
            };
            // The field contains only the sum of the pseudo header, so it would be discarded as invalid.
            net.send(&Header::default(), &mut frame_in_memory()).unwrap();
            net.send(&header.checked(net.features(), frame.len()).unwrap(), &mut frame_in_memory()).unwrap();
            let mut packet = [0; 100];
            let (count, from) = socket.recv_from(&mut packet).unwrap();
            assert_eq!((&packet[..count], from.ip().to_string()), (&b"there and back"[..], "10.9.0.2".to_owned()));
            socket.set_nonblocking(true).unwrap();
            assert!(socket.recv_from(&mut packet).is_err(), "the first was taken too");
        });
    }

    #[test]
    fn frames_arrive_in_enabled_queues() {
        on_taps(2, |mut nets| {
            // Each of many flows goes to one of the queues, selected by the kernel.
            let flows = |nets: &mut [TapNet]| -> [usize; 2] {
                for _ in 0..40 {
                    UdpSocket::bind("10.9.0.1:0").unwrap().send_to(&[7; 100], "10.9.0.2:7").unwrap();
                }
                let count = |net: &mut TapNet| {
                    let mut packets = 0;
                    while net.receive().unwrap() {
                        let is_ours = net.frame().is_some_and(|(_, frame)| frame[12..14] == [8, 0] && frame[23] == 17);
                        packets += usize::from(is_ours);
                        net.consume();
                    }
                    packets
                };
                [count(&mut nets[0]), count(&mut nets[1])]
            };
            nets[1].set_enabled(false).unwrap();
            nets[1].set_enabled(false).unwrap();
            assert_eq!(flows(&mut nets), [40, 0]);
            nets[1].set_enabled(true).unwrap();
            let [first, second] = flows(&mut nets);
            assert!(first + second == 40 && first > 0 && second > 0, "{first} {second}");
            nets[1].set_enabled(false).unwrap();
            assert_eq!(flows(&mut nets), [40, 0]);
        });
    }

    #[test]
    fn a_device_that_is_down_is_distinguished_from_a_removed_one() {
        on_tap(|mut net| {
            let memory = Arc::new(memory::reserve(1).unwrap());
            let send = |net: &mut TapNet| {
                let mut buffers = GuestBuffers::new(memory.clone());
                buffers.push(GuestAddress(0x1000), 60).unwrap();
                net.send(&Header::default(), &mut buffers)
            };
            send(&mut net).unwrap();
            ip("link set t0 down");
            let error = send(&mut net).unwrap_err();
            assert!(!crate::backend::net::is_end(&error), "{error}");
            ip("link set t0 up");
            send(&mut net).unwrap();
            ip("link del t0");
            let error = send(&mut net).unwrap_err();
            assert!(crate::backend::net::is_end(&error), "{error}");
        });
    }
}
