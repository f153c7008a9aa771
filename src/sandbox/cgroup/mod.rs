//! Enforces CPU and memory limits on this process with cgroups.
//!
//! The limits apply to the whole process, so that a guest cannot gain CPU time by making its devices work. A limit that
//! cannot be enforced is an error, never just a warning. Without limits no cgroup is created.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail};

pub mod child;
mod group;

use group::{CgroupPath, Controller, Group, Version};

/// The CFS period, the same as in other tools.
const PERIOD_US: u64 = 100_000;
/// The defaults: cpu.shares in v1, and cpu.weight in v2 (cgroup-v2.rst).
const DEFAULT_SHARES: u32 = 1024;
const DEFAULT_WEIGHT: u32 = 100;
const WEIGHT_MAX: u32 = 10_000;

/// Resource limits of a machine's process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ResourceLimits {
    /// CPU time in thousandths of a CPU.
    pub cpu_millicpus: Option<u32>,
    /// The CPU weight relative to other processes, where 1024 is the default.
    pub cpu_shares: Option<u32>,
    /// Memory in bytes: guest memory, husk's own memory and the page cache charged to it.
    pub memory_bytes: Option<u64>,
}

/// The limits of this process and all of its threads, enforced by cgroups that exist as long as this value. There are
/// none unless a limit is set.
#[derive(Debug, Default)]
pub struct CgroupLimits {
    // More than one if each controller has its own hierarchy.
    groups: Vec<(Controller, Group)>,
    limits: ResourceLimits,
    /// A process that the limits apply to as well.
    child: Option<u32>,
}

impl CgroupLimits {
    /// Applies `limits` to this process. Must be called before guest memory is allocated: memory charged to another
    /// cgroup stays charged to it.
    ///
    /// Removes stale cgroups of killed processes.
    pub fn new(limits: &ResourceLimits) -> Result<CgroupLimits> {
        let mut cgroup_limits = CgroupLimits::default();
        cgroup_limits.set_cpu(limits.cpu_millicpus, limits.cpu_shares)?;
        if limits.memory_bytes.is_some() {
            cgroup_limits
                .group_for(Controller::Memory)
                .map(drop)
                .and_then(|()| cgroup_limits.write_memory(limits.memory_bytes))
                .with_context(|| memory_advice(limits.memory_bytes))?;
        }
        Ok(cgroup_limits)
    }

    /// Makes the limits apply to the process `pid` as well, a copy of this one.
    pub fn include(&mut self, pid: u32) {
        self.child = Some(pid);
    }

    /// The limits in force.
    pub fn limits(&self) -> ResourceLimits {
        self.limits
    }

    /// Returns whether there is a cgroup to remove.
    pub fn has_groups(&self) -> bool {
        !self.groups.is_empty()
    }

    /// Changes the CPU limits. On an error neither of the two has changed, or only the first.
    pub fn set_cpu(&mut self, millicpus: Option<u32>, shares: Option<u32>) -> Result<()> {
        if millicpus != self.limits.cpu_millicpus {
            self.write_quota(millicpus).with_context(|| quota_advice(millicpus))?;
            self.limits.cpu_millicpus = millicpus;
        }
        if shares != self.limits.cpu_shares {
            self.write_shares(shares).with_context(|| shares_advice(shares))?;
            self.limits.cpu_shares = shares;
        }
        Ok(())
    }

    /// Changes the memory limit of a machine that was started with one.
    pub fn set_memory(&mut self, bytes: Option<u64>) -> Result<()> {
        if self.limits.memory_bytes.is_none() && bytes.is_some() {
            bail!("the machine was started without a host memory limit (--host-memory), and cannot get one now");
        }
        self.write_memory(bytes).context("change the host memory limit of the machine")
    }

    /// Returns the cgroup with `controller` enabled, creating it if necessary.
    fn group_for(&mut self, controller: Controller) -> Result<&Group> {
        let index = match self.groups.iter().position(|(other, _)| *other == controller) {
            Some(index) => index,
            None => {
                let place = CgroupPath::of_this_process(controller)?;
                let place =
                    place.with_context(|| format!("this host has no cgroup controller for {}", controller.name()))?;
                // In cgroup v2 a single cgroup serves all controllers.
                match self.groups.iter().position(|(_, group)| group.dir == place.home) {
                    Some(index) => {
                        self.groups[index].1.enable(controller)?;
                        index
                    }
                    None => {
                        let group = place.enter(controller)?;
                        if let Some(pid) = self.child {
                            group.write("cgroup.procs", &pid.to_string())?;
                        }
                        self.groups.push((controller, group));
                        self.groups.len() - 1
                    }
                }
            }
        };
        Ok(&self.groups[index].1)
    }

