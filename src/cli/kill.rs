//! `husk kill`: sends machines a signal.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::selection::Selection;
use super::{machines, signal};
use crate::request::Request;

const EXAMPLES: &str = "\
Examples:
  husk kill web                     (immediately, even if its guest hangs)
  husk kill -s HUP web";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Kill {
    #[command(flatten)]
    selection: Selection,

    /// Signal to send to the machine's process; KILL terminates the machine itself
    #[arg(short, long, value_name = "SIGNAL", value_parser = signal::signal, default_value = "KILL")]
    signal: u8,
}

impl Kill {
    /// Sends the signal to each machine in turn.
    pub fn run(self) -> Result<Exit> {
        let words = self.selection.words(|entry| entry.alive)?;
        machines::for_each(&words, |_, entry| machines::request(entry, &Request::Kill { signal: self.signal }))
    }
}
