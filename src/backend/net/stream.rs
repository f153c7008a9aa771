//! Frames over a Unix stream socket, in the protocol of passt and QEMU's `-netdev stream`: each is preceded by its
//! length in four bytes.
//!
//! Frames are sent directly from guest memory, many with one system call. Those for which the socket has no room stay in
//! flight; only if the guest's queue must be given back are they copied.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

use super::{FLAG_DATA_VALID, FRAME_BYTES_MIN, Header, NetBackend, is_end};
use crate::memory::GuestBuffers;
use crate::sys;

/// The size of the length, which is big-endian.
const LENGTH_BYTES: usize = 4;
/// The longest frame that passt accepts (ETH_MAX_MTU, linux/if_ether.h); it disconnects after a longer one.
const FRAME_BYTES_MAX: usize = 0xffff;
/// Room for several frames, so that many small ones take one system call.
pub const BUFFER_BYTES: usize = 256 << 10;
/// How much is in flight before more is accepted only if that can be sent: many small frames, or some long ones.
const IN_FLIGHT_MAX: usize = 64;
const IN_FLIGHT_BYTES_MAX: usize = 256 << 10;
/// The memory for frames in flight: a copy, the last frame of which may exceed the limit, and the lists of their buffers,
/// each of which may have as many parts as one call takes.
pub const IN_FLIGHT_BUDGET_BYTES: usize =
    IN_FLIGHT_BYTES_MAX + LENGTH_BYTES + FRAME_BYTES_MAX + IN_FLIGHT_MAX * sys::IOV_MAX * size_of::<libc::iovec>();

/// A peer connected by a socket, without checksum offloads in either direction.
pub struct StreamNet {
    socket: UnixStream,
    /// The rest of settled frames. Others are accepted only when it is sent.
    settled: Vec<u8>,
    /// Frames in flight, the first of which may be sent in part, and their size.
    in_flight: VecDeque<Framed>,
    in_flight_bytes: usize,
    /// Received data: frames in order, the last of which may be incomplete.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// The rest of a frame that is to be sent.
struct Framed {
    length: [u8; LENGTH_BYTES],
    /// The part of `length` that was sent.
    length_sent: usize,
    content: GuestBuffers,
}

impl Framed {
    fn prefix(&self) -> &[u8] {
        self.length.get(self.length_sent..).unwrap_or_default()
    }

    fn len_bytes(&self) -> usize {
        self.prefix().len() + self.content.len_bytes() as usize
    }

    /// Consumes the first `count` bytes.
    fn advance(&mut self, count: usize) {
        let of_length = count.min(self.prefix().len());
        self.length_sent += of_length;
        self.content.advance(count - of_length);
    }
}

impl StreamNet {
    /// Creates a back end for the peer of `socket`.
    pub fn new(socket: UnixStream) -> io::Result<StreamNet> {
        socket.set_nonblocking(true)?;
        let buffer = vec![0; BUFFER_BYTES];
        let (settled, in_flight) = (Vec::new(), VecDeque::new());
        Ok(StreamNet { socket, settled, in_flight, in_flight_bytes: 0, buffer, start: 0, end: 0 })
    }

    fn received(&self) -> &[u8] {
        self.buffer.get(self.start..self.end).unwrap_or_default()
    }

