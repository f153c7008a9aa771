//! Writes a snapshot such that it is whole or none.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, Mode, OFlags, openat, renameat, unlinkat};

use super::header::Header;
use super::{CHANGED, DISK, Description, MEMORY, SHARE, STATE, TOUCHED, check_owner, disk_name, share_name};
use crate::memory::bitmap_bytes;

/// The file that becomes [`STATE`].
const NEW_STATE: &str = "state.new";

/// A snapshot that is being written. Dropping it before [`SnapshotWriter::finish`] removes what was written.
///
/// Only the last step, a rename, makes the directory a snapshot. What a killed husk has left is overwritten by the next one.
pub struct SnapshotWriter {
    path: PathBuf,
    /// Locked, so that there is no second writer. Files are created in it, whatever takes its place.
    dir: File,
    memory: File,
    /// All others, with their names.
    files: Vec<(String, File)>,
    is_finished: bool,
}

impl SnapshotWriter {
    /// Creates the directory `path`, accessible only to its owner: memory contains secrets. Fails if it contains anything but an
    /// incomplete snapshot, or belongs to somebody else.
    pub fn create(path: &Path) -> Result<SnapshotWriter> {
        SnapshotWriter::create_at(path).with_context(|| format!("create the snapshot {}", path.display()))
    }

