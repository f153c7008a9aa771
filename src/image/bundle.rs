//! From a directory or a tar archive of an image's parts to each of the parts, by its name in there.
//!
//! Parts of an archive are read where they are: nothing is extracted.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use serde::de::DeserializeOwned;

use super::config::JSON_MAX_BYTES;
use super::tar::{Archive, Kind, Skip, Stream};
use super::tree::components;

/// An image has a few files a layer.
const MAX_MEMBERS: usize = 1 << 14;
/// Old archives link a layer to another image's: once.
const MAX_LINKS: usize = 8;

/// A part: some bytes of a file.
#[derive(Debug, Clone)]
pub struct Part {
    file: Arc<File>,
    at: u64,
    /// How many bytes it has.
    pub size_bytes: u64,
}

impl Part {
    /// Nothing.
    pub fn empty(file: File) -> Part {
        Part { file: Arc::new(file), at: 0, size_bytes: 0 }
    }

    /// All of a file.
    pub fn whole(file: File) -> Result<Part> {
        let size_bytes = file.metadata()?.len();
        Ok(Part { file: Arc::new(file), at: 0, size_bytes })
    }
}

/// Skipping costs nothing.
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

/// Where an image's parts are.
pub enum Bundle {
    /// In files of their own.
    Directory(PathBuf),
    /// In a tar archive that is not packed.
    Archive(BTreeMap<Vec<u8>, Member>),
}

/// A file in an archive.
pub enum Member {
    /// Its bytes.
    File(Part),
    /// Another member's name.
    Link(Vec<u8>),
}

impl Bundle {
    /// Looks through a tar archive; `None` if it has something that no image has, and so is a root file system.
    pub fn in_archive(archive: Part) -> Result<Option<Bundle>> {
        let mut members = BTreeMap::new();
        let mut tar = Archive::new(archive.clone());
        while let Some(entry) = tar.next_entry()? {
            let names = components(&entry.path).unwrap_or_default();
            let Some(first) = names.first() else { continue };
            if !is_of_an_image(first) {
                return Ok(None);
            }
            ensure!(members.len() < MAX_MEMBERS, "an image of more than {MAX_MEMBERS} parts");
            let path = names.join(&b'/');
            let member = match entry.kind {
                Kind::File => {
                    let here = tar.reader();
                    let at = here.at;
                    ensure!(entry.content_bytes <= here.size_bytes, "it ends in the middle of a file");
                    Member::File(Part { file: archive.file.clone(), at, size_bytes: entry.content_bytes })
                }
                Kind::Symlink(target) => match resolve(&names, &target) {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                Kind::Hardlink(target) => Member::Link(components(&target)?.join(&b'/')),
                _ => continue,
            };
            members.insert(path, member);
        }
        let is_image = [&b"manifest.json"[..], b"index.json"].iter().any(|&name| members.contains_key(name));
        Ok(is_image.then_some(Bundle::Archive(members)))
    }

    /// Whether the first entry of an archive that cannot be looked through is one of an image.
    pub fn begins_like_an_image(archive: impl Read) -> Result<bool> {
        let mut tar = Archive::new(Stream(archive));
        while let Some(entry) = tar.next_entry()? {
            if let Some(first) = components(&entry.path).unwrap_or_default().first() {
                return Ok(is_of_an_image(first));
            }
        }
        Ok(false)
    }

    /// Whether there is a part of this name.
    pub fn has(&self, path: &str) -> bool {
        self.part(path).is_ok()
    }

    /// The part of this name.
    pub fn part(&self, path: &str) -> Result<Part> {
        let part = match self {
            Bundle::Directory(folder) => {
                // A path that leads out of the directory is none of its.
                let names = components(path.as_bytes())?;
                ensure!(!names.is_empty() && !path.starts_with('/'), "{path:?} is no part of it");
                File::open(folder.join(path)).map_err(anyhow::Error::new).and_then(Part::whole)
            }
            Bundle::Archive(members) => member(members, path.as_bytes()),
        };
        part.with_context(|| format!("open {path}"))
    }

    /// What a JSON part of this name says.
    pub fn json<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        serde_json::from_slice(&read_json(self.part(path)?).with_context(|| format!("read {path}"))?)
            .with_context(|| format!("read {path}"))
    }
}

/// The bytes of a manifest, an index or a configuration.
pub fn read_json(mut part: Part) -> Result<Vec<u8>> {
    ensure!(part.size_bytes <= JSON_MAX_BYTES, "{} bytes are too many", part.size_bytes);
    let mut bytes = vec![0; part.size_bytes as usize];
    part.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn member(members: &BTreeMap<Vec<u8>, Member>, path: &[u8]) -> Result<Part> {
    let mut path = path;
    for _ in 0..MAX_LINKS {
        match members.get(path).context("it is not there")? {
            Member::File(part) => return Ok(part.clone()),
            Member::Link(target) => path = target,
        }
    }
    bail!("too many links")
}

/// What stands at the top of an image's archive, old or new.
fn is_of_an_image(name: &[u8]) -> bool {
    let stem = name.strip_suffix(b".json").or_else(|| name.strip_suffix(b".tar")).unwrap_or(name);
    let is_digest = stem.len() == 64 && stem.iter().all(u8::is_ascii_hexdigit);
    is_digest
        || matches!(name, b"manifest.json" | b"index.json" | b"repositories" | b"oci-layout" | b"blobs" | b"VERSION")
        // What skopeo and buildah call a packed layer.
        || name.strip_suffix(b".tar.gz").is_some_and(|stem| stem.len() == 64)
}

/// Where a symbolic link leads in the archive.
fn resolve(names: &[&[u8]], target: &[u8]) -> Option<Vec<u8>> {
    let (_, parents) = names.split_last()?;
    let mut names: Vec<&[u8]> = if target.starts_with(b"/") { Vec::new() } else { parents.to_vec() };
    for name in target.split(|&byte| byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => drop(names.pop()?),
            name => names.push(name),
        }
    }
    Some(names.join(&b'/'))
}
