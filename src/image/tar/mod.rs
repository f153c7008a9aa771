//! Parses tar streams in POSIX (ustar, pax) and GNU formats, including sparse files and long names.
//!
//! A custom parser, since the stream is untrusted and of unknown size: existing libraries read extended headers of any
//! length into memory, and do not report holes.

mod header;
mod pax;
mod sparse;

use std::io::{self, Read};
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};

use self::header::{Header, RECORD_BYTES};
use self::pax::Extended;
use super::tree::Attributes;

/// The maximum size of an extended header: names of 4 KiB, and attributes of 64 KiB each.
const EXTENDED_MAX_BYTES: u64 = 1 << 20;

/// The type of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file; its content is read with [`Archive::content`].
    File,
    /// A sparse file of `size_bytes`: only these parts are in the archive.
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

/// An entry of an archive.
#[derive(Debug, Clone)]
pub struct TarEntry {
    pub path: Vec<u8>,
    pub kind: Kind,
    pub attributes: Attributes,
    /// The size of the content in the archive.
    pub content_bytes: u64,
}

/// A stream that supports skipping.
pub trait Skip: Read {
    /// Skips `bytes`, or fewer at the end. Returns the number skipped.
    fn skip(&mut self, bytes: u64) -> io::Result<u64>;
}

/// A stream that is skipped by reading.
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
    /// The unread part of the entry's content.
    unread_bytes: u64,
    /// The padding of its last record.
    padding_bytes: u64,
}

impl<R: Skip> Archive<R> {
    /// Creates an archive from `reader`.
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
                // Global headers do not affect files. Like in Go, and so in Docker, extended headers before one are
                // dropped.
                b'g' => {
                    self.read_extended(&header)?;
                    extended = Extended::default();
                }
                b'L' => extended.set_path(&self.read_extended(&header)?),
                b'K' => extended.set_link(&self.read_extended(&header)?),
                // A volume label.
                b'V' => self.begin_content(header.size_bytes()?)?,
                _ => return self.entry(&header, extended).map(Some),
            }
        }
    }

    /// The unread content of the last entry.
    pub fn content(&mut self) -> Content<'_, R> {
        Content { archive: self }
    }

    /// The underlying reader, at its current position.
    pub fn reader(&self) -> &R {
        &self.reader
    }

    /// The underlying reader, after the end of the archive.
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
            // Before POSIX, a trailing slash indicated a directory.
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
        // Only files have content: the size of other entries is that of a link's target, or zero.
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

    /// Determines whether a file is sparse, from its header, extended header, or content.
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
        // Layers with an unpadded last file exist: Go's library accepts them, so Docker runs them.
        ensure!(skipped >= unread_bytes, "it ends in the middle of a file");
        Ok(())
    }

    fn read_header(&mut self) -> Result<Option<Header>> {
        let mut record = [0; RECORD_BYTES];
        let mut len = 0;
        while len < record.len() {
            match self.reader.read(&mut record[len..])? {
                // Archives without the end-of-archive marker exist.
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

/// An entry's path for a message.
pub fn shown(path: &[u8]) -> String {
    const MAX_BYTES: usize = 200;
    let (start, more) = if path.len() > MAX_BYTES { (&path[..MAX_BYTES], "...") } else { (path, "") };
    format!("{}{more}", start.escape_ascii())
}

/// The unread content of an entry.
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
