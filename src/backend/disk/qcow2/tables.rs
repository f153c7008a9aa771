//! A bounded write-back cache of the image's tables, with two classes of entries.
//!
//! A cached page has a fixed size, independent of the cluster size. Refcounts and references form separate classes,
//! because refcounts must be durable before references are written (`image.rs`, `flush`).

use std::collections::HashMap;
use std::io;
use std::mem;

use super::header::Header;
use super::medium::Medium;

/// The size of a cached page, the same as the host's.
const PIECE_BYTES: u64 = 4096;
/// The maximum size of the cache: entries for 32 GiB with the default cluster size.
pub const CACHE_BYTES: u64 = 4 << 20;

/// The class of a cached page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Refcount blocks and the refcount table.
    Counts,
    /// L1 and L2 tables.
    Pointers,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The same as in the file, durably.
    Clean,
    /// Not written to the file.
    Dirty,
    /// Written to the file, but not durable.
    Written,
}

#[derive(Debug)]
struct Piece {
    bytes: Box<[u8]>,
    kind: Kind,
    state: State,
    /// Used since unused pages were last dropped.
    used: bool,
}

/// The file and its cached tables.
#[derive(Debug)]
pub struct Tables {
    /// The file.
    pub medium: Medium,
    /// By file offset.
    pieces: HashMap<u64, Piece>,
    piece_bytes: u64,
    pieces_max: usize,
}

impl Tables {
    /// Creates an empty cache.
    pub fn new(medium: Medium, header: &Header) -> Tables {
        let piece_bytes = PIECE_BYTES.min(header.cluster_bytes());
        Tables { medium, pieces: HashMap::new(), piece_bytes, pieces_max: (CACHE_BYTES / piece_bytes) as usize }
    }

    /// Reads the entry at `at`, a multiple of 8.
    pub fn get(&mut self, kind: Kind, at: u64) -> io::Result<u64> {
        Ok(self.bytes(kind, at)?.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)))
    }

    /// Writes the entry at `at`, a multiple of 8.
    pub fn set(&mut self, kind: Kind, at: u64, entry: u64) -> io::Result<()> {
        if let Some(bytes) = self.bytes_mut(kind, at)?.first_chunk_mut() {
            *bytes = entry.to_be_bytes();
        }
        Ok(())
    }

    /// The bytes from `at` to the end of its page.
    pub fn bytes(&mut self, kind: Kind, at: u64) -> io::Result<&[u8]> {
        let skip = (at % self.piece_bytes) as usize;
        Ok(&self.piece(kind, at)?.bytes[skip..])
    }

    /// The same, mutable.
    pub fn bytes_mut(&mut self, kind: Kind, at: u64) -> io::Result<&mut [u8]> {
        let skip = (at % self.piece_bytes) as usize;
        let piece = self.piece(kind, at)?;
        piece.state = State::Dirty;
        Ok(&mut piece.bytes[skip..])
    }

    fn piece(&mut self, kind: Kind, at: u64) -> io::Result<&mut Piece> {
        let start = at - at % self.piece_bytes;
        if !self.pieces.contains_key(&start) {
            // Clean pages are also limited when many tables are read.
            if self.are_full() {
                self.drop_unused();
            }
            let mut bytes = vec![0; self.piece_bytes as usize].into_boxed_slice();
            self.medium.read(&mut bytes, start)?;
            self.pieces.insert(start, Piece { bytes, kind, state: State::Clean, used: true });
        }
        let piece = self.pieces.get_mut(&start).ok_or(io::ErrorKind::NotFound)?;
        piece.used = true;
        Ok(piece)
    }

    /// Writes the dirty pages of class `kind`.
    pub fn write(&mut self, kind: Kind) -> io::Result<()> {
        let changed =
            |(start, piece): (&u64, &Piece)| (piece.kind == kind && piece.state == State::Dirty).then_some(*start);
        let mut starts: Vec<u64> = self.pieces.iter().filter_map(changed).collect();
        starts.sort_unstable();
        for start in starts {
            if let Some(piece) = self.pieces.get_mut(&start) {
                self.medium.write(&piece.bytes, start)?;
                piece.state = State::Written;
            }
        }
        Ok(())
    }

    /// Makes all written tables and data durable. After a failure they are written again.
    pub fn sync(&mut self) -> io::Result<()> {
        let result = self.medium.sync();
        let state = if result.is_ok() { State::Clean } else { State::Dirty };
        self.pieces.values_mut().filter(|piece| piece.state == State::Written).for_each(|piece| piece.state = state);
        result
    }

    /// Whether changes of class `kind` are not durable.
    pub fn is_at_risk(&self, kind: Kind) -> bool {
        self.pieces.values().any(|piece| piece.kind == kind && piece.state != State::Clean)
    }

    /// Whether the cache is full.
    pub fn are_full(&self) -> bool {
        self.pieces.len() >= self.pieces_max
    }

    /// Whether the cache is half full.
    pub fn are_half_full(&self) -> bool {
        self.pieces.len() >= self.pieces_max / 2
    }

    /// The size of the cached pages.
    #[cfg(test)]
    pub fn kept_bytes(&self) -> u64 {
        self.pieces.len() as u64 * self.piece_bytes
    }

    /// Drops clean pages that were not used since the last call.
    pub fn drop_unused(&mut self) {
        self.pieces.retain(|_, piece| piece.state != State::Clean || mem::take(&mut piece.used));
    }

    /// Drops cached pages of a range that is no longer a table.
    pub fn forget(&mut self, offset_bytes: u64, len_bytes: u64) {
        if len_bytes / self.piece_bytes > self.pieces.len() as u64 {
            self.pieces.retain(|start, _| !(offset_bytes..offset_bytes + len_bytes).contains(start));
        } else {
            for start in (offset_bytes..offset_bytes + len_bytes).step_by(self.piece_bytes as usize) {
                self.pieces.remove(&start);
            }
        }
    }

    /// Initializes a new table with zeroes. It may be referenced once the file has been synced.
    pub fn clear(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.forget(offset_bytes, len_bytes);
        self.medium.zero(offset_bytes, len_bytes)?;
        self.medium.extend(offset_bytes + len_bytes)
    }
}
