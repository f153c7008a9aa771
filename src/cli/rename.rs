//! `husk rename`: renames a machine.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::machines;
use crate::request::Request;
use crate::state_dir::events::Event;
use crate::state_dir::{StateDir, names};

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  husk rename web old-web")]
pub(super) struct Rename {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// New name
    #[arg(value_name = "NAME")]
    name: String,
}

impl Rename {
    /// Renames the machine, running or not. Its host name in the guest does not change.
    pub fn run(self) -> Result<Exit> {
        names::check(&self.name)?;
        let state_dir = StateDir::open()?;
        let entry = state_dir.find(&self.machine)?;
        if entry.alive {
            machines::request(&entry, &Request::Rename { name: self.name })?;
        } else {
            state_dir.rename(&entry, &self.name)?;
            let earlier = entry.record.iter().map(|record| Event::of(record, "rename").renamed(&self.name));
            state_dir.note(&earlier.collect::<Vec<_>>());
        }
        Ok(Exit::Success)
    }
}
