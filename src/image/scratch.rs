//! Writable disks for machines: temporary ones, those of machines that stay, and persistent ones with a name.
//!
//! All are sparse files with an empty ext4 file system: unwritten blocks take no space.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

use super::ext4::{self, Journal};
use super::store::Store;
use crate::resources::lock;
use crate::sys;

/// A writable disk.
#[derive(Debug)]
pub struct Scratch {
    /// The path to open it. Without a name, it is valid only as long as this value.
    pub path: PathBuf,
    /// Keeps an unnamed disk open.
    _file: Option<File>,
}

/// A persistent disk.
#[derive(Debug, Clone, Serialize)]
pub struct Kept {
    /// Its name.
    pub name: String,
    /// Its capacity.
    pub size_bytes: u64,
    /// Its disk usage.
    pub disk_bytes: u64,
    /// Whether a machine is using it.
    pub in_use: bool,
}

impl Store {
    /// Creates a disk that is removed when its last user closes it, even if killed.
    pub fn scratch(&self, size_bytes: u64, journal: Journal) -> Result<Scratch> {
        let file = self.nameless_file()?;
        let mut uuid = [0; 16];
        sys::getrandom(&mut uuid).context("get random bytes")?;
        make(&file, size_bytes, journal, uuid)?;
        // Allows an unnamed file to be opened, and locked like any disk.
        let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
        Ok(Scratch { path, _file: Some(file) })
    }

    /// The disk with this name, created with this size if it does not exist. It must be locked by its user. It belongs
    /// to the image `identity`: a writable layer cannot be used on another image.
    pub fn kept_disk(&self, name: &str, size_bytes: u64, identity: [u8; 16]) -> Result<Scratch> {
        let path = self.kept_path(name)?;
        let found = |path: PathBuf| -> Result<Scratch> {
            let file = File::open(&path).with_context(|| format!("open {}", path.display()))?;
            ensure!(
                ext4::uuid(&file).with_context(|| format!("read {}", path.display()))? == identity,
                "disk {name} belongs to another image: use another name, or remove it with `husk disks --remove {name}`"
            );
            let size = file.metadata()?.len();
            let (has, wanted) = (size >> 20, size_bytes >> 20);
            if has != wanted {
                log::info!("disk {name} already exists: it has {has} MiB, not {wanted}");
            }
            Ok(Scratch { path, _file: None })
        };
        if path.exists() {
            return found(path);
        }
        let mut work = self.work_file(&format!("disk-{name}"))?;
        // Another process may have created it while this one was waiting.
        if path.exists() {
            return found(path);
        }
        work.file.set_len(0)?;
        make(&work.file, size_bytes, Journal::Yes, identity).with_context(|| format!("create disk {name}"))?;
        work.keep_as(self, &path)?;
        Ok(Scratch { path, _file: None })
    }

    /// All persistent disks, sorted by name.
    pub fn kept_disks(&self) -> Result<Vec<Kept>> {
        let mut disks = Vec::new();
        for entry in fs::read_dir(self.dir().join("disks")).context("list the disks")? {
            let entry = entry?;
            let file_name = entry.file_name();
            let Some(name) = file_name.to_str().and_then(|name| name.strip_suffix(".ext4")) else { continue };
            let metadata = entry.metadata()?;
            let file = lock::file().create(false).open(entry.path());
            let in_use = file.is_ok_and(|file| file.try_lock().is_err());
            let disk_bytes = sys::disk::allocated_bytes(&metadata);
            disks.push(Kept { name: name.to_owned(), size_bytes: metadata.len(), disk_bytes, in_use });
        }
        disks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(disks)
    }

