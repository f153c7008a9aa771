//! `husk wait`: waits until machines have ended, and prints their exit codes.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::machines;
use crate::state_dir::StateDir;

const EXAMPLES: &str = "\
Examples:
  code=$(husk wait job)
  husk wait a b c                   (prints three exit codes, in this order)";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Wait {
    /// Names or IDs of machines
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,

    /// What to wait for, in podman's words: that they have ended
    #[arg(long, hide = true, value_parser = ["stopped", "exited"])]
    condition: Vec<String>,
}

impl Wait {
    /// Prints a line for each machine, in order. If its husk process was killed, the code is 137.
    pub fn run(self) -> Result<Exit> {
        let state_dir = StateDir::open()?;
        let mut exit = Exit::Success;
        let find = |word: &String| state_dir.find(word).map_err(|error| exit = super::report(&error)).ok();
        let entries: Vec<_> = self.machines.iter().filter_map(find).collect();
        let asked: Vec<_> = entries.iter().map(machines::watch_exit).collect();
        for (entry, end) in entries.iter().zip(asked) {
            super::print(&format!("{}\n", machines::exit_code(entry, end)?))?;
        }
        Ok(exit)
    }
}
