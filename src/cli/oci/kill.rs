//! `husk oci kill`: sends the process of a container a signal.

use anyhow::{Result, bail};
use clap::Args;
use rustix::io::Errno;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::Flags;
use crate::cli::{machines, signal};
use crate::oci::state::{State, Status};
use crate::request::Request;

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
        let (_, state) = flags.root()?.open(&self.id)?;
        kill(&state, self.signal)
    }
}

/// Sends the container's process a signal.
pub fn kill(state: &State, signal: u8) -> Result<()> {
    let status = state.status();
    if i32::from(signal) == libc::SIGKILL && status != Status::Stopped {
        return kill_now(state);
    }
    match status {
        Status::Created | Status::Running => machines::request(&state.machine()?, &Request::Kill { signal }),
        Status::Paused => bail!("container is paused: resume it first"),
        Status::Creating | Status::Stopped => bail!("container not running"),
    }
}

/// Ends the machine by killing the process that owns it, which need not answer.
pub fn kill_now(state: &State) -> Result<()> {
    let Some(process) = state.process else { return Ok(()) };
    let Some(handle) = process.pid().and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) else { return Ok(()) };
    // Looked at after it was opened: what is killed is this process, and no later one with its PID.
    if process.is_alive() {
        match pidfd_send_signal(handle, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
