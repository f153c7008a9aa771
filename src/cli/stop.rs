//! `husk stop`: ends machines in order, and by force when that takes too long.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::{ask, when};
use crate::request::Request;

const EXAMPLES: &str = "\
Examples:
  husk stop web
  husk stop --time 60 db            (it has a minute to write what it has to)
  husk ps -q | xargs husk stop

A process is sent its stop signal (TERM, where the image says nothing else); a machine with an init of its own has its power
button pressed.";

/// The flags of `husk stop`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Stop {
    /// Names or IDs
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,

    /// How long each may take, in seconds or with a unit, before it is ended
    #[arg(short, long, value_name = "TIME", value_parser = when::duration, default_value = "10")]
    time: Duration,
}

impl Stop {
    /// Asks all of them, and waits for each.
    pub fn run(self) -> Result<Exit> {
        let request = Request::Stop { timeout_ms: u64::try_from(self.time.as_millis()).unwrap_or(u64::MAX) };
        let roster = crate::roster::Roster::open()?;
        let mut asked = Vec::new();
        let mut exit = Exit::Success;
        for word in self.machines {
            let stopped = roster.find(&word).and_then(|entry| {
                let end = ask::end(&entry);
                if entry.alive { ask::done(&entry, &request).map(|()| (entry, end)) } else { Ok((entry, end)) }
            });
            match stopped {
                Ok((entry, end)) => asked.push((word, entry, end)),
                Err(error) => exit = super::report(&error.context(word)),
            }
        }
        for (word, entry, end) in asked {
            ask::code(&entry, end)?;
            super::print(&format!("{word}\n"))?;
        }
        Ok(exit)
    }
}
