//! A stream, read entry by entry. Nothing of the sender's is trusted: what comes has a place where it comes, a name is
//! one name, and of a guest no name comes twice.

use std::io::{self, Read};

use super::{DEPTH_MAX, Entry, NAME_MAX_BYTES, PIECE_BYTES, failure};
use crate::frame::Reader;

/// Reads a stream.
pub struct Entries<R> {
    input: R,
    reader: Reader,
    is_trusted: bool,
    has_begun: bool,
    /// Of each directory that is open, the name that came last.
    open: Vec<Vec<u8>>,
}

impl<R: Read> Entries<R> {
    /// Reads from `input`, which is best buffered. One that is not trusted sends the names of a directory in ascending
    /// order: so what it has made is never what it goes through, or writes to, afterwards.
    pub fn new(input: R, is_trusted: bool) -> Entries<R> {
        Entries { input, reader: Reader::default(), is_trusted, has_begun: false, open: Vec::new() }
    }

    /// The next entry; none at the end. The first one's name is unchecked, and is best ignored. A file's content is to
    /// be taken, by [`Entries::content`], before what follows it.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let entry = self.read()?;
        match (entry.name(), self.open.last_mut()) {
            (None, None) if entry == Entry::End => return Ok(None),
            (None, Some(_)) if entry == Entry::Leave => {
                self.open.pop();
            }
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

    /// Hands the content of the file that came last to `take`, piece by piece.
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

    /// Frames are short, and are read byte by byte no further than they go: a piece's bytes follow.
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

/// Whether a name leads nowhere but to an entry of its directory.
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
