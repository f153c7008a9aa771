//! From a qcow2 file to the certainty that its tables agree with each other, before anything is done by them.
//!
//! Whoever made the image may have meant harm: a table that is also a guest's data could be rewritten by that guest, and a
//! cluster that is in use and counted as free would become two things at once. So every cluster that the tables name lies in
//! the file, is one thing only, and is counted (docs/interop/qcow2 in QEMU's sources). Nothing is kept but a number a
//! cluster while it is looked at.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt;

use super::Refusal;

const HEADER_BYTES: usize = 104;
/// The header of version 2, which ends sooner; what then follows has these values.
const VERSION_2_BYTES: usize = 72;
const VERSION_2_REFCOUNT_ORDER: u32 = 4;
const MAGIC: u32 = 0x5146_49fb;

// Bits of `incompatible_features`: an image that has one of them is not what it seems to who does not know it.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;

/// Where an entry of the first and of the second level points to.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
/// As large as QEMU makes them (32 MiB).
const TABLE_BYTES_MAX: u64 = 32 << 20;
/// Two bytes are kept of each cluster: the file is at most 4 TiB of the usual 64 KiB clusters.
const CLUSTERS_MAX: u64 = 1 << 26;
/// Tables of the second level for 32 TiB of the usual clusters. More may stand in a file that is mostly holes.
const SECOND_LEVEL_BYTES_MAX: u64 = 4 << 30;
/// A cluster that is one thing and nothing else. Smaller numbers count pieces of compressed data.
const WHOLE: u16 = u16::MAX;

/// Checks all of `file`, in time and memory that its size bounds.
pub fn check(file: &File) -> Result<(), Refusal> {
    let header = Header::read(file)?;
    let clusters = file.metadata()?.len().div_ceil(header.cluster_bytes());
    if clusters > CLUSTERS_MAX {
        return Err(Refusal::TooLarge);
    }
    let uses = vec![0; usize::try_from(clusters).map_err(|_| Refusal::TooLarge)?];
    Tables { file, header, uses }.check()
}

/// What the header says, checked to be an image that can be used at all.
struct Header {
    cluster_bits: u32,
    first_level: (u64, u64),
    counts: (u64, u64),
    refcount_order: u32,
}

impl Header {
    fn read(file: &File) -> Result<Header, Refusal> {
        let mut bytes = [0; HEADER_BYTES];
        // A small image of version 2 may be shorter.
        let len = file.read_at(&mut bytes, 0)?;
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let u64_at = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        if len < VERSION_2_BYTES || u32_at(0) != MAGIC {
            return Err(Refusal::NotQcow2);
        }
        let version_2 = u32_at(4) == 2;
        if u64_at(8) != 0 {
            return Err(Refusal::BackingFile);
        }
        if u32_at(32) != 0 {
            return Err(Refusal::Encrypted);
        }
        check_features(if version_2 { 0 } else { u64_at(72) })?;
        let header = Header {
            cluster_bits: u32_at(20),
            first_level: (u64_at(40), 8 * u64::from(u32_at(36))),
            counts: (u64_at(48), u64::from(u32_at(56)) << u32_at(20).min(21)),
            refcount_order: if version_2 { VERSION_2_REFCOUNT_ORDER } else { u32_at(96) },
        };
        if !(9..=21).contains(&header.cluster_bits) || header.refcount_order > 6 {
            return Err(Refusal::Damaged("its header makes no sense"));
        }
        if header.first_level.1 > TABLE_BYTES_MAX || header.counts.1 > TABLE_BYTES_MAX {
            return Err(Refusal::TooLarge);
        }
        Ok(header)
    }

    fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }
}

fn check_features(features: u64) -> Result<(), Refusal> {
    match features {
        _ if features & DIRTY != 0 => Err(Refusal::Dirty),
        _ if features & CORRUPT != 0 => Err(Refusal::Damaged("it is marked so")),
        _ if features & EXTERNAL_DATA != 0 => Err(Refusal::ExternalData),
        _ if features & COMPRESSION_TYPE != 0 => Err(Refusal::Compression),
        _ => Ok(()),
    }
}

