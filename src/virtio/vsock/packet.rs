//! Packet headers (virtio 1.2 §5.10.6).

use crate::memory::GuestMemory;
use crate::virtio::queue::{self, GuestRange};

/// Length of `struct virtio_vsock_hdr`.
pub const HEADER_BYTES: usize = 44;
/// The host's CID (virtio 1.2 §5.10.4).
pub const HOST_CID: u64 = 2;
/// The only supported socket type (VIRTIO_VSOCK_TYPE_STREAM).
pub const TYPE_STREAM: u16 = 1;

/// VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE: the sender of the packet will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// VIRTIO_VSOCK_SHUTDOWN_F_SEND: the sender of the packet will send no more data.
pub const SHUTDOWN_SEND: u32 = 2;
/// Both: the connection ends.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// Packet operations (virtio 1.2 §5.10.6).
pub mod op {
    /// Requests a connection.
    pub const REQUEST: u16 = 1;
    /// Accepts a connection.
    pub const RESPONSE: u16 = 2;
    /// Refuses or resets a connection.
    pub const RST: u16 = 3;
    /// Shuts down one or both directions.
    pub const SHUTDOWN: u16 = 4;
    /// Carries data.
    pub const RW: u16 = 5;
    /// Updates the sender's credit information.
    pub const CREDIT_UPDATE: u16 = 6;
    /// Requests a credit update.
    pub const CREDIT_REQUEST: u16 = 7;
}

/// A packet header, copied from guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// The sender's CID.
    pub src_cid: u64,
    /// The receiver's CID.
    pub dst_cid: u64,
    /// The sender's port.
    pub src_port: u32,
    /// The receiver's port.
    pub dst_port: u32,
    /// The length of the data after the header.
    pub len_bytes: u32,
    /// The socket type.
    pub kind: u16,
    /// The operation, see [`op`].
    pub op: u16,
    /// The directions to shut down, in a SHUTDOWN packet.
    pub flags: u32,
    /// The sender's total buffer space for this connection.
    pub buf_alloc: u32,
    /// The number of bytes that the sender has forwarded since the start of the connection, modulo 2^32.
    pub fwd_cnt: u32,
}

impl Header {
    /// Reads the header at the front of `ranges`, however they are split. `None` if it is incomplete or outside of
    /// memory.
    pub fn read(memory: &GuestMemory, ranges: &[GuestRange]) -> Option<Header> {
        queue::read_front(memory, ranges).map(|bytes| Header::decode(&bytes))
    }

    /// Writes the header to the front of `ranges`. Returns whether they are large enough and within memory.
    #[must_use]
    pub fn write(&self, memory: &GuestMemory, ranges: &[GuestRange]) -> bool {
        queue::write_front(memory, ranges, &self.encode())
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Header {
        let mut fields = Fields(bytes);
        Header {
            src_cid: u64::from_le_bytes(fields.take()),
            dst_cid: u64::from_le_bytes(fields.take()),
            src_port: u32::from_le_bytes(fields.take()),
            dst_port: u32::from_le_bytes(fields.take()),
            len_bytes: u32::from_le_bytes(fields.take()),
            kind: u16::from_le_bytes(fields.take()),
            op: u16::from_le_bytes(fields.take()),
            flags: u32::from_le_bytes(fields.take()),
            buf_alloc: u32::from_le_bytes(fields.take()),
            fwd_cnt: u32::from_le_bytes(fields.take()),
        }
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len_bytes.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// Reads fields in order. Fields beyond the end are zero.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let Some((field, rest)) = self.0.split_first_chunk() else { return [0; N] };
        self.0 = rest;
        *field
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

    const HEADER: Header = Header {
        src_cid: 0x0102_0304_0506_0708,
        dst_cid: 2,
        src_port: 0x1122_3344,
        dst_port: 52,
        len_bytes: 1000,
        kind: TYPE_STREAM,
        op: op::RW,
        flags: SHUTDOWN_BOTH,
        buf_alloc: 1 << 18,
        fwd_cnt: u32::MAX,
    };

    fn ranges(parts: &[(u64, u32)]) -> Vec<GuestRange> {
        parts.iter().map(|(at, len_bytes)| GuestRange { address: GuestAddress(*at), len_bytes: *len_bytes }).collect()
    }

    #[test]
    fn a_header_has_the_specified_layout() {
        let memory = memory::reserve(1).unwrap();
        assert!(HEADER.write(&memory, &ranges(&[(0x1000, 100)])));
        let read = |offset: u64| memory.read_obj::<u32>(GuestAddress(0x1000 + offset)).unwrap();
        assert_eq!((read(0), read(4), read(8), read(12)), (0x0506_0708, 0x0102_0304, 2, 0));
        assert_eq!((read(16), read(20), read(24), read(28)), (0x1122_3344, 52, 1000, 0x0005_0001));
        assert_eq!((read(32), read(36), read(40), read(44)), (3, 1 << 18, u32::MAX, 0));
    }

    #[test]
    fn a_header_is_read_and_written_however_it_is_split() {
        let memory = memory::reserve(1).unwrap();
        for parts in [&[(0x1000, 44)][..], &[(0x1000, 1), (0x3000, 42), (0x2000, 9)], &[(0x1000, 43), (0x5000, 1)]] {
            assert!(HEADER.write(&memory, &ranges(parts)), "{parts:?}");
            assert_eq!(Header::read(&memory, &ranges(parts)), Some(HEADER), "{parts:?}");
        }
    }

    #[test]
    fn an_incomplete_header_or_one_outside_of_memory_is_rejected() {
        let memory = memory::reserve(1).unwrap();
        for parts in [&[][..], &[(0x1000, 43)], &[((1 << 20) - 43, 44)], &[(0x1000, 20), (u64::MAX, 24)]] {
            assert_eq!(Header::read(&memory, &ranges(parts)), None, "{parts:?}");
            assert!(!HEADER.write(&memory, &ranges(parts)), "{parts:?}");
        }
    }
}
