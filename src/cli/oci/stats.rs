//! `husk oci events`: statistics of a container, as runc prints them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::Flags;
use crate::cli::time;
use crate::oci::state::{State, Status};
use crate::request::{Reply, Request, client};
use crate::state_dir;

#[derive(Debug, Args)]
pub(super) struct Events {
    /// Print the statistics once
    #[arg(long)]
    stats: bool,

    /// How often they are printed
    #[arg(long, value_name = "TIME", value_parser = time::duration, default_value = "5s")]
    interval: Duration,

    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl Events {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let (_, state) = flags.root()?.open(&self.id)?;
        loop {
            print(&state)?;
            if self.stats {
                return Ok(());
            }
            std::thread::sleep(self.interval);
            if state.status() == Status::Stopped {
                return Ok(());
            }
        }
    }
}

fn print(state: &State) -> Result<()> {
    let machine = state.machine()?;
    let reply = client::send(&machine.file(state_dir::CONTROL), &Request::Stats).context("container not running")?;
    let stats = match reply {
        Reply::Stats(stats) => stats,
        Reply::Refused(why) => bail!(why),
        other => bail!("unexpected response from the machine: {other:?}"),
    };
    let used = stats.guest_memory_bytes.saturating_add(stats.own_memory_bytes);
    let line = json!({ "type": "stats", "id": state.id, "data": {
        "cpu": { "usage": { "total": stats.cpu_us.saturating_mul(1000) } },
        "memory": { "usage": { "usage": used, "limit": stats.memory_limit_bytes } },
        "pids": {}, "blkio": {}, "hugetlb": {}, "intel_rdt": {},
    } });
    crate::cli::print(&format!("{line}\n"))
}
