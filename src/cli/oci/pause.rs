//! `husk oci pause` and `resume`.

use anyhow::{Result, ensure};
use clap::Args;

use super::{Flags, cgroup};
use crate::cli::machines;
use crate::oci::pod;
use crate::oci::state::{State, Status};
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
        let root = flags.root()?;
        let (dir, state) = root.open(&self.id)?;
        ensure!(state.status(&dir) == needed, "container {} is not {name}", self.id);
        let is_frozen = matches!(request, Request::Pause);
        if state.is_frozen || state.pod.is_some() || is_frozen && pod::has_others(&root, &self.id)? {
            // Its processes only: the machine is others' as well.
            cgroup::write(&state, &[("cgroup.freeze".into(), u8::from(is_frozen).to_string())])?;
            return dir.write(&State { is_frozen, ..state });
        }
        machines::request(&state.machine()?, request)
    }
}
