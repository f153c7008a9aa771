//! Runs a process in a running machine and collects what it prints, for commands that need an answer rather than a session.

use std::io::{self, Read};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use husk_protocol::{Process, Role, ToHost};

use super::exec::{self, Connections};
use crate::sandbox;

/// What a process has printed, and how it ended.
#[derive(Debug)]
pub struct Captured {
    /// How it ended; `None` if it took too long, and was killed.
    pub end: Option<ToHost>,
    /// Its standard output, at most as much as was wanted.
    pub output: Vec<u8>,
    /// The same of its standard error.
    pub errors: Vec<u8>,
}

/// Runs `process`, which has neither input nor a terminal, in the machine whose vsock socket is at `vsock`. Keeps at most
/// `max_bytes` of each output. After `timeout` it is killed; a guest that does not respond takes no more than twice as long to be given up. Blocks the calling thread until then.
pub fn run(vsock: &Path, process: &Process, max_bytes: usize, timeout: Duration) -> Result<Captured> {
    let deadline = Instant::now().checked_add(timeout);
    let mut connections = exec::request_start_within(vsock, process, timeout)?.connect()?;
    let (stdout, stderr) = (connections.take(Role::Stdout)?, connections.take(Role::Stderr)?);
    let errors = sandbox::spawn("stderr", move || read_all(stderr, max_bytes, deadline)).context("start a thread")?;
    let (output, is_complete) = read_all(stdout, max_bytes, deadline);
    let (errors, are_complete) = errors.join().unwrap_or_default();
    let end = if is_complete && are_complete { end_by(connections, deadline)? } else { kill(connections) };
    Ok(Captured { end, output, errors })
}

fn end_by(mut connections: Connections, deadline: Option<Instant>) -> Result<Option<ToHost>> {
    match connections.end_by(deadline) {
        Err(error) if exec::is_timeout(&error) => Ok(kill(connections)),
        end => end.map(Some),
    }
}

fn kill(mut connections: Connections) -> Option<ToHost> {
    // If the guest is gone, so is the process.
    let _ = connections.signal(libc::SIGKILL as u8);
    None
}

/// Reads to the end or until `deadline`, and returns the first `max_bytes` and whether it was the end.
fn read_all(mut stream: UnixStream, max_bytes: usize, deadline: Option<Instant>) -> (Vec<u8>, bool) {
    let mut kept = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) || stream.set_read_timeout(left).is_err() {
            return (kept, false);
        }
        match stream.read(&mut buffer) {
            Ok(0) => return (kept, true),
            Ok(count) => {
                let room = max_bytes.saturating_sub(kept.len()).min(count);
                kept.extend_from_slice(buffer.get(..room).unwrap_or_default());
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (kept, error.kind() != io::ErrorKind::WouldBlock),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn output_is_bounded_and_its_reader_is_not_late() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || theirs.write_all(&[b'x'; 100_000]));
        let (kept, is_complete) = read_all(ours, 1000, None);
        assert_eq!((kept.len(), is_complete), (1000, true));
        writer.join().unwrap().unwrap();
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let started = Instant::now();
        let (kept, is_complete) = read_all(ours, 1000, Some(started + Duration::from_millis(50)));
        assert!(kept.is_empty() && !is_complete && started.elapsed() >= Duration::from_millis(50));
    }
}
