//! `husk oci pause` and `resume`.

use anyhow::{Result, ensure};
use clap::Args;

use super::Flags;
use crate::cli::machines;
use crate::oci::state::Status;
use crate::request::Request;

#[derive(Debug, Args)]
pub(super) struct Pause {
    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl Pause {
    pub(super) fn pause(self, flags: &Flags) -> Result<()> {
        self.request(flags, Status::Running, "running", &Request::Pause)
    }

    pub(super) fn resume(self, flags: &Flags) -> Result<()> {
        self.request(flags, Status::Paused, "paused", &Request::Unpause)
    }

    fn request(&self, flags: &Flags, needed: Status, name: &str, request: &Request) -> Result<()> {
        let (_, state) = flags.root()?.open(&self.id)?;
        ensure!(state.status() == needed, "container {} is not {name}", self.id);
        machines::request(&state.machine()?, request)
    }
}
