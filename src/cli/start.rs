//! `husk start` and `husk restart`: start machines in the background again, in the same way as before.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::{lifecycle, machines, time};
use crate::request::Request;
use crate::state_dir::{self, MachineEntry, StateDir};

const START_EXAMPLES: &str = "\
Examples:
  husk start web
  husk start $(husk ps -aq)         (running machines are left alone)

The machine keeps its name, ID and logs, and is started with the same command line as before. An image or a kernel is looked
up again by its name. Changes to the root filesystem are lost unless they are on a persistent disk (--keep).";

const RESTART_EXAMPLES: &str = "\
Examples:
  husk restart web
  husk restart --time 60 db         (wait up to a minute before killing it)

A suspended machine is started anew: what it was doing is lost.";

#[derive(Debug, Args)]
#[command(after_help = START_EXAMPLES)]
pub(super) struct Start {
    /// Names or IDs of machines
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = RESTART_EXAMPLES)]
pub(super) struct Restart {
    /// Names or IDs of machines
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,

    /// Time to wait before killing the machine, in seconds or with a unit
    #[arg(short, long, alias = "timeout", value_name = "TIME", value_parser = time::duration, default_value = "10")]
    time: Duration,
}

impl Start {
    /// Starts each machine in turn.
    pub fn run(self) -> Result<Exit> {
        each(&self.machines, |_, entry| if entry.alive { Ok(Exit::Success) } else { lifecycle::start_stopped(entry) })
    }
}

impl Restart {
    /// Stops each machine that is running, and starts it again.
    pub fn run(self) -> Result<Exit> {
        let request = Request::Stop { timeout_ms: u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX) };
        each(&self.machines, |state_dir, entry| {
            lifecycle::check_restartable(entry)?;
            entry.suspended().map_or(Ok(()), state_dir::remove_snapshot)?;
            if entry.alive {
                let end = machines::watch_exit(entry);
                machines::request(entry, &request)?;
                machines::exit_code(entry, end)?;
            }
            lifecycle::start_stopped(&state_dir.find(&entry.id)?)
        })
    }
}

/// Starts each machine and prints its name. Continues after a failure.
fn each(words: &[String], start: impl Fn(&StateDir, &MachineEntry) -> Result<Exit>) -> Result<Exit> {
    let state_dir = StateDir::open()?;
    let mut exit = Exit::Success;
    for word in words {
        match state_dir.find(word).and_then(|entry| start(&state_dir, &entry).with_context(|| entry.name().to_owned()))
        {
            Ok(Exit::Success) => super::print(&format!("{word}\n"))?,
            // It has reported why.
            Ok(_) => exit = Exit::Failure,
            Err(error) => exit = super::report(&error),
        }
    }
    Ok(exit)
}
