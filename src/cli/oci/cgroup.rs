//! The cgroup of a container in its guest: read and written by a process that runs in the machine for that.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use husk_protocol::{INIT_PROGRAM, Process, READ_CGROUP, ToHost, WRITE_CGROUP};

use crate::guest::capture::{self, Captured};
use crate::oci::state::State;
use crate::state_dir;

/// More than the files have together.
const MAX_BYTES: usize = 64 << 10;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Writes files of the cgroup, by their names, in this order.
pub fn write(state: &State, values: &[(String, String)]) -> Result<()> {
    let words = values.iter().map(|(name, value)| format!("{name}={value}")).collect();
    run(state, WRITE_CGROUP, words, TIMEOUT).map(drop)
}

/// Kills all processes in the cgroup.
pub fn kill(state: &State, timeout: Duration) -> Result<()> {
    run(state, WRITE_CGROUP, vec!["cgroup.kill=1".into()], timeout).map(drop)
}

/// The lines of these files of the cgroup, each after the name of its file and a space.
pub fn read(state: &State, names: &[&str]) -> Result<String> {
    run(state, READ_CGROUP, names.iter().map(|name| (*name).to_owned()).collect(), TIMEOUT)
}

fn run(state: &State, what: &str, words: Vec<String>, timeout: Duration) -> Result<String> {
    let before = [INIT_PROGRAM, what, &state.id].map(str::to_owned);
    let args = before.into_iter().chain(words).map(String::into_bytes).collect();
    let process = Process { args, user: "0:0".into(), ..Process::default() };
    let vsock = state.machine()?.file(state_dir::VSOCK);
    let Captured { end, output, errors } = capture::run(&vsock, &process, MAX_BYTES, timeout)?;
    match end.context("the machine does not respond")? {
        ToHost::Exited(0) => Ok(String::from_utf8_lossy(&output).into_owned()),
        ToHost::Failed { message, .. } => bail!(message),
        _ => bail!("{}", crate::foreign::one_line(&String::from_utf8_lossy(&errors))),
    }
}
