//! A bundle's `config.json` (runtime-spec, config.md and config-linux.md), as far as it says something to a machine.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::guest::seccomp::Profile;

/// The name of the file in a bundle.
pub const FILE: &str = "config.json";
/// The version of the specification that is implemented.
pub const VERSION: &str = "1.1.0";
/// No engine writes files of this size.
const BYTES_MAX: u64 = 16 << 20;
/// The CFS period if a configuration has none.
pub const PERIOD_US: u64 = 100_000;

/// The configuration of a container. What is not known is ignored, as the specification demands.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Config {
    /// The version of the specification.
    pub oci_version: String,
    /// The process.
    pub process: Option<Process>,
    /// The root file system.
    pub root: Root,
    /// The host name.
    pub hostname: String,
    /// The domain name.
    pub domainname: String,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// Programs that are run at certain moments.
    pub hooks: Hooks,
    /// Anything, by name.
    pub annotations: BTreeMap<String, String>,
    /// What is Linux's.
    pub linux: Linux,
}

/// The root file system.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub struct Root {
    /// A directory, relative to the bundle.
    pub path: PathBuf,
    /// Whether it is read-only.
    pub readonly: bool,
}

/// A process.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// Whether it has a terminal.
    pub terminal: bool,
    /// The terminal's size.
    pub console_size: Option<ConsoleSize>,
    /// Who it is.
    pub user: User,
    /// The program and its arguments.
    pub args: Vec<String>,
    /// `NAME=VALUE` each.
    pub env: Vec<String>,
    /// The working directory.
    pub cwd: String,
    /// Its capabilities; without them it has none.
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    pub rlimits: Vec<Limit>,
    /// Whether executing a program never gives it more rights.
    pub no_new_privileges: bool,
    /// The adjustment of its out-of-memory score.
    pub oom_score_adj: Option<i32>,
}

/// The size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u16,
    /// Columns.
    pub width: u16,
}

/// Who a process is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// The user ID.
    pub uid: u32,
    /// The group ID.
    pub gid: u32,
    /// The file mode creation mask.
    pub umask: Option<u32>,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
}

/// Five sets of capabilities by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// What no program can exceed.
    pub bounding: Vec<String>,
    /// What is in effect.
    pub effective: Vec<String>,
    /// What programs inherit.
    pub inheritable: Vec<String>,
    /// What can be in effect.
    pub permitted: Vec<String>,
    /// What is preserved across execve(2).
    pub ambient: Vec<String>,
}

/// A resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Limit {
    /// `RLIMIT_NOFILE`
    #[serde(rename = "type")]
    pub kind: String,
    /// The soft limit.
    pub soft: u64,
    /// The hard limit.
    pub hard: u64,
}

/// A mount.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Mount {
    /// Where.
    pub destination: String,
    /// The type of the file system, or `bind`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What is mounted, relative to the bundle.
    pub source: PathBuf,
    /// Options of mount(8).
    pub options: Vec<String>,
}

/// Programs that are run at certain moments (config.md, "POSIX-platform Hooks").
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// Like `create_runtime`, before them.
    pub prestart: Vec<Hook>,
    /// When the namespaces exist.
    pub create_runtime: Vec<Hook>,
    /// After those.
    pub create_container: Vec<Hook>,
    /// Before the program of the container is executed.
    pub start_container: Vec<Hook>,
    /// When it is running.
    pub poststart: Vec<Hook>,
    /// When the container is deleted.
    pub poststop: Vec<Hook>,
}

/// A program.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// Its absolute path.
    pub path: PathBuf,
    /// Its arguments, the first of which is its name.
    pub args: Vec<String>,
    /// Its whole environment.
    pub env: Vec<String>,
    /// How many seconds it may take.
    pub timeout: Option<u64>,
}

