//! Verifies that all tables of a qcow2 file are consistent before they are used.
//!
//! The image may be crafted: a table that is also a guest's data could be rewritten by that guest. Therefore every
//! referenced cluster must be within the file and have a single use. Refcounts that are too low are reported, since
//! they can be repaired (docs/interop/qcow2 in QEMU's sources).

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use super::Refusal;
use super::counts;
use super::header::{CLUSTERS_MAX, Header};
use super::image::{COMPRESSED, OFFSET_MASK, packed_place};

/// L2 tables for 32 TiB with the default cluster size. A sparse file could contain more.
const SECOND_LEVEL_BYTES_MAX: u64 = 4 << 30;
/// A cluster with a single use. Smaller numbers count pieces of compressed data.
const WHOLE: u16 = u16::MAX;
/// The error for refcounts that cannot be repaired.
pub const UNCOUNTED: &str = "a cluster in use is counted as free";

/// The result of the check.
pub struct Survey {
    /// The use of each cluster of the file, to be interpreted by [`needed`].
    pub uses: Vec<u16>,
    /// Whether a refcount is too low.
    pub uncounted: bool,
}

/// The minimum refcount of a cluster with this use.
pub fn needed(uses: u16) -> u64 {
    if uses == WHOLE { 1 } else { u64::from(uses) }
}

/// Checks all of `file`, in time and memory bounded by its size.
pub fn survey(file: &File, header: &Header) -> Result<Survey, Refusal> {
    let clusters = file.metadata()?.len().div_ceil(header.cluster_bytes());
    if clusters > CLUSTERS_MAX {
        return Err(Refusal::TooLarge);
    }
    // Two bytes per cluster: at most 128 MiB, only during the check.
    let uses = vec![0; usize::try_from(clusters).map_err(|_| Refusal::TooLarge)?];
    Tables { file, header, uses }.survey()
}

struct Tables<'a> {
    file: &'a File,
    header: &'a Header,
    /// The use of each cluster.
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

    /// Whether all refcounts are high enough.
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

    /// Marks the range as exclusively used.
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

    /// Marks compressed data, which may start and end anywhere and share clusters.
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
        // At most 32 MiB: a table or a cluster.
        let mut bytes = vec![0; len_bytes as usize];
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                // The file may end within its last cluster; the rest reads as zeroes.
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
