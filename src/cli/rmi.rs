//! `husk rmi`: removes images from the store.

use anyhow::Result;
use clap::Args;

use super::events;
use super::exit::Exit;
use crate::image::{Removed, Source, Store};

const EXAMPLES: &str = "\
Examples:
  husk rmi debian:12
  husk rmi 0123456789ab
  husk rmi ./rootfs.tar             (the image that was made from this file)";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Rmi {
    /// Names, IDs or source paths of images; a name is removed, and its image with its last name
    #[arg(value_name = "IMAGE", required = true, value_parser = super::load::source)]
    images: Vec<Source>,

    /// Remove an image given by its ID with all of its names, and do not fail if an image does not exist
    #[arg(short, long)]
    force: bool,
}

impl Rmi {
    /// Removes each image in turn. Continues after a failure, which the exit code reports.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        let mut exit = Exit::Success;
        for source in &self.images {
            let found = store.find(source).inspect_err(|error| {
                let failed = super::report(error);
                exit = if self.force { exit } else { failed };
            });
            if found.is_err() {
                continue;
            }
            match store.remove(source, self.force) {
                Ok(Removed { untagged, deleted }) => {
                    untagged.iter().for_each(|name| events::note("image", "untag", name, name));
                    deleted.iter().for_each(|id| events::note("image", "delete", id, id));
                    let untagged = untagged.iter().map(|name| format!("Untagged: {name}\n"));
                    let deleted = deleted.iter().map(|id| format!("Deleted: {id}\n"));
                    super::print(&untagged.chain(deleted).collect::<String>())?;
                }
                Err(error) => exit = super::report(&error),
            }
        }
        Ok(exit)
    }
}
