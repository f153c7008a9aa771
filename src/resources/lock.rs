//! File locks (flock(2)) with a timeout, and a warning after one second.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Error, ErrorKind};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The timeout for short operations of other commands.
pub const SHORT_TIMEOUT: Duration = Duration::from_secs(60);
/// The timeout for another command that fetches or unpacks an image that is also needed here.
pub const LONG_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// The time before the warning.
const WARN_AFTER: Duration = Duration::from_secs(1);
/// The polling intervals, since there is no notification when a lock is released.
const PAUSES: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];

/// The kind of lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Shared with other shared locks.
    Shared,
    /// Exclusive.
    Exclusive,
}

/// Options to open a lock file: accessible only to its owner, because any process that can open it can hold the lock,
/// and open for reading and writing, which NFS requires for the two kinds of lock.
pub fn file() -> OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600);
    options
}

/// Locks `file`, opened from `path`, for as long as it is open. Logs a warning after one second, on the calling thread,
/// and fails if the lock is not available within `timeout`.
pub fn wait(file: &File, path: &Path, kind: Kind, timeout: Duration) -> Result<()> {
    let started = Instant::now();
    let mut has_warned = false;
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
        if waited > WARN_AFTER && !std::mem::replace(&mut has_warned, true) {
            log::warn!("waiting for another program that has locked {}", path.display());
        }
        std::thread::sleep(PAUSES[usize::from(waited > PAUSES[1])]);
    }
}

/// Opens the file at `path`, creating it if necessary, and locks it exclusively for as long as the returned file is
/// open.
pub fn alone(path: &Path) -> Result<File> {
    alone_within(path, SHORT_TIMEOUT)
}

/// The same without waiting; `None` if it is locked.
pub fn try_alone(path: &Path) -> Result<Option<File>> {
    let file = file().open(path).with_context(|| format!("open {}", path.display()))?;
    Ok(file.try_lock().is_ok().then_some(file))
}

/// The same, waiting for at most `timeout`.
pub fn alone_within(path: &Path, timeout: Duration) -> Result<File> {
    let file = file().open(path).with_context(|| format!("open {}", path.display()))?;
    wait(&file, path, Kind::Exclusive, timeout)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_lock_is_waited_for_until_the_timeout() {
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
            let waiting = scope.spawn(|| wait(&other, &path, Kind::Shared, SHORT_TIMEOUT));
            std::thread::sleep(Duration::from_millis(100));
            assert!(!waiting.is_finished());
            drop(held);
            waiting.join().unwrap().unwrap();
        });
        wait(&File::open(&path).unwrap(), &path, Kind::Shared, Duration::ZERO).unwrap();
    }
}