    /// Removes a disk and its data, unless it is in use.
    pub fn remove_kept_disk(&self, name: &str) -> Result<()> {
        let path = self.kept_path(name)?;
        let file = match lock::file().create(false).open(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => bail!("no such disk: {name}"),
            file => file.with_context(|| format!("open {}", path.display()))?,
        };
        ensure!(file.try_lock().is_ok(), "disk {name} is in use by a running machine");
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    fn kept_path(&self, name: &str) -> Result<PathBuf> {
        let is_inner = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        let is_name = (1..=64).contains(&name.len())
            && name.bytes().all(is_inner)
            && name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
        ensure!(is_name, "invalid disk name {name:?}: use letters and digits, with . _ - in between");
        Ok(self.dir().join("disks").join(format!("{name}.ext4")))
    }
}

/// The disk at `path` with the changes of one machine, created with this size if it does not exist. It must be locked by its user.
pub fn of_machine(path: &Path, size_bytes: u64, uuid: [u8; 16]) -> Result<Scratch> {
    if !path.exists() {
        // Complete once it has its name. Only the machine's own process creates it.
        let part = path.with_extension("part");
        let create = || {
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(&part)?;
            make(&file, size_bytes, Journal::Yes, uuid)?;
            Ok::<_, anyhow::Error>(fs::rename(&part, path)?)
        };
        create().with_context(|| format!("create {}", path.display()))?;
    }
    Ok(Scratch { path: path.to_owned(), _file: None })
}

fn make(file: &File, size_bytes: u64, journal: Journal, uuid: [u8; 16]) -> Result<()> {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_secs();
    ext4::make(file, size_bytes, journal, uuid, u32::try_from(now).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).unwrap();
        (dir, store)
    }

    #[test]
    fn a_scratch_disk_is_unnamed_and_temporary() {
        let (dir, store) = store();
        let scratch = store.scratch(64 << 20, Journal::No).unwrap();
        let disk = File::options().read(true).write(true).open(&scratch.path).unwrap();
        disk.try_lock().unwrap();
        assert_eq!(disk.metadata().unwrap().len(), 64 << 20);
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_machine_finds_its_disk_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("layer.ext4");
        assert!(of_machine(&path, 1 << 20, [1; 16]).is_err() && !path.exists());
        let disk = of_machine(&path, 64 << 20, [1; 16]).unwrap();
        assert_eq!((disk.path.as_path(), fs::metadata(&path).unwrap().len()), (path.as_path(), 64 << 20));
        let inode = fs::metadata(&path).unwrap().ino();
        of_machine(&path, 128 << 20, [1; 16]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().ino(), inode);
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }

    #[test]
    fn a_persistent_disk_is_reused() {
        let (_dir, store) = store();
        let disk = store.kept_disk("data", 64 << 20, [1; 16]).unwrap();
        let inode = fs::metadata(&disk.path).unwrap().ino();
        let again = store.kept_disk("data", 128 << 20, [1; 16]).unwrap();
        assert_eq!(fs::metadata(&again.path).unwrap().ino(), inode);
        let error = store.kept_disk("data", 64 << 20, [2; 16]).unwrap_err().to_string();
        assert!(error.contains("belongs to another image"), "{error}");
        let file = File::open(&disk.path).unwrap();
        file.lock().unwrap();
        assert!(store.kept_disks().unwrap()[0].in_use);
        assert!(store.remove_kept_disk("data").unwrap_err().to_string().contains("in use"));
        drop(file);
        store.remove_kept_disk("data").unwrap();
        assert!(store.kept_disks().unwrap().is_empty());
        assert_eq!(store.remove_kept_disk("data").unwrap_err().to_string(), "no such disk: data");
    }

    #[test]
    fn creating_a_persistent_disk_does_not_wait_for_its_user() {
        let (_dir, store) = store();
        let mut work = store.work_file("disk-data").unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let other = store.clone();
        let wait = move || sender.send(other.kept_disk("data", 64 << 20, [1; 16]).map(|disk| disk.path));
        let waits = crate::sandbox::spawn("test", wait).unwrap();
        assert!(receiver.recv_timeout(std::time::Duration::from_millis(200)).is_err());
        make(&work.file, 64 << 20, Journal::Yes, [1; 16]).unwrap();
        let path = store.kept_path("data").unwrap();
        work.keep_as(&store, &path).unwrap();
        drop(work);
        let machine = File::open(&path).unwrap();
        machine.lock().unwrap();
        assert_eq!(receiver.recv_timeout(std::time::Duration::from_secs(60)).unwrap().unwrap(), path);
        waits.join().unwrap().unwrap();
    }

    #[test]
    fn a_disk_name_is_not_a_path() {
        let (_dir, store) = store();
        for name in ["", "../x", "a/b", ".x", "-x", "é", &"x".repeat(65)] {
            assert!(store.kept_disk(name, 64 << 20, [1; 16]).is_err(), "{name:?}");
        }
    }
}
