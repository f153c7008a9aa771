//! What the machine of a container is like: from the configuration's limits and annotations.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use super::config::{Config, PERIOD_US, Resources};
use super::pod;
use crate::config::{MAX_CPUS, MachineConfig, Transport};
use crate::guest::GuestSpec;
use crate::resources::guest_kernel::{Choice, GuestKernel};

/// The memory of a machine whose container has no limit.
pub const DEFAULT_MEMORY_MIB: u64 = 512;
/// The memory and vCPUs of a pod's machine whose containers have no limits together.
pub const POD_MEMORY_MIB: u64 = 1024;
/// The same.
pub const POD_CPUS: u32 = 2;
/// What the guest's kernel and init take of a machine's memory, which is not the container's.
pub const GUEST_OVERHEAD_MIB: u64 = 32;
/// What husk's processes take on the host beside the machine's memory.
pub const HOST_OVERHEAD_MIB: u64 = 32;
/// The least memory of a machine, whatever its container's limit.
const MEMORY_MIN_MIB: u64 = 64;

/// The names of annotations that only a machine has.
pub const ANNOTATIONS: [&str; 6] =
    ["io.husk.cpus", "io.husk.memory", "io.husk.kernel", "io.husk.cmdline", "io.husk.transport", "io.husk.warm"];

/// A machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shape {
    /// vCPUs.
    pub cpus: u32,
    /// Memory.
    pub memory_mib: u64,
    /// The kernel, by name or path; `None` is the first one that is available.
    pub kernel: Option<PathBuf>,
    /// Words for the kernel's command line.
    pub cmdline: String,
    /// How the guest finds its devices.
    pub transport: Transport,
    /// Whether it may start from a warm machine.
    pub warm: bool,
}

impl Shape {
    /// The machine for `config`. Annotations come before limits.
    pub fn of(config: &Config) -> Result<Shape> {
        let annotation =
            |name: &str| config.annotations.get(name).map(|value| value.trim()).filter(|value| !value.is_empty());
        let wrong = |name: &str, what: &str| format!("annotation {name}: {what}");
        if let Some(unknown) = config.annotations.keys().find(|name| is_unknown(name)) {
            bail!("annotation {unknown}: it is unknown; there are {}", ANNOTATIONS.join(", "));
        }
        let is_pod = pod::is_sandbox(config);
        let resources = &if is_pod { of_pod(config) } else { config.linux.resources.clone() };
        let cpus = match annotation("io.husk.cpus") {
            Some(text) => text.parse().ok().with_context(|| wrong("io.husk.cpus", "it is not a number of vCPUs"))?,
            None => cpus(resources).unwrap_or(if is_pod { POD_CPUS } else { 1 }),
        };
        ensure!((1..=MAX_CPUS).contains(&cpus), wrong("io.husk.cpus", &format!("a machine has 1 to {MAX_CPUS} vCPUs")));
        let memory_mib = match annotation("io.husk.memory") {
            Some(text) => text.parse().ok().with_context(|| wrong("io.husk.memory", "it is not a number of MiB"))?,
            None if is_pod && limit(resources).is_none() => POD_MEMORY_MIB,
            None => memory_mib(resources),
        };
        let transport = annotation("io.husk.transport").map_or(Ok(Transport::Auto), str::parse);
        let warm = annotation("io.husk.warm").map_or(Some(true), |text| text.parse().ok());
        Ok(Shape {
            cpus,
            memory_mib,
            kernel: annotation("io.husk.kernel").map(PathBuf::from),
            cmdline: annotation("io.husk.cmdline").unwrap_or_default().to_owned(),
            transport: transport.map_err(|error| anyhow::anyhow!(wrong("io.husk.transport", error)))?,
            warm: warm.with_context(|| wrong("io.husk.warm", "it is neither true nor false"))?,
        })
    }
}

impl Shape {
    /// The configuration of the machine for `spec`, which boots `kernel`, with `socket` for its sessions.
    pub fn config(&self, spec: &GuestSpec, kernel: &GuestKernel, socket: &Path) -> Result<MachineConfig> {
        let mut config = spec.machine_config(kernel, self.cpus, self.memory_mib, socket, false);
        config.cmdline = [config.cmdline.as_str(), self.cmdline.as_str()].join(" ").trim().to_owned();
        config.transport = GuestSpec::transport(self.transport, kernel)?;
        Ok(config)
    }

