//! Creates a read-only root file system from a merged tree: an EROFS image, supported since Linux 5.15.
//!
//! File contents are written as they arrive ([`Writer::content`]), inodes and directories when the tree is complete
//! ([`Writer::finish`]). The format is described in the kernel's Documentation/filesystems/erofs.rst and
//! fs/erofs/erofs_fs.h. No library supports everything in container images (extended attributes, hard links, device
//! nodes, names of arbitrary bytes) without keeping the whole image in memory.
//!
//! ```text
//! | superblock | file blocks, in order of arrival | full directory blocks | inodes, each with its inline data |
//! ```

mod compress;
mod content;
mod dirent;
mod inode;
mod metadata;
mod superblock;
mod xattr;

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result};

pub use self::content::Content;
use self::content::{Data, Place};
use super::tree::{Attributes, Tree, Xattr};
use superblock::Superblock;

/// The block size, a page on x86.
pub const BLOCK_BYTES: usize = 4096;
/// Incremented when the same tree would result in a different image.
pub const FORMAT_VERSION: u32 = 2;

/// The storage of file contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Uncompressed.
    Plain,
    /// Compressed with LZ4, which every kernel with EROFS supports.
    Lz4,
}

/// An image being written.
pub struct Writer {
    data: Data,
    sparse: bool,
}

impl Writer {
    /// Starts an image in the empty file `image`, with `spill` as temporary storage for short contents.
    pub fn new(image: File, spill: File, form: Form) -> Writer {
        Writer { data: Data::new(image, spill, form), sparse: false }
    }

    /// Writes the content of a file with these attributes.
    pub fn content(&mut self, reader: &mut dyn Read, size_bytes: u64, attributes: &Attributes) -> Result<Content> {
        self.data.take(reader, size_bytes, inode::head_bytes(attributes))
    }

    /// Writes the parts of a sparse file, which follow each other in `reader`; they are in order and do not overlap.
    pub fn sparse_content(&mut self, reader: &mut dyn Read, size_bytes: u64, parts: &[Range<u64>]) -> Result<Content> {
        self.sparse = true;
        self.data.take_sparse(reader, size_bytes, parts)
    }

    /// Deallocates a content that is no longer part of the tree.
    pub fn forget(&mut self, content: &Content) -> Result<()> {
        self.data.forget(content)
    }

    /// Completes the image. `uuid` is the file system's.
    pub fn finish(mut self, tree: &Tree, uuid: [u8; 16]) -> Result<File> {
        let metadata = metadata::write(&mut self.data, tree).context("write inodes and directories")?;
        let superblock = Superblock {
            root_nid: metadata.root_nid,
            inodes: metadata.inodes,
            blocks: metadata.end_block,
            meta_block: metadata.meta_block,
            uuid,
            cluster_blocks: self.data.cluster_blocks(),
            chunked: self.sparse,
        };
        let file = self.data.file();
        file.set_len(u64::from(metadata.end_block) * BLOCK_BYTES as u64)?;
        file.write_all_at(&superblock.encode(), 0)?;
        Ok(file.try_clone()?)
    }
}

impl Content {
    /// The content of an empty file.
    #[cfg(test)]
    pub fn nothing() -> Content {
        Content { size_bytes: 0, place: Place::Flat { block: 0, tail: None } }
    }

    /// Its memory usage.
    pub fn memory_bytes(&self) -> usize {
        match &self.place {
            Place::Flat { .. } => 0,
            Place::Packed(clusters) => size_of_val(&**clusters),
            Place::Sparse(map) => size_of_val(&**map),
        }
    }
}

/// Whether an inode can hold these extended attributes.
pub fn xattrs_fit(xattrs: &[Xattr]) -> bool {
    xattr::fit(xattrs)
}

/// Whether EROFS supports an extended attribute of this name.
pub fn keeps_xattr(name: &[u8]) -> bool {
    xattr::is_supported(name)
}
