//! The members of a tar archive by name, read in place. Links between them are resolved within the archive.

use std::collections::BTreeMap;
use std::io::Read;

use anyhow::{Result, bail, ensure};

use super::bundle::{Part, is_list, is_of_an_image};
use super::config::MAX_LAYERS;
use super::tar::{Archive, Kind, Stream, shown};
use super::tree::components;

/// An image has a few files per layer.
const MAX_MEMBERS: usize = 1 << 14;
/// The maximum number of members with names unknown from docker, podman or skopeo: tools with custom names have at most
/// a directory and a file per layer. An archive with more is a root file system, and need not be read to its end.
const MAX_FOREIGN: usize = 2 * MAX_LAYERS;
/// The maximum memory for names and links.
const NAMES_MAX_BYTES: usize = 16 << 20;
/// Old archives link a layer to another image's, once.
const MAX_LINKS: usize = 8;
/// The maximum number of path components, including those of links.
const MAX_STEPS: usize = 4096;

/// The files of an archive.
#[derive(Default)]
pub struct Members {
    by_path: BTreeMap<Vec<u8>, Member>,
    /// The number of members with unknown names.
    foreign: usize,
    names_bytes: usize,
}

/// A file in an archive.
enum Member {
    /// Its content.
    File(Part),
    /// A link target: relative to the directory of a symbolic link; a hard link's target starts with `/`.
    Link(Vec<u8>),
}

impl Members {
    /// Scans an archive. `None` if it has so many unknown members that it is a root file system.
    pub fn of(archive: Part) -> Result<Option<Members>> {
        let mut members = Members::default();
        let mut tar = Archive::new(archive.clone());
        while let Some(entry) = tar.next_entry()? {
            let Ok(names) = components(&entry.path) else { continue };
            let Some(first) = names.first() else { continue };
            members.foreign += usize::from(!is_of_an_image(first));
            if members.foreign > MAX_FOREIGN {
                return Ok(None);
            }
            let member = match entry.kind {
                Kind::File => Member::File(archive.part(tar.reader(), entry.content_bytes)?),
                Kind::Symlink(target) => Member::Link(target),
                Kind::Hardlink(target) => Member::Link([b"/", &target[..]].concat()),
                _ => continue,
            };
            members.insert(names.join(&b'/'), member)?;
        }
        Ok(Some(members))
    }

    fn insert(&mut self, path: Vec<u8>, member: Member) -> Result<()> {
        let target_bytes = if let Member::Link(target) = &member { target.len() } else { 0 };
        self.names_bytes = self.names_bytes.saturating_add(path.len() + target_bytes);
        ensure!(self.by_path.len() < MAX_MEMBERS, "the archive has more than {MAX_MEMBERS} members");
        ensure!(self.names_bytes <= NAMES_MAX_BYTES, "the names in the archive are too long");
        self.by_path.insert(path, member);
        Ok(())
    }

    /// Whether all members have names used by docker, podman or skopeo.
    pub fn are_of_an_image(&self) -> bool {
        self.foreign == 0
    }

    /// The part with this name. As in Docker, links cannot leave the archive: `..` at the top stays there.
    pub fn part(&self, path: &[u8]) -> Result<Part> {
        let mut left: Vec<Vec<u8>> = components(path)?.into_iter().rev().map(<[u8]>::to_vec).collect();
        let (mut here, mut last_link): (Vec<Vec<u8>>, _) = (Vec::new(), None);
        let (mut links, mut steps) = (0, 0);
        while let Some(name) = left.pop() {
            steps += 1;
            ensure!(steps + left.len() <= MAX_STEPS, "a path has too many symbolic links");
            if name == b".." {
                here.pop();
                continue;
            }
            here.push(name);
            let path = here.join(&b'/');
            let Some(Member::Link(target)) = self.by_path.get(&path) else { continue };
            links += 1;
            ensure!(links <= MAX_LINKS, "too many links");
            last_link = Some((path, target));
            if target.starts_with(b"/") {
                here.clear();
            } else {
                here.pop();
            }
            let names = target.split(|&byte| byte == b'/').filter(|name| !matches!(*name, b"" | b"."));
            left.extend(names.rev().map(<[u8]>::to_vec));
        }
        match (self.by_path.get(&here.join(&b'/')), last_link) {
            (Some(Member::File(part)), _) => Ok(part.clone()),
            (_, Some((link, target))) => {
                bail!("the link {} points to {}, which does not exist", shown(&link), shown(target))
            }
            _ => bail!("it does not exist"),
        }
    }
}

/// Whether an archive that can only be read sequentially may hold an image: it starts like one, or an image list occurs
/// before it is recognized as a root file system. Returns false on read errors, which are reported later.
pub fn may_hold_an_image(archive: impl Read) -> bool {
    let mut tar = Archive::new(Stream(archive));
    let mut foreign = 0;
    while let Ok(Some(entry)) = tar.next_entry() {
        let names = components(&entry.path).unwrap_or_default();
        match names[..] {
            [] => continue,
            [name] if is_list(name) => return true,
            [first, ..] if is_of_an_image(first) && foreign == 0 => return true,
            _ => foreign += 1,
        }
        if foreign > MAX_FOREIGN {
            return false;
        }
    }
    false
}
