//! Counts VM exits by reason, with a histogram trigger on the kernel's tracepoint.

use std::fs;
use std::process::Command;

const TRACING: &str = "/sys/kernel/tracing";
const EVENT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit";

/// The exit reasons of Intel processors that are frequent at boot (Intel SDM, volume 3, appendix C).
const REASONS: [(u32, &str); 16] = [
    (0, "exception"),
    (1, "interrupt"),
    (7, "interrupt window"),
    (10, "CPUID"),
    (12, "HLT"),
    (18, "VMCALL"),
    (28, "control register"),
    (29, "debug register"),
    (30, "port"),
    (31, "RDMSR"),
    (32, "WRMSR"),
    (40, "PAUSE"),
    (48, "EPT violation"),
    // How KVM recognizes MMIO.
    (49, "MMIO"),
    (52, "preemption timer"),
    (55, "XSETBV"),
];

/// What a VM exit and its handling take on hardware: one to two microseconds.
const EXIT_US: f64 = 1.5;

/// VM exits by reason, most frequent first.
pub struct Exits(Vec<(u32, u64)>);

impl Exits {
    pub fn total(&self) -> u64 {
        self.0.iter().map(|(_, count)| count).sum()
    }

    /// What all of them would take on hardware, in milliseconds.
    pub fn cost_ms(&self) -> f64 {
        self.total() as f64 * EXIT_US / 1e3
    }

    /// The reasons with their counts, in one line.
    pub fn by_reason(&self) -> String {
        let name =
            |reason: &u32| REASONS.iter().find(|(number, _)| number == reason).map(|(_, name)| (*name).to_owned());
        let counts = self
            .0
            .iter()
            .map(|(reason, count)| format!("{} {count}", name(reason).unwrap_or_else(|| format!("reason {reason}"))));
        counts.collect::<Vec<_>>().join(", ")
    }
}

/// A running count of all VM exits of the host.
pub struct Count;

impl Count {
    pub fn start() -> Result<Count, String> {
        if fs::metadata(EVENT).is_err() {
            let mounted = Command::new("mount").args(["-t", "tracefs", "tracefs", TRACING]).status();
            mounted.map_err(|error| format!("mount: {error}"))?;
        }
        trigger("hist:keys=exit_reason:sort=hitcount.descending")?;
        Ok(Count)
    }

    /// Stops counting.
    pub fn finish(self) -> Result<Exits, String> {
        let path = format!("{EVENT}/hist");
        let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        trigger("!hist:keys=exit_reason:sort=hitcount.descending")?;
        Ok(Exits(text.lines().filter_map(count_of).collect()))
    }
}

fn trigger(words: &str) -> Result<(), String> {
    let path = format!("{EVENT}/trigger");
    fs::write(&path, words).map_err(|error| format!("{path}: {error}"))
}

/// A line of the histogram: `{ exit_reason:         30 } hitcount:        512`.
fn count_of(line: &str) -> Option<(u32, u64)> {
    let (reason, count) = line.trim().strip_prefix("{ exit_reason:")?.split_once("} hitcount:")?;
    Some((reason.trim().parse().ok()?, count.trim().parse().ok()?))
}
