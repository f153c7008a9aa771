//! `husk rmi`: takes images out of the store.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use crate::image::{Source, Store};

const EXAMPLES: &str = "\
Examples:
  husk rmi debian:12
  husk rmi 0123456789ab
  husk rmi ./rootfs.tar             (the image that was made from this file)";

/// The flags of `husk rmi`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Rmi {
    /// Names, IDs or source paths of images; a name is untagged, and its image removed with its last name
    #[arg(value_name = "IMAGE", required = true, value_parser = super::load::source)]
    images: Vec<Source>,
}

impl Rmi {
    /// Removes one after the other. The first that cannot be removed ends it.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        for source in &self.images {
            let id = store.find(source)?.id;
            let word = if store.remove(source)? { "Removed" } else { "Untagged (other names remain):" };
            super::print(&format!("{word} {}\n", id.short()))?;
        }
        Ok(Exit::Success)
    }
}
