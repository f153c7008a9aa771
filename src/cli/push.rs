//! `husk push`: uploads images to a registry.

use anyhow::{Result, bail, ensure};
use clap::{ArgAction, Args};

use super::events;
use super::exit::Exit;
use super::limits;
use crate::image::reference::{Reference, Version};
use crate::image::{Progress, Store};

const EXAMPLES: &str = "\
Examples:
  husk tag app registry.example.com/team/app:1
  husk login registry.example.com
  husk push registry.example.com/team/app:1
  husk push --all-tags localhost:5000/app

Layers that the registry has are not sent again, and those that it has in another repository are taken from there.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Push {
    /// Name of an image, which is also where it is pushed to
    #[arg(value_name = "[HOST[:PORT]/]NAME[:TAG]", value_parser = super::pull::reference)]
    name: Reference,

    /// Push all tags of the repository
    #[arg(short, long)]
    all_tags: bool,

    /// Suppress progress output, print only the names
    #[arg(short, long)]
    quiet: bool,

    /// Confine the process that talks to the registry: on (the default), or off to debug it
    #[arg(long, value_name = "on|off", value_parser = limits::on_or_off, action = ArgAction::Set, default_value = "on",
        hide_default_value = true)]
    sandbox: bool,
}

impl Push {
    /// Uploads the images, and prints the digest of each.
    pub fn run(self) -> Result<Exit> {
        let mut store = Store::open_default()?;
        store.sandbox = self.sandbox;
        let progress = if self.quiet { Progress::Hidden } else { Progress::on_terminal() };
        let names = if self.all_tags { self.all(&store)? } else { vec![self.name.clone()] };
        if !self.quiet {
            let Reference { registry, repository, .. } = &self.name;
            super::print(&format!("The push refers to repository [{registry}/{repository}]\n"))?;
        }
        for name in names {
            let Version::Tag(tag) = &name.version else { bail!("an image is pushed by its tag: use NAME[:TAG]") };
            let pushed = store.push(&name, progress)?;
            events::note("image", "push", pushed.digest, name.familiar());
            let line = format!("{tag}: digest: {} size: {}\n", pushed.digest, pushed.manifest_bytes);
            super::print(&if self.quiet { format!("{name}\n") } else { line })?;
        }
        Ok(Exit::Success)
    }

    /// All names with a tag in the repository.
    fn all(&self, store: &Store) -> Result<Vec<Reference>> {
        let index = store.index()?;
        let names = index.names.keys().filter_map(|name| name.parse::<Reference>().ok());
        let is_one = |name: &Reference| {
            (&name.registry, &name.repository) == (&self.name.registry, &self.name.repository)
                && matches!(name.version, Version::Tag(_))
        };
        let names: Vec<Reference> = names.filter(is_one).collect();
        ensure!(!names.is_empty(), "there is no image in {} (see `husk images`)", self.name.repository);
        Ok(names)
    }
}
