//! `husk container exists` and its like: whether there is one, as the exit code.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use crate::image::{Source, Store};
use crate::resources::bridge;
use crate::state_dir::StateDir;

#[derive(Debug, Args)]
pub(super) struct Exists {
    /// Name or ID
    name: String,
}

impl Exists {
    /// Whether there is a machine by this name.
    pub fn machine(&self) -> Result<Exit> {
        StateDir::open()?.has(&self.name).map(exit)
    }

    /// Whether there is an image by this name.
    pub fn image(&self) -> Result<Exit> {
        let source: Source = self.name.parse()?;
        Ok(exit(Store::open_default()?.find(&source).is_ok()))
    }

    /// Whether there is a volume by this name.
    pub fn volume(&self) -> Result<Exit> {
        Ok(exit(Store::open_default()?.volumes()?.iter().any(|volume| volume.name == self.name)))
    }

    /// Whether there is a network by this name.
    pub fn network(&self) -> Result<Exit> {
        Ok(exit(bridge::list()?.iter().any(|network| network.name == self.name)))
    }
}

fn exit(exists: bool) -> Exit {
    if exists { Exit::Success } else { Exit::Failure }
}
