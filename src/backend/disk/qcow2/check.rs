//! From a qcow2 file to the certainty that its tables agree with each other, before anything is done by them.
//!
//! Whoever made the image may have meant harm: a table that is also a guest's data could be rewritten by that guest. So every
//! cluster that the tables name lies in the file and is one thing only. Whether each is counted as well is told, since that
//! can be made good (docs/interop/qcow2 in QEMU's sources).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use super::Refusal;
use super::counts;
use super::header::{CLUSTERS_MAX, Header};
use super::image::{COMPRESSED, OFFSET_MASK, packed_place};

/// Tables of the second level for 32 TiB of the usual clusters. More may stand in a file that is mostly holes.
const SECOND_LEVEL_BYTES_MAX: u64 = 4 << 30;
/// A cluster that is one thing and nothing else. Smaller numbers count pieces of compressed data.
const WHOLE: u16 = u16::MAX;
/// What is wrong with an image whose counts cannot be made good.
pub const UNCOUNTED: &str = "a cluster in use is counted as free";

/// What was found.
pub struct Survey {
    /// By cluster of the file: what the tables make of it, to be read by [`needed`].
    pub uses: Vec<u16>,
    /// Whether one of them is counted less often than it is used.
    pub uncounted: bool,
}

/// How often a cluster that is used so is to be counted.
pub fn needed(uses: u16) -> u64 {
    if uses == WHOLE { 1 } else { u64::from(uses) }
}

/// Looks at all of `file`, in time and memory that its size bounds.
pub fn survey(file: &File, header: &Header) -> Result<Survey, Refusal> {
    let clusters = file.metadata()?.len().div_ceil(header.cluster_bytes());
    if clusters > CLUSTERS_MAX {
        return Err(Refusal::TooLarge);
    }
    // Two bytes a cluster: 128 MiB at most, and while it is looked at only.
    let uses = vec![0; usize::try_from(clusters).map_err(|_| Refusal::TooLarge)?];
    Tables { file, header, uses }.survey()
}

struct Tables<'a> {
    file: &'a File,
    header: &'a Header,
    /// By cluster: what the tables make of it.
    uses: Vec<u16>,
}

impl Tables<'_> {
    fn survey(mut self) -> Result<Survey, Refusal> {
        let (first_level, counts) = (self.header.first_level, self.header.counts);
        self.claim(0, 1)?;
        self.claim(first_level.0, first_level.1)?;
        self.claim(counts.0, counts.1)?;
        let count_blocks = self.read(counts)?;
        for block in entries(&count_blocks) {
            if block != 0 {
                self.claim(block, self.header.cluster_bytes())?;
            }
        }
        self.check_second_level(&self.read(first_level)?)?;
        Ok(Survey { uncounted: !self.are_counted(&count_blocks)?, uses: self.uses })
    }

    fn check_second_level(&mut self, first_level: &[u8]) -> Result<(), Refusal> {
        let cluster_bytes = self.header.cluster_bytes();
        let mut read_bytes = 0;
        for table in entries(first_level).map(|entry| entry & OFFSET_MASK).filter(|offset| *offset != 0) {
            read_bytes += cluster_bytes;
            if read_bytes > SECOND_LEVEL_BYTES_MAX {
                return Err(Refusal::TooLarge);
            }
            self.claim(table, cluster_bytes)?;
            for entry in entries(&self.read((table, cluster_bytes))?) {
                if entry & COMPRESSED != 0 {
                    self.count_compressed(entry)?;
                } else if entry & OFFSET_MASK != 0 {
                    self.claim(entry & OFFSET_MASK, cluster_bytes)?;
                }
            }
        }
        Ok(())
    }

    /// Whether every cluster that is used is counted at least as often.
    fn are_counted(&self, count_blocks: &[u8]) -> Result<bool, Refusal> {
        let order = self.header.refcount_order;
        let mut blocks = entries(count_blocks);
        for uses in self.uses.chunks(self.header.counts_per_block() as usize) {
            let block = blocks.next().unwrap_or(0);
            if uses.iter().all(|uses| *uses == 0) {
                continue;
            }
            if block == 0 {
                return Ok(false);
            }
            let counts = self.read((block, self.header.cluster_bytes()))?;
            for (index, uses) in uses.iter().enumerate().filter(|(_, uses)| **uses != 0) {
                let bits = index << order;
                let bytes = counts.get(bits / 8..).unwrap_or_default();
                if counts::read(bytes, (bits % 8) as u32, order) < needed(*uses) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// What is at `offset` is this and nothing else.
    fn claim(&mut self, offset: u64, len_bytes: u64) -> Result<(), Refusal> {
        if !offset.is_multiple_of(self.header.cluster_bytes()) {
            return Err(Refusal::Damaged("a table entry is not aligned to a cluster"));
        }
        for uses in self.clusters(offset, len_bytes)? {
            if std::mem::replace(uses, WHOLE) != 0 {
                return Err(Refusal::Damaged("a cluster is used twice"));
            }
        }
        Ok(())
    }

    /// Compressed data, which may begin and end anywhere and share clusters with others.
    fn count_compressed(&mut self, entry: u64) -> Result<(), Refusal> {
        let (offset, len_bytes) = packed_place(entry, self.header.cluster_bits);
        for uses in self.clusters(offset, len_bytes)? {
            *uses = match *uses {
                WHOLE => return Err(Refusal::Damaged("a cluster is used twice")),
                uses if uses == WHOLE - 1 => return Err(Refusal::TooLarge),
                uses => uses + 1,
            };
        }
        Ok(())
    }

    fn clusters(&mut self, offset: u64, len_bytes: u64) -> Result<&mut [u16], Refusal> {
        let first = offset >> self.header.cluster_bits;
        let end = offset.saturating_add(len_bytes).div_ceil(self.header.cluster_bytes());
        let clusters = self.uses.get_mut(first as usize..end as usize);
        clusters.ok_or(Refusal::Damaged("a table entry points outside the file"))
    }

    fn read(&self, (offset, len_bytes): (u64, u64)) -> Result<Vec<u8>, Refusal> {
        // No more than 32 MiB: a table, or a cluster.
        let mut bytes = vec![0; len_bytes as usize];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                // The file may end in the middle of its last cluster: what follows reads as zeroes.
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Refusal::Bad(io::Error::new(error.kind(), format!("read a table: {error}")))),
            }
        }
        Ok(bytes)
    }
}

fn entries(table: &[u8]) -> impl Iterator<Item = u64> {
    table.as_chunks().0.iter().map(|bytes| u64::from_be_bytes(*bytes))
}
