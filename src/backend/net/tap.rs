//! Frames through a tap device: the host's kernel takes them as from a network card, and leaves checksums and segments to
//! whom the features say.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
};

use super::{FRAME_BYTES_MAX, FRAME_BYTES_MIN, HEADER_BYTES, Header, NetBackend};
use crate::backend::disk::GuestBuffers;
use crate::sys;
use crate::sys::net::TapOffloads;

/// One queue of a tap device that speaks virtio's headers.
pub struct TapNet {
    tap: File,
    /// A header and a frame.
    buffer: Vec<u8>,
    /// How much of it counts; nothing when there is no frame.
    filled: usize,
}

impl TapNet {
    /// A back end on `tap`, which never waits and whose frames stand behind a header of [`HEADER_BYTES`].
    pub fn new(tap: File) -> TapNet {
        TapNet { tap, buffer: vec![0; HEADER_BYTES + FRAME_BYTES_MAX], filled: 0 }
    }
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
        let checksum = accepted(VIRTIO_NET_F_GUEST_CSUM);
        sys::net::set_tap_offloads(
            &self.tap,
            TapOffloads {
                checksum,
                // None without the other (virtio 1.2 §5.1.3.1), whatever a driver accepts.
                tso4: checksum && accepted(VIRTIO_NET_F_GUEST_TSO4),
                tso6: checksum && accepted(VIRTIO_NET_F_GUEST_TSO6),
                ecn: checksum && accepted(VIRTIO_NET_F_GUEST_ECN),
            },
        )
    }

    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()> {
        let frame_bytes = usize::try_from(frame.len_bytes()).unwrap_or(usize::MAX);
        if !(FRAME_BYTES_MIN..=FRAME_BYTES_MAX).contains(&frame_bytes) {
            return Err(ErrorKind::InvalidInput.into());
        }
        // Whole or not at all.
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

    fn fd(&self) -> BorrowedFd<'_> {
        self.tap.as_fd()
    }
}