struct Tables<'a> {
    file: &'a File,
    header: Header,
    /// By cluster: what the tables make of it.
    uses: Vec<u16>,
}

impl Tables<'_> {
    fn check(mut self) -> Result<(), Refusal> {
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
        self.check_counts(&count_blocks)
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

    /// Every cluster that is used is counted at least as often.
    fn check_counts(&self, count_blocks: &[u8]) -> Result<(), Refusal> {
        const UNCOUNTED: Refusal = Refusal::Damaged("a cluster in use is counted as free");
        let order = self.header.refcount_order;
        let per_block = (self.header.cluster_bytes() << 3 >> order) as usize;
        let mut blocks = entries(count_blocks);
        for uses in self.uses.chunks(per_block) {
            let block = blocks.next().unwrap_or(0);
            if uses.iter().all(|uses| *uses == 0) {
                continue;
            }
            if block == 0 {
                return Err(UNCOUNTED);
            }
            let counts = self.read((block, self.header.cluster_bytes()))?;
            for (index, uses) in uses.iter().enumerate().filter(|(_, uses)| **uses != 0) {
                let needed = if *uses == WHOLE { 1 } else { u64::from(*uses) };
                if count(&counts, index, order) < needed {
                    return Err(UNCOUNTED);
                }
            }
        }
        Ok(())
    }

    /// What is at `offset` is this and nothing else.
    fn claim(&mut self, offset: u64, len_bytes: u64) -> Result<(), Refusal> {
        if !offset.is_multiple_of(self.header.cluster_bytes()) {
            return Err(Refusal::Damaged("a table names half a cluster"));
        }
        for uses in self.clusters(offset, len_bytes)? {
            if std::mem::replace(uses, WHOLE) != 0 {
                return Err(Refusal::Damaged("a cluster is used for two things"));
            }
        }
        Ok(())
    }

    /// Compressed data, which may begin and end anywhere and share clusters with others.
    fn count_compressed(&mut self, entry: u64) -> Result<(), Refusal> {
        let offset_bits = 62 - (self.header.cluster_bits - 8);
        let offset = entry & ((1 << offset_bits) - 1);
        let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        let len_bytes = (sectors + 1) * 512 - offset % 512;
        for uses in self.clusters(offset, len_bytes)? {
            *uses = match *uses {
                WHOLE => return Err(Refusal::Damaged("a cluster is used for two things")),
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
        clusters.ok_or(Refusal::Damaged("a table names what is not in the file"))
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

/// The count at `index` of a block of counts that are `1 << order` bits wide.
fn count(block: &[u8], index: usize, order: u32) -> u64 {
    let byte = |at: usize| u64::from(block.get(at).copied().unwrap_or(0));
    match order {
        0..3 => {
            let (width, bit) = (1 << order, index << order);
            byte(bit / 8) >> (bit % 8) & ((1 << width) - 1)
        }
        _ => {
            let width_bytes = 1 << (order - 3);
            (0..width_bytes).fold(0, |count, step| count << 8 | byte(index * width_bytes + step))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_read() {
        let block = [0b1110_0100, 0x12, 0x34, 0, 0, 0, 0, 7, 9];
        assert_eq!((0..8).map(|index| count(&block, index, 0)).collect::<Vec<_>>(), [0, 0, 1, 0, 0, 1, 1, 1]);
        assert_eq!((0..4).map(|index| count(&block, index, 1)).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((count(&block, 2, 2), count(&block, 3, 2)), (2, 1));
        assert_eq!((count(&block, 1, 3), count(&block, 1, 4)), (0x12, 0x3400));
        assert_eq!(count(&block, 0, 6), 0xe412_3400_0000_0007);
        assert_eq!(count(&block, 100, 4), 0);
    }
}