    /// The next frame, if it is complete. An invalid length is fatal, since the start of the next frame is unknown.
    fn whole_frame(&self) -> io::Result<Option<&[u8]>> {
        let Some((length, rest)) = self.received().split_first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        let len = u32::from_be_bytes(*length) as usize;
        if len > FRAME_BYTES_MAX {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(rest.get(..len))
    }

    fn is_full(&self) -> bool {
        !self.settled.is_empty() || self.in_flight.len() >= IN_FLIGHT_MAX || self.in_flight_bytes >= IN_FLIGHT_BYTES_MAX
    }

    fn send_settled(&mut self) -> io::Result<()> {
        while !self.settled.is_empty() {
            match self.socket.write(&self.settled) {
                Ok(count) => drop(self.settled.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn send_in_flight(&mut self) -> io::Result<()> {
        while !self.in_flight.is_empty() {
            let frames = self.in_flight.iter().map(|framed| (framed.prefix(), &framed.content));
            let sent = sys::net::send_all(&self.socket, frames)?;
            self.advance(sent);
        }
        Ok(())
    }

    /// Consumes the first `count` bytes in flight.
    fn advance(&mut self, mut count: usize) {
        self.in_flight_bytes -= count;
        while let Some(first) = self.in_flight.front_mut() {
            let step = count.min(first.len_bytes());
            first.advance(step);
            count -= step;
            if first.len_bytes() > 0 {
                return;
            }
            self.in_flight.pop_front();
        }
    }

    /// Drops what cannot be sent. If the peer is still there, it must get the rest of a frame that was begun.
    fn give_up(&mut self, is_end: bool) {
        let is_begun = |framed: &Framed| framed.prefix().len() < LENGTH_BYTES;
        let begun = usize::from(!is_end && self.in_flight.front().is_some_and(is_begun));
        self.in_flight.truncate(begun);
        self.in_flight_bytes = self.in_flight.iter().map(Framed::len_bytes).sum();
        if is_end {
            self.settled.clear();
        }
    }
}

impl NetBackend for StreamNet {
    /// Frames cannot be corrupted on the way, so the guest need not verify checksums.
    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_GUEST_CSUM
    }

    fn accept(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn send(&mut self, _header: &Header, frame: &mut GuestBuffers) -> io::Result<()> {
        let frame_bytes = usize::try_from(frame.len_bytes()).unwrap_or(usize::MAX);
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame_bytes) {
            return Err(ErrorKind::InvalidInput.into());
        }
        if self.is_full() {
            self.kick()?;
        }
        let content = frame.split_front(frame_bytes as u64);
        let framed = Framed { length: (frame_bytes as u32).to_be_bytes(), length_sent: 0, content };
        self.in_flight_bytes += framed.len_bytes();
        self.in_flight.push_back(framed);
        Ok(())
    }

    /// The peer may block in the middle of a frame until the rest arrives.
    fn kick(&mut self) -> io::Result<()> {
        let sent = self.send_settled().and_then(|()| self.send_in_flight());
        if let Err(error) = &sent
            && error.kind() != ErrorKind::WouldBlock
        {
            self.give_up(is_end(error));
        }
        sent
    }

    fn in_flight(&self) -> usize {
        self.in_flight.len()
    }

    fn settle(&mut self) {
        self.settled.reserve_exact(self.in_flight_bytes);
        for framed in self.in_flight.drain(..) {
            self.settled.extend_from_slice(framed.prefix());
            for slice in framed.content.slices() {
                let at = self.settled.len();
                self.settled.resize(at + slice.len(), 0);
                slice.copy_to(&mut self.settled[at..]);
            }
        }
        self.in_flight_bytes = 0;
    }

    fn receive(&mut self) -> io::Result<bool> {
        while self.whole_frame()?.is_none() {
            if self.start > 0 {
                self.buffer.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            }
            // There is room: the buffered data is less than a frame.
            let room = self.buffer.get_mut(self.end..).unwrap_or_default();
            match self.socket.read(room) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.end += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn frame(&self) -> Option<(Header, &[u8])> {
        let header = Header { flags: FLAG_DATA_VALID, ..Header::default() };
        self.whole_frame().ok()?.map(|frame| (header, frame))
    }

    fn consume(&mut self) {
        if let Ok(Some(frame)) = self.whole_frame() {
            self.start += LENGTH_BYTES + frame.len();
        }
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{self, GuestMemory};

    fn pair() -> (StreamNet, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (StreamNet::new(ours).unwrap(), theirs)
    }

    fn frame(content: &[u8]) -> Vec<u8> {
        [&(content.len() as u32).to_be_bytes(), content].concat()
    }

    fn next(net: &mut StreamNet) -> Option<Vec<u8>> {
        let found = net.receive().unwrap();
        let frame = net.frame().map(|(_, frame)| frame.to_vec());
        assert_eq!(frame.is_some(), found);
        net.consume();
        frame
    }

    #[test]
    fn frames_arrive_whole_however_the_stream_is_split() {
        let frames = [vec![1; 60], vec![2; 65535], Vec::new(), vec![3; 1514]];
        let bytes: Vec<u8> = frames.iter().flat_map(|content| frame(content)).collect();
        for size in [1, 3, 5, 61, 70_000, bytes.len()] {
            let (mut net, mut peer) = pair();
            let mut got = Vec::new();
            for piece in bytes.chunks(size.max(bytes.len() / 500)) {
                peer.write_all(piece).unwrap();
                while let Some(frame) = next(&mut net) {
                    got.push(frame);
                }
            }
            assert!(got == frames, "in pieces of {size}");
        }
    }

    #[test]
    fn a_disconnect_or_an_invalid_length_is_permanent() {
        let (mut net, peer) = pair();
        drop(peer);
        assert!(is_end(&net.receive().unwrap_err()));
        let (mut net, mut peer) = pair();
        peer.write_all(&[0, 1, 0, 0]).unwrap();
        assert!(is_end(&net.receive().unwrap_err()));
    }

    /// A frame in two buffers at `address` of guest memory.
    fn guest_frame_at(memory: &Arc<GuestMemory>, address: u64, content: &[u8]) -> GuestBuffers {
        let mut buffers = GuestBuffers::new(memory.clone());
        memory.write_slice(content, GuestAddress(address)).unwrap();
        let (first, second) = (content.len() as u32 / 3, content.len() as u32 - content.len() as u32 / 3);
        buffers.push(GuestAddress(address), first).unwrap();
        buffers.push(GuestAddress(address + u64::from(first)), second).unwrap();
        buffers
    }

    fn guest_frame(memory: &Arc<GuestMemory>, content: &[u8]) -> GuestBuffers {
        guest_frame_at(memory, 0x1000, content)
    }

    /// Sends frames of 50,000 bytes, each at an address of its own, until no more are accepted, and returns them as they
    /// should arrive.
    fn fill(net: &mut StreamNet, memory: &Arc<GuestMemory>) -> Vec<u8> {
        let mut accepted = Vec::new();
        for number in 1_u8..80 {
            let content = vec![number; 50_000 + usize::from(number)];
            let address = u64::from(number) * 0x1_0000;
            match net.send(&Header::default(), &mut guest_frame_at(memory, address, &content)) {
                Ok(()) => accepted.extend(frame(&content)),
                Err(error) => {
                    assert_eq!(error.kind(), ErrorKind::WouldBlock);
                    break;
                }
            }
        }
        assert!(net.in_flight_bytes > 0 && net.in_flight_bytes < accepted.len(), "the socket took a part");
        accepted
    }

    /// What the peer receives until all of `net`'s frames are sent.
    fn drain(net: &mut StreamNet, peer: &mut UnixStream) -> Vec<u8> {
        peer.set_nonblocking(true).unwrap();
        let mut all = Vec::new();
        loop {
            let sent = net.kick();
            let _ = peer.read_to_end(&mut all).map_err(|error| assert_eq!(error.kind(), ErrorKind::WouldBlock));
            match sent {
                Ok(()) => return all,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    }

    #[test]
    fn many_frames_leave_in_one_call() {
        let (ours, peer) = sys::net::packet_pair().unwrap();
        let (mut net, memory) = (StreamNet::new(ours).unwrap(), Arc::new(memory::reserve(1).unwrap()));
        let mut sent = Vec::new();
        for number in 0..IN_FLIGHT_MAX as u8 {
            let content = vec![number; 60 + usize::from(number)];
            let mut buffers = guest_frame_at(&memory, 0x1000 + u64::from(number) * 0x100, &content);
            net.send(&Header::default(), &mut buffers).unwrap();
            sent.extend(frame(&content));
            // Neither invalid frames nor their place make a difference.
            let error = net.send(&Header::default(), &mut guest_frame(&memory, &[0; 13])).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
        }
        assert_eq!(net.in_flight(), IN_FLIGHT_MAX);
        net.kick().unwrap();
        assert_eq!(net.in_flight(), 0);
        let mut packet = vec![0; 2 * sent.len()];
        let len = (&peer).read(&mut packet).unwrap();
        assert!(packet[..len] == sent, "{len} of {} bytes in the first call", sent.len());
    }

    #[test]
    fn a_slow_peer_receives_every_accepted_frame() {
        let ((mut net, mut peer), memory) = (pair(), Arc::new(memory::reserve(8).unwrap()));
        let sent = fill(&mut net, &memory);
        let waiting = net.in_flight();
        assert!(drain(&mut net, &mut peer) == sent, "with {waiting} in flight");
        // And what comes behind.
        let last = vec![9; 100];
        net.send(&Header::default(), &mut guest_frame(&memory, &last)).unwrap();
        assert!(drain(&mut net, &mut peer) == frame(&last));
        assert_eq!((net.in_flight(), net.in_flight_bytes), (0, 0));
    }

    #[test]
    fn frames_may_be_sent_up_to_any_byte() {
        let memory = Arc::new(memory::reserve(1).unwrap());
        let contents = [vec![1; 14], vec![2; 70], vec![3; 20]];
        let all: Vec<u8> = contents.iter().flat_map(|content| frame(content)).collect();
        for sent in 0..=all.len() {
            let (mut net, mut peer) = pair();
            for (place, content) in (1..).zip(&contents) {
                net.send(&Header::default(), &mut guest_frame_at(&memory, place * 0x1000, content)).unwrap();
            }
            net.advance(sent);
            assert_eq!(net.in_flight_bytes, net.in_flight.iter().map(Framed::len_bytes).sum::<usize>());
            assert_eq!(net.in_flight(), [18, 92, 116].iter().filter(|end| sent < **end).count(), "{sent}");
            assert!(drain(&mut net, &mut peer) == all[sent..], "{sent}");
        }
    }

    #[test]
    fn settled_frames_no_longer_need_guest_memory() {
        let ((mut net, mut peer), memory) = (pair(), Arc::new(memory::reserve(8).unwrap()));
        let sent = fill(&mut net, &memory);
        net.settle();
        assert_eq!((net.in_flight(), net.in_flight_bytes), (0, 0));
        memory.write_slice(&vec![0xff; 8 << 20], GuestAddress(0)).unwrap();
        let error = net.send(&Header::default(), &mut guest_frame(&memory, &[0; 60])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "they come first");
        assert!(drain(&mut net, &mut peer) == sent);
    }

    #[test]
    fn nothing_is_in_flight_to_a_peer_that_is_gone() {
        let ((mut net, peer), memory) = (pair(), Arc::new(memory::reserve(8).unwrap()));
        fill(&mut net, &memory);
        drop(peer);
        assert!(is_end(&net.kick().unwrap_err()));
        assert_eq!((net.in_flight(), net.in_flight_bytes), (0, 0));
    }

    #[test]
    fn a_frame_that_was_begun_is_not_given_up() {
        let ((mut net, mut peer), memory) = (pair(), Arc::new(memory::reserve(8).unwrap()));
        let sent = fill(&mut net, &memory);
        let begun = net.in_flight[0].len_bytes();
        let rest = net.in_flight_bytes - begun;
        net.give_up(false);
        assert!(net.in_flight() == 1 && net.in_flight_bytes == begun, "the socket is full within a frame");
        assert!(drain(&mut net, &mut peer) == sent[..sent.len() - rest]);
    }

    #[test]
    fn a_frame_that_is_too_long_for_the_peer_is_rejected() {
        let (mut net, _peer) = pair();
        let memory = Arc::new(memory::reserve(1).unwrap());
        for len in [0, 13, 65536] {
            let error = net.send(&Header::default(), &mut guest_frame(&memory, &vec![0; len])).unwrap_err();
            assert!(!is_end(&error) && error.kind() != ErrorKind::WouldBlock, "{len}");
        }
    }
}
