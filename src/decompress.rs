//! Unpacks a bzImage's payload: one decoder for each compression that Linux's build supports.
//!
//! The payload is untrusted: window and output sizes are limited.

use std::fmt;
use std::io::{self, BufRead, BufReader, Read, Write};

use anyhow::{Result, ensure};
use lzma_rust2::{LzmaReader, XzReader};
use ruzstd::decoding::StreamingDecoder;

/// The longest window that a decoder may keep: `zstd -22 --ultra` takes 128 MiB.
const WINDOW_MAX_BYTES: u32 = 128 << 20;
/// The memory of a decoder in addition to its window.
const STATE_BYTES: u32 = 1 << 20;
const BUFFER_BYTES: usize = 256 << 10;

/// `lz4 -l`: the magic number at the start.
const LZ4_LEGACY_MAGIC: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// `lz4 -l`: the maximum unpacked size of a block.
const LZ4_BLOCK_MAX_BYTES: usize = 8 << 20;

/// The compression of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// gzip (RFC 1952).
    Gzip,
    /// bzip2.
    Bzip2,
    /// LZMA, alone (`xz --format=lzma`).
    Lzma,
    /// xz.
    Xz,
    /// LZ4's legacy frames (`lz4 -l`).
    Lz4,
    /// Zstandard (RFC 8878).
    Zstd,
}

impl Compression {
    /// Identifies the compression by the first bytes; `None` if it is not supported (LZO).
    pub fn identify(payload: &[u8]) -> Option<Compression> {
        match payload {
            [0x1f, 0x8b, ..] => Some(Compression::Gzip),
            [b'B', b'Z', b'h', ..] => Some(Compression::Bzip2),
            [0x5d, 0, 0, ..] => Some(Compression::Lzma),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Compression::Xz),
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Some(Compression::Zstd),
            _ if payload.starts_with(&LZ4_LEGACY_MAGIC) => Some(Compression::Lz4),
            _ => None,
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Compression::Gzip => "gzip",
            Compression::Bzip2 => "bzip2",
            Compression::Lzma => "lzma",
            Compression::Xz => "xz",
            Compression::Lz4 => "lz4",
            Compression::Zstd => "zstd",
        })
    }
}

/// Unpacks exactly `unpacked_bytes` from `packed` to `output`; `progress` is called with the number of bytes written so
/// far.
///
/// Every write except the last starts and ends at a multiple of 256 KiB.
pub fn unpack(
    compression: Compression,
    packed: impl Read,
    unpacked_bytes: u64,
    output: &mut dyn Write,
    progress: &mut dyn FnMut(u64),
) -> Result<()> {
    let mut unpacked = reader(compression, packed)?;
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut done: u64 = 0;
    // Reads to the end of the stream, where the checksums are.
    loop {
        let len = fill(&mut unpacked, &mut buffer)?;
        done += len as u64;
        ensure!(done <= unpacked_bytes, "it is longer than the expected {unpacked_bytes} bytes");
        output.write_all(&buffer[..len])?;
        progress(done);
        if len < buffer.len() {
            break;
        }
    }
    ensure!(done == unpacked_bytes, "it ends after {done} of {unpacked_bytes} bytes");
    Ok(())
}

/// A decoder for `packed`, if it is compressed. The unpacked size is unknown, so the caller must limit it.
pub fn unpacking_reader(packed: &[u8]) -> Result<Option<Box<dyn Read + '_>>> {
    Compression::identify(packed).map(|compression| reader(compression, packed)).transpose()
}

/// What `packed` is, whether it is compressed or not. The unpacked size is unknown, so the caller must limit it.
pub fn unpacked<'a>(mut packed: impl BufRead + 'a) -> Result<Box<dyn Read + 'a>> {
    match Compression::identify(packed.fill_buf()?) {
        Some(compression) => reader(compression, packed),
        None => Ok(Box::new(packed)),
    }
}

fn reader<'a>(compression: Compression, packed: impl Read + 'a) -> Result<Box<dyn Read + 'a>> {
    let packed = BufReader::with_capacity(BUFFER_BYTES, packed);
    let memory_max_kib = (WINDOW_MAX_BYTES + STATE_BYTES) >> 10;
    Ok(match compression {
        Compression::Gzip => Box::new(flate2::bufread::GzDecoder::new(packed)),
        Compression::Bzip2 => Box::new(bzip2::bufread::MultiBzDecoder::new(packed)),
        Compression::Lzma => Box::new(LzmaReader::new_mem_limit(packed, memory_max_kib, None)?),
        Compression::Xz => Box::new(XzReader::new_mem_limit(packed, true, memory_max_kib)),
        Compression::Lz4 => Box::new(Lz4Legacy::new(packed)),
        Compression::Zstd => Box::new(StreamingDecoder::new_with_max_window_size(packed, WINDOW_MAX_BYTES.into())?),
    })
}

/// Reads until `buffer` is full or the input ends.
fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match reader.read(&mut buffer[len..])? {
            0 => break,
            read => len += read,
        }
    }
    Ok(len)
}

/// The output of `lz4 -l`: blocks after the magic number, each preceded by its packed size.
struct Lz4Legacy<R> {
    packed: R,
    packed_block: Vec<u8>,
    block: Vec<u8>,
    block_len: usize,
    position: usize,
}

impl<R: Read> Lz4Legacy<R> {
    fn new(packed: R) -> Lz4Legacy<R> {
        let packed_block = Vec::new();
        Lz4Legacy { packed, packed_block, block: vec![0; LZ4_BLOCK_MAX_BYTES], block_len: 0, position: 0 }
    }

    /// Unpacks the next block; false at the end.
    fn next_block(&mut self) -> io::Result<bool> {
        let mut word = [0; 4];
        loop {
            if self.packed.read(&mut word[..1])? == 0 {
                return Ok(false);
            }
            self.packed.read_exact(&mut word[1..])?;
            // Concatenated files are one file.
            if word != LZ4_LEGACY_MAGIC {
                break;
            }
        }
        let len = u32::from_le_bytes(word) as usize;
        if len > lz4_flex::block::get_maximum_output_size(LZ4_BLOCK_MAX_BYTES) {
            return Err(io::Error::other(format!("a block of {len} bytes is too large")));
        }
        self.packed_block.resize(len, 0);
        self.packed.read_exact(&mut self.packed_block)?;
        self.block_len =
            lz4_flex::block::decompress_into(&self.packed_block, &mut self.block).map_err(io::Error::other)?;
        self.position = 0;
        Ok(true)
    }
}

impl<R: Read> Read for Lz4Legacy<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.position == self.block_len {
            if !self.next_block()? {
                return Ok(0);
            }
        }
        let unread = self.block.get(self.position..self.block_len).unwrap_or_default();
        let len = unread.len().min(buffer.len());
        buffer[..len].copy_from_slice(&unread[..len]);
        self.position += len;
        Ok(len)
    }
}
