//! `husk pause` and `husk unpause`: pause and resume machines.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::machines;
use crate::request::Request;

const EXAMPLES: &str = "\
Examples:
  husk pause web
  husk unpause web

A paused machine uses no CPU time and keeps its memory.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Pause {
    /// Names or IDs of machines
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,
}

impl Pause {
    /// Pauses each machine in turn.
    pub fn pause(self) -> Result<Exit> {
        machines::for_each(&self.machines, |_, entry| machines::request(entry, &Request::Pause))
    }

    /// Resumes each machine in turn.
    pub fn unpause(self) -> Result<Exit> {
        machines::for_each(&self.machines, |_, entry| machines::request(entry, &Request::Unpause))
    }
}
