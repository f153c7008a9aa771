//! Writes file contents to blocks while layers are read, and keeps track of their location.
//!
//! Only block numbers are kept in memory, however long a file is. Data shorter than a block goes to a spill file, and
//! from there behind its inode.

use std::fs::File;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

use super::compress::{self, CLUSTER_BYTES, Compressor};
use super::{BLOCK_BYTES, Form};
use crate::sys;

const BUFFER_BYTES: usize = 1 << 20;
/// An unallocated block, which reads as zeroes.
pub const HOLE: u32 = u32::MAX;

/// The location of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Content {
    pub size_bytes: u64,
    pub place: Place,
}

/// The layout of a file's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Contiguous blocks, with a partial last block in the spill file, if any.
    Flat { block: u32, tail: Option<u64> },
    /// A cluster for each 64 KiB.
    Packed(Box<[Cluster]>),
    /// A block number for each block, most of which are holes.
    Sparse(Box<[u32]>),
}

/// 64 KiB of a file, or the rest of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cluster {
    pub block: u32,
    /// The number of blocks, which is smaller than its size if it is compressed.
    pub blocks: u8,
    pub packed: bool,
}

/// The growing part of the image with file contents.
pub struct Data {
    file: File,
    buffer: Vec<u8>,
    /// The file offset of the buffer's first byte.
    buffer_at: u64,
    spill: Spill,
    compressor: Option<Compressor>,
}

impl Data {
    /// Starts after the superblock's block in `file`.
    pub fn new(file: File, spill: File, form: Form) -> Data {
        let compressor = (form == Form::Lz4).then(Compressor::default);
        let buffer = Vec::with_capacity(BUFFER_BYTES + CLUSTER_BYTES);
        Data { file, buffer, buffer_at: BLOCK_BYTES as u64, spill: Spill::new(spill), compressor }
    }

    /// Writes the `size_bytes` of a file from `reader`. `head_bytes` precede them if they are inlined after the inode.
    pub fn take(&mut self, reader: &mut dyn Read, size_bytes: u64, head_bytes: usize) -> Result<Content> {
        let small = head_bytes as u64 + size_bytes <= BLOCK_BYTES as u64;
        let place = if self.compressor.is_some() && !small {
            self.take_packed(reader, size_bytes)?
        } else {
            self.take_flat(reader, size_bytes, head_bytes)?
        };
        Ok(Content { size_bytes, place })
    }

    fn take_flat(&mut self, reader: &mut dyn Read, size_bytes: u64, head_bytes: usize) -> Result<Place> {
        let block = self.next_block()?;
        let tail_bytes = (size_bytes % BLOCK_BYTES as u64) as usize;
        let is_inline = tail_bytes > 0 && head_bytes + tail_bytes <= BLOCK_BYTES;
        let mut rest = if is_inline { size_bytes - tail_bytes as u64 } else { size_bytes };
        let mut bytes = vec![0; (rest as usize).clamp(BLOCK_BYTES, CLUSTER_BYTES)];
        while rest > 0 {
            let part = bytes.len().min(usize::try_from(rest).unwrap_or(usize::MAX));
            reader.read_exact(&mut bytes[..part])?;
            self.append(&bytes[..part])?;
            rest -= part as u64;
        }
        self.pad()?;
        let mut tail = None;
        if is_inline {
            reader.read_exact(&mut bytes[..tail_bytes])?;
            tail = Some(self.spill.append(&bytes[..tail_bytes])?);
        }
        Ok(Place::Flat { block, tail })
    }

    fn take_packed(&mut self, reader: &mut dyn Read, size_bytes: u64) -> Result<Place> {
        let first = self.next_block()?;
        let mut clusters = Vec::new();
        let mut rest = size_bytes;
        let mut compressor = self.compressor.take().context("files are not compressed")?;
        while rest > 0 {
            let part = CLUSTER_BYTES.min(usize::try_from(rest).unwrap_or(usize::MAX));
            reader.read_exact(&mut compressor.input()[..part])?;
            let block = self.next_block()?;
            let (bytes, packed) = compressor.pack(part);
            self.append(bytes)?;
            clusters.push(Cluster { block, blocks: (bytes.len() / BLOCK_BYTES) as u8, packed });
            rest -= part as u64;
        }
        self.compressor = Some(compressor);
        // Without any compressed cluster no table is needed.
        if !clusters.iter().any(|cluster| cluster.packed) {
            return Ok(Place::Flat { block: first, tail: None });
        }
        Ok(Place::Packed(clusters.into()))
    }

