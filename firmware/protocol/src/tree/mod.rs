//! The stream format of `husk cp`, `export`, `diff` and `commit` for files and directories.
//!
//! Entries are frames in traversal order; those within a directory are between its own entry and a `Leave`, and a
//! file's content follows it in pieces. [`send()`] generates them, [`Entries`] reads and validates them, and
//! [`receive()`] creates the files.

mod directory;
mod entries;
mod links;
mod receive;
mod send;
#[cfg(test)]
mod tests;

use std::fs::Metadata;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use entries::Entries;
pub use receive::{Terms, receive};
pub use send::{send, send_changes, send_root};

use crate::frame::{self, Message};

/// The maximum size of a piece.
const PIECE_BYTES: usize = 256 << 10;
/// The maximum depth. Each level uses a descriptor of the receiver, whose limit is usually 1024.
const DEPTH_MAX: usize = 512;
/// The reason for omitting devices, pipes and sockets.
pub const NOT_COPIED: &str = "not a file, directory or symbolic link";
/// The maximum size of an extended attribute's value, and of a path to a file that was sent, so that they fit into a message.
const ATTRIBUTE_MAX_BYTES: usize = 15 << 10;
const PATH_MAX_BYTES: usize = 8 << 10;
/// The maximum length of a file name (NAME_MAX in Linux).
const NAME_MAX_BYTES: usize = 255;

/// An element of the stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// A directory, followed by its contents up to a `Leave`.
    Directory(Vec<u8>, About),
    /// A file, and its size when it was opened, followed by its `Piece`s, the last of which is empty. If it changes in
    /// the meantime, their total differs.
    File(Vec<u8>, About, u64),
    /// A piece of a file, followed by this many bytes.
    Piece(u32),
    /// A symbolic link, and its target.
    Link(Vec<u8>, Vec<u8>, About),
    /// A directory that is created if missing and otherwise left unchanged, followed by its contents up to a `Leave`.
    Enter(Vec<u8>),
    /// A hard link to a file in the stream, by its path below the first directory. From a machine, only if that one was [`Entry::Linked`].
    Same(Vec<u8>, Vec<Vec<u8>>),
    /// A device or a pipe. Only of a [whole](send_root) file system, or of its [changes](send_changes).
    Special(Vec<u8>, Special, About),
    /// Of the changes: a file or directory of the image that is gone.
    Gone(Vec<u8>),
    /// Of the changes: the directory has nothing of the image's that is not in the stream. The first in it.
    Opaque,
    /// Of the changes: the next entry is in the image as well.
    InImage,
    /// Of a whole file system or its changes: the next entry is a file that has more names.
    Linked,
    /// Likewise: an extended attribute of the next entry, its name and value.
    Attribute(Vec<u8>, Vec<u8>),
    /// The end of a directory.
    Leave,
    /// The sender failed, for this reason.
    Failed(String),
    /// The end of the stream.
    End,
}

impl Message for Entry {
    const MAX_BYTES: usize = 16 << 10;
}

impl Entry {
    /// The name, for elements that have one.
    pub fn name(&self) -> Option<&[u8]> {
        match self {
            Entry::Directory(name, _) | Entry::File(name, ..) | Entry::Link(name, ..) => Some(name),
            Entry::Enter(name) | Entry::Same(name, _) | Entry::Special(name, ..) | Entry::Gone(name) => Some(name),
            _ => None,
        }
    }

    /// Whether it says something about the next entry, or about the directory that it is in.
    fn is_mark(&self) -> bool {
        matches!(self, Entry::Opaque | Entry::InImage | Entry::Linked | Entry::Attribute(..))
    }

    /// Whether contents follow.
    pub fn is_dir(&self) -> bool {
        matches!(self, Entry::Directory(..) | Entry::Enter(_))
    }
}

/// A kind of special file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Special {
    /// A character device, by its major and minor number.
    Character(u32, u32),
    /// A block device, likewise.
    Block(u32, u32),
    /// A named pipe.
    Pipe,
}

/// The metadata of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Permissions, including setuid, setgid and the sticky bit.
    pub mode: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The modification time, in seconds since 1970.
    pub mtime_s: i64,
    /// Its nanoseconds.
    pub mtime_ns: u32,
}

impl From<&Metadata> for About {
    fn from(metadata: &Metadata) -> About {
        About {
            mode: metadata.mode() & 0o7777,
            uid: metadata.uid(),
            gid: metadata.gid(),
            mtime_s: metadata.mtime(),
            mtime_ns: metadata.mtime_nsec() as u32,
        }
    }
}

/// Writes a stream, for sources other than a local directory.
pub struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// Writes to `out`, which should be buffered.
    pub fn new(out: W) -> Writer<W> {
        Writer { out }
    }

    /// Writes the next entry.
    pub fn say(&mut self, entry: &Entry) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame::write(entry, &mut bytes).map_err(|error| failure(error.to_string()))?;
        self.out.write_all(&bytes)
    }

    /// Writes the next piece of the current file; empty at its end.
    pub fn piece(&mut self, bytes: &[u8]) -> io::Result<()> {
        for bytes in bytes.chunks(PIECE_BYTES).filter(|_| !bytes.is_empty()) {
            self.say(&Entry::Piece(bytes.len() as u32))?;
            self.out.write_all(bytes)?;
        }
        if bytes.is_empty() { self.say(&Entry::Piece(0)) } else { Ok(()) }
    }

    /// Returns the output.
    pub fn into_inner(self) -> W {
        self.out
    }

    /// Flushes buffered data.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A summary of what was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// The number of files, links and directories.
    pub entries: u64,
    /// The size of their contents.
    pub bytes: u64,
    /// Omitted entries with the reason: devices, pipes, sockets, and files that could not be read or were removed in
    /// the meantime.
    pub skipped: Vec<String>,
    /// The target, if only a symbolic link was copied.
    pub link: Option<PathBuf>,
}

fn failure(words: impl Into<String>) -> io::Error {
    io::Error::other(words.into())
}

/// Adds the operation and its path to an error.
fn about(action: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{action} {}: {}", path.display(), words(error)))
}

/// An error message without the error number.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
