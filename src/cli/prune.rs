//! `husk prune`: gives the disk back that nobody uses.

use anyhow::{Context, Result};
use clap::Args;
use indicatif::HumanBytes;

use super::exit::Exit;
use crate::image::{Held, Store};

const EXAMPLES: &str = "\
Examples:
  husk prune              images without a name, and what broken-off pulls have left
  husk prune --layers     layers too: images run as before, and their next versions are fetched whole";

/// The flags of `husk prune`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Prune {
    /// Remove layers as they came, too: only a pull of an image's next version would want them
    #[arg(long)]
    layers: bool,

    /// Print what was removed as JSON
    #[arg(long)]
    json: bool,
}

impl Prune {
    /// Removes, and says how much it was. What a running machine uses stays.
    pub fn run(self) -> Result<Exit> {
        let pruned = Store::open_default()?.prune(Held { nameless: false, layers: !self.layers })?;
        let text = if self.json {
            serde_json::to_string(&pruned).context("print what was removed")?
        } else {
            format!("{} images, {} files removed: {}", pruned.images, pruned.files, HumanBytes(pruned.bytes))
        };
        super::print(&format!("{text}\n"))?;
        Ok(Exit::Success)
    }
}
