//! Locks of files (flock(2)) that are waited for: with a word after a second, and not for ever.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long what is soon done may be waited for: another command's look or change.
pub const SOON: Duration = Duration::from_secs(60);
/// How long another command may fetch or unpack an image that this one wants, too.
pub const LATER: Duration = Duration::from_secs(60 * 60);
/// Nobody wonders so early.
const SILENT: Duration = Duration::from_secs(1);
/// How often a lock is looked at. Nobody is told that it is free.
const PAUSES: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];

/// Whether others may have a lock, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Others that share it.
    Shared,
    /// Nobody.
    Exclusive,
}

/// How a file is opened that is there to be locked: for its owner alone, since whoever can open it can hold the lock;
/// and for both reading and writing, as NFS wants it for a lock of either kind.
pub fn file() -> OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

/// Locks `file`, which is the one at `path`, for as long as it is open. Says after a second that it waits, on the
/// calling thread, and fails where somebody else has it for longer than `timeout`.
pub fn wait(file: &File, path: &Path, kind: Kind, timeout: Duration) -> Result<()> {
    let started = Instant::now();
    let mut has_told = false;
    loop {
        let locked = match kind {
            Kind::Shared => file.try_lock_shared(),
            Kind::Exclusive => file.try_lock(),
        };
        match locked {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) if error.kind() != ErrorKind::Interrupted => {
                return Err::<(), Error>(error).with_context(|| format!("lock {}", path.display()));
            }
            Err(_) => {}
        }
        let waited = started.elapsed();
        if waited > timeout {
            let (path, seconds) = (path.display(), timeout.as_secs());
            bail!("{path} was locked by another program for {seconds} s: run `fuser -v {path}` to find it");
        }
        if waited > SILENT && !std::mem::replace(&mut has_told, true) {
            log::warn!("waiting for another program that has locked {}", path.display());
        }
        std::thread::sleep(PAUSES[usize::from(waited > PAUSES[1])]);
    }
}

/// Opens the file at `path`, makes it if need be, and locks it alone, for as long as what is returned is open.
pub fn alone(path: &Path) -> Result<File> {
    let file = file().open(path).with_context(|| format!("open {}", path.display()))?;
    wait(&file, path, Kind::Exclusive, SOON)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_lock_is_waited_for_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        let held = alone(&path).unwrap();
        assert_eq!(held.metadata().unwrap().mode() & 0o777, 0o600, "whoever opens it can hold it");
        let other = File::open(&path).unwrap();
        for kind in [Kind::Shared, Kind::Exclusive] {
            let error = wait(&other, &path, kind, Duration::from_millis(100)).unwrap_err().to_string();
            assert!(error.contains("was locked by another program") && error.contains("fuser -v"), "{error}");
        }
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| wait(&other, &path, Kind::Shared, SOON));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!waiting.is_finished());
            drop(held);
            waiting.join().unwrap().unwrap();
        });
        wait(&File::open(&path).unwrap(), &path, Kind::Shared, Duration::ZERO).unwrap();
    }
}
