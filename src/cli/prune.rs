//! `husk prune`: frees disk space that is not in use.

use anyhow::{Context, Result};
use clap::Args;
use indicatif::HumanBytes;

use super::exit::Exit;
use crate::image::{PruneOptions, Store};
use crate::snapshot::warm;

const EXAMPLES: &str = "\
Examples:
  husk prune              (untagged images, outdated warm images, leftovers of interrupted pulls)
  husk prune --all        (all images that no machine has)
  husk prune --layers     (layers too: images still run, but later versions are downloaded in full)";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Prune {
    /// Also remove images with a name that no machine has, running or not
    #[arg(short, long)]
    all: bool,

    /// Also remove layers, which are only needed to pull newer versions of images
    #[arg(long)]
    layers: bool,

    /// Do not prompt for confirmation: always on, for compatibility with `docker system prune`
    #[arg(short, long, hide = true)]
    force: bool,

    /// Format the output as JSON
    #[arg(long)]
    json: bool,
}

impl Prune {
    /// Removes unused data and prints the amount. Data used by running machines is kept.
    pub fn run(self) -> Result<Exit> {
        let Prune { all, layers, json, force: _ } = self;
        let store = Store::open_default()?;
        let mut pruned = store.prune(PruneOptions { keep_named: !all, keep_unnamed: false, keep_layers: !layers })?;
        warm::prune(&store, &mut pruned)?;
        let text = if json {
            serde_json::to_string(&pruned).context("print what was removed")?
        } else {
            format!(
                "Removed {} images and {} files, reclaimed {}",
                pruned.images,
                pruned.files,
                HumanBytes(pruned.bytes)
            )
        };
        super::print(&format!("{text}\n"))?;
        Ok(Exit::Success)
    }
}
