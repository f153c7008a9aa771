//! Executes requests on an image, in runs of contiguous clusters.

use std::io::{self, ErrorKind};

use super::super::{Operation, Request};
use super::backing::Backing;
use super::image::{Mapping, Qcow2Image};
use super::medium::fill_with_zeroes;
use crate::memory::GuestBuffers;

/// The maximum number of clusters looked up before data is transferred.
const RUN_CLUSTERS_MAX: u64 = 1024;

impl Qcow2Image {
    /// Executes `request`.
    pub fn execute(&mut self, request: &mut Request) -> io::Result<()> {
        let offset_bytes = request.offset_bytes;
        if self.readonly && !matches!(request.operation, Operation::Read | Operation::Flush) {
            return Err(ErrorKind::ReadOnlyFilesystem.into());
        }
        match request.operation {
            Operation::Read => self.read(&mut request.buffers, offset_bytes),
            Operation::Write => self.write(&mut request.buffers, offset_bytes),
            Operation::Flush => self.flush(),
            // A hint: partial clusters are not discarded.
            Operation::Discard { len_bytes } => self.discard(offset_bytes, len_bytes),
            Operation::WriteZeroes { len_bytes, unmap } => self.write_zeroes(offset_bytes, len_bytes, unmap),
        }
    }

    /// Fills `buffers` with the content at `offset_bytes`.
    pub fn read(&mut self, buffers: &mut GuestBuffers, mut offset_bytes: u64) -> io::Result<()> {
        while buffers.len_bytes() > 0 {
            self.make_room()?;
            let (mapping, len_bytes) = self.run_to_read(offset_bytes, buffers.len_bytes())?;
            let mut part = buffers.split_front(len_bytes);
            let skip = self.cluster_of(offset_bytes).1;
            match mapping {
                Mapping::Backing => self.backing()?.read_into(&mut part, offset_bytes)?,
                Mapping::Zero | Mapping::Kept(_) => fill_with_zeroes(&mut part),
                Mapping::Data { at, .. } => self.tables.medium.read_into(&mut part, at + skip)?,
                Mapping::Packed { at, len_bytes: packed_bytes } => {
                    let cluster = self.unpack(at, packed_bytes)?;
                    part.fill(&cluster[skip as usize..][..len_bytes as usize]);
                }
            }
            offset_bytes += len_bytes;
        }
        Ok(())
    }

    /// Fills `bytes` with the content at `offset_bytes`.
    pub fn copy_out(&mut self, mut bytes: &mut [u8], mut offset_bytes: u64) -> io::Result<()> {
        while !bytes.is_empty() {
            self.make_room()?;
            let (mapping, len_bytes) = self.run_to_read(offset_bytes, bytes.len() as u64)?;
            let (part, rest) = bytes.split_at_mut(len_bytes as usize);
            let skip = self.cluster_of(offset_bytes).1;
            match mapping {
                Mapping::Backing => self.backing()?.read(part, offset_bytes)?,
                Mapping::Zero | Mapping::Kept(_) => part.fill(0),
                Mapping::Data { at, .. } => self.tables.medium.read(part, at + skip)?,
                Mapping::Packed { at, len_bytes: packed_bytes } => {
                    part.copy_from_slice(&self.unpack(at, packed_bytes)?[skip as usize..][..part.len()]);
                }
            }
            bytes = rest;
            offset_bytes += len_bytes;
        }
        Ok(())
    }

    fn backing(&mut self) -> io::Result<&mut Backing> {
        self.backing.as_mut().ok_or_else(|| ErrorKind::NotFound.into())
    }

