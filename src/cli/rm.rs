//! `husk rm`: removes machines that have ended.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::selection::Selection;
use super::volume::users;
use super::{machines, time};
use crate::request::Request;
use crate::state_dir::record::State;
use crate::state_dir::{NoSuchMachine, StateDir};

const EXAMPLES: &str = "\
Examples:
  husk rm job
  husk rm --force web               (kills it first if it is running)
  husk rm $(husk ps -aq)";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Rm {
    #[command(flatten)]
    selection: Selection,

    /// Force the removal of running machines (uses SIGKILL), and do not fail if a machine does not exist
    #[arg(short, long)]
    force: bool,

    /// With --force: stop the machine first, and kill it if it still runs after this time, in seconds or with a unit
    #[arg(short, long, value_name = "TIME", value_parser = time::duration, requires = "force")]
    time: Option<Duration>,

    /// Remove the anonymous volumes of the machines as well, unless other machines have them
    #[arg(short, long)]
    volumes: bool,
}

impl Rm {
    /// Removes each machine in turn, including its logs.
    pub fn run(self) -> Result<Exit> {
        let mut words = self.selection.words(|_| true)?;
        if self.force {
            // Like Docker: a machine that does not exist is reported, but is not a failure.
            let state_dir = StateDir::open()?;
            words.retain(|word| match state_dir.find(word) {
                Err(error) if error.is::<NoSuchMachine>() => {
                    super::report(&error);
                    false
                }
                _ => true,
            });
        }
        machines::for_each(&words, |state_dir, entry| {
            if entry.alive && self.force {
                let end = machines::watch_exit(entry);
                // It may have just ended by itself.
                let end_it = match self.time {
                    Some(time) if !time.is_zero() => machines::stop_request(entry, self.time),
                    _ => Request::Kill { signal: libc::SIGKILL as u8 },
                };
                let _ = machines::request(entry, &end_it);
                machines::exit_code(entry, end)?;
                if let Some(ended) = entry.await_end()? {
                    state_dir.remove(&ended)?;
                }
            } else {
                state_dir.remove(entry)?;
            }
            if self.volumes { users::remove_anonymous(state_dir, entry) } else { Ok(()) }
        })
    }
}

#[derive(Debug, Args)]
pub(super) struct Prune {
    /// Do not ask
    #[arg(short, long, required = true)]
    force: bool,
}

impl Prune {
    /// Removes all machines that have ended or were not started yet, as Docker does, and prints their IDs. Suspended ones are to continue.
    pub fn run(self) -> Result<Exit> {
        let machines = StateDir::open()?.list()?;
        let idle = machines.iter().filter(|entry| matches!(entry.state(), State::Created | State::Exited { .. }));
        let ids: Vec<String> = idle.map(|entry| entry.id.clone()).collect();
        machines::for_each(&ids, |state_dir, entry| state_dir.remove(entry))
    }
}
