//! The scenarios and metrics of `husk bench`.

use serde::{Deserialize, Serialize};

/// A group of related metrics, selected by `--scenario`.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
    schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Scenario {
    /// Time to the first output and to the exit, with cold and warm caches.
    Start,
    /// Memory of one more idle instance, before and after work.
    Memory,
    /// Idle instances that fit into a memory budget, and starts per second.
    Density,
    /// Integer and floating-point operations, on one CPU and on all.
    Cpu,
    /// Memory copies and first-touch page faults.
    MemoryBandwidth,
    /// A system call that does nothing.
    Syscall,
    /// Creation of a process that exits at once.
    Fork,
    /// Execution of a program that exits at once.
    Exec,
    /// Switches between two processes that wake each other in turn.
    ContextSwitch,
    /// Sequential and random reads and writes, on the root and on a scratch disk.
    Disk,
    /// Throughput and latency through a published port.
    Network,
    /// The effect of a crash on a neighbor.
    Isolation,
    /// A command of the user, instead of all other scenarios.
    Command,
}

/// The unit of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Wall-clock time of a run.
    Milliseconds,
    /// Time per operation.
    Nanoseconds,
    /// Time per operation.
    Microseconds,
    /// Throughput in units of 2^20 bytes.
    MibPerSecond,
    /// Operations per second.
    PerSecond,
    /// Size in units of 2^20 bytes.
    Mib,
    /// A number of instances.
    Count,
}

impl Unit {
    /// Returns the unit symbol.
    pub const fn symbol(self) -> &'static str {
        match self {
            Unit::Milliseconds => "ms",
            Unit::Nanoseconds => "ns",
            Unit::Microseconds => "µs",
            Unit::MibPerSecond => "MiB/s",
            Unit::PerSecond => "/s",
            Unit::Mib => "MiB",
            Unit::Count => "",
        }
    }
}

/// Whether lower or higher values are better.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    /// Times and sizes.
    Lower,
    /// Rates and counts.
    Higher,
}

impl Better {
    /// Returns the phrase shown next to a metric.
    pub const fn phrase(self) -> &'static str {
        match self {
            Better::Lower => "lower is better",
            Better::Higher => "higher is better",
        }
    }
}

/// A metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Metric {
    /// The name in reports and for the workload program.
    pub name: &'static str,
    /// The title shown to users.
    pub title: &'static str,
    /// The scenario that it belongs to.
    pub scenario: Scenario,
    /// The unit.
    pub unit: Unit,
    /// Whether it is the duration of a task of the workload program.
    pub is_workload: bool,
}

impl Metric {
    /// Whether lower or higher values are better; follows from the unit.
    pub const fn better(&self) -> Better {
        match self.unit {
            Unit::MibPerSecond | Unit::PerSecond | Unit::Count => Better::Higher,
            Unit::Milliseconds | Unit::Nanoseconds | Unit::Microseconds | Unit::Mib => Better::Lower,
        }
    }

    /// Returns the value for `amount` of work that took `seconds`. Work is counted in operations, or in bytes for
    /// `MibPerSecond`.
    pub fn from_workload(&self, amount: u64, seconds: f64) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "a count of work done has far fewer digits than that")]
        let amount = amount as f64;
        match self.unit {
            Unit::Milliseconds => seconds * 1e3,
            Unit::Nanoseconds => seconds * 1e9 / amount,
            Unit::Microseconds => seconds * 1e6 / amount,
            Unit::MibPerSecond => amount / f64::from(1 << 20) / seconds,
            Unit::PerSecond => amount / seconds,
            Unit::Mib | Unit::Count => amount,
        }
    }

    /// Returns the metric with this name.
    pub fn by_name(name: &str) -> Option<&'static Metric> {
        METRICS.iter().find(|metric| metric.name == name)
    }
}

const fn workload(name: &'static str, title: &'static str, scenario: Scenario, unit: Unit) -> Metric {
    Metric { name, title, scenario, unit, is_workload: true }
}

const fn external(name: &'static str, title: &'static str, scenario: Scenario, unit: Unit) -> Metric {
    Metric { name, title, scenario, unit, is_workload: false }
}

