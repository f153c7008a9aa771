//! Files and directories as a stream of bytes: what `husk cp` sends into a machine, and has sent out of it.
//!
//! Entries are frames in the order of a walk; a directory's are between its own and a `Leave`, and a file's content
//! follows it in pieces. [`send()`] walks and says them, [`Entries`] reads and checks them, and [`receive()`] makes
//! files of them.

mod directory;
mod entries;
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
pub use send::send;

use crate::frame::{self, Message};

/// As much of a file as one piece has.
const PIECE_BYTES: usize = 256 << 10;
/// Directories in each other, at most. Each is a descriptor of the receiver's, which has 1024 as a rule.
const DEPTH_MAX: usize = 512;
/// Why devices, pipes and sockets are left out.
pub const NOT_COPIED: &str = "not a file, directory or symbolic link";
/// Longest name of a file (Linux' NAME_MAX).
const NAME_MAX_BYTES: usize = 255;

/// What a stream is made of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Entry {
    /// A directory; what is in it follows, up to its `Leave`.
    Directory(Vec<u8>, About),
    /// A file, and how many bytes it had when it was opened; its `Piece`s follow, the last of which is empty. One that
    /// changes meanwhile has more of them, or less.
    File(Vec<u8>, About, u64),
    /// So many bytes of a file follow, as they are.
    Piece(u32),
    /// A symbolic link, and where it leads.
    Link(Vec<u8>, Vec<u8>, About),
    /// A directory that is made where it is missing, and else stays as it is; what is to be in it follows, up to its
    /// `Leave`.
    Enter(Vec<u8>),
    /// Another name for a file that the stream has made, by its path below the first directory. Only for a machine,
    /// from its host.
    Same(Vec<u8>, Vec<Vec<u8>>),
    /// The directory is complete.
    Leave,
    /// The sender cannot go on, for this reason.
    Failed(String),
    /// This was all.
    End,
}

impl Message for Entry {
    const MAX_BYTES: usize = 16 << 10;
}

impl Entry {
    /// What it is called, if it is something with a name.
    pub fn name(&self) -> Option<&[u8]> {
        match self {
            Entry::Directory(name, _) | Entry::File(name, ..) | Entry::Link(name, ..) => Some(name),
            Entry::Enter(name) | Entry::Same(name, _) => Some(name),
            _ => None,
        }
    }

    /// Whether others follow that are in it.
    pub fn is_dir(&self) -> bool {
        matches!(self, Entry::Directory(..) | Entry::Enter(_))
    }
}

/// What there is to know of a file beside its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Permissions, with the bits above them.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// When it was changed, in seconds since 1970.
    pub mtime_s: i64,
    /// And nanoseconds.
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

/// Writes a stream, entry by entry, for who has other entries than a directory's of this machine.
pub struct Writer<W> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// Writes to `out`, which is best buffered.
    pub fn new(out: W) -> Writer<W> {
        Writer { out }
    }

    /// Says what comes next.
    pub fn say(&mut self, entry: &Entry) -> io::Result<()> {
        let mut bytes = Vec::new();
        frame::write(entry, &mut bytes).map_err(|error| failure(error.to_string()))?;
        self.out.write_all(&bytes)
    }

    /// The next bytes of the file that was said last, or its end.
    pub fn piece(&mut self, bytes: &[u8]) -> io::Result<()> {
        for bytes in bytes.chunks(PIECE_BYTES).filter(|_| !bytes.is_empty()) {
            self.say(&Entry::Piece(bytes.len() as u32))?;
            self.out.write_all(bytes)?;
        }
        if bytes.is_empty() { self.say(&Entry::Piece(0)) } else { Ok(()) }
    }

    /// What it writes to.
    pub fn into_inner(self) -> W {
        self.out
    }

    /// Writes out what is held back.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// What was copied.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Copied {
    /// Files, links and directories.
    pub entries: u64,
    /// Of their contents.
    pub bytes: u64,
    /// What was left out of directories, and why: devices, pipes, sockets, what could not be read or was gone before its turn.
    pub skipped: Vec<String>,
    /// Where it leads, if all that was copied is a symbolic link.
    pub link: Option<PathBuf>,
}

fn failure(words: impl Into<String>) -> io::Error {
    io::Error::other(words.into())
}

/// What `error` says, about what was done with `path`.
fn about(action: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{action} {}: {}", path.display(), words(error)))
}

/// An error without the number that stands behind its words.
fn words(error: &io::Error) -> String {
    let text = error.to_string();
    text.split(" (os error").next().unwrap_or_default().to_owned()
}
