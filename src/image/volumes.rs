//! Named volumes: folders in the store that machines share, and that outlive them.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, RenameFlags, openat, renameat_with, unlinkat};
use rustix::io::Errno;
use serde::Serialize;

use super::Store;
use super::digest::Digest;
use super::store::is_at;
use crate::resources::lock::{self, Kind};

/// The longest name.
const NAME_BYTES_MAX: usize = 64;
/// How a folder is opened that is to be removed.
const AS_FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// A volume, for display.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its folder on the host.
    pub path: PathBuf,
    /// Whether a running machine has it.
    pub in_use: bool,
    /// The user's labels.
    pub labels: BTreeMap<String, String>,
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

/// The name of the volume whose folder `path` is, if it looks like one in a store.
pub fn name_of(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    path.parent().filter(|dir| dir.ends_with("volumes")).map(|_| name)
}

/// The name of the anonymous volume of machine `id` at the path `target`. It is the same when the machine is started again.
pub fn anonymous_name(id: &str, target: &[u8]) -> String {
    Digest::of(&[id.as_bytes(), b"\0", target].concat()).hex()
}

/// Whether a volume with this name belongs to a machine, and not to a user who has named it.
pub fn is_anonymous(name: &str) -> bool {
    Digest::from_hex(name).is_some()
}

/// Whether nothing is in the volume `path`.
pub fn is_empty(path: &Path) -> Result<bool> {
    let mut entries = fs::read_dir(path).with_context(|| format!("read the volume {}", path.display()))?;
    Ok(entries.next().is_none())
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

    /// Creates an anonymous volume with these labels, and returns its name.
    pub fn create_anonymous_volume(&self, labels: &BTreeMap<String, String>) -> Result<String> {
        let mut random = [0; 32];
        crate::sys::getrandom(&mut random).context("generate a name")?;
        let name = Digest::of(&random).hex();
        self.create_volume(&name, labels)?;
        Ok(name)
    }

    /// Creates a volume with these labels. One that exists keeps its own.
    pub fn create_volume(&self, name: &str, labels: &BTreeMap<String, String>) -> Result<()> {
        let path = self.volume_path(name)?;
        if !labels.is_empty() && !path.exists() {
            let written = serde_json::to_vec(labels).map_err(io::Error::from);
            let written = written.and_then(|json| fs::write(self.labels_path(name), json));
            written.with_context(|| format!("write the labels of volume {name}"))?;
        }
        make(&path)
    }

    /// The labels of a volume: none, if they cannot be read.
    fn labels_of(&self, name: &str) -> BTreeMap<String, String> {
        let json = fs::read(self.labels_path(name)).unwrap_or_default();
        serde_json::from_slice(&json).unwrap_or_default()
    }

    fn labels_path(&self, name: &str) -> PathBuf {
        self.dir().join("volume-labels").join(name)
    }

    /// All volumes, sorted by name.
    pub fn volumes(&self) -> Result<Vec<Volume>> {
        let mut volumes = Vec::new();
        for entry in fs::read_dir(self.volumes_dir()).context("list the volumes")? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            let in_use = File::open(entry.path()).is_ok_and(|folder| folder.try_lock().is_err());
            let labels = self.labels_of(&name);
            volumes.push(Volume { name, path: entry.path(), in_use, labels });
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
            .with_context(|| format!("no such volume: {name} (see `husk volume ls`)"))
    }

    /// Removes a volume with all that is in it, unless a running machine has it.
    pub fn remove_volume(&self, name: &str) -> Result<()> {
        let path = self.volume_path(name)?;
        let folder = match File::open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => bail!("no such volume: {name} (see `husk volume ls`)"),
            folder => folder.with_context(|| format!("open volume {name}"))?,
        };
        ensure!(folder.try_lock().is_ok(), "volume {name} is in use by a running machine");
        ensure!(is_at(&folder, &path), "volume {name} is being removed by another command");
        // First, so that another volume of this name does not get them.
        let _ = fs::remove_file(self.labels_path(name));
        remove_tree(&path).with_context(|| format!("remove volume {name}"))
    }

    fn volumes_dir(&self) -> PathBuf {
        self.dir().join("volumes")
    }

    fn volume_path(&self, name: &str) -> Result<PathBuf> {
        check_name(name)?;
        Ok(self.volumes_dir().join(name))
    }
}

