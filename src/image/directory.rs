//! Adds a root directory of the host to the tree, with its owners, modes and attributes.
//!
//! Links are never followed and mounts of other file systems are not entered, so nothing outside is read.

use std::collections::HashMap;
use std::fs::{self, File, Metadata};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::digest::{Digest, Hasher};
use super::erofs::{self, Content, Writer};
use super::tree::{Attributes, Body, Tree, Xattr};
use crate::sys;

/// The maximum number of data ranges of a sparse file; one with more is read as if it were not sparse.
const MAX_PARTS: usize = 1 << 16;

/// Identifies a tree's state without reading file contents, and returns their total size: short of setting the clock, a
/// file cannot be changed without a new ctime.
pub fn fingerprint(root: &Path) -> Result<(Digest, u64)> {
    let (mut hasher, mut total_bytes) = (Hasher::default(), 0);
    walk(root, &mut |path, m| {
        total_bytes += m.len();
        hasher.update(path.as_os_str().as_bytes());
        hasher.update(&[0]);
        for number in [m.dev(), m.ino(), m.size(), u64::from(m.mode()), m.uid().into(), m.gid().into(), m.rdev()] {
            hasher.update(&number.to_le_bytes());
        }
        for number in [m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec()] {
            hasher.update(&number.to_le_bytes());
        }
        Ok(())
    })?;
    Ok((hasher.digest(), total_bytes))
}

/// Adds everything below `root` to the tree, and returns the total size of files, which `progress` also receives.
pub fn add(root: &Path, tree: &mut Tree, writer: &mut Writer, progress: &mut dyn FnMut(u64)) -> Result<u64> {
    let mut linked: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let (mut done_bytes, mut denied) = (0, Vec::new());
    walk(root, &mut |path, metadata| {
        let here = root.join(path);
        if metadata.nlink() > 1 && !metadata.is_dir() {
            let key = (metadata.dev(), metadata.ino());
            if let Some(first) = linked.get(&key) {
                return tree.link(path.as_os_str().as_bytes(), first.as_os_str().as_bytes());
            }
            linked.insert(key, path.to_owned());
        }
        match file(&here, metadata, writer) {
            Ok((attributes, body)) => tree.insert(path.as_os_str().as_bytes(), attributes, body)?,
            Err(error) if is_denied(&error) => denied.push(path.to_owned()),
            Err(error) => return Err(error).with_context(|| format!("read {}", here.display())),
        }
        done_bytes += metadata.len();
        progress(done_bytes);
        Ok(())
    })?;
    if let Some(first) = denied.first() {
        bail!(
            "{} files are not readable by this user, for example {}: run husk as their owner",
            denied.len(),
            first.display()
        );
    }
    Ok(done_bytes)
}

fn is_denied(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == ErrorKind::PermissionDenied)
}

/// Calls `visit` for each path below `root`, including the root: parents first, names in order.
fn walk(root: &Path, visit: &mut dyn FnMut(&Path, &Metadata) -> Result<()>) -> Result<()> {
    let device = fs::metadata(root)?.dev();
    let mut paths = vec![PathBuf::new()];
    while let Some(path) = paths.pop() {
        let here = root.join(&path);
        let shown = || format!("read {}", here.display());
        // The root itself may be a link.
        let metadata = if path.as_os_str().is_empty() { fs::metadata(root) } else { fs::symlink_metadata(&here) };
        let metadata = metadata.with_context(shown)?;
        visit(&path, &metadata)?;
        if !metadata.is_dir() {
            continue;
        }
        if metadata.dev() != device {
            log::info!("skipped {}: it is on another filesystem", here.display());
            continue;
        }
        let entries = fs::read_dir(&here).with_context(shown)?;
        let mut names = entries.map(|entry| entry.map(|entry| entry.file_name())).collect::<io::Result<Vec<_>>>()?;
        names.sort();
        paths.extend(names.into_iter().rev().map(|name| path.join(name)));
    }
    Ok(())
}

fn file(path: &Path, metadata: &Metadata, writer: &mut Writer) -> Result<(Attributes, Body)> {
    let attributes = Attributes {
        mode: (metadata.mode() & 0o7777) as u16,
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime_seconds: metadata.mtime(),
        mtime_nanoseconds: metadata.mtime_nsec() as u32,
        xattrs: xattrs(path)?,
    };
    let kind = metadata.file_type();
    let device = || (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    let body = if kind.is_dir() {
        Body::empty_directory()
    } else if kind.is_file() {
        Body::File(content(path, metadata, &attributes, writer)?)
    } else if kind.is_symlink() {
        Body::Symlink(fs::read_link(path)?.as_os_str().as_bytes().into())
    } else if kind.is_char_device() {
        let (major, minor) = device();
        Body::Character { major, minor }
    } else if kind.is_block_device() {
        let (major, minor) = device();
        Body::Block { major, minor }
    } else if kind.is_fifo() {
        Body::Fifo
    } else {
        Body::Socket
    };
    Ok((attributes, body))
}

fn xattrs(path: &Path) -> Result<Vec<Xattr>> {
    let mut xattrs = Vec::new();
    for name in sys::xattr::list(path)? {
        if erofs::keeps_xattr(name.to_bytes()) {
            let value = sys::xattr::get(path, &name)?.into();
            xattrs.push(Xattr { name: name.to_bytes().into(), value });
        }
    }
    Ok(xattrs)
}

fn content(path: &Path, metadata: &Metadata, attributes: &Attributes, writer: &mut Writer) -> Result<Content> {
    let mut file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK).open(path)?;
    let size_bytes = metadata.size();
    if sys::disk::allocated_bytes(metadata) < size_bytes
        && let Some(parts) = parts(&file, size_bytes)?
    {
        return writer.sparse_content(
            &mut Parts { file, parts: parts.clone().into_iter(), left_bytes: 0 },
            size_bytes,
            &parts,
        );
    }
    file.seek(SeekFrom::Start(0))?;
    // A file that grows in the meantime is truncated, one that shrinks is an error.
    writer.content(&mut file, size_bytes, attributes)
}

/// The data ranges of a file.
fn parts(file: &File, size_bytes: u64) -> io::Result<Option<Vec<Range<u64>>>> {
    let (mut parts, mut at) = (Vec::new(), 0);
    while at < size_bytes
        && let Some(part) = sys::disk::next_data(file, at)?
    {
        let part = part.start.min(size_bytes)..part.end.min(size_bytes);
        at = part.end;
        parts.push(part);
        if parts.len() > MAX_PARTS {
            return Ok(None);
        }
    }
    Ok(Some(parts))
}

/// Reads the data ranges of a file in sequence.
struct Parts {
    file: File,
    parts: std::vec::IntoIter<Range<u64>>,
    left_bytes: u64,
}

impl Read for Parts {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.left_bytes == 0 {
            let Some(part) = self.parts.next() else { return Ok(0) };
            self.file.seek(SeekFrom::Start(part.start))?;
            self.left_bytes = part.end - part.start;
        }
        let len = buffer.len().min(usize::try_from(self.left_bytes).unwrap_or(usize::MAX));
        let read = self.file.read(&mut buffer[..len])?;
        self.left_bytes -= read as u64;
        Ok(read)
    }
}
