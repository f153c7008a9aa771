//! The work directory of a run: locked while the run is alive, and removed with everything in it at the end.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::mount::{UnmountFlags, unmount};

use super::contender;
use crate::image::Store;
use crate::sandbox::cgroup::child;
use crate::sys;

/// The directory of all runs, next to the image store.
const SUBDIR: &str = "bench";
/// The prefix of the names of work directories.
const PREFIX: &str = "husk-bench";
const ID_BYTES: usize = 3;
const ATTEMPTS: usize = 8;

/// Returns the ID of the run that has this work directory; it is part of the names of everything that the run creates.
pub fn id_of(dir: &Path) -> String {
    dir.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A locked work directory. Dropping it unmounts and removes everything in it.
#[derive(Debug)]
pub struct WorkDir {
    /// The path.
    pub dir: PathBuf,
    _lock: File,
}

impl WorkDir {
    /// Creates a work directory in `base`, or next to the image store, and removes those that killed runs left behind.
    pub fn claim(base: Option<&Path>) -> Result<WorkDir> {
        let base = match base {
            Some(base) => fs::canonicalize(base).with_context(|| format!("open {}", base.display()))?,
            None => Store::open_default()?.dir().join(SUBDIR),
        };
        // Overlays and QEMU use these characters as separators.
        let is_separator =
            |character: char| matches!(character, ',' | ':' | '\\' | '"' | '\'') || character.is_whitespace();
        let path = base.to_str().filter(|path| !path.contains(is_separator));
        ensure!(
            path.is_some(),
            "{}: commas, colons, quotes and spaces are not supported here, type --work-dir DIR",
            base.display()
        );
        let make = DirBuilder::new().recursive(true).mode(0o700).create(&base);
        make.with_context(|| format!("create {} (type --work-dir DIR for another place)", base.display()))?;
        remove_stale(&base)?;
        WorkDir::create(&base)
    }

    fn create(base: &Path) -> Result<WorkDir> {
        for _ in 0..ATTEMPTS {
            let mut random = [0; ID_BYTES];
            sys::getrandom(&mut random).context("generate a name")?;
            let dir = base.join(format!("{PREFIX}-{}", random.map(|byte| format!("{byte:02x}")).concat()));
            match DirBuilder::new().mode(0o700).create(&dir) {
                Err(error) if error.kind() == ErrorKind::AlreadyExists => continue,
                made => made.with_context(|| format!("create {}", dir.display()))?,
            }
            // Another run may have removed the directory before it was locked.
            let Ok(lock) = open(&dir) else { continue };
            if lock.try_lock().is_ok() && dir.exists() {
                return Ok(WorkDir { dir, _lock: lock });
            }
        }
        bail!("every name in {} is taken", base.display())
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        contender::remove_networks(&self.dir);
        let id = id_of(&self.dir);
        for result in [child::remove_left_behind(&format!("{id}-")), remove(&self.dir)] {
            if let Err(error) = result {
                log::warn!("{error:#}");
            }
        }
    }
}

/// Removes work directories in `base` that killed runs left behind.
fn remove_stale(base: &Path) -> Result<()> {
    for entry in fs::read_dir(base).with_context(|| format!("list {}", base.display()))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(&format!("{PREFIX}-")) || !entry.file_type()?.is_dir() {
            continue;
        }
        let Ok(lock) = open(&entry.path()) else { continue };
        if lock.try_lock().is_ok() {
            log::info!("{} was left behind by a killed run", entry.path().display());
            contender::remove_leftovers(&entry.path());
            child::remove_left_behind(&format!("{name}-"))?;
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn open(dir: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(dir)
}

/// Removes a directory of a run, after unmounting everything below it.
pub fn remove(dir: &Path) -> Result<()> {
    for mount in mounts_below(dir)?.iter().rev() {
        unmount(mount, UnmountFlags::DETACH).with_context(|| format!("unmount {}", mount.display()))?;
    }
    let mounted = mounts_below(dir)?;
    ensure!(mounted.is_empty(), "{} is still mounted", mounted.first().unwrap_or(&PathBuf::new()).display());
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error).context(format!("remove {}", dir.display())),
        _ => Ok(()),
    }
}

/// Returns the mount points below a directory, in mount order.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    // proc_pid_mountinfo(5): the fifth field. Paths of work directories need no unescaping.
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    Ok(points.filter(|point| point.starts_with(dir)).collect())
}
