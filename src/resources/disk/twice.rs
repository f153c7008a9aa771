//! Finds files that a machine would use twice. The lock of such a file would be held by the machine itself.

use std::fmt;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Result, bail};

use crate::config::{DiskConfig, disk_name};

/// A file, as a disk or as a backing file of one.
struct Use<'a> {
    path: &'a Path,
    disk: &'a DiskConfig,
    identity: Option<Identity>,
}

/// Of a block device its number, of a file the number of its device and its inode.
#[derive(PartialEq, Eq)]
enum Identity {
    BlockDevice(u64),
    File(u64, u64),
}

impl<'a> Use<'a> {
    fn all_of(disk: &'a DiskConfig) -> impl Iterator<Item = Use<'a>> {
        let backing = disk.backing.iter().map(|backing| &backing.path);
        std::iter::once(&disk.path).chain(backing).map(move |path| Use::new(path, disk))
    }

    fn new(path: &'a Path, disk: &'a DiskConfig) -> Use<'a> {
        // A file that cannot be found is reported when it is opened.
        let identity = fs::metadata(path).ok().map(|found| match found.file_type().is_block_device() {
            true => Identity::BlockDevice(found.rdev()),
            false => Identity::File(found.dev(), found.ino()),
        });
        Use { path, disk, identity }
    }

    fn is_disk(&self) -> bool {
        std::ptr::eq(self.path, &*self.disk.path)
    }

    fn is_written(&self) -> bool {
        self.is_disk() && !self.disk.readonly
    }

    fn conflicts_with(&self, other: &Use) -> bool {
        (self.is_written() || other.is_written()) && self.identity.is_some() && self.identity == other.identity
    }
}

impl fmt::Display for Use<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let (path, disk) = (self.path.display(), disk_name(&self.disk.path));
        if self.is_disk() { write!(f, "disk {disk}") } else { write!(f, "backing file {path} of disk {disk}") }
    }
}

/// Fails if two of the machine's disks and their backing files are the same file, and one of them may be written.
pub(super) fn check(disks: &[DiskConfig]) -> Result<()> {
    if disks.len() < 2 && disks.iter().all(|disk| disk.backing.is_empty()) {
        return Ok(());
    }
    let uses: Vec<Use> = disks.iter().flat_map(Use::all_of).collect();
    for (index, second) in uses.iter().enumerate() {
        let Some(first) = uses[..index].iter().find(|first| first.conflicts_with(second)) else { continue };
        if first.to_string() == second.to_string() {
            bail!("{second} is given twice: remove one, or add `,ro` to both");
        }
        bail!("{second} is the same file as {first}: remove one, or add `,ro` to both");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::config::{BackingConfig, Format};

    fn disk(path: &Path, readonly: bool, backing: &[&Path]) -> DiskConfig {
        let backing = backing.iter().map(|path| BackingConfig { path: path.to_path_buf(), format: Some(Format::Raw) });
        DiskConfig { readonly, backing: backing.collect(), ..DiskConfig::of(path.to_owned()) }
    }

    #[test]
    fn a_file_is_used_twice_only_if_nobody_writes_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, link] = ["a", "b", "link"].map(|name| dir.path().join(name));
        [&a, &b].into_iter().for_each(|path| fs::write(path, []).unwrap());
        fs::hard_link(&a, &link).unwrap();
        let line = |disks: &[DiskConfig]| check(disks).map_or_else(|error| error.to_string(), |()| "unused".to_owned());
        let (a_name, link_name) = (a.display(), link.display());
        let twice = format!("disk {a_name} is given twice: remove one, or add `,ro` to both");
        for (first, second) in [(false, false), (false, true), (true, false)] {
            assert_eq!(line(&[disk(&a, first, &[]), disk(&b, false, &[]), disk(&a, second, &[])]), twice);
        }
        let same = format!("disk {link_name} is the same file as disk {a_name}: remove one, or add `,ro` to both");
        assert_eq!(line(&[disk(&a, false, &[]), disk(&link, false, &[])]), same);
        let below = line(&[disk(&a, false, &[]), disk(&b, false, &[&link])]);
        let of_b = format!("backing file {link_name} of disk {} is the same file as disk {a_name}: ", b.display());
        assert!(below.starts_with(&of_b), "{below}");
        assert!(line(&[disk(&b, false, &[&b])]).starts_with("backing file "), "an image over itself");
        let missing = PathBuf::from("/none");
        for unused in [
            [disk(&a, true, &[]), disk(&a, true, &[])],
            [disk(&a, true, &[]), disk(&b, false, &[&a])],
            [disk(&a, false, &[]), disk(&b, false, &[])],
            [disk(&missing, false, &[]), disk(&missing, false, &[])],
        ] {
            assert_eq!(line(&unused), "unused");
        }
    }
}
