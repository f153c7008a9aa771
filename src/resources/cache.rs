//! What is unpacked once and found again: a directory in the user's cache, `${XDG_CACHE_HOME:-~/.cache}/husk/NAME/`.
//!
//! A file there is whole from the moment it has its name: it is written under another one, and renamed. Any number of
//! husks may do so at once, and each of them may be killed. What was not used for longest goes.

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
    /// The one of this name for the user, where there is a place for it. As many names are kept as `names_kept`.
    pub fn of_user(name: &str, names_kept: usize) -> Option<Cache> {
        // A relative path is to be ignored (XDG base directory specification).
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let base = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")))?;
        Some(Cache { dir: base.join("husk").join(name), names_kept })
    }

    /// One in this directory, which is made when it is needed.
    #[cfg(test)]
    pub fn at(dir: &std::path::Path, names_kept: usize) -> Cache {
        Cache { dir: dir.to_owned(), names_kept }
    }

    /// Where the entry of this name is, if there is one.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Opens an entry. It is used now, and so the last to go.
    pub fn open(&self, name: &str) -> Option<File> {
        let file = File::open(self.path(name)).ok()?;
        let _ = file.set_modified(SystemTime::now());
        Some(file)
    }

    /// Makes an entry of what `fill` writes to an empty file, and returns what that returns. Fails at once if another
    /// husk is making the same.
    pub fn fill<T>(&self, name: &str, fill: impl FnOnce(&File) -> Result<T>) -> Result<T> {
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&self.dir).context("create the cache")?;
        // The same name for everyone, so that a husk that was killed leaves nothing that piles up: the next one takes
        // it over.
        let (entry, part) = (self.path(name), self.path(name).with_extension("part"));
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&part)?;
        file.try_lock().context("another husk is unpacking it")?;
        let same = fs::metadata(&part).is_ok_and(|found| file.metadata().is_ok_and(|own| found.ino() == own.ino()));
        ensure!(same, "another husk has just unpacked it");
        let make = || -> Result<T> {
            file.set_len(0)?;
            let made = fill(&file)?;
            // Else a power cut could leave the name without the content.
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

    /// Removes what was not used for longest. A husk that has it open keeps it.
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

/// What tells a file's content without reading it: short of setting the clock, nobody changes a file and keeps its
/// ctime.
pub struct Identity {
    /// A file's name.
    pub name: String,
    /// Whether the last change is long enough ago that another one would have another time.
    pub settled: bool,
}

impl Identity {
    /// That of a file as it is now.
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
