//! `husk attach`: attaches this terminal to a machine in the background.

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use crate::request::attach::{self, End};
use crate::state_dir::{self, MachineEntry, StateDir};
use crate::supervisor;

const EXAMPLES: &str = "\
Examples:
  husk attach web                   (Ctrl-P Ctrl-Q detaches and leaves it running)
  husk attach --no-stdin web

Earlier output is in `husk logs`. A machine keeps running even if nothing reads its output.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Attach {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Do not attach standard input
    #[arg(long)]
    no_stdin: bool,
}

impl Attach {
    /// Attaches until the machine has ended, and returns its exit code, or until the user detaches.
    pub fn run(self) -> Result<Exit> {
        attach_to(&StateDir::open()?.find(&self.machine)?, !self.no_stdin)
    }
}

/// Attaches until the machine has ended, and returns its exit code, or until the user detaches. `with_stdin` says whether its process
/// may read this process's standard input.
pub(super) fn attach_to(entry: &MachineEntry, with_stdin: bool) -> Result<Exit> {
    let record = entry.record()?;
    // A machine started by `husk boot` has a console, which is a terminal with input.
    let (stdin, terminal) = record.process.as_ref().map_or((true, true), |process| (process.stdin, process.terminal));
    let signals = supervisor::block_signals(true)?;
    let end = attach::attach(&entry.file(state_dir::CONTROL), &signals, stdin && with_stdin, terminal);
    match end.with_context(|| format!("attach to {}", entry.name()))? {
        End::Ended(code) => Ok(Exit::Reported(code)),
        End::Detached => Ok(Exit::Success),
    }
}