    /// The mapping at `offset_bytes`, and how many of `len_bytes` it covers contiguously.
    fn run_to_read(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<(Mapping, u64)> {
        let cluster_bytes = self.header.cluster_bytes();
        let (cluster, skip) = self.cluster_of(offset_bytes);
        let mapping = self.mapping(cluster)?;
        let mut clusters = 1;
        while clusters * cluster_bytes - skip < len_bytes && clusters < RUN_CLUSTERS_MAX {
            let next = self.mapping(cluster + clusters)?;
            let goes_on = match (mapping, next) {
                (Mapping::Backing, Mapping::Backing) => true,
                (Mapping::Zero | Mapping::Kept(_), Mapping::Zero | Mapping::Kept(_)) => true,
                (Mapping::Data { at, .. }, Mapping::Data { at: next, .. }) => next == at + clusters * cluster_bytes,
                _ => false,
            };
            if !goes_on {
                break;
            }
            clusters += 1;
        }
        Ok((mapping, (clusters * cluster_bytes - skip).min(len_bytes)))
    }

    fn write(&mut self, buffers: &mut GuestBuffers, mut offset_bytes: u64) -> io::Result<()> {
        while buffers.len_bytes() > 0 {
            self.make_room()?;
            let len_bytes = match self.run_in_place(offset_bytes, buffers.len_bytes())? {
                Some((at, len_bytes)) => {
                    self.tables.medium.write_from(&mut buffers.split_front(len_bytes), at)?;
                    len_bytes
                }
                None => self.write_anew(buffers, offset_bytes)?,
            };
            offset_bytes += len_bytes;
        }
        if self.has_much_to_free() { self.flush() } else { Ok(()) }
    }

    /// The file offset of a write at `offset_bytes` that needs no new cluster, and how many bytes it covers.
    fn run_in_place(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<Option<(u64, u64)>> {
        let (Mapping::Data { at, own: true }, mut run_bytes) = self.run_to_read(offset_bytes, len_bytes)? else {
            return Ok(None);
        };
        let (cluster, skip) = self.cluster_of(offset_bytes);
        let clusters = (skip + run_bytes).div_ceil(self.header.cluster_bytes());
        for index in 1..clusters {
            if !matches!(self.mapping(cluster + index)?, Mapping::Data { own: true, .. }) {
                run_bytes = index * self.header.cluster_bytes() - skip;
                break;
            }
        }
        Ok(Some((at + skip, run_bytes)))
    }

    /// Writes the first of `buffers` to new contiguous clusters. Returns the number of bytes.
    fn write_anew(&mut self, buffers: &mut GuestBuffers, offset_bytes: u64) -> io::Result<u64> {
        let cluster_bytes = self.header.cluster_bytes();
        let (cluster, skip) = self.cluster_of(offset_bytes);
        let wanted = (skip + buffers.len_bytes()).div_ceil(cluster_bytes).min(RUN_CLUSTERS_MAX);
        let (mut start, mut clusters) = (0, 0);
        while clusters < wanted && !matches!(self.mapping(cluster + clusters)?, Mapping::Data { own: true, .. }) {
            let at = match self.allocate() {
                // Writes what there was space for.
                Err(_) if clusters > 0 => break,
                at => at?,
            };
            if clusters == 0 {
                start = at;
            } else if at != start + clusters * cluster_bytes {
                self.give_back(at, 1)?;
                break;
            }
            clusters += 1;
        }
        let len_bytes = (clusters * cluster_bytes - skip).min(buffers.len_bytes());
        let written = self
            .fill_edges(offset_bytes, len_bytes, start)
            .and_then(|()| self.tables.medium.write_from(&mut buffers.split_front(len_bytes), start + skip));
        if let Err(error) = written {
            self.give_back(start, clusters)?;
            return Err(error);
        }
        for index in 0..clusters {
            let at = start + index * cluster_bytes;
            if let Err(error) = self.map(cluster + index, at) {
                self.give_back(at, clusters - index)?;
                return Err(error);
            }
        }
        Ok(len_bytes)
    }

    /// Frees new clusters that are not referenced.
    fn give_back(&mut self, at: u64, clusters: u64) -> io::Result<()> {
        let first = at >> self.header.cluster_bits;
        (first..first + clusters).try_for_each(|cluster| self.counts.release(&mut self.tables, cluster).map(drop))
    }

    /// Fills the new clusters at `start`, which are for `len_bytes` of the disk at `offset_bytes`, before and after these.
    fn fill_edges(&mut self, offset_bytes: u64, len_bytes: u64, start: u64) -> io::Result<()> {
        let (_, skip) = self.cluster_of(offset_bytes);
        let end_bytes = offset_bytes + len_bytes;
        let after = end_bytes.next_multiple_of(self.header.cluster_bytes()) - end_bytes;
        self.fill_edge(offset_bytes - skip, skip, start)?;
        self.fill_edge(end_bytes, after, start + skip + len_bytes)
    }

    /// Copies `len_bytes` of the disk at `offset_bytes`, within a cluster, to the file offset `at`, in a new cluster.
    fn fill_edge(&mut self, offset_bytes: u64, len_bytes: u64, at: u64) -> io::Result<()> {
        if len_bytes == 0 {
            return Ok(());
        }
        if matches!(self.mapping(self.cluster_of(offset_bytes).0)?, Mapping::Zero | Mapping::Kept(_)) {
            return self.tables.medium.zero(at, len_bytes);
        }
        let mut bytes = vec![0; len_bytes as usize];
        self.copy_out(&mut bytes, offset_bytes)?;
        self.tables.medium.write(&bytes, at)
    }

    /// Decompresses the cluster at `at`. The last one is cached, since a cluster is seldom read at once.
    fn unpack(&mut self, at: u64, len_bytes: u64) -> io::Result<&[u8]> {
        if self.unpacked.as_ref().is_none_or(|(last, _)| *last != at) {
            // At most twice the cluster size.
            let mut packed = vec![0; len_bytes as usize];
            self.tables.medium.read(&mut packed, at)?;
            let cluster = self.header.compression.unpack(&packed, self.header.cluster_bytes() as usize)?;
            self.unpacked = Some((at, cluster));
        }
        self.unpacked.as_ref().map(|(_, cluster)| &cluster[..]).ok_or_else(|| ErrorKind::NotFound.into())
    }

    fn discard(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        if !self.can_unmap() {
            return Ok(());
        }
        let (first, end) = self.whole_clusters(offset_bytes, len_bytes);
        let mut cluster = first;
        while let Some(mapped) = self.next_mapped(cluster, end)? {
            self.make_room()?;
            self.unmap(mapped)?;
            if self.has_much_to_free() {
                self.flush()?;
            }
            cluster = mapped + 1;
        }
        Ok(())
    }

    /// The clusters entirely within the range. Beyond the end of the disk there is nothing to preserve.
    fn whole_clusters(&self, offset_bytes: u64, len_bytes: u64) -> (u64, u64) {
        let end_bytes = offset_bytes + len_bytes;
        let first = offset_bytes.div_ceil(self.header.cluster_bytes());
        match end_bytes >= self.header.size_bytes {
            true => (first, end_bytes.div_ceil(self.header.cluster_bytes())),
            false => (first, end_bytes >> self.header.cluster_bits),
        }
    }

    fn write_zeroes(&mut self, mut offset_bytes: u64, len_bytes: u64, unmap: bool) -> io::Result<()> {
        if unmap {
            self.discard(offset_bytes, len_bytes)?;
        }
        let end_bytes = offset_bytes + len_bytes;
        while offset_bytes < end_bytes {
            self.make_room()?;
            let (mapping, run_bytes) = self.run_to_read(offset_bytes, end_bytes - offset_bytes)?;
            let (cluster, skip) = self.cluster_of(offset_bytes);
            let (_, whole_end) = self.whole_clusters(offset_bytes, run_bytes);
            let run_bytes = match mapping {
                Mapping::Zero | Mapping::Kept(_) => run_bytes,
                // Data shared with a snapshot must not be modified.
                Mapping::Data { own: true, .. } => {
                    let (at, run_bytes) = self.run_in_place(offset_bytes, run_bytes)?.ok_or(ErrorKind::NotFound)?;
                    self.tables.medium.zero(at, run_bytes)?;
                    run_bytes
                }
                Mapping::Backing if skip == 0 && whole_end > cluster && self.can_unmap() => {
                    (cluster..whole_end).try_for_each(|cluster| self.unmap(cluster))?;
                    run_bytes.min((whole_end - cluster) << self.header.cluster_bits)
                }
                Mapping::Backing | Mapping::Data { .. } | Mapping::Packed { .. } => {
                    let run_bytes = run_bytes.min(self.header.cluster_bytes() - skip);
                    if skip == 0 && whole_end > cluster && self.can_unmap() {
                        self.unmap(cluster)?;
                    } else {
                        self.zero_anew(offset_bytes, run_bytes)?;
                    }
                    run_bytes
                }
            };
            offset_bytes += run_bytes;
        }
        if self.has_much_to_free() { self.flush() } else { Ok(()) }
    }

    /// Zeroes `len_bytes` at `offset_bytes` in a copy of their cluster.
    fn zero_anew(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let (cluster, skip) = self.cluster_of(offset_bytes);
        let at = self.allocate()?;
        let filled = self
            .fill_edges(offset_bytes, len_bytes, at)
            .and_then(|()| self.tables.medium.zero(at + skip, len_bytes))
            // The whole cluster may be zeroed, and an entry must not refer to what is beyond the file.
            .and_then(|()| self.tables.medium.extend(at + skip + len_bytes));
        if let Err(error) = filled {
            self.give_back(at, 1)?;
            return Err(error);
        }
        self.map(cluster, at).or_else(|error| self.give_back(at, 1).and(Err(error)))
    }
}
