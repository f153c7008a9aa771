//! The header before each frame, with offloaded work (virtio 1.2 §5.1.6): read once and validated.
//!
//! Drivers and tap devices use the same structure.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE,
    VIRTIO_NET_HDR_GSO_TCPV4, VIRTIO_NET_HDR_GSO_TCPV6,
};

/// The size of `struct virtio_net_hdr_v1`.
pub const HEADER_BYTES: usize = 12;
/// The receiver need not check the packet's checksum.
pub const FLAG_DATA_VALID: u8 = VIRTIO_NET_HDR_F_DATA_VALID as u8;

const FLAG_NEEDS_CHECKSUM: u8 = VIRTIO_NET_HDR_F_NEEDS_CSUM as u8;
const SEGMENTS_NONE: u8 = VIRTIO_NET_HDR_GSO_NONE as u8;
const SEGMENTS_ECN: u8 = VIRTIO_NET_HDR_GSO_ECN as u8;
/// The size of a checksum.
const CHECKSUM_BYTES: usize = 2;

/// A frame's header, copied from guest memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    /// Whether a checksum must be filled in, or is known to be valid.
    pub flags: u8,
    /// The type of segmentation.
    pub segments: u8,
    /// The length of all headers in the frame, as a hint.
    pub headers_bytes: u16,
    /// The payload size of each segment.
    pub segment_bytes: u16,
    /// The offset where the checksum computation starts.
    pub checksum_start: u16,
    /// The position of the checksum relative to that.
    pub checksum_offset: u16,
    /// The number of the driver's buffers that the frame takes; 0 towards the host.
    pub buffers: u16,
}

impl Header {
    /// Parses the structure, which is little-endian.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Header {
        let [flags, segments, a, b, c, d, e, f, g, h, i, j] = bytes;
        Header {
            flags,
            segments,
            headers_bytes: u16::from_le_bytes([a, b]),
            segment_bytes: u16::from_le_bytes([c, d]),
            checksum_start: u16::from_le_bytes([e, f]),
            checksum_offset: u16::from_le_bytes([g, h]),
            buffers: u16::from_le_bytes([i, j]),
        }
    }

    /// Serializes the structure.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [self.flags, self.segments, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.headers_bytes, self.segment_bytes, self.checksum_start, self.checksum_offset, self.buffers];
        for (place, word) in bytes.chunks_exact_mut(2).skip(1).zip(words) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Validates the header of a frame of `frame_bytes` from a driver that accepted `features`. Returns it without any
    /// other fields, or `None` if it requests something else or refers to positions outside of the frame.
    pub fn checked(self, features: u64, frame_bytes: usize) -> Option<Header> {
        let accepted = |bit: u32| features >> bit & 1 != 0;
        let needs_checksum = self.flags & FLAG_NEEDS_CHECKSUM != 0;
        let cut = self.segments & !SEGMENTS_ECN;
        let ecn = self.segments & SEGMENTS_ECN != 0;
        let cut_allowed = match u32::from(cut) {
            VIRTIO_NET_HDR_GSO_TCPV4 => accepted(VIRTIO_NET_F_HOST_TSO4),
            VIRTIO_NET_HDR_GSO_TCPV6 => accepted(VIRTIO_NET_F_HOST_TSO6),
            _ => self.segments == SEGMENTS_NONE,
        };
        if !cut_allowed || ecn && !accepted(VIRTIO_NET_F_HOST_ECN) || needs_checksum && !accepted(VIRTIO_NET_F_CSUM) {
            return None;
        }
        // Each segment has its own checksum, which must be computed during segmentation.
        if cut != SEGMENTS_NONE && (!needs_checksum || self.segment_bytes == 0) {
            return None;
        }
        let checksum_end = usize::from(self.checksum_start) + usize::from(self.checksum_offset) + CHECKSUM_BYTES;
        if needs_checksum && checksum_end > frame_bytes || usize::from(self.headers_bytes) > frame_bytes {
            return None;
        }
        let (checksum_start, checksum_offset) =
            if needs_checksum { (self.checksum_start, self.checksum_offset) } else { (0, 0) };
        let (headers_bytes, segment_bytes) =
            if cut == SEGMENTS_NONE { (0, 0) } else { (self.headers_bytes, self.segment_bytes) };
        Some(Header {
            flags: self.flags & FLAG_NEEDS_CHECKSUM,
            segments: self.segments,
            headers_bytes,
            segment_bytes,
            checksum_start,
            checksum_offset,
            buffers: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 =
        1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_HOST_TSO4 | 1 << VIRTIO_NET_F_HOST_TSO6 | 1 << VIRTIO_NET_F_HOST_ECN;

    fn segments() -> Header {
        Header {
            flags: FLAG_NEEDS_CHECKSUM,
            segments: VIRTIO_NET_HDR_GSO_TCPV4 as u8,
            headers_bytes: 54,
            segment_bytes: 1460,
            checksum_start: 34,
            checksum_offset: 16,
            buffers: 0,
        }
    }

    #[test]
    fn a_header_survives_a_round_trip() {
        let bytes = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12];
        assert_eq!(Header::decode(bytes).encode(), bytes);
        assert_eq!(Header::decode(bytes).checksum_start, 0x0807);
    }

    #[test]
    fn only_negotiated_offloads_are_accepted() {
        assert_eq!(segments().checked(ALL, 4000), Some(segments()));
        let ecn = Header { segments: segments().segments | SEGMENTS_ECN, ..segments() };
        assert_eq!(ecn.checked(ALL, 4000), Some(ecn));
        for without in [VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_ECN] {
            assert_eq!(ecn.checked(ALL & !(1 << without), 4000), None, "{without}");
        }
        for segments_of in [2, 3, 5, 0x7f, SEGMENTS_ECN] {
            assert_eq!(Header { segments: segments_of, ..segments() }.checked(ALL, 4000), None, "{segments_of}");
        }
        let plain = Header { flags: 0xfe, buffers: 7, checksum_start: 0xffff, segment_bytes: 9, ..Header::default() };
        assert_eq!(plain.checked(0, 60), Some(Header::default()), "what is not asked for is not passed on");
    }

    #[test]
    fn a_header_that_points_outside_of_its_frame_is_rejected() {
        let checksum = Header { checksum_start: 34, checksum_offset: 16, flags: 1, ..Header::default() };
        assert_eq!((checksum.checked(ALL, 52), checksum.checked(ALL, 51)), (Some(checksum), None));
        assert_eq!(Header { checksum_offset: 0xffff, ..checksum }.checked(ALL, 65000), None);
        assert_eq!(Header { headers_bytes: 4001, ..segments() }.checked(ALL, 4000), None);
        assert_eq!(Header { segment_bytes: 0, ..segments() }.checked(ALL, 4000), None);
        assert_eq!(Header { flags: 0, ..segments() }.checked(ALL, 4000), None);
    }
}
