//! From a place on the disk to one in the file: the two levels of tables, what of them is changed, and the order in which
//! all of it becomes durable.

use std::io;
use std::ops::Range;

use super::check::Survey;
use super::counts::Counts;
use super::header::{AUTOCLEAR_AT, DIRTY, FEATURES_AT, Header};
use super::medium::Medium;
use super::tables::{Kind, Tables};
use super::{Refusal, check};

/// Where an entry of the first and of the second level points to.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// In an entry of the second level: compressed data.
pub const COMPRESSED: u64 = 1 << 62;
/// What an entry points to is used by it alone, and may be written to.
const COPIED: u64 = 1 << 63;
/// In an entry of the second level: reads as zeroes, whatever it points to.
const ZERO: u64 = 1 << 0;
/// Ranges that may wait to be counted as free.
const FREED_RANGES_MAX: usize = 16 << 10;
/// Bytes that may wait to be given back to the host.
const FREED_BYTES_MAX: u64 = 8 << 20;

/// Where a cluster of the disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Nowhere: it reads as zeroes.
    Zero,
    /// Nowhere, but this cluster is kept for it.
    Kept(u64),
    /// At this offset. `own`: nothing else uses it, and it may be written to.
    Data { at: u64, own: bool },
    /// Compressed, in this many bytes from this offset on.
    Packed { at: u64, len_bytes: u64 },
}

/// An open image.
#[derive(Debug)]
pub struct Qcow2Image {
    pub header: Header,
    pub tables: Tables,
    pub counts: Counts,
    pub readonly: bool,
    /// Clusters that nothing points to any more, which the file does not know durably.
    freed: Vec<Range<u64>>,
    freed_clusters: u64,
    /// What was last unpacked: where it was, and the cluster.
    pub unpacked: Option<(u64, Vec<u8>)>,
}

impl Qcow2Image {
    /// The image on `medium`, checked; what its counts lack is added to them if it may be written to.
    pub fn open(medium: Medium, readonly: bool) -> Result<Qcow2Image, Refusal> {
        let header = Header::read(medium.file())?;
        let survey = check::survey(medium.file(), &header)?;
        let mut image = Qcow2Image {
            header,
            tables: Tables::new(medium, &header),
            counts: Counts::new(&header),
            readonly,
            freed: Vec::new(),
            freed_clusters: 0,
            unpacked: None,
        };
        if !readonly {
            image.make_good(&survey)?;
        }
        Ok(image)
    }

    /// Raises the counts that a loss of power left too low, and takes the marks away that say so.
    fn make_good(&mut self, survey: &Survey) -> Result<(), Refusal> {
        let dirty = self.header.features & DIRTY != 0;
        if dirty || survey.uncounted {
            // What they hold is not looked at, so that nobody knows how often it is used.
            if self.header.snapshots {
                return Err(if dirty { Refusal::Dirty } else { Refusal::Damaged(check::UNCOUNTED) });
            }
            self.recount(&survey.uses)?;
            self.flush()?;
        }
        if dirty {
            let features = self.header.features & !DIRTY;
            self.tables.medium.write(&features.to_be_bytes(), FEATURES_AT)?;
        }
        if self.header.autoclear {
            self.tables.medium.write(&[0; 8], AUTOCLEAR_AT)?;
        }
        Ok(())
    }

    /// Has every cluster counted at least as often as `uses` says.
    fn recount(&mut self, uses: &[u16]) -> Result<(), Refusal> {
        self.add_missing_blocks(uses)?;
        let per_block = self.header.counts_per_block();
        for (range, uses) in (0..).zip(uses.chunks(per_block as usize)) {
            for (cluster, uses) in (range * per_block..).zip(uses).filter(|(_, uses)| **uses != 0) {
                let needed = check::needed(*uses);
                if needed > u64::MAX >> (64 - (1 << self.header.refcount_order)) {
                    return Err(Refusal::Damaged("a reference count overflows"));
                }
                if self.counts.get(&mut self.tables, cluster)? < needed {
                    self.counts.set(&mut self.tables, cluster, needed)?;
                }
            }
            self.make_room()?;
        }
        Ok(())
    }

