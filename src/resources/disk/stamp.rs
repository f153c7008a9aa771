//! Recognizes whether the files of disks have changed while no machine had them open.

use std::fs::{self, File, Metadata};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use super::check_is_in_use;
use crate::config::{DiskConfig, disk_name};

/// A file at some time, such as a disk when its machine was saved. The content of a block device may change without a trace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stamp {
    path: PathBuf,
    size_bytes: u64,
    /// When it was modified, in nanoseconds since 1970.
    modified_ns: i64,
}

impl Stamp {
    /// The stamp of the file at `path`.
    pub fn of(path: &Path) -> Result<Stamp> {
        let found = fs::metadata(path).with_context(|| format!("inspect {}", disk_name(path)))?;
        Stamp::with(path, &found)
    }

    /// The same for a file that somebody has locked. Fails if nobody has.
    fn of_locked(path: &Path) -> Result<Stamp> {
        let inspect = || {
            let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
            file.metadata().map(|found| (file, found))
        };
        let (file, found) = inspect().with_context(|| format!("inspect {}", disk_name(path)))?;
        check_is_in_use(&file, path)?;
        Stamp::with(path, &found)
    }

    fn with(path: &Path, found: &Metadata) -> Result<Stamp> {
        let modified_ns = found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec());
        Ok(Stamp { path: std::path::absolute(path)?, size_bytes: found.len(), modified_ns })
    }
}

/// The stamps of all files of the disks, which are open and locked. Fails if one is not: another file has taken its place. A relative path is that of a disk inside of a snapshot: only its
/// backing files have any.
pub fn all(disks: &[DiskConfig]) -> Result<Vec<Stamp>> {
    let paths = |disk: &DiskConfig| {
        let backing = disk.backing.iter().map(|backing| backing.path.clone());
        backing.chain([disk.path.clone()]).collect::<Vec<_>>()
    };
    disks.iter().flat_map(paths).filter(|path| path.is_absolute()).map(|path| Stamp::of_locked(&path)).collect()
}

/// Fails if a file of the disks, which are open and locked, is not as in `stamps`.
pub fn check(disks: &[DiskConfig], stamps: &[Stamp]) -> Result<()> {
    let found = all(disks)?;
    ensure!(found.len() == stamps.len(), "the snapshot is of a machine with other disks");
    for (found, saved) in found.iter().zip(stamps) {
        if found != saved {
            bail!(
                "disk {} has changed since the snapshot: what the guest knows of it is wrong",
                disk_name(&saved.path)
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_changed_disk_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        fs::write(&path, [0; 512]).unwrap();
        let held = File::open(&path).unwrap();
        held.lock().unwrap();
        let disks = [DiskConfig::of(path.clone())];
        let stamps = all(&disks).unwrap();
        check(&disks, &stamps).unwrap();
        fs::write(&path, [0; 1024]).unwrap();
        let error = check(&disks, &stamps).unwrap_err().to_string();
        assert!(error.starts_with("disk /") && error.contains("disk.img has changed since the snapshot"), "{error}");
        fs::write(&path, [0; 512]).unwrap();
        assert!(check(&disks, &stamps).is_err(), "it was modified");
        assert!(check(&[], &stamps).is_err());
        fs::remove_file(&path).unwrap();
        assert!(check(&disks, &stamps).unwrap_err().to_string().contains("inspect /"));
        fs::write(&path, [0; 512]).unwrap();
        assert!(all(&disks).unwrap_err().to_string().ends_with("it was replaced"));
    }
}
