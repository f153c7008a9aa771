//! From an entry of a table to the file and back: pieces of the image's tables, kept in memory within a bound, and written
//! back in two waves.
//!
//! A piece is a page of a table, however large the image's clusters are. Counts are one kind and everything that points to
//! clusters is the other, because the one has to be durable before the other may be written (`image.rs`, `flush`).

use std::collections::HashMap;
use std::io;
use std::mem;

use super::header::Header;
use super::medium::Medium;

/// Of a table, as much as a page of the host's: it is read and written at once.
const PIECE_BYTES: u64 = 4096;
/// What may be kept. Entries for 32 GiB of a disk of the usual clusters.
pub const CACHE_BYTES: u64 = 4 << 20;

/// What stands in a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Blocks of counts, and the table of these.
    Counts,
    /// The first and the second level.
    Pointers,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// As it is in the file, durably.
    Clean,
    /// Not yet in the file.
    Dirty,
    /// In the file, but it may be lost with the host's power.
    Written,
}

#[derive(Debug)]
struct Piece {
    bytes: Box<[u8]>,
    kind: Kind,
    state: State,
    /// Since pieces were last dropped.
    used: bool,
}

/// The file and what is kept of its tables.
#[derive(Debug)]
pub struct Tables {
    /// The file.
    pub medium: Medium,
    /// By offset in the file.
    pieces: HashMap<u64, Piece>,
    piece_bytes: u64,
    pieces_max: usize,
}

impl Tables {
    /// Nothing of them yet.
    pub fn new(medium: Medium, header: &Header) -> Tables {
        let piece_bytes = PIECE_BYTES.min(header.cluster_bytes());
        Tables { medium, pieces: HashMap::new(), piece_bytes, pieces_max: (CACHE_BYTES / piece_bytes) as usize }
    }

    /// The entry at `at`, a multiple of 8.
    pub fn get(&mut self, kind: Kind, at: u64) -> io::Result<u64> {
        Ok(self.bytes(kind, at)?.first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes)))
    }

    /// Changes the entry at `at`, a multiple of 8.
    pub fn set(&mut self, kind: Kind, at: u64, entry: u64) -> io::Result<()> {
        if let Some(bytes) = self.bytes_mut(kind, at)?.first_chunk_mut() {
            *bytes = entry.to_be_bytes();
        }
        Ok(())
    }

    /// What stands at `at` and behind it, up to the end of its piece.
    pub fn bytes(&mut self, kind: Kind, at: u64) -> io::Result<&[u8]> {
        let skip = (at % self.piece_bytes) as usize;
        Ok(&self.piece(kind, at)?.bytes[skip..])
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self, kind: Kind, at: u64) -> io::Result<&mut [u8]> {
        let skip = (at % self.piece_bytes) as usize;
        let piece = self.piece(kind, at)?;
        piece.state = State::Dirty;
        Ok(&mut piece.bytes[skip..])
    }

    fn piece(&mut self, kind: Kind, at: u64) -> io::Result<&mut Piece> {
        let start = at - at % self.piece_bytes;
        if !self.pieces.contains_key(&start) {
            // Who looks through many tables and changes none keeps no more of them than may be kept either.
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

    /// Writes what was changed of `kind`.
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

    /// Makes all that was written durable, tables and data. What could not be made so is written anew the next time.
    pub fn sync(&mut self) -> io::Result<()> {
        let result = self.medium.sync();
        let state = if result.is_ok() { State::Clean } else { State::Dirty };
        self.pieces.values_mut().filter(|piece| piece.state == State::Written).for_each(|piece| piece.state = state);
        result
    }

    /// Whether there is something of `kind` that a loss of power would take.
    pub fn is_at_risk(&self, kind: Kind) -> bool {
        self.pieces.values().any(|piece| piece.kind == kind && piece.state != State::Clean)
    }

    /// Whether as much is kept as may be.
    pub fn are_full(&self) -> bool {
        self.pieces.len() >= self.pieces_max
    }

    /// Whether half of what may be kept is.
    pub fn are_half_full(&self) -> bool {
        self.pieces.len() >= self.pieces_max / 2
    }

    /// Bytes that are kept.
    #[cfg(test)]
    pub fn kept_bytes(&self) -> u64 {
        self.pieces.len() as u64 * self.piece_bytes
    }

    /// Forgets what is in the file anyway and was not used since this was last called.
    pub fn drop_unused(&mut self) {
        self.pieces.retain(|_, piece| piece.state != State::Clean || mem::take(&mut piece.used));
    }

    /// Forgets what was kept of a range that is no table any more.
    pub fn forget(&mut self, offset_bytes: u64, len_bytes: u64) {
        if len_bytes / self.piece_bytes > self.pieces.len() as u64 {
            self.pieces.retain(|start, _| !(offset_bytes..offset_bytes + len_bytes).contains(start));
        } else {
            for start in (offset_bytes..offset_bytes + len_bytes).step_by(self.piece_bytes as usize) {
                self.pieces.remove(&start);
            }
        }
    }

    /// Makes a new table of zeroes of the range. Whatever is to point to it may do so once the file has been synced.
    pub fn clear(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.forget(offset_bytes, len_bytes);
        self.medium.zero(offset_bytes, len_bytes)?;
        self.medium.extend(offset_bytes + len_bytes)
    }
}