    /// Has every cluster in use be in the range of a block of counts. There may be many to make: the disk is waited for once,
    /// when all of them are there and none is found yet.
    fn add_missing_blocks(&mut self, uses: &[u16]) -> Result<(), Refusal> {
        let per_block = self.header.counts_per_block();
        let mut made = Vec::new();
        for (range, uses) in (0..).zip(uses.chunks(per_block as usize)) {
            if uses.iter().all(|uses| *uses == 0) || self.counts.block(&mut self.tables, range)?.is_some() {
                continue;
            }
            // Behind the last one that is used, all are free.
            let free = uses.iter().position(|uses| *uses == 0).unwrap_or(uses.len()) as u64;
            if free == per_block || range >= self.header.counts.1 / 8 {
                return Err(Refusal::Damaged(check::UNCOUNTED));
            }
            let cluster = range * per_block + free;
            self.counts.make_block(&mut self.tables, cluster)?;
            made.push((range, cluster));
            self.make_room()?;
        }
        if !made.is_empty() {
            self.tables.write(Kind::Counts)?;
            self.tables.sync()?;
        }
        for (range, cluster) in made {
            self.counts.enter_block(&mut self.tables, range, cluster)?;
            self.make_room()?;
        }
        Ok(())
    }

    /// The cluster of the disk that `offset_bytes` is in, and how far into it.
    pub fn cluster_of(&self, offset_bytes: u64) -> (u64, u64) {
        (offset_bytes >> self.header.cluster_bits, offset_bytes & (self.header.cluster_bytes() - 1))
    }

    /// How many clusters one table of the second level maps.
    fn per_table(&self) -> u64 {
        self.header.cluster_bytes() / 8
    }

    /// Where `cluster` of the disk is.
    pub fn mapping(&mut self, cluster: u64) -> io::Result<Mapping> {
        let Some((table, _)) = self.table(cluster)? else { return Ok(Mapping::Zero) };
        let entry = self.tables.get(Kind::Pointers, self.entry_at(table, cluster))?;
        Ok(self.read_entry(entry))
    }

    fn read_entry(&self, entry: u64) -> Mapping {
        let (at, own) = (entry & OFFSET_MASK, entry & COPIED != 0);
        if entry & COMPRESSED != 0 {
            let (at, len_bytes) = packed_place(entry, self.header.cluster_bits);
            return Mapping::Packed { at, len_bytes };
        }
        match (at, entry & ZERO != 0) {
            (0, _) => Mapping::Zero,
            (at, true) => Mapping::Kept(at),
            (at, false) => Mapping::Data { at, own },
        }
    }

    /// The table of the second level for `cluster`, and whether it may be written to.
    fn table(&mut self, cluster: u64) -> io::Result<Option<(u64, bool)>> {
        let entry = self.tables.get(Kind::Pointers, self.first_level_at(cluster))?;
        let table = entry & OFFSET_MASK;
        Ok((table != 0).then_some((table, entry & COPIED != 0)))
    }

    fn first_level_at(&self, cluster: u64) -> u64 {
        self.header.first_level.0 + 8 * (cluster / self.per_table())
    }

    fn entry_at(&self, table: u64, cluster: u64) -> u64 {
        table + 8 * (cluster % self.per_table())
    }

    /// The same table, which is made if there is none, and copied if a snapshot uses it as well.
    fn own_table(&mut self, cluster: u64) -> io::Result<u64> {
        let old = match self.table(cluster)? {
            Some((table, true)) => return Ok(table),
            Some((table, false)) => Some(table),
            None => None,
        };
        let new_cluster = self.counts.allocate(&mut self.tables)?;
        let new = new_cluster << self.header.cluster_bits;
        self.tables.clear(new, self.header.cluster_bytes())?;
        if let Some(old) = old {
            self.copy_table(old, new)?;
            self.free(old, self.header.cluster_bytes());
        }
        self.tables.set(Kind::Pointers, self.first_level_at(cluster), new | COPIED)?;
        Ok(new)
    }

    /// Copies a table of the second level to the file, so that it is there before anything points to it.
    fn copy_table(&mut self, old: u64, new: u64) -> io::Result<()> {
        let mut entries = vec![0; self.header.cluster_bytes() as usize];
        // Nobody has written to it, since it is not ours alone: in the file it is as it is.
        self.tables.medium.read(&mut entries, old)?;
        for bytes in entries.as_chunks_mut().0 {
            let entry = u64::from_be_bytes(*bytes);
            // What the snapshot uses too is not for one of them to write to.
            if entry & COMPRESSED == 0 {
                *bytes = (entry & !COPIED).to_be_bytes();
            }
        }
        self.tables.medium.write(&entries, new)
    }

