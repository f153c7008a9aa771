//! `husk suspend`: puts running machines away to disk, to be continued by `husk start`.

use std::os::unix::ffi::OsStringExt;

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::machines;
use crate::image::Store;
use crate::request::{AfterSnapshot, Request, SnapshotOptions};
use crate::snapshot;

const EXAMPLES: &str = "\
Examples:
  husk suspend web
  husk start web

A suspended machine uses no memory and no CPU time. `husk start` continues it where it was,
with its name, ports and logs; `husk restart` starts it anew. Connections through
user-mode networking are reset. Like other machines it is forgotten when the host restarts: its snapshot is then
left in the image store, in `suspended`, for `husk restore`.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Suspend {
    /// Names or IDs of machines in the background
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,
}

impl Suspend {
    /// Suspends each machine in turn. Returns when all of them have ended.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        machines::for_each(&self.machines, |_, entry| {
            let path = snapshot::absolute(&store.suspended_dir(&entry.id))?.into_os_string().into_vec();
            let options = SnapshotOptions::new(AfterSnapshot::Suspend);
            let end = machines::watch_exit(entry);
            machines::request(entry, &Request::Snapshot { path, options })?;
            machines::exit_code(entry, end).map(drop)
        })
    }
}
