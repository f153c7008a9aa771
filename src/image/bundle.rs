//! A directory or tar archive with an image's parts, which are accessed by name.
//!
//! Parts of an archive are read in place: nothing is extracted.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;
use serde::de::DeserializeOwned;

use super::config::JSON_MAX_BYTES;
use super::digest::{Digest, Hasher};
use super::members::Members;
use super::outside::Outside;
use super::tar::{Skip, shown};
use super::tree::components;
use super::{docker_archive, oci_layout};

/// A part: a range of a file.
#[derive(Debug, Clone)]
pub struct Part {
    file: Arc<File>,
    at: u64,
    /// Its size.
    pub size_bytes: u64,
}

impl Part {
    /// All of a file.
    pub fn whole(file: File) -> Result<Part> {
        let size_bytes = file.metadata()?.len();
        Ok(Part { file: Arc::new(file), at: 0, size_bytes })
    }

    /// The next `size_bytes` from the current position of `here`, a reader of the same file.
    pub fn part(&self, here: &Part, size_bytes: u64) -> Result<Part> {
        ensure!(size_bytes <= here.size_bytes, "it ends in the middle of a file");
        Ok(Part { file: self.file.clone(), at: here.at, size_bytes })
    }
}

impl AsRawFd for Part {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Skipping is free.
impl Skip for Part {
    fn skip(&mut self, bytes: u64) -> io::Result<u64> {
        let bytes = bytes.min(self.size_bytes);
        self.at += bytes;
        self.size_bytes -= bytes;
        Ok(bytes)
    }
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = buffer.len().min(usize::try_from(self.size_bytes).unwrap_or(usize::MAX));
        let read = self.file.read_at(&mut buffer[..len], self.at)?;
        self.at += read as u64;
        self.size_bytes -= read as u64;
        Ok(read)
    }
}

/// The container of an image's parts.
pub enum Bundle<'a> {
    /// Separate files of a directory.
    Directory(&'a dyn Outside),
    /// An uncompressed tar archive.
    Archive(Members),
}

/// The kind of image list in a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum List {
    /// Docker's `manifest.json`.
    Docker,
    /// The `index.json` of an OCI image layout.
    Oci,
}

impl Bundle<'_> {
    /// The bundle's image list; `None` if there is none, so that it is a root file system. The names of other parts do
    /// not matter if the list is valid: each tool uses different names.
    pub fn list(&self) -> Option<List> {
        let is_docker = |json: Vec<u8>| docker_archive::is_list(&json);
        // Docker's list takes precedence: since Docker 25, archives have both.
        if self.part(docker_archive::MANIFEST).and_then(read_json).is_ok_and(is_docker) {
            return Some(List::Docker);
        }
        let has_only_known = self.has_only_known_names();
        if self.has(oci_layout::INDEX) && (has_only_known || self.has(oci_layout::MARK)) {
            return Some(List::Oci);
        }
        // A damaged image, certainly not a root file system.
        (has_only_known && self.has(docker_archive::MANIFEST)).then_some(List::Docker)
    }

    fn has_only_known_names(&self) -> bool {
        match self {
            Bundle::Directory(outside) => outside.has_only_known_names().unwrap_or(false),
            Bundle::Archive(members) => members.are_of_an_image(),
        }
    }

    /// Whether there is a part of this name.
    pub fn has(&self, path: &str) -> bool {
        self.part(path).is_ok()
    }

    /// The part of this name.
    pub fn part(&self, path: &str) -> Result<Part> {
        let part = match self {
            Bundle::Directory(outside) => outside.open_part(path).and_then(Part::whole),
            Bundle::Archive(members) => members.part(path.as_bytes()),
        };
        part.with_context(|| format!("open {}", if path.is_empty() { "\"\"".into() } else { shown(path.as_bytes()) }))
    }

    /// Parses the JSON part of this name.
    pub fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        serde_json::from_slice(&read_json(self.part(path)?).with_context(|| format!("read {path}"))?)
            .with_context(|| format!("read {path}"))
    }
}

/// Opens a file in a directory of parts for who reads them, who may have been taken over. Links are followed within the
/// directory. A blob of an image layout may be a link to elsewhere, as some build tools make them, if it has the digest that
/// it is named by.
pub fn open_in(dir: &Path, path: &str) -> Result<File> {
    let names = components(path.as_bytes())?;
    ensure!(!names.is_empty(), "it does not exist");
    let full = dir.join(OsStr::from_bytes(&names.join(&b'/')));
    let shown = |error: io::Error| match fs::read_link(&full) {
        Ok(target) => anyhow!("the link {} points to {}: {error}", full.display(), target.display()),
        Err(_) => error.into(),
    };
    let top = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(dir)?;
    let find = |resolve| openat2(&top, names.join(&b'/'), OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve);
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    let (found, digest) = match (find(within), blob_digest(&names)) {
        (Err(Errno::XDEV), Some(digest)) => (find(ResolveFlags::NO_MAGICLINKS), Some(digest)),
        (Err(Errno::XDEV), None) => bail!("the link {} leads out of {}", full.display(), dir.display()),
        (found, _) => (found, None),
    };
    let found = found.map_err(|error| shown(error.into()))?;
    // Before it is opened for reading, which blocks for a FIFO and has effects for some devices.
    ensure!(FileType::from_raw_mode(fstat(&found)?.st_mode) == FileType::RegularFile, "it is not a regular file");
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd())).map_err(shown)?;
    if let Some(digest) = digest {
        let found = digest_of(&file)?;
        ensure!(found == digest, "the link {} leads to a file with digest {found}", full.display());
    }
    Ok(file)
}

/// The digest of a whole file, wherever its position is.
pub fn digest_of(file: &File) -> Result<Digest> {
    let mut hasher = Hasher::default();
    io::copy(&mut Part::whole(file.try_clone()?)?, &mut hasher)?;
    Ok(hasher.digest())
}

/// The digest that a blob of an image layout is named by.
fn blob_digest(names: &[&[u8]]) -> Option<Digest> {
    let [b"blobs", b"sha256", name] = names else { return None };
    Digest::from_hex(std::str::from_utf8(name).ok()?)
}

/// Reads a manifest, an index or a configuration.
pub fn read_json(mut part: Part) -> Result<Vec<u8>> {
    ensure!(part.size_bytes <= JSON_MAX_BYTES, "it is too large: {} bytes", part.size_bytes);
    let mut bytes = vec![0; part.size_bytes as usize];
    part.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// The names of files at the top level that are image lists or accompany one.
pub const LISTS: [&str; 3] = [docker_archive::MANIFEST, oci_layout::INDEX, oci_layout::MARK];

/// Whether a file of this name at the top level may be an image list or accompany one.
pub fn is_list(name: &[u8]) -> bool {
    LISTS.iter().any(|list| list.as_bytes() == name)
}

/// Whether this is a top-level name in image archives of Docker (old or new), podman, buildah, skopeo, or tools based
/// on go-containerregistry.
pub fn is_of_an_image(name: &[u8]) -> bool {
    let name = name.strip_prefix(b"sha256:").unwrap_or(name);
    let stem = [&b".json"[..], b".tar", b".tar.gz"].iter().find_map(|&end| name.strip_suffix(end)).unwrap_or(name);
    let is_digest = stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit);
    is_digest || is_list(name) || matches!(name, b"repositories" | b"blobs" | b"VERSION")
}