/// Removes a folder with all that is in it. A guest may have nested folders deeper than descriptors or a stack reach, so each is
/// moved to the top before what is in it is removed.
fn remove_tree(path: &Path) -> rustix::io::Result<()> {
    let top = openat(CWD, path, AS_FOLDER, Mode::empty())?;
    let mut next_name = 0_u64;
    loop {
        let folders = remove_files(&top)?;
        if folders.is_empty() {
            return unlinkat(CWD, path, AtFlags::REMOVEDIR);
        }
        for name in folders {
            let folder = openat(&top, &name, AS_FOLDER, Mode::empty())?;
            for inner in remove_files(&folder)? {
                let mut move_up = || {
                    next_name += 1;
                    renameat_with(&folder, &inner, &top, next_name.to_string(), RenameFlags::NOREPLACE)
                };
                while let Err(error) = move_up() {
                    if error != Errno::EXIST {
                        return Err(error);
                    }
                }
            }
            unlinkat(&top, &name, AtFlags::REMOVEDIR)?;
        }
    }
}

/// Removes all files and empty folders of a folder. Returns the names of the other folders.
fn remove_files(folder: &OwnedFd) -> rustix::io::Result<Vec<CString>> {
    let mut others = Vec::new();
    for entry in Dir::read_from(folder)? {
        let name = entry?.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let removed = unlinkat(folder, &name, AtFlags::empty());
        match removed.or_else(|_| unlinkat(folder, &name, AtFlags::REMOVEDIR)) {
            Err(Errno::NOTEMPTY) => others.push(name),
            Err(Errno::NOTDIR) => removed?,
            removed => removed?,
        }
    }
    Ok(others)
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
        let labels = [("team".to_owned(), "web".to_owned())].into();
        store.create_volume("data", &labels).unwrap();
        store.create_volume("a.b-c_1", &labels).unwrap();
        assert_eq!(store.volume("a.b-c_1").unwrap().labels, labels);
        assert!(store.volume("data").unwrap().labels.is_empty(), "it existed");
        store.remove_volume("a.b-c_1").unwrap();
        store.create_volume("a.b-c_1", &BTreeMap::new()).unwrap();
        assert!(store.volume("a.b-c_1").unwrap().labels.is_empty(), "it is another one");
        assert!(is_empty(&store.volume("a.b-c_1").unwrap().path).unwrap() && !is_empty(&held.path).unwrap());
        let found: Vec<_> = store.volumes().unwrap().into_iter().map(|volume| (volume.name, volume.in_use)).collect();
        assert_eq!(found, [("a.b-c_1".into(), false), ("data".into(), true)]);
        assert!(store.remove_volume("data").unwrap_err().to_string().contains("in use"));
        drop((held, also));
        assert_eq!(fs::read(store.volume("data").unwrap().path.join("f")).unwrap(), b"kept");
        store.remove_volume("data").unwrap();
        assert!(store.remove_volume("data").unwrap_err().to_string().contains("no such volume"));
        for wrong in ["", ".", "..", "a/b", "-a", "a b", &"a".repeat(65)] {
            assert!(store.create_volume(wrong, &BTreeMap::new()).is_err(), "{wrong}");
            assert!(store.remove_volume(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_volume_that_is_replaced_before_it_is_locked_is_not_the_one_that_is_used() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        store.create_volume("data", &BTreeMap::new()).unwrap();
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

    #[test]
    fn a_volume_of_any_depth_is_removed_and_nothing_outside() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(outside.path().join("kept"), b"").unwrap();
        let store = Store::open(dir.path()).unwrap();
        let path = store.use_volume("deep").unwrap().path;
        let mut at = openat(CWD, &path, AS_FOLDER, Mode::empty()).unwrap();
        // More than this process can have descriptors.
        let files_max = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1024);
        for _ in 0..files_max.min(20_000) + 100 {
            rustix::fs::mkdirat(&at, "1", Mode::RWXU).unwrap();
            rustix::fs::mkdirat(&at, "2", Mode::RWXU).unwrap();
            rustix::fs::symlinkat(outside.path(), &at, "link").unwrap();
            at = openat(&at, "1", AS_FOLDER, Mode::empty()).unwrap();
        }
        store.remove_volume("deep").unwrap();
        assert!(!path.exists() && outside.path().join("kept").exists());
    }

    #[test]
    fn an_anonymous_volume_is_told_from_others_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        let name = anonymous_name("0123456789ab", b"/data");
        assert!(check_name(&name).is_ok() && is_anonymous(&name) && !is_anonymous("data"));
        assert_eq!(name, anonymous_name("0123456789ab", b"/data"));
        assert_ne!(name, anonymous_name("0123456789ab", b"/dat"));
        let create = || store.create_anonymous_volume(&BTreeMap::new()).unwrap();
        assert_ne!(create(), create());
        assert!(store.volumes().unwrap().iter().all(|volume| is_anonymous(&volume.name)));
    }
}