    /// Has `cluster` of the disk be the file's cluster at `at` from now on, and that alone.
    pub fn map(&mut self, cluster: u64, at: u64) -> io::Result<()> {
        self.change(cluster, at | COPIED, at)
    }

    /// Has `cluster` of the disk be nowhere.
    pub fn unmap(&mut self, cluster: u64) -> io::Result<()> {
        self.change(cluster, 0, 0)
    }

    /// Changes the entry of `cluster`, and frees what it pointed to unless it stays in use at `kept`.
    fn change(&mut self, cluster: u64, entry: u64, kept: u64) -> io::Result<()> {
        let table = self.own_table(cluster)?;
        let at = self.entry_at(table, cluster);
        let old = self.tables.get(Kind::Pointers, at)?;
        self.tables.set(Kind::Pointers, at, entry)?;
        match self.read_entry(old) {
            Mapping::Data { at, .. } | Mapping::Kept(at) if at != kept => self.free(at, self.header.cluster_bytes()),
            Mapping::Packed { at, len_bytes } => self.free(at, len_bytes),
            _ => {}
        }
        Ok(())
    }

    /// The next cluster of the disk at or behind `cluster` whose entry is not 0, and in front of `end`.
    pub fn next_mapped(&mut self, mut cluster: u64, end: u64) -> io::Result<Option<u64>> {
        while cluster < end {
            let Some((table, _)) = self.table(cluster)? else {
                cluster = (cluster / self.per_table() + 1) * self.per_table();
                continue;
            };
            if self.tables.get(Kind::Pointers, self.entry_at(table, cluster))? != 0 {
                return Ok(Some(cluster));
            }
            cluster += 1;
        }
        Ok(None)
    }

    /// A cluster of the file that nothing uses: its offset.
    pub fn allocate(&mut self) -> io::Result<u64> {
        Ok(self.counts.allocate(&mut self.tables)? << self.header.cluster_bits)
    }

    /// Takes one use from each cluster of the range, when nothing points to it durably.
    fn free(&mut self, at: u64, len_bytes: u64) {
        self.unpacked = None;
        let clusters = at >> self.header.cluster_bits..(at + len_bytes).div_ceil(self.header.cluster_bytes());
        self.freed_clusters += clusters.end - clusters.start;
        match self.freed.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.freed.push(clusters),
        }
    }

    /// Whether so much waits to be given back that it is time for it.
    pub fn has_much_to_free(&self) -> bool {
        self.freed.len() >= FREED_RANGES_MAX || self.freed_clusters << self.header.cluster_bits >= FREED_BYTES_MAX
    }

    /// Keeps the tables within their bound.
    pub fn make_room(&mut self) -> io::Result<()> {
        if self.tables.are_full() {
            self.tables.drop_unused();
            if self.tables.are_half_full() {
                self.flush()?;
                self.tables.drop_unused();
            }
        }
        Ok(())
    }

    /// Makes durable whatever was done: data and counts first, then what points to them, then what is free.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.readonly {
            return Ok(());
        }
        self.tables.write(Kind::Counts)?;
        if self.tables.is_at_risk(Kind::Pointers) && self.tables.is_at_risk(Kind::Counts) {
            self.tables.sync()?;
        }
        self.tables.write(Kind::Pointers)?;
        self.tables.sync()?;
        self.release_freed()
    }

    /// Nothing points to these any more: they may be used for other things.
    fn release_freed(&mut self) -> io::Result<()> {
        if self.freed.is_empty() {
            return Ok(());
        }
        self.freed_clusters = 0;
        for range in std::mem::take(&mut self.freed) {
            let mut hole = range.start..range.start;
            for cluster in range {
                if self.counts.release(&mut self.tables, cluster)? {
                    hole.end = cluster + 1;
                } else {
                    self.punch(&hole);
                    hole = cluster + 1..cluster + 1;
                }
            }
            self.punch(&hole);
        }
        // If this is lost, the clusters are counted too often.
        self.tables.write(Kind::Counts)
    }

    fn punch(&mut self, clusters: &Range<u64>) {
        let bits = self.header.cluster_bits;
        self.tables.medium.punch(clusters.start << bits, (clusters.end - clusters.start) << bits);
    }
}

/// Offset and bytes of compressed data, which may begin and end anywhere.
pub fn packed_place(entry: u64, cluster_bits: u32) -> (u64, u64) {
    let offset_bits = 62 - (cluster_bits - 8);
    let at = entry & ((1 << offset_bits) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
    (at, (sectors + 1) * 512 - at % 512)
}
