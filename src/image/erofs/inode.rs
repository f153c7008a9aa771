//! Encodes extended inodes of 64 bytes (linux, fs/erofs/erofs_fs.h: `erofs_inode_extended`).

use super::xattr;
use crate::image::tree::{Attributes, Body, Node};

/// The size of an inode; it is followed by extended attributes and inline data.
pub const BYTES: usize = 64;

/// The data layouts (`EROFS_INODE_FLAT_PLAIN` and others).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DataLayout {
    Plain = 0,
    /// Compressed, with an eight-byte record for each block.
    Compressed = 1,
    /// The last partial block is stored after the inode.
    Inline = 2,
    Chunks = 4,
}

/// The properties of an inode that are not in the tree.
pub struct Place {
    pub layout: DataLayout,
    pub size_bytes: u64,
    /// `i_u`: a block number, a device number, the number of compressed blocks, or the chunk format.
    pub union: u32,
    pub number: u32,
    pub links: u32,
}

/// The number of bytes before inline data.
pub fn head_bytes(attributes: &Attributes) -> usize {
    BYTES + xattr::encoded_bytes(&attributes.xattrs)
}

/// Appends the inode and its extended attributes.
pub fn encode(node: &Node, place: &Place, output: &mut Vec<u8>) {
    let attributes = &node.attributes;
    let mode = file_type_bits(&node.body) | (attributes.mode & 0o7777);
    output.extend((1 | (place.layout as u16) << 1).to_le_bytes());
    output.extend(xattr::count(&attributes.xattrs).to_le_bytes());
    output.extend(mode.to_le_bytes());
    output.extend([0; 2]);
    output.extend(place.size_bytes.to_le_bytes());
    output.extend(place.union.to_le_bytes());
    output.extend(place.number.to_le_bytes());
    output.extend(attributes.uid.to_le_bytes());
    output.extend(attributes.gid.to_le_bytes());
    output.extend(attributes.mtime_seconds.to_le_bytes());
    output.extend(attributes.mtime_nanoseconds.to_le_bytes());
    output.extend(place.links.to_le_bytes());
    output.extend([0; 16]);
    xattr::encode(&attributes.xattrs, output);
}

fn file_type_bits(body: &Body) -> u16 {
    (match body {
        Body::Directory(_) => libc::S_IFDIR,
        Body::File(_) => libc::S_IFREG,
        Body::Symlink(_) => libc::S_IFLNK,
        Body::Character { .. } => libc::S_IFCHR,
        Body::Block { .. } => libc::S_IFBLK,
        Body::Fifo => libc::S_IFIFO,
        Body::Socket => libc::S_IFSOCK,
    }) as u16
}

/// The type in a directory entry (`EROFS_FT_REG_FILE` and others).
pub fn kind(body: &Body) -> u8 {
    match body {
        Body::File(_) => 1,
        Body::Directory(_) => 2,
        Body::Character { .. } => 3,
        Body::Block { .. } => 4,
        Body::Fifo => 5,
        Body::Socket => 6,
        Body::Symlink(_) => 7,
    }
}

/// Twelve bits of major number and twenty of minor number, the kernel's on-disk format (`new_encode_dev`).
pub fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_inode_has_64_bytes() {
        let node = Node { attributes: Attributes::default(), body: Body::Fifo, names: 1 };
        let place = Place { layout: DataLayout::Plain, size_bytes: 0, union: 0, number: 1, links: 1 };
        let mut bytes = Vec::new();
        encode(&node, &place, &mut bytes);
        assert_eq!((bytes.len(), head_bytes(&node.attributes)), (BYTES, BYTES));
    }

    #[test]
    fn device_numbers_are_the_kernels() {
        assert_eq!(device_number(8, 1), 0x801);
        assert_eq!(device_number(0xfff, 0xf_ffff), 0xffff_ffff);
    }
}
