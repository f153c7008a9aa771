//! Counts VM exits by reason, with a histogram trigger on the kernel's tracepoint.

use std::fmt::Write;
use std::fs;
use std::process::Command;

const TRACING: &str = "/sys/kernel/tracing";
const EVENT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit";

/// The exit reasons of Intel processors that are frequent at boot (Intel SDM, volume 3, appendix C).
const REASONS: [(u32, &str); 14] = [
    (0, "exception"),
    (1, "interrupt"),
    (7, "interrupt window"),
    (10, "CPUID"),
    (12, "HLT"),
    (28, "control register"),
    (30, "port"),
    (31, "RDMSR"),
    (32, "WRMSR"),
    (40, "PAUSE"),
    (48, "EPT violation"),
    (49, "EPT misconfiguration"),
    (52, "preemption timer"),
    (55, "XSETBV"),
];

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

    /// Stops counting and returns the counts as one line.
    pub fn finish(self) -> Result<String, String> {
        let path = format!("{EVENT}/hist");
        let text = fs::read_to_string(&path).map_err(|error| format!("{path}: {error}"))?;
        trigger("!hist:keys=exit_reason:sort=hitcount.descending")?;
        let counts: Vec<(u32, u64)> = text.lines().filter_map(count_of).collect();
        let mut line = counts.iter().map(|(_, count)| count).sum::<u64>().to_string();
        for (index, (reason, count)) in counts.iter().enumerate() {
            let name = REASONS.iter().find(|(number, _)| number == reason).map(|(_, name)| (*name).to_owned());
            let name = name.unwrap_or_else(|| format!("reason {reason}"));
            let _ = write!(line, "{} {name} {count}", if index == 0 { ":" } else { "," });
        }
        Ok(line)
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
