//! Frames over a Unix stream socket, in the protocol of passt and QEMU's `-netdev stream`: each is preceded by its
//! length in four bytes.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use virtio_bindings::virtio_net::VIRTIO_NET_F_GUEST_CSUM;

use super::{FLAG_DATA_VALID, FRAME_BYTES_MIN, Header, NetBackend};
use crate::memory::GuestBuffers;
use crate::sys;

/// The size of the length, which is big-endian.
const LENGTH_BYTES: usize = 4;
/// The longest frame that passt accepts (ETH_MAX_MTU, linux/if_ether.h); it disconnects after a longer one.
const FRAME_BYTES_MAX: usize = 0xffff;
/// Room for several frames, so that many small ones take one system call.
pub const BUFFER_BYTES: usize = 256 << 10;

/// A peer connected by a socket, without checksum offloads in either direction.
pub struct StreamNet {
    socket: UnixStream,
    /// The rest of a partially sent frame.
    unsent: Vec<u8>,
    /// Received data: frames in order, the last of which may be incomplete.
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

impl StreamNet {
    /// Creates a back end for the peer of `socket`.
    pub fn new(socket: UnixStream) -> io::Result<StreamNet> {
        socket.set_nonblocking(true)?;
        Ok(StreamNet { socket, unsent: Vec::new(), buffer: vec![0; BUFFER_BYTES], start: 0, end: 0 })
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

    /// Keeps the rest of a frame of which `sent_bytes`, including the length, have been sent.
    fn keep(&mut self, length: [u8; LENGTH_BYTES], frame: &mut GuestBuffers, sent_bytes: usize) {
        self.unsent.extend_from_slice(length.get(sent_bytes..).unwrap_or_default());
        frame.advance(sent_bytes.saturating_sub(LENGTH_BYTES));
        for slice in frame.slices() {
            let at = self.unsent.len();
            self.unsent.resize(at + slice.len(), 0);
            slice.copy_to(&mut self.unsent[at..]);
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
        self.flush()?;
        let frame_bytes = usize::try_from(frame.len_bytes()).unwrap_or(usize::MAX);
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame_bytes) {
            return Err(ErrorKind::InvalidInput.into());
        }
        let length = (frame_bytes as u32).to_be_bytes();
        let sent = sys::net::send(&self.socket, &length, frame)?;
        if sent < LENGTH_BYTES + frame_bytes {
            self.keep(length, frame, sent);
        }
        Ok(())
    }

    /// The peer may block in the middle of a frame until the rest arrives.
    fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            match self.socket.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
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
    use crate::backend::net::is_end;
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

    fn guest_frame(memory: &Arc<GuestMemory>, content: &[u8]) -> GuestBuffers {
        let mut buffers = GuestBuffers::new(memory.clone());
        memory.write_slice(content, GuestAddress(0x1000)).unwrap();
        let (first, second) = (content.len() as u32 / 3, content.len() as u32 - content.len() as u32 / 3);
        buffers.push(GuestAddress(0x1000), first).unwrap();
        buffers.push(GuestAddress(0x1000 + u64::from(first)), second).unwrap();
        buffers
    }

    #[test]
    fn a_slow_peer_receives_every_accepted_frame() {
        let (mut net, mut peer) = pair();
        let memory = Arc::new(memory::reserve(1).unwrap());
        let mut sent = Vec::new();
        for number in 0_u8.. {
            let content = vec![number; 50_000 + usize::from(number)];
            match net.send(&Header::default(), &mut guest_frame(&memory, &content)) {
                Ok(()) => sent.extend(frame(&content)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) => panic!("{error}"),
            }
        }
        assert!(!net.unsent.is_empty(), "a part of a frame was sent");
        let mut got = vec![0; sent.len()];
        let (head, tail) = got.split_at_mut(sent.len() - net.unsent.len());
        peer.read_exact(head).unwrap();
        // The rest is sent when there is room, followed by the next frame.
        net.flush().unwrap();
        peer.read_exact(tail).unwrap();
        let last = vec![9; 100];
        net.send(&Header::default(), &mut guest_frame(&memory, &last)).unwrap();
        assert!(got == sent);
        let mut behind = vec![0; LENGTH_BYTES + last.len()];
        peer.read_exact(&mut behind).unwrap();
        assert!(behind == frame(&last));
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
