//! The directory of a running machine with its record, sockets and logs, accessible only to its owner.
//!
//! The process that runs the machine holds a lock on it, so that directories left behind by killed processes can be
//! detected.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::record::Record;
use super::{StateDir, kept};
use crate::resources::lock::{self, Kind};
use crate::sys;

/// A collision of random IDs is extremely unlikely.
const ATTEMPTS: usize = 8;

/// How long an unused directory may be locked by processes that check whether it is in use.
const LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// The length of an ID in bytes; it is written in hexadecimal.
const ID_BYTES: usize = 6;

/// The prefix of a directory that is being removed.
pub(super) const GONE: &str = "gone-";

/// A machine's directory. Dropping this removes it, unless it is kept.
#[derive(Debug)]
pub struct MachineDir {
    path: PathBuf,
    keep: bool,
    /// Where what outlives the host's next restart is, if the machine stays.
    kept: Option<PathBuf>,
    _lock: File,
}

impl MachineDir {
    /// The machine's ID: the directory's random, unique name.
    pub fn id(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The path of a file in the directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Writes the machine's record. Must be called by one thread at a time.
    pub fn write(&self, record: &Record) -> Result<()> {
        if let Some(kept) = &self.kept
            && let Err(error) = record.write(kept)
        {
            // It is only needed after a restart of the host.
            log::warn!("{error:#}");
        }
        record.write(&self.path)
    }

    /// Makes the machine one that stays until it is removed: its record, how it was started and its writable layer outlive the host's
    /// next restart. Returns the directory for them. Does nothing when repeated.
    pub fn stay(&mut self) -> Result<PathBuf> {
        let place = kept::place().context("there is no place for the machine: neither $HUSK_DATA nor $HOME is set")?;
        self.stay_in(&place)
    }

    pub(super) fn stay_in(&mut self, place: &Path) -> Result<PathBuf> {
        if let Some(kept) = &self.kept {
            return Ok(kept.clone());
        }
        let kept = kept::create(&self.path, place)?;
        self.kept = Some(kept.clone());
        Ok(kept)
    }

    /// The directory for what outlives the host's next restart, if the machine stays.
    pub fn kept(&self) -> Option<&Path> {
        self.kept.as_deref()
    }

    /// The last record that was written, possibly by the previous run of the machine.
    pub fn record(&self) -> Result<Record> {
        Record::read(&self.path)
    }

    /// Whether the directory is kept when this is dropped.
    pub fn is_kept(&self) -> bool {
        self.keep
    }

    /// Keeps the directory when this is dropped, so that the machine's exit can be inspected.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// Reverts [`MachineDir::keep`].
    pub fn forget(&mut self) {
        self.keep = false;
    }

    /// The state directory that contains this machine.
    pub fn state_dir(&self) -> StateDir {
        StateDir { base: self.path.parent().unwrap_or(Path::new("/")).to_owned(), kept: None }
    }

    /// Leaves the directory as a killed process would.
    #[cfg(test)]
    pub(super) fn abandon(mut self) {
        self.keep();
        // A child started by another test shares the lock for a moment, which a killed process's child does not.
        self._lock.unlock().unwrap();
    }
}

impl Drop for MachineDir {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        // Anything that cannot be removed now is removed with the next stale directories.
        let record = Record::read(&self.path);
        let _ = kept::remove_of(&self.path);
        let _ = remove(&self.path);
        match record {
            Ok(Record { name: Some(name), .. }) => drop(self.state_dir().release(&name, &self.id())),
            Ok(_) => {}
            // There may be a name that was never recorded.
            Err(_) => self.state_dir().remove_stale_names(),
        }
    }
}

/// Removes a machine's directory: atomically for other processes, then its content.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    let id = path.file_name().unwrap_or_default().to_string_lossy();
    let gone = path.with_file_name(format!("{GONE}{id}"));
    let removed = match fs::rename(path, &gone) {
        Ok(()) => fs::remove_dir_all(gone),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(error),
        Err(_) => fs::remove_dir_all(path),
    };
    match removed {
        // Another process has removed it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Removes directories whose removal was interrupted because the process was killed.
pub(super) fn remove_leftovers(base: &Path) {
    for entry in fs::read_dir(base).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(GONE) {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Whether a directory of this name belongs to a machine.
pub(super) fn is_id(name: &str) -> bool {
    name.len() == 2 * ID_BYTES && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
}

/// The location of this user's machines. The directory created at login is used even if the variable is not set, so
/// that machines are visible in all of the user's shells.
pub(super) fn base() -> Result<PathBuf> {
    let user = fs::metadata("/proc/self").context("look at /proc/self")?.uid();
    let configured = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    // After `sudo -E` or `su`, root has another user's directory in its environment. Files created there by root would
    // be in that user's way.
    let configured =
        configured.filter(|path| fs::metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == user));
    let usual = || Some(PathBuf::from(format!("/run/user/{user}"))).filter(|path| is_private(path, user));
    Ok(match configured.or_else(usual) {
        Some(runtime) => runtime.join("husk"),
        None => PathBuf::from(format!("/tmp/husk-{user}")),
    })
}

fn is_private(path: &Path, user: u32) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0)
}

