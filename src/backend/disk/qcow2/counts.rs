//! Allocates and frees clusters using the image's refcounts.
//!
//! A refcount is increased before its cluster is referenced, and decreased durably after the last reference is gone
//! (`image.rs`, `flush`). A power failure therefore only leaves leaked clusters, which take space but do no harm.

use std::io::{self, ErrorKind};
use std::ops::Range;

use super::header::{CLUSTERS_MAX, COUNTS_AT, Header, TABLE_BYTES_MAX};
use super::tables::{Kind, Tables};

/// The maximum number of free ranges kept in memory. Others are found again through the refcounts.
const FREE_RANGES_MAX: usize = 32 << 10;

/// The refcounts of an image, and where to look for free clusters.
#[derive(Debug)]
pub struct Counts {
    cluster_bits: u32,
    order: u32,
    per_block: u64,
    /// The offset of the refcount table, and its number of entries.
    table: (u64, u64),
    /// Clusters below are in use, in `free`, or no longer tracked.
    next: u64,
    free: Vec<Range<u64>>,
}

impl Counts {
    /// The refcounts described by `header`.
    pub fn new(header: &Header) -> Counts {
        Counts {
            cluster_bits: header.cluster_bits,
            order: header.refcount_order,
            per_block: header.counts_per_block(),
            table: (header.counts.0, header.counts.1 / 8),
            next: 0,
            free: Vec::new(),
        }
    }

    /// Allocates a cluster with a refcount of one.
    pub fn allocate(&mut self, tables: &mut Tables) -> io::Result<u64> {
        while let Some(range) = self.free.last_mut() {
            let Some(cluster) = range.next() else {
                self.free.pop();
                continue;
            };
            if self.get(tables, cluster)? == 0 {
                self.set(tables, cluster, 1)?;
                return Ok(cluster);
            }
        }
        loop {
            let cluster = self.next;
            if cluster >= CLUSTERS_MAX {
                return Err(io::Error::new(
                    ErrorKind::StorageFull,
                    "the image has reached its maximum number of clusters",
                ));
            }
            let range = cluster / self.per_block;
            if range >= self.table.1 {
                self.grow_table(tables)?;
            } else if self.block(tables, range)?.is_none() {
                // The whole range is unused.
                self.add_block(tables, range, cluster)?;
            } else if self.get(tables, cluster)? == 0 {
                self.set(tables, cluster, 1)?;
                self.next += 1;
                return Ok(cluster);
            }
            self.next = self.next.max(cluster + 1);
        }
    }

    /// Decreases the refcount of `cluster`, and returns whether it is free now.
    pub fn release(&mut self, tables: &mut Tables, cluster: u64) -> io::Result<bool> {
        let count = self.get(tables, cluster)?;
        // In an inconsistent image the refcount may already be zero.
        if count == 0 {
            return Ok(false);
        }
        self.set(tables, cluster, count - 1)?;
        if count > 1 {
            return Ok(false);
        }
        tables.forget(cluster << self.cluster_bits, 1 << self.cluster_bits);
        let ranges = self.free.len();
        match self.free.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ if ranges < FREE_RANGES_MAX => self.free.push(cluster..cluster + 1),
            _ => self.next = self.next.min(cluster),
        }
        Ok(true)
    }

    /// The refcount of `cluster`.
    pub fn get(&self, tables: &mut Tables, cluster: u64) -> io::Result<u64> {
        let Some(block) = self.block(tables, cluster / self.per_block)? else { return Ok(0) };
        let (at, bit) = self.place(block, cluster);
        Ok(read(tables.bytes(Kind::Counts, at)?, bit, self.order))
    }

    /// Sets the refcount of `cluster`, if its refcount block exists.
    pub fn set(&self, tables: &mut Tables, cluster: u64, count: u64) -> io::Result<()> {
        let block = self.block(tables, cluster / self.per_block)?.ok_or(ErrorKind::NotFound)?;
        let (at, bit) = self.place(block, cluster);
        write(tables.bytes_mut(Kind::Counts, at)?, bit, self.order, count);
        Ok(())
    }

    /// The offset of the refcount block for the clusters of `range`.
    pub fn block(&self, tables: &mut Tables, range: u64) -> io::Result<Option<u64>> {
        if range >= self.table.1 {
            return Ok(None);
        }
        let offset = tables.get(Kind::Counts, self.table.0 + 8 * range)?;
        Ok((offset != 0).then_some(offset))
    }

    /// Adds a refcount block for `range`, a table entry, at `cluster`, which lies within that range.
    pub fn add_block(&mut self, tables: &mut Tables, range: u64, cluster: u64) -> io::Result<()> {
        self.make_block(tables, cluster)?;
        // The block must be written before it is referenced.
        tables.write(Kind::Counts)?;
        tables.sync()?;
        self.enter_block(tables, range, cluster)
    }

    /// Creates a block at `cluster` that counts itself. It must be durable before it is entered in the table.
    pub fn make_block(&self, tables: &mut Tables, cluster: u64) -> io::Result<()> {
        let block = cluster << self.cluster_bits;
        tables.clear(block, 1 << self.cluster_bits)?;
        let (at, bit) = self.place(block, cluster);
        write(tables.bytes_mut(Kind::Counts, at)?, bit, self.order, 1);
        Ok(())
    }

    /// Enters the block at `cluster` in the table entry of `range`.
    pub fn enter_block(&self, tables: &mut Tables, range: u64, cluster: u64) -> io::Result<()> {
        tables.set(Kind::Counts, self.table.0 + 8 * range, cluster << self.cluster_bits)
    }

    /// Moves the table to the end of the file with twice the capacity. The blocks that cover its new location precede
    /// it.
    fn grow_table(&mut self, tables: &mut Tables) -> io::Result<()> {
        let full =
            || io::Error::new(ErrorKind::StorageFull, "the refcount table of the image has reached its maximum size");
        let (cluster_bytes, per_cluster) = (1_u64 << self.cluster_bits, (1_u64 << self.cluster_bits) / 8);
        let (old, entries) = self.table;
        let first = entries * self.per_block;
        let mut table_clusters = (2 * entries).div_ceil(per_cluster).max(1);
        let blocks = loop {
            let blocks = blocks_for(table_clusters, self.per_block);
            if table_clusters * per_cluster >= entries + blocks {
                break blocks;
            }
            table_clusters += 1;
        };
        let new = (first + blocks) << self.cluster_bits;
        if table_clusters * cluster_bytes > TABLE_BYTES_MAX || first + blocks + table_clusters > CLUSTERS_MAX {
            return Err(full());
        }
        tables.clear(first << self.cluster_bits, (blocks + table_clusters) * cluster_bytes)?;
        for cluster in first..first + blocks + table_clusters {
            let block = first + (cluster - first) / self.per_block;
            let (at, bit) = self.place(block << self.cluster_bits, cluster);
            write(tables.bytes_mut(Kind::Counts, at)?, bit, self.order, 1);
        }
        for index in 0..entries {
            let block = tables.get(Kind::Counts, old + 8 * index)?;
            tables.set(Kind::Counts, new + 8 * index, block)?;
        }
        for index in 0..blocks {
            tables.set(Kind::Counts, new + 8 * (entries + index), (first + index) << self.cluster_bits)?;
        }
        tables.write(Kind::Counts)?;
        tables.sync()?;
        let pointer = [&new.to_be_bytes()[..], &(table_clusters as u32).to_be_bytes()].concat();
        tables.medium.write(&pointer, COUNTS_AT)?;
        // From here on either may be the table, and further refcounts are entered only in the new one.
        tables.sync()?;
        self.table = (new, table_clusters * per_cluster);
        self.next = first + blocks + table_clusters;
        for cluster in 0..(8 * entries).div_ceil(cluster_bytes) {
            self.release(tables, (old >> self.cluster_bits) + cluster)?;
        }
        Ok(())
    }

    /// The byte within its block where the refcount of `cluster` starts, and the bit in that byte.
    fn place(&self, block: u64, cluster: u64) -> (u64, u32) {
        let bits = (cluster % self.per_block) << self.order;
        (block + bits / 8, (bits % 8) as u32)
    }
}

