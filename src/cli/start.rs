//! `husk start` and `husk restart`: start machines again, in the same way as before.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::exit::Exit;
use super::selection::Selection;
use super::{attach, lifecycle, machines, time};
use crate::state_dir::{self, MachineEntry, StateDir};
use crate::supervisor::notify;

const START_EXAMPLES: &str = "\
Examples:
  husk start web
  husk start $(husk ps -aq)         (running machines are left alone)
  husk start -a job                 (on this terminal; the exit code is the command's)
  husk start -ai shell

The machine keeps its name, ID and logs, its image and its changes to the root filesystem, and is started with the same command
line as before. A kernel is looked up again by its name.";

const RESTART_EXAMPLES: &str = "\
Examples:
  husk restart web
  husk restart --time 60 db         (wait up to a minute before killing it)

A suspended machine is started anew: what it was doing is lost.";

#[derive(Debug, Args)]
#[command(after_help = START_EXAMPLES)]
pub(super) struct Start {
    /// Attach this terminal to the output of the machine, and return its exit code
    #[arg(short, long)]
    attach: bool,

    /// Attach standard input as well, if the machine was created with --interactive
    #[arg(short, long)]
    interactive: bool,

    #[command(flatten)]
    keys: attach::AttachFlags,

    /// Names or IDs of machines
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,
}

#[derive(Debug, Args)]
#[command(after_help = RESTART_EXAMPLES)]
pub(super) struct Restart {
    #[command(flatten)]
    selection: Selection,

    /// Time to wait before killing the machine, in seconds or with a unit [default: 10, or --stop-timeout of `husk run`]
    #[arg(short, long, alias = "timeout", value_name = "TIME", value_parser = time::duration)]
    time: Option<Duration>,
}

impl Start {
    /// Starts each machine in turn.
    pub fn run(self) -> Result<Exit> {
        if self.attach || self.interactive {
            return self.start_attached();
        }
        each(&self.machines, |_, entry| if entry.alive { Ok(Exit::Success) } else { lifecycle::start_stopped(entry) })
    }

    /// Runs the machine in the place of this process, or attaches to it if it is running.
    fn start_attached(self) -> Result<Exit> {
        let [machine] = self.machines.as_slice() else { bail!("only one machine can be attached to this terminal") };
        let entry = StateDir::open()?.find(machine)?;
        if entry.alive {
            notify::ready();
            return attach::attach_to(&entry, self.interactive, self.keys);
        }
        lifecycle::become_stopped(&entry, self.interactive, self.keys.sig_proxy)
    }
}

impl Restart {
    /// Stops each machine that is running, and starts it again.
    pub fn run(self) -> Result<Exit> {
        let words = self.selection.words(|entry| entry.alive)?;
        each(&words, |state_dir, entry| {
            lifecycle::check_restartable(entry)?;
            entry.suspended().map_or(Ok(()), state_dir::remove_snapshot)?;
            if entry.alive {
                let end = machines::watch_exit(entry);
                machines::request(entry, &machines::stop_request(entry, self.time))?;
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
