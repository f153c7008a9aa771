//! The flags of all commands that add images to the store.

use anyhow::Result;
use clap::{ArgAction, Args};

use super::{limits, size};
use crate::image::Store;

#[derive(Debug, Args)]
pub(super) struct ImportFlags {
    /// Limit the disk space for downloading and unpacking the image [default: the free disk space]
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    max_size: Option<u64>,

    /// Confine the processes that download and unpack the image: on (the default), or off to debug them
    #[arg(long, value_name = "on|off", value_parser = limits::on_or_off, action = ArgAction::Set, default_value = "on",
        hide_default_value = true)]
    sandbox: bool,
}

impl ImportFlags {
    /// Opens the user's store for an import with these flags.
    pub fn store(&self) -> Result<Store> {
        let mut store = Store::open_default()?;
        store.unpack_limit_bytes = self.max_size;
        store.sandbox = self.sandbox;
        if !self.sandbox {
            log::warn!("--sandbox off: an image that takes over the process that reads it has the rights of this user");
        }
        Ok(store)
    }
}
