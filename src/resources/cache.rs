//! A cache of unpacked files in the user's cache directory, `${XDG_CACHE_HOME:-~/.cache}/husk/NAME/`.
//!
//! Entries are complete from the moment they exist: they are written under a temporary name and renamed. Any number of
//! processes may use the cache concurrently, and may be killed at any time. The least recently used entries are
//! evicted.

use std::cmp::Reverse;
use std::fs::{self, File};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};

/// A directory of unpacked files.
#[derive(Debug, Clone)]
pub struct Cache {
    dir: PathBuf,
    names_kept: usize,
}

impl Cache {
    /// Opens the user's cache with this name, if there is a location for it. At most `names_kept` entries are kept.
    pub fn of_user(name: &str, names_kept: usize) -> Option<Cache> {
        // Relative paths must be ignored (XDG base directory specification).
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
        Some(Cache { dir: base.join("husk").join(name), names_kept })
    }

    /// Opens a cache in this directory, which is created when needed.
    #[cfg(test)]
    pub fn at(dir: &std::path::Path, names_kept: usize) -> Cache {
        Cache { dir: dir.to_owned(), names_kept }
    }

    /// The path of the entry with this name, if it exists.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Opens an entry and marks it as recently used.
    pub fn open(&self, name: &str) -> Option<File> {
        let file = File::open(self.path(name)).ok()?;
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    /// Creates an entry with the content that `fill` writes to an empty file, and returns the result of `fill`. Fails
    /// immediately if another process is creating the same entry.
    pub fn fill<T>(&self, name: &str, fill: impl FnOnce(&File) -> Result<T>) -> Result<T> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.dir).context("create the cache")?;
        // The name is deterministic, so that files of killed processes do not accumulate: the next process reuses them.
        let (entry, part) = (self.path(name), self.path(name).with_extension("part"));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&part)?;
        file.try_lock().context("another husk is unpacking it")?;
        let same = fs::metadata(&part).is_ok_and(|found| file.metadata().is_ok_and(|own| found.ino() == own.ino()));
        ensure!(same, "another husk has just unpacked it");
        let make = || -> Result<T> {
            file.set_len(0)?;
            let made = fill(&file)?;
            // Otherwise a power failure could leave the name without the content.
            file.sync_data()?;
            fs::rename(&part, entry)?;
            Ok(made)
        };
        let made = make().inspect_err(|_| {
            let _ = fs::remove_file(&part);
        })?;
        if let Err(error) = self.forget_oldest() {
            log::info!("clean up {}: {error:#}", self.dir.display());
        }
        Ok(made)
    }

    /// Evicts the least recently used entries. A process that has one open can continue to use it.
    fn forget_oldest(&self) -> Result<()> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            files.push((Reverse(entry.metadata()?.modified()?), entry.path()));
        }
        files.sort();
        for (_, path) in files.iter().skip(self.names_kept) {
            fs::remove_file(path)?;
        }
        Ok(())
    }
}

/// Identifies a file's content without reading it: short of setting the clock, a file cannot be changed without a new
/// ctime.
pub struct Identity {
    /// The name of a cache entry for the file.
    pub name: String,
    /// Whether the last change was long enough ago for another change to have a different timestamp.
    pub settled: bool,
}

impl Identity {
    /// The identity of an open file.
    pub fn of(file: &File) -> Result<Identity> {
        const CLOCK_TICK: Duration = Duration::from_secs(1);
        let m = file.metadata()?;
        let (seconds, nanoseconds) = (m.ctime(), m.ctime_nsec());
        let changed = Duration::new(seconds.try_into()?, nanoseconds.try_into()?);
        let settled = SystemTime::UNIX_EPOCH.elapsed()? > changed + CLOCK_TICK;
        let name = format!("{:x}-{}-{}-{seconds}.{nanoseconds:09}", m.dev(), m.ino(), m.size());
        Ok(Identity { name, settled })
    }
}
