//! `husk disks`: manages persistent disks.

use anyhow::Result;
use clap::Args;
use indicatif::HumanBytes;

use super::exit::Exit;
use crate::image::Store;

const EXAMPLES: &str = "\
Examples:
  husk disks
  husk disks --remove build-cache";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Disks {
    /// Format the output as JSON
    #[arg(long)]
    json: bool,

    /// Remove a disk and its data; can be repeated
    #[arg(long, value_name = "NAME", conflicts_with = "json")]
    remove: Vec<String>,
}

impl Disks {
    /// Prints the list, or removes the given disks.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        for name in &self.remove {
            store.remove_kept_disk(name)?;
            super::print(&format!("Removed {name}\n"))?;
        }
        if !self.remove.is_empty() {
            return Ok(Exit::Success);
        }
        let disks = store.kept_disks()?;
        if self.json {
            super::print_json(&disks, "the disks")?;
            return Ok(Exit::Success);
        }
        let mut rows = vec![["NAME".to_owned(), "SIZE".into(), "USED".into(), "STATE".into()]];
        rows.extend(disks.into_iter().map(|disk| {
            let state = if disk.in_use { "in use" } else { "free" };
            [disk.name, HumanBytes(disk.size_bytes).to_string(), HumanBytes(disk.disk_bytes).to_string(), state.into()]
        }));
        super::print(&super::images::table(&rows))?;
        Ok(Exit::Success)
    }
}