    /// Takes the parts of a sparse file, which follow each other in `reader`; the rest of its `size_bytes` is holes.
    ///
    /// The parts are in order and do not overlap, which their source has checked.
    pub fn take_sparse(&mut self, reader: &mut dyn Read, size_bytes: u64, parts: &[Range<u64>]) -> Result<Content> {
        let blocks = size_bytes.div_ceil(BLOCK_BYTES as u64);
        // Four bytes of memory per block.
        ensure!(blocks <= 1 << 26, "a sparse file of {size_bytes} bytes is too large (the maximum is 256 GiB)");
        let mut map = vec![HOLE; blocks as usize];
        let mut block = [0; BLOCK_BYTES];
        let mut pending: Option<u64> = None;
        for part in parts {
            let mut at = part.start;
            while at < part.end {
                let index = at / BLOCK_BYTES as u64;
                if pending != Some(index) {
                    self.put_sparse(pending, &mut block, &mut map)?;
                    pending = Some(index);
                }
                let from = (at % BLOCK_BYTES as u64) as usize;
                let len = ((part.end - at) as usize).min(BLOCK_BYTES - from);
                reader.read_exact(&mut block[from..from + len])?;
                at += len as u64;
            }
        }
        self.put_sparse(pending, &mut block, &mut map)?;
        Ok(Content { size_bytes, place: Place::Sparse(map.into()) })
    }

    /// Writes a sparse file's block, unless it is all zeroes, and clears it for the next one.
    fn put_sparse(&mut self, index: Option<u64>, block: &mut [u8; BLOCK_BYTES], map: &mut [u32]) -> Result<()> {
        let Some(entry) = index.and_then(|index| map.get_mut(index as usize)) else { return Ok(()) };
        if block.iter().any(|&byte| byte != 0) {
            *entry = self.next_block()?;
            self.append(block)?;
            block.fill(0);
        }
        Ok(())
    }

    /// Deallocates the blocks of a file that is no longer part of the image.
    pub fn forget(&mut self, content: &Content) -> Result<()> {
        match &content.place {
            Place::Flat { block, tail } => {
                let bytes = content.size_bytes;
                let blocks =
                    if tail.is_some() { bytes / BLOCK_BYTES as u64 } else { bytes.div_ceil(BLOCK_BYTES as u64) };
                self.punch(*block, blocks)
            }
            Place::Packed(clusters) => match (clusters.first(), clusters.last()) {
                (Some(first), Some(last)) => {
                    self.punch(first.block, u64::from(last.block) + u64::from(last.blocks) - u64::from(first.block))
                }
                _ => Ok(()),
            },
            Place::Sparse(map) => {
                let mut data = map.iter().filter(|&&block| block != HOLE);
                match (data.next(), data.next_back()) {
                    (Some(&first), Some(&last)) => self.punch(first, u64::from(last) + 1 - u64::from(first)),
                    (Some(&only), None) => self.punch(only, 1),
                    _ => Ok(()),
                }
            }
        }
    }

    fn punch(&mut self, block: u32, blocks: u64) -> Result<()> {
        if blocks == 0 {
            return Ok(());
        }
        let at = u64::from(block) * BLOCK_BYTES as u64;
        if at + blocks * BLOCK_BYTES as u64 > self.buffer_at {
            self.flush()?;
        }
        match sys::disk::punch_hole(&self.file, at, blocks * BLOCK_BYTES as u64) {
            // The image then takes more space, but is valid.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            punched => punched.context("free blocks of the image"),
        }
    }

    /// The number of the next block to write.
    pub fn next_block(&self) -> Result<u32> {
        let block = (self.buffer_at + self.buffer.len() as u64).div_ceil(BLOCK_BYTES as u64);
        u32::try_from(block).ok().filter(|&block| block < HOLE).context("the image is larger than 16 TiB")
    }

    /// Appends raw bytes.
    pub fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    /// Pads the last block with zeroes.
    pub fn pad(&mut self) -> io::Result<()> {
        let len = self.buffer.len().next_multiple_of(BLOCK_BYTES);
        self.buffer.resize(len, 0);
        Ok(())
    }

    /// Writes the buffer, which is block-aligned except in the middle of a file.
    pub fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.buffer_at)?;
        self.buffer_at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Reads from the spill file.
    pub fn read_spilled(&mut self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.spill.read(at, bytes)
    }

    /// The image file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The maximum number of blocks of a cluster written so far, if compression is enabled.
    pub fn cluster_blocks(&self) -> Option<u16> {
        self.compressor.as_ref().map(|_| compress::MAX_CLUSTER_BLOCKS)
    }
}

/// Stores short files, and the partial last blocks of longer ones.
struct Spill {
    file: File,
    buffer: Vec<u8>,
    written_bytes: u64,
}

impl Spill {
    fn new(file: File) -> Spill {
        Spill { file, buffer: Vec::new(), written_bytes: 0 }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let at = self.written_bytes + self.buffer.len() as u64;
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()?;
        }
        Ok(at)
    }

    fn flush(&mut self) -> io::Result<()> {
        (&self.file).write_all(&self.buffer)?;
        self.written_bytes += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn read(&mut self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.flush()?;
        self.file.read_exact_at(bytes, at)
    }
}
