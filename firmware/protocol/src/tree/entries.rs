//! Reads and validates a stream, entry by entry. The sender is not trusted: entries must be in a valid order, names are
//! single components, and a guest cannot send a name twice.

use std::io::{self, Read};

use super::{DEPTH_MAX, Entry, NAME_MAX_BYTES, PIECE_BYTES, failure};
use crate::frame::Reader;

/// Reads a stream.
pub struct Entries<R> {
    input: R,
    reader: Reader,
    is_trusted: bool,
    has_begun: bool,
    /// The last name in each open directory.
    open: Vec<Vec<u8>>,
}

impl<R: Read> Entries<R> {
    /// Reads from `input`, which should be buffered. An untrusted sender must sort the names of a directory: thus it
    /// cannot traverse or overwrite what it has created before.
    pub fn new(input: R, is_trusted: bool) -> Entries<R> {
        Entries { input, reader: Reader::default(), is_trusted, has_begun: false, open: Vec::new() }
    }

    /// The next entry; `None` at the end. The first one's name is not validated, and should be ignored. A file's
    /// content must be read with [`Entries::content`] before the next entry.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let entry = self.read()?;
        match (entry.name(), self.open.last_mut()) {
            (None, None) if entry == Entry::End => return Ok(None),
            (None, Some(_)) if entry == Entry::Leave => {
                self.open.pop();
            }
            (None, Some(_)) if entry.is_mark() => {}
            (Some(_), None) if !self.has_begun && !matches!(entry, Entry::Same(..)) => self.has_begun = true,
            (Some(name), Some(last)) => {
                check_name(name)?;
                if !self.is_trusted && name <= last.as_slice() {
                    return Err(failure("the sender sent names out of order"));
                }
                *last = name.to_vec();
            }
            _ => return Err(nonsense()),
        }
        if entry.is_dir() {
            if self.open.len() >= DEPTH_MAX {
                return Err(failure("the sender sent too many nested directories"));
            }
            self.open.push(Vec::new());
        }
        Ok(Some(entry))
    }

    /// Passes the content of the last file to `take`, in pieces.
    pub fn content(&mut self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let mut piece = Vec::new();
        loop {
            let Entry::Piece(count) = self.read()? else { return Err(nonsense()) };
            match count as usize {
                0 => return Ok(()),
                count @ 1..=PIECE_BYTES => piece.resize(count, 0),
                _ => return Err(failure("the sender sent too much data at once")),
            }
            self.input.read_exact(&mut piece).map_err(|_| gone())?;
            take(&piece)?;
        }
    }

    /// Frames are short, and are read byte by byte because a piece's data may follow.
    fn read(&mut self) -> io::Result<Entry> {
        loop {
            match self.reader.take::<Entry>() {
                Ok(Some(Entry::Failed(why))) => return Err(failure(why)),
                Ok(Some(entry)) => return Ok(entry),
                Ok(None) => {}
                Err(error) => return Err(failure(format!("the sender sent invalid data: {error}"))),
            }
            let mut bytes = [0; 1];
            self.input.read_exact(&mut bytes).map_err(|_| gone())?;
            self.reader.push(&bytes);
        }
    }
}

/// Checks that a name is a single path component.
pub(super) fn check_name(name: &[u8]) -> io::Result<()> {
    let has_length = (1..=NAME_MAX_BYTES).contains(&name.len());
    let leads_on = name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0);
    if has_length && !leads_on { Ok(()) } else { Err(failure("the sender sent an invalid name")) }
}

fn nonsense() -> io::Error {
    failure("the sender sent invalid data")
}

fn gone() -> io::Error {
    failure("the sender closed the connection before everything was sent")
}
