//! From a request to a qcow2 image: done when `submit` returns.
//!
//! The image is one file that is already open: whatever other file it names is never looked for. `check.rs` looks at all of
//! its tables first. What stands in them by then is only what was checked or what was written here.

use std::fs::File;
use std::io;

use super::{BlockingDisk, Request};
use image::Qcow2Image;
use medium::Medium;

mod access;
mod check;
mod counts;
mod header;
mod image;
mod medium;
mod packed;
#[cfg(test)]
mod power_cut;
mod tables;
#[cfg(test)]
mod tests;

/// Why an image is not used.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Another file, or none.
    #[error("is not a qcow2 image (add `,format=raw` to use it as a raw image)")]
    NotQcow2,
    /// Another layout than those that are known.
    #[error("has unsupported qcow2 version {0}: convert it with `qemu-img convert -O qcow2`")]
    Version(u32),
    /// A file of the host's that whoever made the image has chosen.
    #[error("has a backing file, which is not supported: merge both into one image with `qemu-img convert -O qcow2`")]
    BackingFile,
    /// The same.
    #[error("has an external data file, which is not supported: convert it with `qemu-img convert -O qcow2`")]
    ExternalData,
    /// What is in it would be taken for the disk's contents.
    #[error("is encrypted, which is not supported: decrypt it with `qemu-img convert`")]
    Encrypted,
    /// Entries of another shape.
    #[error(
        "has extended L2 entries, which are not supported: convert it with \
         `qemu-img convert -O qcow2 -o extended_l2=off OLD NEW`"
    )]
    ExtendedL2,
    /// Whoever does not know these may not open it.
    #[error("uses unknown qcow2 features ({0:#x}): convert it with `qemu-img convert -O qcow2`")]
    Feature(u64),
    /// Whoever wrote to it last did not come to an end, and it has snapshots.
    #[error("was not closed cleanly: repair it with `qemu-img check -r all`")]
    Dirty,
    /// Its tables contradict each other, or the file, by accident or not.
    #[error("is corrupted, {0}: if you trust its origin, repair it with `qemu-img check -r all`")]
    Damaged(&'static str),
    /// It would take too much time or memory to look at.
    #[error("has too many clusters: make them larger with `qemu-img convert -O qcow2 -o cluster_size=2M`")]
    TooLarge,
    /// Another compression than deflate and Zstandard.
    #[error("uses an unknown compression type ({0}): convert it with `qemu-img convert -O qcow2`")]
    Compression(u8),
    /// Whatever else is wrong with it.
    #[error("cannot be used as qcow2: {0}")]
    Bad(#[from] io::Error),
}

/// A qcow2 image. Dropping it writes what it holds back.
#[derive(Debug)]
pub struct Qcow2Disk {
    image: Qcow2Image,
}

impl Qcow2Disk {
    /// The most memory that an open image holds, in bytes, whatever its clusters: the pieces of its tables and what finds
    /// them, ranges of free clusters, and a cluster of 2 MiB, unpacked, with its decoder's window, and packed at twice that.
    pub const BUDGET_BYTES: u64 = 2 * tables::CACHE_BYTES + (1 << 20) + ((2 + 8 + 4) << 20);

    /// The image in `file`, which is open for writing too unless `readonly`.
    pub fn open(file: File, readonly: bool) -> Result<Qcow2Disk, Refusal> {
        Qcow2Disk::on(Medium::new(file)?, readonly)
    }

    fn on(medium: Medium, readonly: bool) -> Result<Qcow2Disk, Refusal> {
        Ok(Qcow2Disk { image: Qcow2Image::open(medium, readonly)? })
    }

    /// Size of the disk that the image describes.
    pub fn capacity_bytes(&self) -> u64 {
        self.image.header.size_bytes
    }
}

impl Drop for Qcow2Disk {
    fn drop(&mut self) {
        if let Err(error) = self.image.flush() {
            log::warn!("write back the tables of a qcow2 image: {error}");
        }
    }
}

impl BlockingDisk for Qcow2Disk {
    fn execute(&mut self, request: &mut Request) -> io::Result<()> {
        self.image.execute(request)
    }
}