    /// The kernel that the machine boots.
    pub fn kernel(&self) -> Result<GuestKernel> {
        self.kernel.as_deref().map_or(Choice::Any, Choice::from_word).find()
    }
}

/// A misspelled annotation would otherwise go unnoticed.
fn is_unknown(name: &str) -> bool {
    name.starts_with("io.husk.") && !ANNOTATIONS.contains(&name)
}

/// The limits of all containers of a pod together, which containerd adds to its sandbox as annotations; 0 is none.
fn of_pod(config: &Config) -> Resources {
    let number = |name: &str| config.annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?.parse().ok();
    let mut resources = config.linux.resources.clone();
    let (quota, period) = (number("cpu-quota"), number("cpu-period").and_then(|period| u64::try_from(period).ok()));
    resources.cpu.quota = quota.or(resources.cpu.quota);
    resources.cpu.period = period.or(resources.cpu.period);
    resources.memory.limit = number("memory").or(resources.memory.limit);
    resources
}

/// As many vCPUs as can be used at once, if that is limited.
fn cpus(resources: &Resources) -> Option<u32> {
    let cpu = &resources.cpu;
    let quota = cpu.quota.and_then(|quota| u64::try_from(quota).ok()).filter(|quota| *quota > 0);
    let by_time = quota.map(|quota| quota.div_ceil(cpu.period.filter(|period| *period > 0).unwrap_or(PERIOD_US)));
    let by_list = count(&cpu.cpus);
    let least = by_time.into_iter().chain(by_list).min()?;
    Some(u32::try_from(least).unwrap_or(MAX_CPUS).clamp(1, MAX_CPUS))
}

/// The number of CPUs in a list such as `0-2,7`.
fn count(list: &str) -> Option<u64> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u64, u64) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    };
    let parts = list.split(',').filter(|part| !part.trim().is_empty());
    let total = parts.map(range).try_fold(0_u64, |total, count| total.checked_add(count?));
    total.filter(|total| *total > 0)
}

fn limit(resources: &Resources) -> Option<u64> {
    resources.memory.limit.and_then(|limit| u64::try_from(limit).ok()).filter(|limit| *limit > 0)
}

/// The memory of the machine for a container with these limits.
pub fn memory_mib(resources: &Resources) -> u64 {
    limit(resources)
        .map_or(DEFAULT_MEMORY_MIB, |limit| (limit.div_ceil(1 << 20) + GUEST_OVERHEAD_MIB).max(MEMORY_MIN_MIB))
}

/// What is written to files of the guest's cgroup for `resources`. Memory and CPU time of a container that has its machine for itself are
/// the machine's.
pub fn guest_limits(resources: &Resources, is_one_of_several: bool) -> Vec<(String, String)> {
    let named = |name: &str, value: Option<String>| value.map(|value| (name.to_owned(), value));
    let processes = match resources.pids.limit {
        ..0 => Some("max".to_owned()),
        0 => None,
        limit => Some(limit.to_string()),
    };
    let limited: Vec<_> = named("pids.max", processes).into_iter().collect();
    if !is_one_of_several {
        return limited;
    }
    let memory = resources.memory.limit.filter(|limit| *limit != 0);
    let memory = memory.map(|limit| if limit < 0 { "max".to_owned() } else { limit.to_string() });
    let others = [("memory.max", memory), ("cpu.max", resources.cpu.max()), ("cpu.weight", resources.cpu.weight())];
    limited.into_iter().chain(others.into_iter().filter_map(|(name, value)| named(name, value))).collect()
}

