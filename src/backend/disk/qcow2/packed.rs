//! Decompresses clusters.

use std::io::{self, ErrorKind, Read};

use flate2::read::DeflateDecoder;
use ruzstd::decoding::StreamingDecoder;

/// The window size that every decoder must support (RFC 8878 §3.1.1.1.2).
const WINDOW_MAX_BYTES: u64 = 8 << 20;

/// The compression type of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A raw deflate stream, RFC 1951.
    Deflate,
    /// A frame, RFC 8878.
    Zstd,
}

impl Compression {
    /// Decompresses the cluster of `cluster_bytes` bytes at the start of `packed`, which may be followed by anything.
    /// Fails if it is shorter than a cluster.
    pub fn unpack(self, packed: &[u8], cluster_bytes: usize) -> io::Result<Vec<u8>> {
        let mut cluster = vec![0; cluster_bytes];
        let result = match self {
            Compression::Deflate => DeflateDecoder::new(packed).read_exact(&mut cluster),
            Compression::Zstd => StreamingDecoder::new_with_max_window_size(packed, WINDOW_MAX_BYTES)
                .map_err(io::Error::other)
                .and_then(|mut decoder| decoder.read_exact(&mut cluster)),
        };
        match result {
            Ok(()) => Ok(cluster),
            Err(error) => Err(io::Error::new(ErrorKind::InvalidData, format!("unpack a compressed cluster: {error}"))),
        }
    }
}