    fn write_quota(&mut self, millicpus: Option<u32>) -> Result<()> {
        let quota_us = millicpus.map(|millicpus| u64::from(millicpus) * PERIOD_US / 1000);
        let group = self.group_for(Controller::Cpu)?;
        match group.version {
            Version::V1 => {
                group.write("cpu.cfs_period_us", &PERIOD_US.to_string())?;
                group.write("cpu.cfs_quota_us", &quota_us.map_or("-1".to_owned(), |quota_us| quota_us.to_string()))
            }
            Version::V2 => {
                let quota_us = quota_us.map_or("max".to_owned(), |quota_us| quota_us.to_string());
                group.write("cpu.max", &format!("{quota_us} {PERIOD_US}"))
            }
        }
    }

    fn write_shares(&mut self, shares: Option<u32>) -> Result<()> {
        let shares = shares.unwrap_or(DEFAULT_SHARES);
        let group = self.group_for(Controller::Cpu)?;
        match group.version {
            Version::V1 => group.write("cpu.shares", &shares.to_string()),
            Version::V2 => group.write("cpu.weight", &weight(shares).to_string()),
        }
    }

    fn write_memory(&mut self, bytes: Option<u64>) -> Result<()> {
        let group = self.group_for(Controller::Memory)?;
        let (file, none) = match group.version {
            Version::V1 => ("memory.limit_in_bytes", "-1"),
            Version::V2 => ("memory.max", "max"),
        };
        group.write(file, &bytes.map_or(none.to_owned(), |bytes| bytes.to_string()))?;
        self.limits.memory_bytes = bytes;
        Ok(())
    }
}

/// Converts shares to a weight proportionally, so that the shares of machines relate to each other and to other cgroups
/// as they do in v1. Docker's own conversion preserves neither.
fn weight(shares: u32) -> u32 {
    let weight = u64::from(shares) * u64::from(DEFAULT_WEIGHT) / u64::from(DEFAULT_SHARES);
    u32::try_from(weight).unwrap_or(WEIGHT_MAX).clamp(1, WEIGHT_MAX)
}

fn quota_advice(millicpus: Option<u32>) -> String {
    let Some(millicpus) = millicpus else { return "remove the CPU limit of the machine".to_owned() };
    let (limit, quota) = (f64::from(millicpus) / 1000.0, f64::from(millicpus) / 10.0);
    let start = format!("{} -p CPUQuota={quota}%", scope());
    format!("limit the machine to {limit} CPUs (start it with `{start} husk ...`, and a whole number of --cpus)")
}

fn shares_advice(shares: Option<u32>) -> String {
    let Some(shares) = shares else { return "reset the CPU shares of the machine".to_owned() };
    let start = format!("{} -p CPUWeight={}", scope(), weight(shares));
    format!("give the machine {shares} CPU shares (start it with `{start} husk ...`, without --cpu-shares)")
}

fn memory_advice(bytes: Option<u64>) -> String {
    let limit_mib = bytes.unwrap_or_default() >> 20;
    let start = format!("{} -p MemoryMax={limit_mib}M", scope());
    format!(
        "limit the machine to {limit_mib} MiB of host memory (start it with `{start} husk ...`, without --host-memory)"
    )
}

/// The prefix that starts a command in a cgroup created by systemd. User cgroups are delegated in v2 only.
fn scope() -> &'static str {
    let version = CgroupPath::of_this_process(Controller::Cpu).ok().flatten().map(|place| place.version);
    match version {
        _ if is_root() => "systemd-run --scope",
        Some(Version::V1) => "sudo systemd-run --scope",
        Some(Version::V2) | None => "systemd-run --user --scope",
    }
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_converted_to_weights_proportionally() {
        assert_eq!([2, 512, 1024, 3072, 262_144].map(weight), [1, 50, 100, 300, 10_000]);
        assert_eq!([0, u32::MAX].map(weight), [1, 10_000]);
    }

    #[test]
    fn without_limits_no_cgroup_is_created() {
        let before = fs::read_to_string("/proc/self/cgroup").unwrap();
        let hold = CgroupLimits::new(&ResourceLimits::default()).unwrap();
        assert_eq!(fs::read_to_string("/proc/self/cgroup").unwrap(), before);
        assert!(hold.groups.is_empty());
    }

    #[test]
    fn an_unavailable_limit_is_an_error_with_a_remedy() {
        assert!(quota_advice(Some(1500)).contains("-p CPUQuota=150% husk"));
        assert!(shares_advice(Some(2048)).contains("-p CPUWeight=200 husk"));
        assert!(memory_advice(Some(96 << 20)).contains("-p MemoryMax=96M husk"));
    }
}