/// The number of blocks that cover themselves and `table_clusters` after them.
fn blocks_for(table_clusters: u64, per_block: u64) -> u64 {
    let mut blocks = 1;
    while blocks * per_block < blocks + table_clusters {
        blocks += 1;
    }
    blocks
}

/// Reads the refcount of `1 << order` bits that starts at `bit` of the first of `bytes`.
pub fn read(bytes: &[u8], bit: u32, order: u32) -> u64 {
    match order {
        0..3 => u64::from(bytes.first().copied().unwrap_or(0)) >> bit & ((1 << (1 << order)) - 1),
        _ => bytes.iter().take(1 << (order - 3)).fold(0, |count, byte| count << 8 | u64::from(*byte)),
    }
}

fn write(bytes: &mut [u8], bit: u32, order: u32, count: u64) {
    let width_bytes = 1 << order >> 3;
    match bytes.first_mut() {
        Some(byte) if order < 3 => {
            let mask = ((1_u16 << (1 << order)) - 1) as u8;
            *byte = *byte & !(mask << bit) | (count as u8 & mask) << bit;
        }
        _ => {
            let count = count.to_be_bytes();
            bytes.iter_mut().zip(&count[8 - width_bytes..]).for_each(|(to, from)| *to = *from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_are_read_and_written() {
        let block = [0b1110_0100, 0x12, 0x34, 0, 0, 0, 0, 7, 9];
        assert_eq!((0..8).map(|bit| read(&block, bit, 0)).collect::<Vec<_>>(), [0, 0, 1, 0, 0, 1, 1, 1]);
        assert_eq!([0, 2, 4, 6].map(|bit| read(&block, bit, 1)), [0, 1, 2, 3]);
        assert_eq!((read(&block[1..], 0, 2), read(&block[1..], 4, 2)), (2, 1));
        assert_eq!((read(&block[1..], 0, 3), read(&block[2..], 0, 4)), (0x12, 0x3400));
        assert_eq!(read(&block, 0, 6), 0xe412_3400_0000_0007);
        assert_eq!(read(&[], 0, 4), 0);
        for order in 0..=6 {
            let most = u64::MAX >> (64 - (1 << order));
            for bit in (0..8).step_by(1 << order) {
                let mut block = [0xa5; 9];
                write(&mut block, bit, order, most);
                assert_eq!(read(&block, bit, order), most);
                write(&mut block, bit, order, 0);
                assert_eq!((read(&block, bit, order), block[8]), (0, 0xa5));
                write(&mut block, bit, order, 1);
                assert_eq!(read(&block, bit, order), 1, "{order} {bit}");
            }
        }
    }
}
