//! `husk pause` and `husk unpause`: pause and resume machines.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::machines;
use super::selection::Selection;
use crate::request::Request;
use crate::state_dir::record::State;

const EXAMPLES: &str = "\
Examples:
  husk pause web
  husk unpause web

A paused machine uses no CPU time and keeps its memory.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Pause {
    #[command(flatten)]
    selection: Selection,
}

impl Pause {
    /// Pauses each machine in turn.
    pub fn pause(self) -> Result<Exit> {
        let words = self.selection.words(|entry| matches!(entry.state(), State::Running { .. }))?;
        machines::for_each(&words, |_, entry| machines::request(entry, &Request::Pause))
    }

    /// Resumes each machine in turn.
    pub fn unpause(self) -> Result<Exit> {
        let words = self.selection.words(|entry| matches!(entry.state(), State::Paused { .. }))?;
        machines::for_each(&words, |_, entry| machines::request(entry, &Request::Unpause))
    }
}
