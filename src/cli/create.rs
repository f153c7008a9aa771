//! `husk create`: a machine as of `husk run`, for `husk start`.

use std::time::Instant;

use clap::Args;

use super::exit::Exit;
use super::run::Run;

const EXAMPLES: &str = "\
Examples:
  husk create --name job ./image.tar make
  husk start job                    (in the background)
  husk start -a job                 (on this terminal, until it exits)

All options are those of `husk run`. The machine keeps what it changes until it is removed.";

#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "husk create [OPTIONS] IMAGE [COMMAND] [ARG]...")]
#[command(after_help = EXAMPLES, after_long_help = EXAMPLES)]
pub(super) struct Create {
    #[command(flatten)]
    run: Run,
}

impl Create {
    /// The number of words from the image on.
    pub fn trailing_words(&self) -> usize {
        self.run.trailing_words()
    }

    /// How often `--verbose` was meant among the volumes.
    pub fn take_verbosity(&mut self) -> u8 {
        self.run.take_verbosity()
    }

    /// Creates the machine and prints its ID; or runs it, if it is started again.
    pub fn run(mut self, started: Instant) -> Exit {
        self.run.only_creates = true;
        self.run.run(started)
    }
}
