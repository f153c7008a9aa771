//! `husk inspect`: all that the store knows of an image, as JSON.

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use crate::image::{Source, Store};

const EXAMPLES: &str = "\
Examples:
  husk inspect debian:12
  husk inspect debian:12 | jq -r '.[].process.env[]'";

/// The flags of `husk inspect`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Inspect {
    /// Names, IDs, or paths that images were made from
    #[arg(value_name = "IMAGE", required = true, value_parser = super::load::source)]
    images: Vec<Source>,
}

impl Inspect {
    /// Prints a list with an object for each image.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        let images = self.images.iter().map(|source| store.find(source)).collect::<Result<Vec<_>>>()?;
        let json = serde_json::to_string_pretty(&images).context("print the images")?;
        super::print(&format!("{json}\n"))?;
        Ok(Exit::Success)
    }
}
