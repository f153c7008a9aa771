//! Writes a snapshot such that it is whole or none.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::header::Header;
use super::{Description, MEMORY, STATE};
use crate::sys::private_file;

/// The file that becomes [`STATE`].
const NEW_STATE: &str = "state.new";

/// A snapshot that is being written. Dropping it before [`SnapshotWriter::finish`] removes what was written.
///
/// Only the last step, a rename, makes the directory a snapshot. What a killed husk has left is overwritten by the next one.
pub struct SnapshotWriter {
    path: PathBuf,
    /// Locked, so that there is no second writer.
    memory: File,
    is_finished: bool,
}

impl SnapshotWriter {
    /// Creates the directory `path`, accessible only to its owner: memory contains secrets. Fails if it contains anything but an
    /// incomplete snapshot.
    pub fn create(path: &Path) -> Result<SnapshotWriter> {
        SnapshotWriter::create_at(path).with_context(|| format!("create the snapshot {}", path.display()))
    }

    fn create_at(path: &Path) -> Result<SnapshotWriter> {
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => check_replaceable(path)?,
            created => created?,
        }
        let memory = private_file().read(true).write(true).create(true).truncate(false).open(path.join(MEMORY))?;
        match memory.try_lock() {
            Err(TryLockError::WouldBlock) => bail!("another husk is writing it"),
            locked => locked.context("lock its file `memory`")?,
        }
        let writer = SnapshotWriter { path: path.to_owned(), memory, is_finished: false };
        writer.memory.set_len(0).context("empty its file `memory`")?;
        Ok(writer)
    }

    /// The empty file for the guest's memory.
    pub fn memory(&self) -> &File {
        &self.memory
    }

    /// Writes `description` and `state` and completes the snapshot, durably.
    pub fn finish(mut self, description: &Description, state: &[u8]) -> Result<()> {
        self.complete(description, state).with_context(|| format!("write the snapshot {}", self.path.display()))?;
        self.is_finished = true;
        Ok(())
    }

    fn complete(&self, description: &Description, state: &[u8]) -> Result<()> {
        self.memory.sync_all()?;
        let description = serde_json::to_vec(description)?;
        let new = self.path.join(NEW_STATE);
        let mut file = private_file().write(true).create(true).truncate(true).open(&new)?;
        file.write_all(&Header::of(&description, state).to_bytes())?;
        file.write_all(&description)?;
        file.write_all(state)?;
        file.sync_all()?;
        fs::rename(&new, self.path.join(STATE))?;
        Ok(File::open(&self.path)?.sync_all()?)
    }
}

impl Drop for SnapshotWriter {
    fn drop(&mut self) {
        if !self.is_finished {
            // The directory stays if it has other files.
            [STATE, NEW_STATE, MEMORY].iter().for_each(|name| drop(fs::remove_file(self.path.join(name))));
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Fails unless the directory is empty or has an incomplete snapshot.
fn check_replaceable(path: &Path) -> Result<()> {
    for entry in fs::read_dir(path)? {
        match entry?.file_name() {
            name if name == STATE => bail!("it exists: remove it, or choose another directory"),
            name if name == MEMORY || name == NEW_STATE => {}
            _ => bail!("the directory is not empty: choose another one"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

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
        for name in [MEMORY, NEW_STATE] {
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
        assert!(path.join(STATE).exists(), "a refusal removes nothing");
    }
}