    fn create_at(path: &Path) -> Result<SnapshotWriter> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
        let found = fs::metadata(path)?;
        ensure!(found.is_dir(), "it exists, and is not a directory: choose another name");
        let dir = File::open(path)?;
        check_owner(&dir)?;
        match dir.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("another husk is writing it"),
            locked => locked.context("lock it")?,
        }
        // Only now, since another husk may have completed it in between.
        let left = check_replaceable(path)?;
        dir.set_permissions(fs::Permissions::from_mode(0o700))?;
        left.iter().try_for_each(|name| unlinkat(&dir, name, AtFlags::empty()))?;
        let memory = create_in(&dir, MEMORY)?;
        Ok(SnapshotWriter { path: path.to_owned(), dir, memory, files: Vec::new(), is_finished: false })
    }

    /// The empty file for the guest's memory.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Creates the empty file for disk `index`, which must be written before [`SnapshotWriter::finish`].
    pub fn disk(&mut self, index: usize) -> Result<File> {
        self.file(disk_name(index))
    }

    /// Creates the empty file for what the guest knows of share `index`, which must be written in the same way.
    pub fn share(&mut self, index: usize) -> Result<File> {
        self.file(share_name(index))
    }

    /// Creates the empty file for the bitmap of changed pages of a diff snapshot, which must be written in the same way.
    pub fn changed(&mut self) -> Result<File> {
        self.file(CHANGED.to_owned())
    }

    fn file(&mut self, name: String) -> Result<File> {
        let file = create_in(&self.dir, &name)?;
        let copy = file.try_clone().context("duplicate a file descriptor")?;
        self.files.push((name, file));
        Ok(copy)
    }

    /// The file with the guest's memory, opened again: it cannot be written to.
    pub fn memory_to_read(&self) -> Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.dir, MEMORY, flags, Mode::empty()).map(File::from).context("open the file `memory`")
    }

    /// Writes `description` and `state` and completes the snapshot, durably.
    pub fn finish(mut self, description: &Description, state: &[u8]) -> Result<()> {
        self.complete(description, state).with_context(|| format!("write the snapshot {}", self.path.display()))?;
        self.is_finished = true;
        Ok(())
    }

    fn complete(&self, description: &Description, state: &[u8]) -> Result<()> {
        let (found, expected) = (self.memory.metadata()?.len(), description.config.memory_mib << 20);
        ensure!(found == expected, "the monitor process has written {found} bytes of memory instead of {expected}");
        self.memory.sync_all()?;
        if let Some((_, changed)) = self.files.iter().find(|(name, _)| name == CHANGED) {
            let (found, expected) = (changed.metadata()?.len(), bitmap_bytes(expected));
            ensure!(
                found == expected,
                "the monitor process has written {found} bytes of a bitmap instead of {expected}"
            );
        }
        self.files.iter().try_for_each(|(_, file)| file.sync_all())?;
        let description = serde_json::to_vec(description)?;
        let mut file = create_in(&self.dir, NEW_STATE)?;
        file.write_all(&Header::of(&description, state).to_bytes())?;
        file.write_all(&description)?;
        file.write_all(state)?;
        file.sync_all()?;
        renameat(&self.dir, NEW_STATE, &self.dir, STATE)?;
        Ok(self.dir.sync_all()?)
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.is_finished {
            let others = self.files.iter().map(|(name, _)| &**name);
            for name in [STATE, NEW_STATE, MEMORY].into_iter().chain(others) {
                let _ = unlinkat(&self.dir, name, AtFlags::empty());
            }
            // It stays if it has other files.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Creates a file in a directory, accessible only to its owner. Fails if there is anything with this name.
fn create_in(dir: &File, name: &str) -> Result<File> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let created = openat(dir, name, flags, Mode::RUSR | Mode::WUSR);
    created.map(File::from).with_context(|| format!("create its file `{name}`"))
}

/// Whether it is the name of a disk or of a share in a snapshot.
fn is_numbered(name: &str) -> bool {
    let index = name.strip_prefix(DISK).or_else(|| name.strip_prefix(SHARE));
    index.is_some_and(|index| index.parse::<usize>().is_ok())
}

/// Whether it is the name of a record of touched memory, or of one that was being written.
fn is_touched(name: &str) -> bool {
    let number = |rest: &str| rest.strip_prefix('.').is_some_and(|pid| pid.parse::<u32>().is_ok());
    name.strip_prefix(TOUCHED).is_some_and(|rest| rest.is_empty() || number(rest))
}

/// Fails unless the directory is empty or has an incomplete snapshot, whose files are returned.
fn check_replaceable(path: &Path) -> Result<Vec<String>> {
    let mut left = Vec::new();
    for entry in fs::read_dir(path)? {
        match entry?.file_name().into_string() {
            Ok(name) if name == STATE => bail!("it exists: remove it, or choose another directory"),
            Ok(name) if [MEMORY, CHANGED, NEW_STATE].contains(&&*name) || is_numbered(&name) || is_touched(&name) => {
                left.push(name)
            }
            _ => bail!("the directory is not empty: choose another one"),
        }
    }
    Ok(left)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_not_finished_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        drop(SnapshotWriter::create(&path).unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn only_an_incomplete_snapshot_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |path: &Path| format!("{:#}", SnapshotWriter::create(path).map(drop).unwrap_err());
        let path = dir.path().join("snapshot");
        fs::create_dir(&path).unwrap();
        for name in [MEMORY, CHANGED, NEW_STATE, "disk-0", "disk-12"] {
            fs::write(path.join(name), "left by a killed husk").unwrap();
        }
        let writer = SnapshotWriter::create(&path).unwrap();
        assert_eq!(writer.memory().metadata().unwrap().len(), 0);
        assert!(refused(&path).ends_with("another husk is writing it"), "{}", refused(&path));
        drop(writer);
        fs::create_dir(&path).unwrap();
        fs::write(path.join(STATE), "").unwrap();
        assert!(refused(&path).ends_with("it exists: remove it, or choose another directory"));
        assert!(refused(dir.path()).ends_with("the directory is not empty: choose another one"));
        assert!(refused(&dir.path().join("a/b")).ends_with("No such file or directory (os error 2)"));
        assert!(refused(&path.join(STATE)).ends_with("not a directory: choose another name"));
        assert!(path.join(STATE).exists(), "a refusal removes nothing");
        let photos = dir.path().join("photos");
        fs::create_dir(&photos).unwrap();
        fs::write(photos.join("touched-up.jpg"), "").unwrap();
        assert!(refused(&photos).ends_with("the directory is not empty: choose another one"));
        assert!(photos.join("touched-up.jpg").exists());
        assert!(is_touched("touched") && is_touched("touched.123") && !is_touched("touched.jpg"));
    }

    #[test]
    fn nothing_is_written_through_links_or_into_files_of_others() {
        let dir = tempfile::tempdir().unwrap();
        let (path, precious) = (dir.path().join("snapshot"), dir.path().join("precious"));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(&precious, "precious").unwrap();
        symlink(&precious, path.join(MEMORY)).unwrap();
        symlink(&precious, path.join(NEW_STATE)).unwrap();
        let writer = SnapshotWriter::create(&path).unwrap();
        writer.memory().set_len(32 << 20).unwrap();
        writer.finish(&super::super::tests::description(), b"{}").unwrap();
        assert_eq!(fs::read(&precious).unwrap(), b"precious");
        assert_eq!((mode(&path), mode(&path.join(MEMORY)), mode(&path.join(STATE))), (0o700, 0o600, 0o600));
        let open = dir.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        let error = format!("{:#}", SnapshotWriter::create(&open).map(drop).unwrap_err());
        assert!(error.contains("others can change it"), "{error}");
    }

    #[test]
    fn memory_of_another_size_is_not_completed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("snapshot");
        let writer = SnapshotWriter::create(&path).unwrap();
        writer.memory().set_len((32 << 20) + 1).unwrap();
        let error = format!("{:#}", writer.finish(&super::super::tests::description(), b"{}").unwrap_err());
        assert!(error.contains("has written 33554433 bytes"), "{error}");
        assert!(!path.exists());
    }
}