/// The same for its cgroup when it is created, which has no limits then. Memory and processes of one of several are counted in any case,
/// for which the guest enables what limits them.
pub fn first_limits(resources: &Resources, is_one_of_several: bool) -> Vec<(String, String)> {
    let mut limits = guest_limits(resources, is_one_of_several);
    limits.retain(|(_, value)| !value.starts_with("max"));
    for name in ["memory.max", "pids.max"].into_iter().filter(|_| is_one_of_several) {
        if !limits.iter().any(|(limited, _)| limited == name) {
            limits.push((name.to_owned(), "max".to_owned()));
        }
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(json: &str) -> Result<Shape> {
        Shape::of(&Config::parse(json.as_bytes()).unwrap())
    }

    #[test]
    fn limits_become_a_machine() {
        let size = |resources: &str| {
            let shape = shape(&format!("{{\"linux\":{{\"resources\":{resources}}}}}")).unwrap();
            (shape.cpus, shape.memory_mib)
        };
        assert_eq!(size("{}"), (1, 512));
        assert_eq!(size(r#"{"memory":{"limit":134217728},"cpu":{"quota":150000,"period":100000}}"#), (2, 160));
        assert_eq!(size(r#"{"memory":{"limit":-1},"cpu":{"quota":-1,"cpus":"0-2,7"}}"#), (4, 512));
        assert_eq!(size(r#"{"memory":{"limit":4194304},"cpu":{"quota":400000,"cpus":"1"}}"#), (1, 64));
        assert_eq!(size(r#"{"cpu":{"quota":9000000000,"period":0,"cpus":"5-3"}}"#).0, MAX_CPUS);
    }

    #[test]
    fn a_pods_machine_has_the_limits_of_its_containers_together() {
        let size = |annotations: &str| {
            let kind = r#""io.kubernetes.cri.container-type":"sandbox""#;
            let shape = shape(&format!("{{\"annotations\":{{{kind}{annotations}}}}}")).unwrap();
            (shape.cpus, shape.memory_mib)
        };
        assert_eq!(size(""), (2, 1024));
        let of = |name: &str, value: &str| format!(r#","io.kubernetes.cri.sandbox-{name}":"{value}""#);
        assert_eq!(size(&(of("memory", "0") + &of("cpu-quota", "0"))), (2, 1024));
        assert_eq!(
            size(&(of("memory", "134217728") + &of("cpu-quota", "250000") + &of("cpu-period", "100000"))),
            (3, 160)
        );
        assert_eq!(size(r#","io.husk.memory":"300""#), (2, 300));
    }

    #[test]
    fn the_guest_limits_those_who_share_a_machine() {
        let resources = |json: &str| serde_json::from_str::<Resources>(json).unwrap();
        let given = resources(r#"{"memory":{"limit":4096},"cpu":{"quota":-1,"shares":1024},"pids":{"limit":-1}}"#);
        let named = |limits: Vec<(String, String)>| {
            limits.into_iter().map(|(name, value)| name + "=" + &value).collect::<Vec<_>>()
        };
        assert_eq!(named(guest_limits(&given, false)), ["pids.max=max"]);
        let all = ["pids.max=max", "memory.max=4096", "cpu.max=max 100000", "cpu.weight=39"];
        assert_eq!(named(guest_limits(&given, true)), all);
        assert!(guest_limits(&resources("{}"), true).is_empty());
        assert_eq!(named(first_limits(&given, true)), ["memory.max=4096", "cpu.weight=39", "pids.max=max"]);
        assert_eq!(named(first_limits(&resources("{}"), true)), ["memory.max=max", "pids.max=max"]);
        assert!(first_limits(&given, false).is_empty());
    }

    #[test]
    fn annotations_are_for_what_only_a_machine_has() {
        let of = |name: &str, value: &str| shape(&format!("{{\"annotations\":{{\"{name}\":\"{value}\"}}}}"));
        assert_eq!(of("io.husk.memory", "2048").unwrap().memory_mib, 2048);
        assert_eq!(of("io.husk.cpus", "3").unwrap().cpus, 3);
        assert_eq!(of("io.husk.transport", "pci").unwrap().transport, Transport::Pci);
        assert_eq!(of("io.husk.kernel", "stock").unwrap().kernel, Some("stock".into()));
        assert!(of("org.example.x", "y").unwrap().warm && !of("io.husk.warm", "false").unwrap().warm);
        for (name, value) in [
            ("io.husk.cpus", "0"),
            ("io.husk.cpus", "x"),
            ("io.husk.transport", "isa"),
            ("io.husk.cpu", "1"),
            ("io.husk.warm", "hot"),
        ] {
            let told = format!("{:#}", of(name, value).unwrap_err());
            assert!(told.starts_with(&format!("annotation {name}: ")), "{told}");
        }
    }
}
