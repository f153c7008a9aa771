//! From a tar stream to its entries, as POSIX (ustar, pax) and GNU tar write them, sparse files and long names included.
//!
//! Our own, since the stream is hostile and endless: the libraries read extended headers of any length into memory, and do not
//! tell where a sparse file's holes are.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use self::header::{Header, RECORD_BYTES};
use self::pax::Extended;
use super::tree::Attributes;

/// The longest extended header: names of 4 KiB, and attributes of 64 KiB each.
const EXTENDED_MAX_BYTES: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file; its bytes are read with [`Archive::content`].
    File,
    /// A file of `size_bytes`: only these parts of it are in the archive, the rest is holes.
    Sparse {
        size_bytes: u64,
        parts: Vec<Range<u64>>,
    },
    Directory,
    Symlink(Vec<u8>),
    Hardlink(Vec<u8>),
    Character {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A file in an archive.
#[derive(Debug, Clone)]
pub struct TarEntry {
    pub path: Vec<u8>,
    pub kind: Kind,
    pub attributes: Attributes,
    /// How many bytes of content follow in the archive.
    pub content_bytes: u64,
}

/// A stream whose bytes can be passed over.
pub trait Skip: Read {
    /// Passes over so many bytes; fewer only at the end. Tells how many it was.
    fn skip(&mut self, bytes: u64) -> io::Result<u64>;
}

/// A stream that has to be read to be passed over.
pub struct Stream<R>(pub R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl<R: Read> Skip for Stream<R> {
    fn skip(&mut self, bytes: u64) -> io::Result<u64> {
        io::copy(&mut (&mut self.0).take(bytes), &mut io::sink())
    }
}

/// A tar stream.
pub struct Archive<R> {
    reader: R,
    /// Of the entry's content, what was not read.
    unread_bytes: u64,
    /// What fills its last record up.
    padding_bytes: u64,
}

impl<R: Skip> Archive<R> {
    /// The archive that `reader` gives.
    pub fn new(reader: R) -> Archive<R> {
        Archive { reader, unread_bytes: 0, padding_bytes: 0 }
    }

    /// The next entry; `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<TarEntry>> {
        let mut extended = Extended::default();
        loop {
            self.skip_content()?;
            let Some(header) = self.read_header()? else {
                ensure!(extended.is_empty(), "it ends after an extended header");
                return Ok(None);
            };
            match header.kind() {
                b'x' | b'X' => extended.read_pax(&self.read_extended(&header)?)?,
                // Nothing that is kept of a file is the same for all files. What came before it is forgotten: Go's reader, and so
                // Docker, has it for an entry of its own.
                b'g' => {
                    self.read_extended(&header)?;
                    extended = Extended::default();
                }
                b'L' => extended.set_path(&self.read_extended(&header)?),
                b'K' => extended.set_link(&self.read_extended(&header)?),
                // A volume's label.
                b'V' => self.begin_content(header.size_bytes()?)?,
                _ => return self.entry(&header, extended).map(Some),
            }
        }
    }

    /// The content of the entry that came last: as much of it as was not read.
    pub fn content(&mut self) -> Content<'_, R> {
        Content { archive: self }
    }

    /// The stream, where the archive was read to.
    pub fn reader(&self) -> &R {
        &self.reader
    }

    /// The stream behind the end of the archive.
    pub fn into_inner(self) -> R {
        self.reader
    }

    fn entry(&mut self, header: &Header, mut extended: Extended) -> Result<TarEntry> {
        let path = extended.take_path().unwrap_or_else(|| header.path());
        let attributes = extended.attributes(header).with_context(|| shown(&path))?;
        let link = extended.take_link().unwrap_or_else(|| header.link());
        let stored_bytes = match extended.size_bytes() {
            Some(size_bytes) => size_bytes,
            None => header.size_bytes().with_context(|| shown(&path))?,
        };
        let device = || -> Result<(u32, u32)> { Ok((header.major()?, header.minor()?)) };
        let kind = match header.kind() {
            // Before POSIX, a directory was a file whose name ends so.
            0 if path.ends_with(b"/") => Kind::Directory,
            0 | b'0' | b'7' => Kind::File,
            b'S' => Kind::File,
            b'1' => Kind::Hardlink(link),
            b'2' => Kind::Symlink(link),
            b'3' => device().map(|(major, minor)| Kind::Character { major, minor })?,
            b'4' => device().map(|(major, minor)| Kind::Block { major, minor })?,
            b'5' | b'D' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => bail!("{}: unknown entry type {:?}", shown(&path), char::from(other)),
        };
        // Only files have content: what the others say of their size is that of what they are linked to, or nothing.
        let has_content = matches!(kind, Kind::File) || header.kind() == b'D';
        self.begin_content(0)?;
        let kind = match kind {
            Kind::File => self.file(header, &extended, stored_bytes).with_context(|| shown(&path))?,
            kind => {
                self.begin_content(if has_content { stored_bytes } else { 0 })?;
                kind
            }
        };
        Ok(TarEntry { path, kind, attributes, content_bytes: self.unread_bytes })
    }

    /// Finds out whether a file is sparse, which its header, extended header, or content tells.
    fn file(&mut self, header: &Header, extended: &Extended, stored_bytes: u64) -> Result<Kind> {
        let map = if header.kind() == b'S' {
            let map = sparse::read_gnu(header, &mut self.reader)?;
            self.begin_content(stored_bytes)?;
            map
        } else if let Some(size_bytes) = extended.sparse_map_in_content() {
            self.begin_content(stored_bytes)?;
            sparse::read_content(&mut self.content(), size_bytes)?
        } else {
            self.begin_content(stored_bytes)?;
            match extended.sparse_map()? {
                Some(map) => map,
                None => return Ok(Kind::File),
            }
        };
        map.check(self.unread_bytes)?;
        Ok(Kind::Sparse { size_bytes: map.size_bytes, parts: map.parts })
    }

    fn begin_content(&mut self, size_bytes: u64) -> Result<()> {
        ensure!(size_bytes <= i64::MAX as u64, "a file of {size_bytes} bytes is too large");
        self.unread_bytes = size_bytes;
        self.padding_bytes = size_bytes.next_multiple_of(RECORD_BYTES as u64) - size_bytes;
        Ok(())
    }

    fn skip_content(&mut self) -> Result<()> {
        let (unread_bytes, padding_bytes) = (self.unread_bytes, self.padding_bytes);
        (self.unread_bytes, self.padding_bytes) = (0, 0);
        let skipped = self.reader.skip(unread_bytes + padding_bytes)?;
        // Layers whose last file is not filled up are about: Go's library does not mind, so Docker runs them.
        ensure!(skipped >= unread_bytes, "it ends in the middle of a file");
        Ok(())
    }

    fn read_header(&mut self) -> Result<Option<Header>> {
        let mut record = [0; RECORD_BYTES];
        let mut len = 0;
        while len < record.len() {
            match self.reader.read(&mut record[len..])? {
                // Archives without the two records of zeroes at their end are about.
                0 if len == 0 => return Ok(None),
                0 => bail!("it ends in the middle of a header"),
                read => len += read,
            }
        }
        if record == [0; RECORD_BYTES] { Ok(None) } else { Header::parse(record).map(Some) }
    }

    fn read_extended(&mut self, header: &Header) -> Result<Vec<u8>> {
        let size_bytes = header.size_bytes()?;
        ensure!(size_bytes <= EXTENDED_MAX_BYTES, "an extended header of {size_bytes} bytes is too large");
        self.begin_content(size_bytes)?;
        let mut bytes = vec![0; size_bytes as usize];
        self.content().read_exact(&mut bytes).context("it ends in the middle of an extended header")?;
        Ok(bytes)
    }
}

/// An entry's name in a message.
pub fn shown(path: &[u8]) -> String {
    const MAX_BYTES: usize = 200;
    let (start, more) = if path.len() > MAX_BYTES { (&path[..MAX_BYTES], "...") } else { (path, "") };
    format!("{}{more}", start.escape_ascii())
}

/// What is left of an entry's content.
pub struct Content<'a, R> {
    archive: &'a mut Archive<R>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(usize::try_from(self.archive.unread_bytes).unwrap_or(usize::MAX));
        if len == 0 {
            return Ok(0);
        }
        let read = self.archive.reader.read(&mut buffer[..len])?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends in the middle of a file"));
        }
        self.archive.unread_bytes -= read as u64;
        Ok(read)
    }
}
