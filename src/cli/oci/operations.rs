//! What is done to a container by talking to its machine only, for a process that has several threads: none of this starts a process on
//! the host, or waits for one.

use anyhow::{Context, Result};

pub use super::pause::set_paused;
pub use super::stats::{Data, read as stats};
use crate::cli::top;
use crate::oci::state::Root;

/// Sends the container's process a signal.
pub fn kill(root: &Root, id: &str, signal: u8) -> Result<()> {
    let (dir, state) = root.open(id)?;
    super::kill::kill(&dir, &state, signal)
}

/// The PIDs of the container's processes in its machine.
pub fn pids(root: &Root, id: &str) -> Result<Vec<u32>> {
    let (_, state) = root.open(id)?;
    let (pids, _) = top::processes(&state.machine()?, id).context("list the container's processes")?;
    Ok(pids)
}
