//! `husk oci pause` and `resume`.

use anyhow::{Result, ensure};
use clap::Args;

use super::{Flags, cgroup};
use crate::cli::machines;
use crate::oci::pod;
use crate::oci::state::{Root, State, Status};
use crate::request::Request;

#[derive(Debug, Args)]
pub(super) struct Pause {
    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl Pause {
    pub(super) fn pause(self, flags: &Flags) -> Result<()> {
        set_paused(&flags.root()?, &self.id, true)
    }

    pub(super) fn resume(self, flags: &Flags) -> Result<()> {
        set_paused(&flags.root()?, &self.id, false)
    }
}

/// Pauses the container `id`, or resumes it.
pub fn set_paused(root: &Root, id: &str, is_frozen: bool) -> Result<()> {
    let needed = if is_frozen { Status::Running } else { Status::Paused };
    let (dir, state) = root.open(id)?;
    ensure!(state.status(&dir) == needed, "container {id} is not {needed}");
    if state.is_frozen || state.pod.is_some() || is_frozen && pod::has_others(root, id)? {
        // Its processes only: the machine is others' as well.
        cgroup::write(&state, &[("cgroup.freeze".into(), u8::from(is_frozen).to_string())])?;
        return dir.write(&State { is_frozen, ..state });
    }
    machines::request(&state.machine()?, if is_frozen { &Request::Pause } else { &Request::Unpause })
}
