//! What `husk bench` can measure: every number by its name, its unit and the way it is got. The one list of them.

use serde::{Deserialize, Serialize};

/// A group of numbers that one kind of run gives; what `--scenario` names.
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
    /// To the first output and to the exit, caches cold and warm.
    Start,
    /// What one more idle instance costs the host, before and after work.
    Memory,
    /// How many instances fit a budget of memory, and how many start in a second.
    Density,
    /// Integer and floating-point work, on one processor and on all.
    Cpu,
    /// Copying memory, and pages touched for the first time.
    MemoryBandwidth,
    /// A system call that does nothing.
    Syscall,
    /// A process that ends at once.
    Fork,
    /// A program that ends at once.
    Exec,
    /// Two processes that wake each other in turn.
    ContextSwitch,
    /// Reads and writes, in order and not, on the root and on a scratch disk.
    Disk,
    /// What comes through a published port.
    Network,
    /// What a crash does to a neighbour.
    Isolation,
    /// A command of the user's, in place of all others.
    Command,
}

/// What a number counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Seconds from outside, shown in milliseconds.
    Milliseconds,
    /// Time of one operation.
    Nanoseconds,
    /// Time of one operation.
    Microseconds,
    /// Bytes of a second, in units of 2^20.
    MibPerSecond,
    /// Operations of a second.
    PerSecond,
    /// Bytes, in units of 2^20.
    Mib,
    /// Instances.
    Count,
}

impl Unit {
    /// As it stands behind a number.
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

/// Which of two numbers a user would rather have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    /// Times and sizes.
    Lower,
    /// Rates and counts.
    Higher,
}

/// One number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measure {
    /// As JSON, the work program and `--compare` know it.
    pub name: &'static str,
    /// As a person reads it.
    pub title: &'static str,
    /// The scenario that it belongs to.
    pub scenario: Scenario,
    /// What it counts.
    pub unit: Unit,
    /// Whether the work program does it between two marks, whose times are taken outside (`bench::work`).
    pub is_work: bool,
}

impl Measure {
    /// Which of two is better follows from the unit.
    pub const fn better(&self) -> Better {
        match self.unit {
            Unit::MibPerSecond | Unit::PerSecond | Unit::Count => Better::Higher,
            Unit::Milliseconds | Unit::Nanoseconds | Unit::Microseconds | Unit::Mib => Better::Lower,
        }
    }

    /// The value of `amount` units of work that took `seconds`. Work is counted in operations, or in bytes for `MibPerSecond`.
    pub fn of_work(&self, amount: u64, seconds: f64) -> f64 {
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

    /// The measure of this name.
    pub fn named(name: &str) -> Option<&'static Measure> {
        MEASURES.iter().find(|measure| measure.name == name)
    }
}

const fn work(name: &'static str, title: &'static str, scenario: Scenario, unit: Unit) -> Measure {
    Measure { name, title, scenario, unit, is_work: true }
}

const fn outside(name: &'static str, title: &'static str, scenario: Scenario, unit: Unit) -> Measure {
    Measure { name, title, scenario, unit, is_work: false }
}

/// All of them, in the order in which they are shown.
pub const MEASURES: &[Measure] = &[
    outside("start-output-warm", "Start to first output, caches warm", Scenario::Start, Unit::Milliseconds),
    outside("start-exit-warm", "Start to exit, caches warm", Scenario::Start, Unit::Milliseconds),
    outside("start-output-cold", "Start to first output, caches cold", Scenario::Start, Unit::Milliseconds),
    outside("start-exit-cold", "Start to exit, caches cold", Scenario::Start, Unit::Milliseconds),
    outside("memory-idle", "Memory of one more idle instance (PSS)", Scenario::Memory, Unit::Mib),
    outside("memory-cache", "Page cache of one more idle instance", Scenario::Memory, Unit::Mib),
    outside("memory-after-work", "Memory of an instance after work (PSS)", Scenario::Memory, Unit::Mib),
    outside("density-instances", "Idle instances in the budget", Scenario::Density, Unit::Count),
    outside("density-starts", "Instances started a second", Scenario::Density, Unit::PerSecond),
    work("cpu-integer", "Integer work, one processor", Scenario::Cpu, Unit::Nanoseconds),
    work("cpu-float", "Floating-point work, one processor", Scenario::Cpu, Unit::Nanoseconds),
    work("cpu-integer-all", "Integer work, all processors", Scenario::Cpu, Unit::Nanoseconds),
    work("cpu-float-all", "Floating-point work, all processors", Scenario::Cpu, Unit::Nanoseconds),
    work("memory-copy", "Memory copied", Scenario::MemoryBandwidth, Unit::MibPerSecond),
    work("page-faults", "Pages touched for the first time", Scenario::MemoryBandwidth, Unit::Nanoseconds),
    work("syscall", "A system call", Scenario::Syscall, Unit::Nanoseconds),
    work("fork", "A process, from fork to exit", Scenario::Fork, Unit::Microseconds),
    work("exec", "A program, from fork and exec to exit", Scenario::Exec, Unit::Microseconds),
    work("context-switch", "A switch between processes", Scenario::ContextSwitch, Unit::Nanoseconds),
    work("root-read", "Root: reads in order", Scenario::Disk, Unit::MibPerSecond),
    work("root-read-random", "Root: 4 KiB reads anywhere", Scenario::Disk, Unit::PerSecond),
    work("root-write", "Root: writes in order, then fsync", Scenario::Disk, Unit::MibPerSecond),
    work("scratch-write", "Scratch disk: writes in order, then fsync", Scenario::Disk, Unit::MibPerSecond),
    work("scratch-read", "Scratch disk: direct reads in order", Scenario::Disk, Unit::MibPerSecond),
    work("scratch-write-random", "Scratch disk: direct 4 KiB writes anywhere", Scenario::Disk, Unit::PerSecond),
    work("scratch-read-random", "Scratch disk: direct 4 KiB reads anywhere", Scenario::Disk, Unit::PerSecond),
    work("scratch-fsync", "Scratch disk: 4 KiB appended, each with fdatasync", Scenario::Disk, Unit::PerSecond),
    outside("network-to", "Network: bytes to the instance", Scenario::Network, Unit::MibPerSecond),
    outside("network-from", "Network: bytes from the instance", Scenario::Network, Unit::MibPerSecond),
    outside("network-latency", "Network: one byte there and back", Scenario::Network, Unit::Microseconds),
    outside("network-requests", "Network: connections with a request each", Scenario::Network, Unit::PerSecond),
    outside(
        "isolation-kernel",
        "Longest silence of a neighbour while a kernel crashes",
        Scenario::Isolation,
        Unit::Milliseconds,
    ),
    outside(
        "isolation-memory",
        "Longest silence of a neighbour while memory runs out",
        Scenario::Isolation,
        Unit::Milliseconds,
    ),
    outside("command", "The command, from start to exit", Scenario::Command, Unit::Milliseconds),
];

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn names_are_unique() {
        let names: HashSet<_> = MEASURES.iter().map(|measure| measure.name).collect();
        assert_eq!(names.len(), MEASURES.len());
    }

    #[test]
    fn work_becomes_time_of_an_operation_or_a_rate() {
        let of = |name: &str, amount, seconds| Measure::named(name).unwrap().of_work(amount, seconds);
        assert_eq!(of("syscall", 1_000_000, 0.5), 500.0);
        assert_eq!(of("fork", 1_000, 0.5), 500.0);
        assert_eq!(of("memory-copy", 1 << 30, 2.0), 512.0);
        assert_eq!(of("scratch-fsync", 100, 0.5), 200.0);
    }
}
