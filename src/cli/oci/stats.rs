//! `husk oci events`: statistics of a container, as runc prints them.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::{Flags, cgroup};
use crate::cli::time;
use crate::oci::pod;
use crate::oci::state::{Root, State, Status};
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
const FILES: [&str; 7] =
    ["cpu.stat", "memory.current", "memory.max", "memory.stat", "memory.events", "pids.current", "pids.max"];

/// What is counted. What a machine does not tell of itself is 0 or missing.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Data {
    pub cpu_ns: u64,
    pub user_ns: u64,
    pub system_ns: u64,
    pub memory_bytes: u64,
    pub memory_limit_bytes: u64,
    /// Of these, what the kernel gives back first: copies of files that were not used lately.
    pub inactive_file_bytes: u64,
    /// How many processes were killed because memory was short.
    pub oom_kills: u64,
    pub pids: Option<u64>,
    /// Their limit, if there is one.
    pub pids_limit: Option<u64>,
}

impl Events {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let root = flags.root()?;
        let (dir, state) = root.open(&self.id)?;
        loop {
            print(&state, &of(&root, &state)?)?;
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

/// What the container `id` uses.
pub fn read(root: &Root, id: &str) -> Result<Data> {
    of(root, &root.open(id)?.1)
}

fn of(root: &Root, state: &State) -> Result<Data> {
    let shares_machine = state.pod.is_some() || pod::has_others(root, &state.id)?;
    if shares_machine { Ok(of_cgroup(&cgroup::read(state, &FILES)?)) } else { of_machine(state) }
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
        ..Data::default()
    })
}

/// What the cgroup of a container in its guest says.
fn of_cgroup(lines: &str) -> Data {
    let after = |start: &str| lines.lines().find_map(|line| line.strip_prefix(start)).map(str::trim);
    let number = |start: &str| after(start).and_then(|text| text.parse().ok());
    let time_ns = |start: &str| number(start).unwrap_or(0_u64).saturating_mul(1000);
    Data {
        cpu_ns: time_ns("cpu.stat usage_usec "),
        user_ns: time_ns("cpu.stat user_usec "),
        system_ns: time_ns("cpu.stat system_usec "),
        memory_bytes: number("memory.current ").unwrap_or(0),
        // Without a limit it is `max`.
        memory_limit_bytes: number("memory.max ").unwrap_or(u64::MAX),
        inactive_file_bytes: number("memory.stat inactive_file ").unwrap_or(0),
        oom_kills: number("memory.events oom_kill ").unwrap_or(0),
        pids: number("pids.current "),
        pids_limit: number("pids.max "),
    }
}

fn print(state: &State, data: &Data) -> Result<()> {
    let pids = match (data.pids, data.pids_limit) {
        (Some(current), Some(limit)) => json!({ "current": current, "limit": limit }),
        (Some(current), None) => json!({ "current": current }),
        (None, _) => json!({}),
    };
    let line = json!({ "type": "stats", "id": state.id, "data": {
        "cpu": { "usage": { "total": data.cpu_ns, "user": data.user_ns, "kernel": data.system_ns } },
        "memory": {
            "usage": { "usage": data.memory_bytes, "limit": data.memory_limit_bytes },
            "raw": { "inactive_file": data.inactive_file_bytes },
        },
        "pids": pids, "blkio": {}, "hugetlb": {}, "intel_rdt": {},
    } });
    crate::cli::print(&format!("{line}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_is_counted_by_its_cgroup() {
        let lines = "cpu.stat usage_usec 1500\ncpu.stat user_usec 9\nmemory.current 4096\nmemory.max max\n\
                     memory.stat anon 1\nmemory.stat inactive_file 512\nmemory.events oom 2\nmemory.events oom_kill 1\n\
                     pids.current 3\npids.max 40\n";
        let counted = Data {
            cpu_ns: 1_500_000,
            user_ns: 9000,
            memory_bytes: 4096,
            memory_limit_bytes: u64::MAX,
            inactive_file_bytes: 512,
            oom_kills: 1,
            pids: Some(3),
            pids_limit: Some(40),
            ..Data::default()
        };
        assert_eq!(of_cgroup(lines), counted);
        let nothing = Data { memory_limit_bytes: u64::MAX, ..Data::default() };
        assert_eq!(of_cgroup("cpu.stat usage_usec x\n"), nothing);
    }
}
