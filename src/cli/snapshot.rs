//! `husk snapshot`: saves a running machine to a directory.

use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::machines;
use crate::request::{AfterSnapshot, Request};
use crate::snapshot;
use crate::state_dir::StateDir;

const EXAMPLES: &str = "\
Examples:
  Save a machine, which is paused until its memory is written:
    husk snapshot web ./web.snap

  Continue it later, as often as wanted:
    husk restore -d ./web.snap

  Save and stop it:
    husk snapshot --stop web ./web.snap

A snapshot contains the memory, and so the secrets, of the machine: only you can read it.
It does not contain the disks: when one of them has changed, it cannot be restored.";

// Named so because of `snapshot::Snapshot`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct SnapshotArgs {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Directory to create
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    /// Stop the machine as soon as it is saved
    #[arg(long)]
    stop: bool,
}

impl SnapshotArgs {
    /// Returns when the snapshot is complete.
    pub fn run(self) -> Result<Exit> {
        let entry = StateDir::open()?.find(&self.machine)?;
        let path = snapshot::absolute(&self.dir)?.into_os_string().into_vec();
        let then = if self.stop { AfterSnapshot::Stop } else { AfterSnapshot::Continue };
        machines::request(&entry, &Request::Snapshot { path, then }).with_context(|| entry.name().to_owned())?;
        if !self.stop && entry.record()?.config.disks.iter().any(|disk| !disk.readonly) {
            log::warn!(
                "the snapshot cannot be restored any more as soon as the machine writes to its disk: use --stop"
            );
        }
        super::print(&format!("{}\n", self.dir.display()))?;
        Ok(Exit::Success)
    }
}
