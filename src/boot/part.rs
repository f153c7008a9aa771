//! A part of an open file: all of it, or a section of a unified kernel image.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestMemory;

/// A range of a file, which limits all reads. Positions are passed explicitly; the file's own position is not used.
#[derive(Debug)]
pub struct Part {
    file: File,
    start: u64,
    len_bytes: u64,
}

impl Part {
    /// All of `file`, with its current length.
    pub fn whole(file: File) -> io::Result<Part> {
        let len_bytes = file.metadata()?.len();
        Ok(Part { file, start: 0, len_bytes })
    }

    /// `len_bytes` of `file` from `start`. Fails if the file is shorter.
    pub fn of(file: &File, start: u64, len_bytes: u64) -> io::Result<Part> {
        let end = start.checked_add(len_bytes).ok_or(ErrorKind::UnexpectedEof)?;
        if end > file.metadata()?.len() {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(Part { file: file.try_clone()?, start, len_bytes })
    }

    /// The underlying file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the underlying file.
    pub fn into_file(self) -> File {
        self.file
    }

    /// The offset in the file.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Its length.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Reads at `offset` of the part, up to its end.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let left = usize::try_from(self.len_bytes.saturating_sub(offset)).unwrap_or(usize::MAX);
        let len = buffer.len().min(left);
        // Cannot overflow: the end of the part is a valid offset, and `offset` is less if there is anything to read.
        if len == 0 { Ok(0) } else { self.file.read_at(&mut buffer[..len], self.start + offset) }
    }

    /// Reads exactly `buffer` at `offset` of the part.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match self.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(read) => done += read,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads `len_bytes` from `offset` sequentially, or up to the end.
    pub fn reader(&self, offset: u64, len_bytes: u64) -> impl Read {
        Reader { part: self, at: offset, end: offset.saturating_add(len_bytes).min(self.len_bytes) }
    }

    /// Reads `len_bytes` at `offset` directly to guest memory.
    pub fn copy_to(&self, memory: &GuestMemory, address: u64, offset: u64, len_bytes: u64) -> Result<()> {
        let inside = offset.checked_add(len_bytes).is_some_and(|end| end <= self.len_bytes);
        ensure!(inside, "{len_bytes} bytes at offset {offset} are incomplete");
        let mut file = &self.file;
        file.seek(SeekFrom::Start(self.start + offset))?;
        memory
            .read_exact_volatile_from(GuestAddress(address), &mut file, usize::try_from(len_bytes)?)
            .context("read to guest memory")
    }
}

struct Reader<'a> {
    part: &'a Part,
    at: u64,
    end: u64,
}

impl Read for Reader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end.saturating_sub(self.at)).unwrap_or(usize::MAX);
        let len = buffer.len().min(left);
        let read = self.part.read_at(&mut buffer[..len], self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::sample;

    #[test]
    fn nothing_is_read_beyond_the_end_of_a_part() {
        let file = sample::file(b"0123456789");
        let part = Part::of(&file, 3, 4).unwrap();
        let mut text = String::new();
        part.reader(1, 100).read_to_string(&mut text).unwrap();
        assert_eq!(text, "456");
        let mut buffer = [0; 8];
        assert_eq!(part.read_at(&mut buffer, 2).unwrap(), 2);
        for offset in [4, 5, u64::MAX] {
            assert_eq!(part.read_at(&mut buffer, offset).unwrap(), 0, "{offset}");
            assert!(part.read_exact_at(&mut buffer[..1], offset).is_err(), "{offset}");
        }
        part.read_exact_at(&mut buffer[..4], 0).unwrap();
        assert!(part.read_exact_at(&mut buffer[..5], 0).is_err());
    }

    #[test]
    fn a_part_beyond_its_file_is_rejected() {
        let file = sample::file(b"0123456789");
        Part::of(&file, 3, 7).unwrap();
        for (start, len) in [(3, 8), (11, 0), (u64::MAX, 2), (0, u64::MAX)] {
            assert!(Part::of(&file, start, len).is_err(), "{start}+{len}");
        }
    }
}
