//! Files on their way between a machine and this process: the host's side of init's own program (firmware/init/src/copy.rs).

use std::io::{BufReader, Read};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, bail, ensure};
use husk_protocol::{INIT_PROGRAM, Process, Role, ToHost};

use crate::guest::exec as guest;
use crate::sandbox;
use crate::state_dir::{self, MachineEntry};

/// Starts init's program in a running machine, with `word` and a path in it. With `stdin`, it reads.
pub fn start(entry: &MachineEntry, word: &str, path: &str, stdin: bool) -> Result<guest::Connections> {
    ensure!(!path.is_empty(), "no path given after {}:", entry.name());
    let args = [INIT_PROGRAM, word, path].map(|word| word.as_bytes().to_vec()).to_vec();
    let process = Process { args, user: "0:0".into(), stdin, ..Process::default() };
    guest::request_start(&entry.file(state_dir::VSOCK), &process)?.connect()
}

/// Calls `take` with the output of `process`, and waits for its exit.
pub fn receive_from<T>(
    mut process: guest::Connections,
    take: impl FnOnce(&mut BufReader<UnixStream>) -> Result<T>,
) -> Result<T> {
    let stream = process.take(Role::Stdout)?;
    let errors = collect_stderr(&mut process)?;
    let copied = take(&mut BufReader::new(stream))?;
    finish(process, errors)?;
    Ok(copied)
}

pub type Errors = std::thread::JoinHandle<String>;

/// Collects the error messages of the other side.
pub fn collect_stderr(process: &mut guest::Connections) -> Result<Errors> {
    const MAX_BYTES: u64 = 64 << 10;
    let stream = process.take(Role::Stderr)?;
    let read = move || {
        let mut bytes = Vec::new();
        let _ = stream.take(MAX_BYTES).read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    };
    sandbox::spawn("stderr", read).context("start a thread")
}

/// Waits for the other side's exit, and fails if it was not successful.
pub fn finish(process: guest::Connections, errors: Errors) -> Result<()> {
    let end = process.end()?;
    let messages = errors.join().unwrap_or_default();
    match end {
        ToHost::Exited(0) => {
            messages.lines().for_each(|line| log::warn!("{line}"));
            Ok(())
        }
        ToHost::Failed { message, .. } => bail!(message),
        _ if messages.trim().is_empty() => bail!("the copy failed in the guest"),
        _ => bail!(messages.trim().to_owned()),
    }
}
