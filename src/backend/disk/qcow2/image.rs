//! Maps disk offsets to file offsets through the L1 and L2 tables, updates them, and orders writes for durability.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};

use super::backing::Backing;
use super::check::Survey;
use super::counts::Counts;
use super::header::{AUTOCLEAR_AT, DIRTY, FEATURES_AT, Header};
use super::medium::Medium;
use super::tables::{Kind, Tables};
use super::{Refusal, check};

/// The offset in an L1 or L2 entry.
pub const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// L2 entry: compressed data.
pub const COMPRESSED: u64 = 1 << 62;
/// The referenced cluster has a refcount of one and may be written.
const COPIED: u64 = 1 << 63;
/// L2 entry: reads as zeroes, with or without an allocated cluster.
const ZERO: u64 = 1 << 0;
/// The maximum number of ranges waiting to be freed.
const FREED_RANGES_MAX: usize = 16 << 10;
/// The maximum number of bytes waiting to be deallocated on the host.
const FREED_BYTES_MAX: u64 = 8 << 20;

/// The mapping of a disk cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mapping {
    /// Unallocated: reads from the backing file, which reaches there.
    Backing,
    /// Unallocated: reads as zeroes.
    Zero,
    /// Reads as zeroes, with this cluster preallocated.
    Kept(u64),
    /// Allocated at this offset. With `own` it is not shared and may be written.
    Data { at: u64, own: bool },
    /// Compressed data of this size at this offset.
    Packed { at: u64, len_bytes: u64 },
}

/// An open image.
#[derive(Debug)]
pub struct Qcow2Image {
    pub header: Header,
    pub tables: Tables,
    pub counts: Counts,
    pub readonly: bool,
    /// The backing file, if there is one.
    pub backing: Option<Backing>,
    /// Clusters that are no longer referenced, but whose references may still be in the file.
    freed: Vec<Range<u64>>,
    freed_clusters: u64,
    /// The last decompressed cluster and its offset.
    pub unpacked: Option<(u64, Vec<u8>)>,
}

impl Qcow2Image {
    /// The descriptors of the image and its backing files.
    pub fn fds(&self) -> Vec<RawFd> {
        let backing = self.backing.as_ref().map_or_else(Vec::new, Backing::fds);
        [vec![self.tables.medium.as_raw_fd()], backing].concat()
    }

    /// Opens and checks the image on `medium`, and repairs refcounts if it is writable.
    pub fn open(medium: Medium, readonly: bool, backing: Option<Backing>) -> Result<Qcow2Image, Refusal> {
        let header = Header::read(medium.file(), backing.is_some())?;
        let survey = check::survey(medium.file(), &header)?;
        let mut image = Qcow2Image {
            header,
            tables: Tables::new(medium, &header),
            counts: Counts::new(&header),
            readonly,
            backing,
            freed: Vec::new(),
            freed_clusters: 0,
            unpacked: None,
        };
        if !readonly {
            image.make_good(&survey)?;
        }
        Ok(image)
    }