/// All metrics, in display order.
pub const METRICS: &[Metric] = &[
    external("start-output-warm", "Start to first output, caches warm", Scenario::Start, Unit::Milliseconds),
    external("start-exit-warm", "Start to exit, caches warm", Scenario::Start, Unit::Milliseconds),
    external("start-output-cold", "Start to first output, caches cold", Scenario::Start, Unit::Milliseconds),
    external("start-exit-cold", "Start to exit, caches cold", Scenario::Start, Unit::Milliseconds),
    external("memory-idle", "Memory of one more idle instance (PSS)", Scenario::Memory, Unit::Mib),
    external("memory-cache", "Page cache of one more idle instance", Scenario::Memory, Unit::Mib),
    external("memory-after-work", "Memory of an instance after work (PSS)", Scenario::Memory, Unit::Mib),
    external("density-instances", "Idle instances in the budget", Scenario::Density, Unit::Count),
    external("density-starts", "Instances started per second", Scenario::Density, Unit::PerSecond),
    workload("cpu-integer", "Integer work, one processor", Scenario::Cpu, Unit::Nanoseconds),
    workload("cpu-float", "Floating-point work, one processor", Scenario::Cpu, Unit::Nanoseconds),
    workload("cpu-integer-all", "Integer work, all processors", Scenario::Cpu, Unit::Nanoseconds),
    workload("cpu-float-all", "Floating-point work, all processors", Scenario::Cpu, Unit::Nanoseconds),
    workload("memory-copy", "Memory copy", Scenario::MemoryBandwidth, Unit::MibPerSecond),
    workload("page-faults", "First-touch page faults", Scenario::MemoryBandwidth, Unit::Nanoseconds),
    workload("syscall", "System call", Scenario::Syscall, Unit::Nanoseconds),
    workload("fork", "Process, from fork to exit", Scenario::Fork, Unit::Microseconds),
    workload("exec", "Program, from fork and exec to exit", Scenario::Exec, Unit::Microseconds),
    workload("context-switch", "Context switch between processes", Scenario::ContextSwitch, Unit::Nanoseconds),
    workload("root-read", "Root: sequential reads", Scenario::Disk, Unit::MibPerSecond),
    workload("root-read-random", "Root: random 4 KiB reads", Scenario::Disk, Unit::PerSecond),
    workload("root-write", "Root: sequential writes, then fsync", Scenario::Disk, Unit::MibPerSecond),
    workload("scratch-write", "Scratch disk: sequential writes, then fsync", Scenario::Disk, Unit::MibPerSecond),
    workload("scratch-read", "Scratch disk: sequential direct reads", Scenario::Disk, Unit::MibPerSecond),
    workload("scratch-write-random", "Scratch disk: random direct 4 KiB writes", Scenario::Disk, Unit::PerSecond),
    workload("scratch-read-random", "Scratch disk: random direct 4 KiB reads", Scenario::Disk, Unit::PerSecond),
    workload("scratch-fsync", "Scratch disk: 4 KiB appends, each with fdatasync", Scenario::Disk, Unit::PerSecond),
    external("network-to", "Network: throughput to the instance", Scenario::Network, Unit::MibPerSecond),
    external("network-from", "Network: throughput from the instance", Scenario::Network, Unit::MibPerSecond),
    external("network-latency", "Network: round trip of one byte", Scenario::Network, Unit::Microseconds),
    external("network-requests", "Network: connections, one request each", Scenario::Network, Unit::PerSecond),
    external(
        "isolation-kernel",
        "Longest stall of a neighbor during a kernel crash",
        Scenario::Isolation,
        Unit::Milliseconds,
    ),
    external(
        "isolation-memory",
        "Longest stall of a neighbor while memory runs out",
        Scenario::Isolation,
        Unit::Milliseconds,
    ),
    external("command", "Command, from start to exit", Scenario::Command, Unit::Milliseconds),
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), METRICS.len());
    }

    #[test]
    fn work_becomes_time_of_an_operation_or_a_rate() {
        let of = |name: &str, amount, seconds| Metric::by_name(name).unwrap().from_workload(amount, seconds);
        assert_eq!(of("syscall", 1_000_000, 0.5), 500.0);
        assert_eq!(of("fork", 1_000, 0.5), 500.0);
        assert_eq!(of("memory-copy", 1 << 30, 2.0), 512.0);
        assert_eq!(of("scratch-fsync", 100, 0.5), 200.0);
    }
}
