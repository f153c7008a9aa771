//! `husk oci events`: statistics of a container, as runc prints them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::{Flags, cgroup};
use crate::cli::time;
use crate::oci::pod;
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

/// The files of a cgroup with what is counted.
const FILES: [&str; 4] = ["cpu.stat", "memory.current", "memory.max", "pids.current"];

/// What is counted.
#[derive(Debug, PartialEq, Eq)]
struct Data {
    cpu_ns: u64,
    memory_bytes: u64,
    memory_limit_bytes: u64,
    pids: Option<u64>,
}

impl Events {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let root = flags.root()?;
        let (dir, state) = root.open(&self.id)?;
        loop {
            let shares_machine = state.pod.is_some() || pod::has_others(&root, &self.id)?;
            let data = if shares_machine { of_cgroup(&cgroup::read(&state, &FILES)?) } else { of_machine(&state)? };
            print(&state, data)?;
            if self.stats {
                return Ok(());
            }
            std::thread::sleep(self.interval);
            if state.status(&dir) == Status::Stopped {
                return Ok(());
            }
        }
    }
}

/// What the machine of the container uses on the host.
fn of_machine(state: &State) -> Result<Data> {
    let machine = state.machine()?;
    let reply = client::send(&machine.file(state_dir::CONTROL), &Request::Stats).context("container not running")?;
    let stats = match reply {
        Reply::Stats(stats) => stats,
        Reply::Refused(why) => bail!(why),
        other => bail!("unexpected response from the machine: {other:?}"),
    };
    Ok(Data {
        cpu_ns: stats.cpu_us.saturating_mul(1000),
        memory_bytes: stats.guest_memory_bytes.saturating_add(stats.own_memory_bytes),
        memory_limit_bytes: stats.memory_limit_bytes,
        pids: None,
    })
}

/// What the cgroup of a container in its guest says.
fn of_cgroup(lines: &str) -> Data {
    let after = |start: &str| lines.lines().find_map(|line| line.strip_prefix(start)).map(str::trim);
    let number = |start: &str| after(start).and_then(|text| text.parse().ok());
    Data {
        cpu_ns: number("cpu.stat usage_usec ").unwrap_or(0_u64).saturating_mul(1000),
        memory_bytes: number("memory.current ").unwrap_or(0),
        // Without a limit it is `max`.
        memory_limit_bytes: number("memory.max ").unwrap_or(u64::MAX),
        pids: number("pids.current "),
    }
}

fn print(state: &State, data: Data) -> Result<()> {
    let pids = data.pids.map_or_else(|| json!({}), |current| json!({ "current": current }));
    let line = json!({ "type": "stats", "id": state.id, "data": {
        "cpu": { "usage": { "total": data.cpu_ns } },
        "memory": { "usage": { "usage": data.memory_bytes, "limit": data.memory_limit_bytes } },
        "pids": pids, "blkio": {}, "hugetlb": {}, "intel_rdt": {},
    } });
    crate::cli::print(&format!("{line}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_counted_by_its_cgroup() {
        let lines =
            "cpu.stat usage_usec 1500\ncpu.stat user_usec 9\nmemory.current 4096\nmemory.max max\npids.current 3\n";
        let counted = Data { cpu_ns: 1_500_000, memory_bytes: 4096, memory_limit_bytes: u64::MAX, pids: Some(3) };
        assert_eq!(of_cgroup(lines), counted);
        let nothing = Data { cpu_ns: 0, memory_bytes: 0, memory_limit_bytes: u64::MAX, pids: None };
        assert_eq!(of_cgroup("cpu.stat usage_usec x\n"), nothing);
    }
}
