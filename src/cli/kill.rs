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
    #[arg(short, long, value_name = "SIGNAL", value_parser = with_dash, allow_hyphen_values = true, default_value = "KILL")]
    signal: u8,
}

impl Kill {
    /// Sends the signal to each machine in turn.
    pub fn run(self) -> Result<Exit> {
        let words = self.selection.words(|entry| entry.alive)?;
        machines::for_each(&words, |_, entry| machines::request(entry, &Request::Kill { signal: self.signal }))
    }
}

/// A signal, also with a dash in front, as kill(1) has it.
fn with_dash(text: &str) -> Result<u8, String> {
    signal::signal(text.strip_prefix('-').unwrap_or(text))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Only {
        #[command(flatten)]
        kill: Kill,
    }

    #[test]
    fn a_signal_may_have_a_dash() {
        let signal = |words: &[&str]| {
            let parsed = Only::try_parse_from([&["kill"], words, &["web"]].concat());
            parsed.map(|only| only.kill.signal).map_err(|error| error.to_string())
        };
        for (words, expected) in [(&["-s", "-INT"][..], 2), (&["-s", "-1"], 1), (&["--signal=-SIGUSR1"], 10), (&[], 9)]
        {
            assert_eq!(signal(words), Ok(expected), "{words:?}");
        }
        assert!(signal(&["-s", "--INT"]).is_err());
    }
}
