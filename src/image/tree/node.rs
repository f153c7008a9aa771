//! A file of the tree, of any type, with its attributes.

use std::collections::BTreeMap;

use crate::image::erofs::Content;

/// An index of a node in the tree.
pub type NodeId = usize;
/// The root directory.
pub const ROOT: NodeId = 0;

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    pub name: Box<[u8]>,
    pub value: Box<[u8]>,
}

/// The attributes of any file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permissions, including setuid, setgid and the sticky bit.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime_seconds: i64,
    pub mtime_nanoseconds: u32,
    pub xattrs: Vec<Xattr>,
}

/// The type of a file and its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    Directory(BTreeMap<Box<[u8]>, NodeId>),
    File(Content),
    Symlink(Box<[u8]>),
    Character { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Fifo,
    Socket,
}

impl Body {
    /// A directory without entries.
    pub fn empty_directory() -> Body {
        Body::Directory(BTreeMap::new())
    }
}

/// A file of any type.
#[derive(Debug, Clone)]
pub struct Node {
    pub attributes: Attributes,
    pub body: Body,
    /// The number of hard links.
    pub names: u32,
}
