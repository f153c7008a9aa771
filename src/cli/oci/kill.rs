//! `husk oci kill`: sends the process of a container a signal.

use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use clap::Args;
use rustix::process::{PidfdFlags, pidfd_open};

use super::Flags;
use crate::cli::{machines, signal};
use crate::oci::state::{Dir, ProcessId, State, Status};
use crate::request::Request;
use crate::state_dir::record::State as MachineState;
use crate::sys::process::signal_opened;

/// How long a guest has to kill a container's processes, and then to report it.
const GUEST_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a process may take to end that was killed.
pub const KILL_TIMEOUT: Duration = Duration::from_secs(10);

#[derive(Debug, Args)]
pub(super) struct Kill {
    /// Send it to all processes: with KILL that is so anyway, since the machine ends
    #[arg(short, long)]
    all: bool,

    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,

    /// Signal, by name or number
    #[arg(value_name = "SIGNAL", value_parser = signal::signal, default_value = "TERM")]
    signal: u8,
}

impl Kill {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let (dir, state) = flags.root()?.open(&self.id)?;
        kill(&dir, &state, self.signal)
    }
}

/// Sends the container's process a signal.
pub fn kill(dir: &Dir, state: &State, signal: u8) -> Result<()> {
    let status = state.status(dir);
    if i32::from(signal) == libc::SIGKILL && status != Status::Stopped {
        return kill_now(state);
    }
    match status {
        // It passes signals on, except for those that stop it.
        Status::Created | Status::Running if state.pod.is_some() => {
            let number = i32::from(signal);
            ensure!(number != libc::SIGSTOP, "SIGSTOP: use `pause` for a container that shares its machine");
            state.process.map_or(Ok(()), |process| send(process, number))
        }
        Status::Created | Status::Running => machines::request(&state.machine()?, &Request::Kill { signal }),
        Status::Paused => bail!("container is paused: resume it first"),
        Status::Creating | Status::Stopped => bail!("container not running"),
    }
}

/// Ends the container, and its machine if that is its own, by killing its process, which need not answer. The processes of one that
/// shares its machine are killed first, so that none of them outlives it, unless the guest does not do so in time.
pub fn kill_now(state: &State) -> Result<()> {
    let Some(process) = state.process.filter(ProcessId::is_alive) else { return Ok(()) };
    if state.pod.is_some()
        && state.machine().is_ok_and(|machine| !matches!(machine.state(), MachineState::Paused { .. }))
        && super::cgroup::kill(state, GUEST_TIMEOUT).is_ok()
        && await_end(process, GUEST_TIMEOUT).is_ok()
    {
        return Ok(());
    }
    send(process, libc::SIGKILL)
}

/// Waits until a process that was killed has ended.
pub fn await_end(process: ProcessId, timeout: Duration) -> Result<()> {
    let until = Instant::now() + timeout;
    while process.is_alive() {
        ensure!(Instant::now() < until, "process {} does not end", process.pid);
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Sends a container's process on the host a signal, if it is still there.
pub fn send(process: ProcessId, signal: i32) -> Result<()> {
    let Some(handle) = process.pid().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { return Ok(()) };
    // Looked at after it was opened: what is killed is this process, and no later one with its PID.
    if process.is_alive() {
        match signal_opened(handle, signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}
