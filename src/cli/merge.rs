//! `husk merge`: makes a diff snapshot whole.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use crate::snapshot;

const EXAMPLES: &str = "\
Examples:
  husk snapshot --base ./web.snap web ./web.1
  husk merge ./web.1 ./web.now
  husk restore ./web.now

A base that is a diff snapshot itself is merged, too. Neither is changed, and both can be
removed afterwards.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Merge {
    /// Directory that `husk snapshot --base` has created
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Directory to create
    #[arg(value_name = "NEW")]
    new: PathBuf,

    /// Where its base is now, if that was moved
    #[arg(long, value_name = "DIR")]
    base: Option<PathBuf>,
}

impl Merge {
    /// Returns when the new snapshot is complete.
    pub fn run(self) -> Result<Exit> {
        snapshot::merge(&self.dir, self.base.as_deref(), &self.new)?;
        super::print(&format!("{}\n", self.new.display()))?;
        Ok(Exit::Success)
    }
}
