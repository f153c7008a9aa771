//! qcow2 disks, with requests complete when `submit` returns.
//!
//! The image and its backing files, if any, are already open: what the image itself refers to is never opened. `check.rs`
//! first examines all of its tables, so that they contain only entries that were validated or written here.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use super::{BlockingDisk, Request};
use crate::foreign;
use image::Qcow2Image;
use medium::Medium;

mod access;
mod backing;
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

pub use backing::Backing;

/// The backing file that an image asks for, chosen by whoever created the image.
#[derive(Debug)]
pub struct BackingName {
    /// Its path.
    name: Vec<u8>,
    /// Its format, empty if not given.
    format: Vec<u8>,
}

/// The option that names this file, safe to print.
impl fmt::Display for BackingName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let name = String::from_utf8_lossy(&self.name);
        write!(f, ",backing={}", foreign::line(&name))?;
        match (&self.format[..], name.ends_with(".qcow2")) {
            (b"qcow2", false) => f.write_str(",backing_format=qcow2"),
            (b"raw", true) => f.write_str(",backing_format=raw"),
            _ => Ok(()),
        }
    }
}

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not a qcow2 image.
    #[error("is not a qcow2 image (add `,format=raw` to use it as a raw image)")]
    NotQcow2,
    /// An unsupported version.
    #[error("has unsupported qcow2 version {0}: convert it with `qemu-img convert -O qcow2`")]
    Version(u32),
    /// A host file chosen by the creator of the image, which is never opened by that name.
    #[error("has a backing file, which is used only if you name it: add `{0}`")]
    BackingFile(BackingName),
    /// A backing file was given.
    #[error("has no backing file: remove `,backing=`")]
    NoBackingFile,
    /// The same for data files.
    #[error("has an external data file, which is not supported: convert it with `qemu-img convert -O qcow2`")]
    ExternalData,
    /// The encrypted content would be taken for the disk's.
    #[error("is encrypted, which is not supported: decrypt it with `qemu-img convert`")]
    Encrypted,
    /// An unsupported entry format.
    #[error(
        "has extended L2 entries, which are not supported: convert it with \
         `qemu-img convert -O qcow2 -o extended_l2=off OLD NEW`"
    )]
    ExtendedL2,
    /// Unknown incompatible features.
    #[error("uses unknown qcow2 features ({0:#x}): convert it with `qemu-img convert -O qcow2`")]
    Feature(u64),
    /// It was not closed properly and has snapshots.
    #[error("was not closed cleanly: repair it with `qemu-img check -r all`")]
    Dirty,
    /// Its tables are inconsistent, accidentally or deliberately.
    #[error("is corrupted, {0}: if you trust its origin, repair it with `qemu-img check -r all`")]
    Damaged(&'static str),
    /// Checking it would take too much time or memory.
    #[error("has too many clusters: make them larger with `qemu-img convert -O qcow2 -o cluster_size=2M`")]
    TooLarge,
    /// A compression type other than deflate and Zstandard.
    #[error("uses an unknown compression type ({0}): convert it with `qemu-img convert -O qcow2`")]
    Compression(u8),
    /// An I/O error or invalid data.
    #[error("cannot be used as qcow2: {0}")]
    Bad(#[from] io::Error),
}

impl Refusal {
    /// The same with names that do not depend on the place of the image at `path`: an image stores the name of its
    /// backing file relative to its own directory.
    pub fn of(mut self, path: &Path) -> Refusal {
        if let (Refusal::BackingFile(BackingName { name, .. }), Some(dir)) = (&mut self, path.parent())
            && !name.starts_with(b"/")
            // A protocol, such as `nbd:`.
            && !name.contains(&b':')
        {
            *name = dir.join(OsStr::from_bytes(name)).into_os_string().into_vec();
        }
        self
    }
}

/// A qcow2 disk. Dropping it writes cached changes.
#[derive(Debug)]
pub struct Qcow2Disk {
    image: Qcow2Image,
}

impl Qcow2Disk {
    /// The maximum memory of an open image, in bytes, for any cluster size: cached table pages with their index, free
    /// ranges, and a decompressed cluster of 2 MiB with the decoder's window and twice its size as compressed data.
    pub const BUDGET_BYTES: u64 = 2 * tables::CACHE_BYTES + (1 << 20) + ((2 + 8 + 4) << 20);

    /// Opens the image in `file`, which is writable unless `readonly`. Clusters that it does not have are read from `backing`,
    /// which must be given exactly if the image has a backing file.
    pub fn open(file: File, readonly: bool, backing: Option<Backing>) -> Result<Qcow2Disk, Refusal> {
        Qcow2Disk::on(Medium::new(file)?, readonly, backing)
    }

    fn on(medium: Medium, readonly: bool, backing: Option<Backing>) -> Result<Qcow2Disk, Refusal> {
        Ok(Qcow2Disk { image: Qcow2Image::open(medium, readonly, backing)? })
    }

    /// The capacity of the disk.
    pub fn capacity_bytes(&self) -> u64 {
        self.image.header.size_bytes
    }

    /// The descriptors of the image and its backing files.
    pub fn fds(&self) -> Vec<RawFd> {
        self.image.fds()
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

    fn settle(&mut self) -> io::Result<()> {
        self.image.flush()
    }
}
