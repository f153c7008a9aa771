//! The image file: all system calls on it, and its current length.

use std::fs::File;
use std::io::{self, ErrorKind, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;

use super::super::loss::Loss;
use super::super::{ZEROES, write_zeroes_out};
use crate::memory::GuestBuffers;
use crate::sys;

/// An image file.
#[derive(Debug)]
pub struct Medium {
    file: File,
    /// The file's length, unless another process truncated it; it reads as zeroes beyond.
    len_bytes: u64,
    loss: Loss,
    /// Records operations on the file, for power failure tests.
    #[cfg(test)]
    pub log: Option<super::power_cut::Log>,
}

impl AsRawFd for Medium {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Medium {
    /// Creates a medium from `file`.
    pub fn new(file: File) -> io::Result<Medium> {
        // The metadata of a block device does not contain its size.
        let len_bytes = (&file).seek(SeekFrom::End(0))?;
        Ok(Medium {
            file,
            len_bytes,
            loss: Loss::default(),
            #[cfg(test)]
            log: None,
        })
    }

    /// The file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The file's length.
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    /// Reads `bytes` from the file, with zeroes beyond its end. A truncated file is an error.
    pub fn read(&self, bytes: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = offset_bytes + done as u64;
            match self.file.read_at(rest, at) {
                Ok(0) => {
                    self.check_end(at)?;
                    rest.fill(0);
                    break;
                }
                Ok(count) => done += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Fills `buffers` from the file, with zeroes beyond its end. A truncated file is an error.
    pub fn read_into(&self, buffers: &mut GuestBuffers, mut offset_bytes: u64) -> io::Result<()> {
        while buffers.len_bytes() > 0 {
            match sys::disk::read_at(&self.file, buffers, offset_bytes)? {
                0 => {
                    self.check_end(offset_bytes)?;
                    fill_with_zeroes(buffers);
                }
                count => {
                    buffers.advance(count);
                    offset_bytes += count as u64;
                }
            }
        }
        Ok(())
    }

    /// Fails if there is nothing at `offset_bytes` because another process truncated the file.
    fn check_end(&self, offset_bytes: u64) -> io::Result<()> {
        if offset_bytes < self.len_bytes { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Writes all of `bytes`.
    pub fn write(&mut self, bytes: &[u8], offset_bytes: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset_bytes)?;
        self.was_written(offset_bytes, bytes.len() as u64)
    }

    /// Writes all of `buffers`.
    pub fn write_from(&mut self, buffers: &mut GuestBuffers, offset_bytes: u64) -> io::Result<()> {
        let len_bytes = buffers.len_bytes();
        let mut at = offset_bytes;
        while buffers.len_bytes() > 0 {
            match sys::disk::write_at(&self.file, buffers, at)? {
                0 => return Err(ErrorKind::WriteZero.into()),
                count => {
                    buffers.advance(count);
                    at += count as u64;
                }
            }
        }
        self.was_written(offset_bytes, len_bytes)
    }

    /// Makes the range read as zeroes, without allocating space where there is none.
    pub fn zero(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        // It already reads as zeroes beyond the end, and the file must not grow.
        let len_bytes = len_bytes.min(self.len_bytes.saturating_sub(offset_bytes));
        if len_bytes == 0 {
            return Ok(());
        }
        // Writing a few bytes is faster than updating the host file system's extents.
        let few = len_bytes <= ZEROES.len() as u64;
        if few || sys::disk::zero_range(&self.file, offset_bytes, len_bytes).is_err() {
            write_zeroes_out(offset_bytes, len_bytes, |zeroes, at| self.file.write_all_at(zeroes, at))?;
        }
        self.was_written(offset_bytes, len_bytes)
    }

    /// Deallocates the range's space. Its content is no longer needed, so errors of the host are ignored.
    pub fn punch(&mut self, offset_bytes: u64, len_bytes: u64) {
        // Nothing is allocated beyond its end.
        let len_bytes = len_bytes.min(self.len_bytes.saturating_sub(offset_bytes));
        if len_bytes > 0 && sys::disk::punch_hole(&self.file, offset_bytes, len_bytes).is_ok() {
            #[cfg(test)]
            self.record(offset_bytes, len_bytes);
        }
    }

    /// Extends the file to `len_bytes`, if it is shorter.
    pub fn extend(&mut self, len_bytes: u64) -> io::Result<()> {
        if len_bytes > self.len_bytes {
            self.file.set_len(len_bytes)?;
            self.len_bytes = len_bytes;
            #[cfg(test)]
            self.record(len_bytes, 0);
        }
        Ok(())
    }

    /// Makes all writes durable.
    pub fn sync(&self) -> io::Result<()> {
        self.loss.after_flush(self.file.sync_data())?;
        #[cfg(test)]
        if let Some(log) = &self.log {
            log.sync();
        }
        Ok(())
    }

    fn was_written(&mut self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        self.len_bytes = self.len_bytes.max(offset_bytes + len_bytes);
        #[cfg(test)]
        self.record(offset_bytes, len_bytes);
        Ok(())
    }

    #[cfg(test)]
    fn record(&self, offset_bytes: u64, len_bytes: u64) {
        if let Some(log) = &self.log {
            let mut bytes = vec![0; len_bytes as usize];
            self.read(&mut bytes, offset_bytes).unwrap();
            log.write(offset_bytes, bytes);
        }
    }
}

/// Fills the rest of `buffers` with zeroes.
pub fn fill_with_zeroes(buffers: &mut GuestBuffers) {
    while buffers.len_bytes() > 0 {
        buffers.fill(&ZEROES[..buffers.len_bytes().min(ZEROES.len() as u64) as usize]);
    }
}