/// What is Linux's.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// Namespaces that the container does not share with the host.
    pub namespaces: Vec<Namespace>,
    /// Device nodes.
    pub devices: Vec<Device>,
    /// The cgroup.
    pub cgroups_path: String,
    /// Limits.
    pub resources: Resources,
    /// Kernel parameters.
    pub sysctl: BTreeMap<String, String>,
    /// What the process may call.
    pub seccomp: Option<Profile>,
    /// Paths that are made inaccessible.
    pub masked_paths: Vec<String>,
    /// Paths that are made read-only.
    pub readonly_paths: Vec<String>,
    /// User IDs of a user namespace.
    pub uid_mappings: Vec<serde_json::Value>,
}

/// A namespace: of its own, or that of a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// `network`
    #[serde(rename = "type")]
    pub kind: String,
    /// The file; empty for one of its own.
    pub path: PathBuf,
}

/// A device node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// Its path.
    pub path: String,
    /// `c`, `u`, `b` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The major number.
    pub major: i64,
    /// The minor number.
    pub minor: i64,
    /// Its permissions.
    pub file_mode: Option<u32>,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Limits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Resources {
    /// Of memory.
    pub memory: Memory,
    /// Of CPU time.
    pub cpu: Cpu,
    /// Of processes.
    pub pids: Pids,
}

/// Limits of memory.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Memory {
    /// In bytes; 0 and -1 are none.
    pub limit: Option<i64>,
}

/// Limits of CPU time.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Cpu {
    /// The weight relative to others, where 1024 is the default.
    pub shares: Option<u64>,
    /// The time in each period, in microseconds; 0 and less is unlimited.
    pub quota: Option<i64>,
    /// The period, in microseconds.
    pub period: Option<u64>,
    /// A list such as `0-2,7`.
    pub cpus: String,
}

/// A limit of processes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// 0 and less is unlimited.
    pub limit: i64,
}

impl Cpu {
    /// The time in each period as cpu.max of cgroup v2 has it.
    pub fn max(&self) -> Option<String> {
        let period = self.period.filter(|period| *period > 0).unwrap_or(PERIOD_US);
        let quota = self.quota.filter(|quota| *quota != 0)?;
        Some(if quota < 0 { format!("max {period}") } else { format!("{quota} {period}") })
    }

    /// The weight as cpu.weight of cgroup v2 has it, converted as runc and crun do.
    pub fn weight(&self) -> Option<String> {
        let shares = self.shares.filter(|shares| *shares > 1)?.clamp(2, 262_144);
        Some((1 + (shares - 2) * 9999 / 262_142).to_string())
    }

    /// Whether any of the limits is one.
    pub fn is_limited(&self) -> bool {
        self.quota.is_some_and(|quota| quota > 0)
            || self.shares.is_some_and(|shares| shares > 1)
            || !self.cpus.is_empty()
    }
}

impl Config {
    /// Reads the configuration at `path`.
    pub fn read(path: &Path) -> Result<Config> {
        read(path)
    }

    /// Parses a configuration.
    pub fn parse(json: &[u8]) -> Result<Config> {
        Ok(serde_json::from_slice(json)?)
    }

    /// The namespace of this type that is not the host's, if any.
    pub fn namespace(&self, kind: &str) -> Option<&Namespace> {
        self.linux.namespaces.iter().find(|namespace| namespace.kind == kind)
    }
}

impl Process {
    /// Reads the description of a process at `path`.
    pub fn read(path: &Path) -> Result<Process> {
        read(path)
    }
}

fn read<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let what = || format!("read {}", path.display());
    let mut json = Vec::new();
    File::open(path).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut json)).with_context(what)?;
    ensure!(json.len() as u64 <= BYTES_MAX, "read {}: it exceeds {} MiB", path.display(), BYTES_MAX >> 20);
    serde_json::from_slice(&json).with_context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_a_weight_and_a_quota_a_maximum() {
        let weight = |shares| Cpu { shares: Some(shares), ..Cpu::default() }.weight().unwrap_or_default();
        assert_eq!([1, 2, 1024, 262_144].map(weight), ["", "1", "39", "10000"]);
        let max = |quota, period| Cpu { quota: Some(quota), period, ..Cpu::default() }.max().unwrap_or_default();
        assert_eq!(
            [max(0, None), max(-1, None), max(5, Some(0)), max(5, Some(9))],
            ["", "max 100000", "5 100000", "5 9"]
        );
    }
}