/// Creates the directory of all machines, unless it exists. Another process may have created it first.
pub(super) fn own(base: &Path) -> Result<()> {
    match DirBuilder::new().mode(0o700).create(base) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
        _ => {}
    }
    let user = fs::metadata("/proc/self")?.uid();
    ensure!(is_private(base, user), "it already exists and is not private to this user: remove it");
    Ok(())
}

pub(super) fn create_in(base: &Path) -> Result<MachineDir> {
    for _ in 0..ATTEMPTS {
        let mut random = [0; ID_BYTES];
        sys::getrandom(&mut random).context("generate an ID")?;
        let id = random.map(|byte| format!("{byte:02x}")).concat();
        // It is also a host name, and programs take such a one for a number.
        if id.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let path = base.join(id);
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            created => created?,
        }
        // In the meantime another process may have checked it or considered it abandoned; both are short.
        let Ok(lock) = open(&path) else { continue };
        if lock::wait(&lock, &path, Kind::Exclusive, lock::SHORT_TIMEOUT).is_ok() && path.exists() {
            return Ok(MachineDir { path, keep: false, kept: None, _lock: lock });
        }
    }
    bail!("every ID is taken")
}

/// Opens the existing directory at `path`. Fails if it is in use.
pub(super) fn reopen(path: &Path) -> Result<MachineDir> {
    let lock = open(path)?;
    ensure!(self::lock(&lock), "the machine is running");
    ensure!(path.exists(), "it was removed");
    Ok(MachineDir { path: path.to_owned(), keep: true, kept: kept::of(path), _lock: lock })
}

/// Locks a directory for as long as `dir` is open. Returns false if it is in use.
pub(super) fn lock(dir: &File) -> bool {
    let deadline = Instant::now() + LOCK_TIMEOUT;
    while dir.try_lock().is_err() {
        if Instant::now() > deadline {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

pub(super) fn open(dir: &Path) -> io::Result<File> {
    File::options().read(true).custom_flags(libc::O_DIRECTORY | libc::O_NOFOLLOW).open(dir)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_is_removed_with_its_machine() {
        let base = tempfile::tempdir().unwrap();
        let dir = create_in(base.path()).unwrap();
        fs::write(dir.file("log"), "x").unwrap();
        assert_eq!(fs::metadata(&dir.path).unwrap().permissions().mode() & 0o777, 0o700);
        let path = dir.path.clone();
        drop(dir);
        assert!(!path.exists());
    }

    #[test]
    fn concurrent_removal_of_leftovers_is_handled() {
        let base = tempfile::tempdir().unwrap();
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    remove_leftovers(base.path());
                }
            });
            let removed = (0..3000).map(|n| {
                let path = base.path().join(format!("{n:012x}"));
                fs::create_dir(&path)?;
                fs::write(path.join("record.json"), "")?;
                remove(&path)
            });
            let failed: Vec<io::Error> = removed.filter_map(Result::err).collect();
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert!(failed.is_empty(), "{} of 3000: {:?}", failed.len(), failed.first());
        });
    }

    #[test]
    fn concurrent_starts_do_not_interfere() {
        let (_temporary, state_dir) = super::super::tests::state_dir();
        let start = || {
            for _ in 0..500 {
                state_dir.remove_stale().unwrap();
                let dir = state_dir.create(None).unwrap();
                std::thread::yield_now();
                fs::write(dir.file("vsock"), "").unwrap();
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(start))));
    }

    #[test]
    fn a_directory_accessible_to_others_is_rejected() {
        let base = tempfile::tempdir().unwrap();
        let husk = base.path().join("husk");
        own(&husk).unwrap();
        own(&husk).unwrap();
        fs::set_permissions(&husk, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(own(&husk).unwrap_err().to_string().contains("not private"));
    }
}
