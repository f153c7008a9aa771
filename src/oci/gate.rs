//! Where a further container of a machine waits to be started: a socket in the container's directory, which is there until then.

use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use rustix::fs::{AtFlags, Mode, OFlags, open, unlinkat};

use super::state::Dir;

const SOCKET: &str = "start";
/// What who has started the container is told: this, or why it has failed.
const STARTED: &str = "started";
const REASON_BYTES_MAX: u64 = 4096;

/// The side of the container's process.
pub struct Gate {
    /// Its root directory is another when the container is started.
    dir: OwnedFd,
    listener: UnixListener,
}

/// The path of the socket by a descriptor of its directory: that of an engine may be too long for a socket.
fn socket(dir: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd()))
}

fn open_dir(dir: &Dir) -> Result<OwnedFd> {
    let path = dir.path();
    open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open {}", path.display()))
}

/// Whether the container `dir` waits to be started.
pub fn is_shut(dir: &Dir) -> bool {
    dir.path().join(SOCKET).exists()
}

/// Starts the container `dir`. Returns when its program is running, or why it is not.
pub fn pass(dir: &Dir) -> Result<()> {
    let opened = open_dir(dir)?;
    let stream = UnixStream::connect(socket(&opened)).context("the container does not wait to be started")?;
    let mut told = String::new();
    stream.take(REASON_BYTES_MAX).read_to_string(&mut told).context("wait until the container is started")?;
    match told.as_str() {
        STARTED => Ok(()),
        "" => bail!("the container has ended before it was started"),
        why => bail!("{why}"),
    }
}

impl Gate {
    /// Shuts the gate of the container `dir`.
    pub fn shut(dir: &Dir) -> Result<Gate> {
        let dir = open_dir(dir)?;
        let listener = UnixListener::bind(socket(&dir)).context("create the socket that starts the container")?;
        Ok(Gate { dir, listener })
    }

    /// Lets the first one pass who has come; the gate is gone then. It is answered when the container's program is running.
    pub fn open(self) -> Result<UnixStream> {
        let (stream, _) = self.listener.accept().context("accept a connection")?;
        unlinkat(self.dir.as_fd(), SOCKET, AtFlags::empty()).context("remove the socket that starts the container")?;
        Ok(stream)
    }
}

impl AsRawFd for Gate {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.as_raw_fd()
    }
}

/// Answers who has passed: with why the container's program is not running, if it is not.
pub fn answer(mut passed: UnixStream, failure: Option<&str>) {
    // It may have gone.
    let _ = passed.write_all(failure.unwrap_or(STARTED).as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::state::Root;

    #[test]
    fn a_container_is_started_once() {
        let temporary = tempfile::tempdir().unwrap();
        // Longer than the address of a socket may be.
        let root = Root::new(Some(temporary.path().join("r".repeat(120)))).unwrap();
        let dir = root.create("a").unwrap();
        assert!(!is_shut(&dir) && pass(&dir).is_err());
        for failure in [None, Some("exec: \"x\": not found")] {
            let gate = Gate::shut(&dir).unwrap();
            assert!(is_shut(&dir));
            let at = root.dir("a");
            let starter = std::thread::spawn(move || pass(&at).map_err(|error| format!("{error:#}")));
            let passed = gate.open().unwrap();
            assert!(!is_shut(&dir) && pass(&dir).is_err());
            answer(passed, failure);
            assert_eq!(starter.join().unwrap().err().as_deref(), failure);
        }
        let gate = Gate::shut(&dir).unwrap();
        drop(gate);
        assert!(pass(&dir).unwrap_err().to_string().contains("does not wait"));
    }
}
