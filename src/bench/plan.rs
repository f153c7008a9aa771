//! What a run of `husk bench` is to do, as plain data.

use std::path::PathBuf;
use std::time::Duration;

use super::report::Limits;
use super::scenario::Scenario;

/// Everything that the user has chosen.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What is measured, in any order.
    pub scenarios: Vec<Scenario>,
    /// The work, where that is a command of the image's.
    pub command: Vec<String>,
    /// Who is compared; everyone where it is empty.
    pub contenders: Vec<String>,
    /// Whom ratios are to.
    pub baseline: Option<String>,
    /// How much is done for a number.
    pub sampling: Sampling,
    /// What every instance may use.
    pub limits: Limits,
    /// The same processors as `limits.cpuset` has, by their numbers.
    pub cpus: Option<Vec<u32>>,
    /// What `density` fills; a share of what is available where nothing is said.
    pub budget_mib: Option<u64>,
    /// How long one instance may take.
    pub timeout: Duration,
    /// Where the bench makes its files.
    pub work_dir: Option<PathBuf>,
    /// How the user asked for all this.
    pub command_line: Vec<String>,
}

/// A plan that is wrong on any host.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

/// How much is done for a number.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampling {
    /// Less work in each round.
    pub quick: bool,
    /// Uncounted rounds before the others.
    pub warm_up_rounds: u32,
    /// At least so many rounds.
    pub min_rounds: u32,
    /// At most so many.
    pub max_rounds: u32,
    /// The half width of an interval, as a share of the median, at which no more rounds are needed.
    pub precision: f64,
}

/// An interval of fewer samples says little.
const MIN_ROUNDS: u32 = 6;
const MAX_ROUNDS: u32 = 40;
const QUICK_ROUNDS: u32 = 3;
const PRECISION: f64 = 0.05;

impl Sampling {
    /// As many rounds as it takes.
    pub const fn until_precise() -> Sampling {
        Sampling {
            quick: false,
            warm_up_rounds: 1,
            min_rounds: MIN_ROUNDS,
            max_rounds: MAX_ROUNDS,
            precision: PRECISION,
        }
    }

    /// So many rounds, however precise they are.
    pub const fn exactly(rounds: u32) -> Sampling {
        Sampling { min_rounds: rounds, max_rounds: rounds, ..Sampling::until_precise() }
    }

    /// A first look.
    pub const fn quick() -> Sampling {
        Sampling { quick: true, ..Sampling::exactly(QUICK_ROUNDS) }
    }

    /// How long a piece of work takes on the bare host: long enough that the way of a mark through pipes and consoles is nothing.
    pub const fn target_time(&self) -> Duration {
        Duration::from_millis(if self.quick { 50 } else { 300 })
    }

    /// The size of the file that reads of the root read, in MiB.
    pub const fn data_mib(&self) -> u64 {
        if self.quick { 16 } else { 128 }
    }
}

impl Plan {
    /// As many threads as can use all processors of an instance.
    pub fn threads(&self) -> usize {
        self.limits.cpus.ceil() as usize
    }

    /// What is measured where the user has chosen nothing.
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
