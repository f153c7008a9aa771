//! Named volumes: folders in the store that machines share, and that outlive them.

use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::Store;
use crate::resources::lock::{self, Kind};

/// The longest name.
const NAME_BYTES_MAX: usize = 64;

/// A volume, for display.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its folder on the host.
    pub path: PathBuf,
    /// Whether a running machine has it.
    pub in_use: bool,
}

/// A volume that is not removed for as long as this exists.
#[derive(Debug)]
pub struct VolumeInUse {
    /// Its folder on the host.
    pub path: PathBuf,
    /// Keeps it.
    pub lock: File,
}

/// Fails unless `name` can be that of a volume, as in Docker: letters, digits, and `_`, `.` and `-` after the first one.
pub fn check_name(name: &str) -> Result<()> {
    let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let is_name = (1..=NAME_BYTES_MAX).contains(&name.len())
        && name.bytes().all(is_inner)
        && name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    ensure!(
        is_name,
        "invalid volume name {name:?}: use letters and digits, with . _ - in between, or a path that starts with / or ./"
    );
    Ok(())
}

impl Store {
    /// The volume with this name, created if it does not exist.
    pub fn use_volume(&self, name: &str) -> Result<VolumeInUse> {
        let path = self.volume_path(name)?;
        loop {
            make(&path)?;
            let lock = File::open(&path).with_context(|| format!("open volume {name}"))?;
            lock::wait(&lock, &path, Kind::Shared, lock::SHORT_TIMEOUT)?;
            // It may have been removed before it was locked, and another one created.
            if is_at(&lock, &path) {
                return Ok(VolumeInUse { path, lock });
            }
        }
    }

    /// Creates a volume, if it does not exist.
    pub fn create_volume(&self, name: &str) -> Result<()> {
        make(&self.volume_path(name)?)
    }

    /// All volumes, sorted by name.
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        let mut volumes = Vec::new();
        for entry in fs::read_dir(self.volumes_dir()).context("list the volumes")? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let in_use = File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_err());
            volumes.push(Volume { name, path: entry.path(), in_use });
        }
        volumes.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(volumes)
    }

    /// The volume with this name.
    pub fn volume(&self, name: &str) -> Result<Volume> {
        check_name(name)?;
        self.volumes()?
            .into_iter()
            .find(|volume| volume.name == name)
            .with_context(|| format!("no such volume: {name}"))
    }

    /// Removes a volume with all that is in it, unless a running machine has it.
    pub fn remove_volume(&self, name: &str) -> Result<()> {
        let path = self.volume_path(name)?;
        let folder = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => bail!("no such volume: {name}"),
            folder => folder.with_context(|| format!("open volume {name}"))?,
        };
        ensure!(folder.try_lock().is_ok(), "volume {name} is in use by a running machine");
        ensure!(is_at(&folder, &path), "volume {name} is being removed by another command");
        fs::remove_dir_all(&path).with_context(|| format!("remove volume {name}"))
    }

    fn volumes_dir(&self) -> PathBuf {
        self.dir().join("volumes")
    }

    fn volume_path(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        Ok(self.volumes_dir().join(name))
    }
}

/// Whether `path` names the open folder, and not another one that has taken its place.
fn is_at(folder: &File, path: &Path) -> bool {
    let id = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    folder.metadata().is_ok_and(|own| fs::symlink_metadata(path).is_ok_and(|found| id(found) == id(own)))
}

/// Its own mode is the guest's to change; the folder above is accessible to this user alone.
fn make(path: &Path) -> Result<()> {
    let made = DirBuilder::new().mode(0o755).create(path);
    match made {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("create {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_stays_until_it_is_removed_and_not_while_it_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.volumes().unwrap(), []);
        let held = store.use_volume("data").unwrap();
        let also = store.use_volume("data").unwrap();
        fs::write(held.path.join("f"), b"kept").unwrap();
        store.create_volume("data").unwrap();
        store.create_volume("a.b-c_1").unwrap();
        let found: Vec<_> = store.volumes().unwrap().into_iter().map(|volume| (volume.name, volume.in_use)).collect();
        assert_eq!(found, [("a.b-c_1".into(), false), ("data".into(), true)]);
        assert!(store.remove_volume("data").unwrap_err().to_string().contains("in use"));
        drop((held, also));
        assert_eq!(fs::read(store.volume("data").unwrap().path.join("f")).unwrap(), b"kept");
        store.remove_volume("data").unwrap();
        assert!(store.remove_volume("data").unwrap_err().to_string().contains("no such volume"));
        for wrong in ["", ".", "..", "a/b", "-a", "a b", &"a".repeat(65)] {
            assert!(store.create_volume(wrong).is_err(), "{wrong}");
            assert!(store.remove_volume(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_volume_that_is_replaced_before_it_is_locked_is_not_the_one_that_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.create_volume("data").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..300).for_each(|_| drop(store.remove_volume("data"))));
            }
            for _ in 0..300 {
                let Ok(used) = store.use_volume("data") else { continue };
                std::thread::yield_now();
                assert!(is_at(&used.lock, &used.path));
            }
        });
    }
}
