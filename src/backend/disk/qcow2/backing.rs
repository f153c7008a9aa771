//! What an image reads where it has no data of its own: a raw or qcow2 disk that nobody writes to.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::Refusal;
use super::image::Qcow2Image;
use super::medium::{Medium, fill_with_zeroes};
use crate::memory::GuestBuffers;

/// A backing file. It reads as zeroes beyond its end.
#[derive(Debug)]
pub struct Backing {
    content: Content,
    capacity_bytes: u64,
}

#[derive(Debug)]
enum Content {
    Raw(Medium),
    Qcow2(Box<Qcow2Image>),
}

impl Backing {
    /// The descriptors of this image and those behind it.
    pub fn fds(&self) -> Vec<RawFd> {
        match &self.content {
            Content::Raw(medium) => vec![medium.as_raw_fd()],
            Content::Qcow2(image) => image.fds(),
        }
    }

    /// The plain content of `file`, a file or a block device.
    pub fn raw(file: File) -> io::Result<Backing> {
        let medium = Medium::new(file)?;
        Ok(Backing { capacity_bytes: medium.len_bytes(), content: Content::Raw(medium) })
    }

    /// The qcow2 image in `file`, with a backing file of its own, or none.
    pub fn qcow2(file: File, backing: Option<Backing>) -> Result<Backing, Refusal> {
        let image = Qcow2Image::open(Medium::new(file)?, true, backing)?;
        Ok(Backing { capacity_bytes: image.header.size_bytes, content: Content::Qcow2(Box::new(image)) })
    }

    /// The size, beyond which it reads as zeroes.
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    /// Fills `buffers` with the content at `offset_bytes`.
    pub fn read_into(&mut self, buffers: &mut GuestBuffers, offset_bytes: u64) -> io::Result<()> {
        let len_bytes = buffers.len_bytes().min(self.capacity_bytes.saturating_sub(offset_bytes));
        let mut within = buffers.split_front(len_bytes);
        match &mut self.content {
            Content::Raw(medium) => medium.read_into(&mut within, offset_bytes)?,
            Content::Qcow2(image) => image.read(&mut within, offset_bytes)?,
        }
        fill_with_zeroes(buffers);
        Ok(())
    }

    /// Fills `bytes` with the content at `offset_bytes`.
    pub fn read(&mut self, bytes: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let len = (bytes.len() as u64).min(self.capacity_bytes.saturating_sub(offset_bytes)) as usize;
        let (within, beyond) = bytes.split_at_mut(len);
        beyond.fill(0);
        match &mut self.content {
            Content::Raw(medium) => medium.read(within, offset_bytes),
            Content::Qcow2(image) => image.copy_out(within, offset_bytes),
        }
    }
}
