//! `husk oci start`: executes the program of a container that was created.

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use super::Flags;
use crate::cli::machines;
use crate::oci::state::Status;
use crate::oci::{gate, hooks};
use crate::request::Request;

#[derive(Debug, Args)]
pub(super) struct Start {
    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl Start {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        start(flags, &self.id)
    }
}

/// Starts the container `id`.
pub fn start(flags: &Flags, id: &str) -> Result<()> {
    let (dir, state) = flags.root()?.open(id)?;
    match state.status(&dir) {
        Status::Created => {}
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Creating => bail!("cannot start a container that is being created"),
        Status::Running | Status::Paused => bail!("cannot start an already running container"),
    }
    let config = dir.config()?;
    ensure!(
        config.hooks.start_container.is_empty(),
        "startContainer hooks are not supported: they would run in the machine"
    );
    let started =
        if state.pod.is_some() { gate::pass(&dir) } else { machines::request(&state.machine()?, &Request::Go) };
    started.with_context(|| format!("start container {id}"))?;
    hooks::run_all("poststart", &config.hooks.poststart, &state.to_json(Status::Running).to_string());
    Ok(())
}