    /// Increases refcounts that a power failure left too low, and clears the dirty marks.
    fn make_good(&mut self, survey: &Survey) -> Result<(), Refusal> {
        let dirty = self.header.features & DIRTY != 0;
        if dirty || survey.uncounted {
            // The clusters of snapshots are not examined, so their refcounts are unknown.
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

    /// Raises all refcounts to at least those required by `uses`.
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

    /// Adds missing refcount blocks for clusters in use. There may be many: they are synced once, before any of them is
    /// referenced.
    fn add_missing_blocks(&mut self, uses: &[u16]) -> Result<(), Refusal> {
        let per_block = self.header.counts_per_block();
        let mut made = Vec::new();
        for (range, uses) in (0..).zip(uses.chunks(per_block as usize)) {
            if uses.iter().all(|uses| *uses == 0) || self.counts.block(&mut self.tables, range)?.is_some() {
                continue;
            }
            // All clusters after the last one in use are free.
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

    /// The disk cluster that contains `offset_bytes`, and the offset in it.
    pub fn cluster_of(&self, offset_bytes: u64) -> (u64, u64) {
        (offset_bytes >> self.header.cluster_bits, offset_bytes & (self.header.cluster_bytes() - 1))
    }

    /// The number of clusters mapped by an L2 table.
    fn per_table(&self) -> u64 {
        self.header.cluster_bytes() / 8
    }

    /// The mapping of `cluster`.
    pub fn mapping(&mut self, cluster: u64) -> io::Result<Mapping> {
        let entry = match self.table(cluster)? {
            Some((table, _)) => self.tables.get(Kind::Pointers, self.entry_at(table, cluster))?,
            None => 0,
        };
        let has_backing = |backing: &Backing| backing.capacity_bytes() > cluster << self.header.cluster_bits;
        if entry == 0 && self.backing.as_ref().is_some_and(has_backing) {
            return Ok(Mapping::Backing);
        }
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

    /// The L2 table for `cluster`, and whether it may be written.
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

    /// The L2 table for writing: created if it does not exist, and copied if it is shared with a snapshot.
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

    /// Copies an L2 table to a new location before it is referenced.
    fn copy_table(&mut self, old: u64, new: u64) -> io::Result<()> {
        let mut entries = vec![0; self.header.cluster_bytes() as usize];
        // A shared table has no unwritten changes, so its content in the file is current.
        self.tables.medium.read(&mut entries, old)?;
        for bytes in entries.as_chunks_mut().0 {
            let entry = u64::from_be_bytes(*bytes);
            // Data shared with the snapshot must not be written through either table.
            if entry & COMPRESSED == 0 {
                *bytes = (entry & !COPIED).to_be_bytes();
            }
        }
        self.tables.medium.write(&entries, new)
    }

    /// Maps `cluster` of the disk to the exclusively used file offset `at`.
    pub fn map(&mut self, cluster: u64, at: u64) -> io::Result<()> {
        self.change(cluster, at | COPIED, at)
    }

    /// Whether clusters can be unmapped: without hiding the backing file again, their old data there would reappear.
    pub fn can_unmap(&self) -> bool {
        self.backing.is_none() || !self.header.version_2
    }

    /// Unmaps `cluster`, which then reads as zeroes. Only if [`Self::can_unmap`].
    pub fn unmap(&mut self, cluster: u64) -> io::Result<()> {
        self.change(cluster, if self.backing.is_some() { ZERO } else { 0 }, 0)
    }

    /// Changes the entry of `cluster`, and frees what it referenced, except at `kept`.
    fn change(&mut self, cluster: u64, entry: u64, kept: u64) -> io::Result<()> {
        let table = self.own_table(cluster)?;
        let at = self.entry_at(table, cluster);
        let old = self.tables.get(Kind::Pointers, at)?;
        if old == entry {
            return Ok(());
        }
        self.tables.set(Kind::Pointers, at, entry)?;
        match self.read_entry(old) {
            Mapping::Data { at, .. } | Mapping::Kept(at) if at != kept => self.free(at, self.header.cluster_bytes()),
            Mapping::Packed { at, len_bytes } => self.free(at, len_bytes),
            _ => {}
        }
        Ok(())
    }

    /// The next cluster from `cluster` to `end` whose entry is not 0.
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

    /// Allocates a cluster and returns its offset.
    pub fn allocate(&mut self) -> io::Result<u64> {
        Ok(self.counts.allocate(&mut self.tables)? << self.header.cluster_bits)
    }

    /// Releases the clusters of the range once they are no longer referenced durably.
    fn free(&mut self, at: u64, len_bytes: u64) {
        self.unpacked = None;
        let clusters = at >> self.header.cluster_bits..(at + len_bytes).div_ceil(self.header.cluster_bytes());
        self.freed_clusters += clusters.end - clusters.start;
        match self.freed.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.freed.push(clusters),
        }
    }

    /// Whether a significant amount is waiting to be freed.
    pub fn has_much_to_free(&self) -> bool {
        self.freed.len() >= FREED_RANGES_MAX || self.freed_clusters << self.header.cluster_bits >= FREED_BYTES_MAX
    }

    /// Keeps the cached tables within their limit.
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

    /// Makes all changes durable: first data and refcounts, then references to them, then freed clusters.
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

    /// These clusters are no longer referenced and may be reused.
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
        // If this is lost, the refcounts are only too high.
        self.tables.write(Kind::Counts)
    }

    fn punch(&mut self, clusters: &Range<u64>) {
        let bits = self.header.cluster_bits;
        self.tables.medium.punch(clusters.start << bits, (clusters.end - clusters.start) << bits);
    }
}

/// The offset and size of compressed data, which may start and end anywhere.
pub fn packed_place(entry: u64, cluster_bits: u32) -> (u64, u64) {
    let offset_bits = 62 - (cluster_bits - 8);
    let at = entry & ((1 << offset_bits) - 1);
    let sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
    (at, (sectors + 1) * 512 - at % 512)
}
