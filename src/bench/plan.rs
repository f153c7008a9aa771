//! The settings of a run, as plain data.

use std::path::PathBuf;
use std::time::Duration;

use super::report::Limits;
use super::scenario::Scenario;

/// The user's choices.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The scenarios, in any order.
    pub scenarios: Vec<Scenario>,
    /// The command to measure, for the `command` scenario.
    pub command: Vec<String>,
    /// The names of the contenders; all if empty.
    pub contenders: Vec<String>,
    /// The contender that ratios refer to.
    pub baseline: Option<String>,
    /// How many rounds are run, and how much work each does.
    pub sampling: Sampling,
    /// The limits of every instance.
    pub limits: Limits,
    /// The processors of `limits.cpuset`, by number.
    pub cpus: Option<Vec<u32>>,
    /// The memory budget of the density benchmark; by default, a fraction of the available memory.
    pub budget_mib: Option<u64>,
    /// The timeout of an instance.
    pub timeout: Duration,
    /// The parent of the work directory.
    pub work_dir: Option<PathBuf>,
    /// The command line, for the report.
    pub command_line: Vec<String>,
}

/// A usage error that does not depend on the host.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// How many rounds are run, and how much work each does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Whether each round does less work.
    pub quick: bool,
    /// Warm-up rounds, which are not counted.
    pub warm_up_rounds: u32,
    /// The minimum number of rounds.
    pub min_rounds: u32,
    /// The maximum number of rounds.
    pub max_rounds: u32,
    /// The relative half-width of the interval at which sampling stops.
    pub precision: f64,
}

/// Intervals of fewer samples are too wide.
const MIN_ROUNDS: u32 = 6;
const MAX_ROUNDS: u32 = 40;
const QUICK_ROUNDS: u32 = 3;
const PRECISION: f64 = 0.05;

impl Sampling {
    /// Samples until the results are precise.
    pub const fn until_precise() -> Sampling {
        Sampling {
            quick: false,
            warm_up_rounds: 1,
            min_rounds: MIN_ROUNDS,
            max_rounds: MAX_ROUNDS,
            precision: PRECISION,
        }
    }

    /// Runs a fixed number of rounds.
    pub const fn exactly(rounds: u32) -> Sampling {
        Sampling { min_rounds: rounds, max_rounds: rounds, ..Sampling::until_precise() }
    }

    /// Runs a few rounds with less work.
    pub const fn quick() -> Sampling {
        Sampling { quick: true, ..Sampling::exactly(QUICK_ROUNDS) }
    }

    /// The calibrated duration of a task, long enough to make the latency of its output negligible.
    pub const fn target_time(&self) -> Duration {
        Duration::from_millis(if self.quick { 50 } else { 300 })
    }

    /// The size of the file for read benchmarks, in MiB.
    pub const fn data_mib(&self) -> u64 {
        if self.quick { 16 } else { 128 }
    }
}

impl Plan {
    /// The number of threads that use all processors of an instance.
    pub fn threads(&self) -> usize {
        self.limits.cpus.ceil() as usize
    }

    /// The default scenarios.
    pub fn default_scenarios(quick: bool) -> Vec<Scenario> {
        use Scenario::{
            ContextSwitch, Cpu, Density, Disk, Exec, Fork, Isolation, Memory, MemoryBandwidth, Network, Start, Syscall,
        };
        if quick {
            return vec![Start, Memory, Cpu, MemoryBandwidth, Syscall, Fork, Exec, ContextSwitch, Disk];
        }
        vec![Start, Memory, Density, Cpu, MemoryBandwidth, Syscall, Fork, Exec, ContextSwitch, Disk, Network, Isolation]
    }
}
