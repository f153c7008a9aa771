//! `husk oci kill`: sends the process of a container a signal.

use anyhow::{Result, bail, ensure};
use clap::Args;
use rustix::process::{PidfdFlags, pidfd_open};

use super::Flags;
use crate::cli::{machines, signal};
use crate::oci::state::{Dir, State, Status};
use crate::request::Request;
use crate::sys::process::signal_opened;

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
            send(state, number)
        }
        Status::Created | Status::Running => machines::request(&state.machine()?, &Request::Kill { signal }),
        Status::Paused => bail!("container is paused: resume it first"),
        Status::Creating | Status::Stopped => bail!("container not running"),
    }
}

/// Ends the container, and its machine if that is its own, by killing its process, which need not answer.
pub fn kill_now(state: &State) -> Result<()> {
    send(state, libc::SIGKILL)
}

/// Sends the container's process on the host a signal, if it is still there.
fn send(state: &State, signal: i32) -> Result<()> {
    let Some(process) = state.process else { return Ok(()) };
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
