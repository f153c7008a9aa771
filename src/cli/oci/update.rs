//! `husk oci update`: changes the limits of a container.

use std::io::Read;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::{Flags, cgroup};
use crate::cli::machines;
use crate::oci::config::Resources;
use crate::oci::machine::{guest_limits, memory_mib};
use crate::oci::state::Status;
use crate::request::{self, Request};

#[derive(Debug, Args)]
pub(super) struct Update {
    /// File with limits as in linux.resources, `-` for standard input
    #[arg(short, long, value_name = "FILE")]
    resources: Option<PathBuf>,

    /// Memory limit in bytes; -1 is what the machine was started with
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    memory: Option<i64>,

    /// CPU time in each period, in microseconds; -1 is unlimited
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,

    /// The period, in microseconds
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,

    /// CPU weight relative to others, where 1024 is the default
    #[arg(long, alias = "cpu-share", value_name = "N")]
    cpu_shares: Option<u64>,

    /// CPUs, such as 0-2,7
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,

    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl Update {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let (dir, state) = flags.root()?.open(&self.id)?;
        ensure!(
            matches!(state.status(&dir), Status::Created | Status::Running | Status::Paused),
            "container not running"
        );
        let mut resources = self.read()?;
        resources.memory.limit = self.memory.or(resources.memory.limit);
        let cpu = &mut resources.cpu;
        (cpu.quota, cpu.period) = (self.cpu_quota.or(cpu.quota), self.cpu_period.or(cpu.period));
        cpu.shares = self.cpu_shares.or(cpu.shares);
        if let Some(cpus) = self.cpuset_cpus {
            cpu.cpus = cpus;
        }
        if state.pod.is_some() {
            return cgroup::write(&state, &guest_limits(&resources, true));
        }
        let cgroup = state.cgroup(&dir.config()?)?;
        ensure!(
            cgroup.is_some() || !resources.cpu.is_limited(),
            "the container has no cgroup, which limits of CPUs need"
        );
        let machine = state.machine()?;
        // The guest gives memory back with the balloon, and gets no more than it was started with.
        let most = machine.record()?.config.memory_mib;
        let limit = resources.memory.limit.filter(|limit| *limit != 0);
        let memory_mib = limit.map(|limit| if limit < 0 { most } else { memory_mib(&resources).min(most) });
        if memory_mib.is_some() {
            let update = request::Update { memory_mib, ..request::Update::default() };
            machines::request(&machine, &Request::Update(update))?;
        }
        cgroup.map_or(Ok(()), |cgroup| cgroup.limit(&resources, memory_mib.unwrap_or(most)))
    }

    fn read(&self) -> Result<Resources> {
        let Some(path) = &self.resources else { return Ok(Resources::default()) };
        let mut json = String::new();
        let read = match path.to_str() {
            Some("-") => std::io::stdin().read_to_string(&mut json).map(drop),
            _ => std::fs::read_to_string(path).map(|text| json = text),
        };
        let what = || format!("read limits from {}", path.display());
        read.with_context(what)?;
        serde_json::from_str(&json).with_context(what)
    }
}
