//! `husk tag`: gives an image another name.

use anyhow::{Result, ensure};
use clap::Args;

use super::events;
use super::exit::Exit;
use crate::image::reference::{Reference, Version};
use crate::image::{Source, Store};

const EXAMPLES: &str = "\
Examples:
  husk tag debian:12 registry.example.com/team/base:1
  husk tag 0123456789ab app                (app:latest)";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Tag {
    /// Name, ID or source path of an image
    #[arg(value_name = "SOURCE_IMAGE", value_parser = super::load::source)]
    source: Source,

    /// Name to add; another image that has it loses it
    #[arg(value_name = "TARGET_IMAGE", value_parser = super::pull::reference)]
    target: Reference,
}

impl Tag {
    /// Adds the name.
    pub fn run(self) -> Result<Exit> {
        ensure!(matches!(self.target.version, Version::Tag(_)), "an image cannot be given a digest: use NAME[:TAG]");
        let store = Store::open_default()?;
        let image = store.find(&self.source)?;
        let name = self.target.familiar();
        store.tag(image.id, &[self.target])?;
        events::note("image", "tag", image.id, name);
        Ok(Exit::Success)
    }
}
