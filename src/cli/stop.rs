//! `husk stop`: stops machines gracefully, or by force after a timeout.

use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::selection::Selection;
use super::{machines, time};

const EXAMPLES: &str = "\
Examples:
  husk stop web
  husk stop --time 60 db            (wait up to a minute before killing it)
  husk ps -q | xargs husk stop

The main process receives its stop signal (TERM, unless the image sets another one); if the machine runs its own init, its
power button is pressed instead.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Stop {
    #[command(flatten)]
    selection: Selection,

    /// Time to wait before killing the machine, in seconds or with a unit [default: 10, or --stop-timeout of `husk run`]
    #[arg(short, long, alias = "timeout", value_name = "TIME", value_parser = time::duration)]
    time: Option<Duration>,
}

impl Stop {
    /// Requests a stop of all machines, and waits for each.
    pub fn run(self) -> Result<Exit> {
        let state_dir = crate::state_dir::StateDir::open()?;
        let mut asked = Vec::new();
        let mut exit = Exit::Success;
        for word in self.selection.words(|entry| entry.alive)? {
            let stopped = state_dir.find(&word).and_then(|entry| {
                let end = machines::watch_exit(&entry);
                if entry.alive {
                    machines::request(&entry, &machines::stop_request(&entry, self.time))
                        .with_context(|| word.clone())?;
                }
                Ok((entry, end))
            });
            match stopped {
                Ok((entry, end)) => asked.push((word, entry, end)),
                Err(error) => exit = super::report(&error),
            }
        }
        for (word, entry, end) in asked {
            machines::exit_code(&entry, end)?;
            super::print(&format!("{word}\n"))?;
        }
        Ok(exit)
    }
}
