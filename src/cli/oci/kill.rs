//! `husk oci kill`: sends the process of a container a signal.

use anyhow::{Result, bail};
use clap::Args;
use rustix::process::{Signal, kill_process};

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
    // It was seen alive with its start time just before.
    if let Some(pid) = state.process.filter(|process| process.is_alive()).and_then(|process| process.pid()) {
        match kill_process(pid, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
