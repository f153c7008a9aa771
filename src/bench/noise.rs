//! The noise of the host: a fixed amount of reference work before every round.

use std::fs;
use std::hint::black_box;
use std::time::Instant;

use super::report::Noise;
use super::statistics;

/// About 20 ms on a current processor.
const STEPS: u64 = 20_000_000;

/// Monitors the host during a run.
#[derive(Debug)]
pub struct NoiseMonitor {
    samples_ms: Vec<f64>,
    before: Option<CpuTimes>,
}

/// CPU time of all processors since boot, in ticks (proc_stat(5)).
#[derive(Debug, Clone, Copy)]
struct CpuTimes {
    all: u64,
    stolen: u64,
}

impl NoiseMonitor {
    /// Starts monitoring.
    pub fn new() -> NoiseMonitor {
        NoiseMonitor { samples_ms: Vec::new(), before: times(&proc_stat()) }
    }

    /// Does the reference work once. No instance should be running.
    pub fn sample(&mut self) {
        let started = Instant::now();
        let mut state = black_box(0x9e37_79b9_7f4a_7c15_u64);
        for _ in 0..STEPS {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
        }
        black_box(state);
        self.samples_ms.push(started.elapsed().as_secs_f64() * 1e3);
    }

    /// Returns the noise of the host.
    pub fn finish(self) -> Noise {
        let stolen = match (self.before, times(&proc_stat())) {
            (Some(before), Some(after)) => stolen(before, after),
            _ => 0.0,
        };
        let spread = statistics::spread(&self.samples_ms);
        Noise { spread, stolen, verdict: statistics::noise_level(spread, stolen), samples_ms: self.samples_ms }
    }
}

impl Default for NoiseMonitor {
    fn default() -> NoiseMonitor {
        NoiseMonitor::new()
    }
}

fn proc_stat() -> String {
    fs::read_to_string("/proc/stat").unwrap_or_default()
}

/// Parses the first line: user, nice, system, idle, iowait, irq, softirq, steal. Guest time is already part of user and
/// nice.
fn times(stat: &str) -> Option<CpuTimes> {
    let numbers = stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().take(8);
    let numbers: Vec<u64> = numbers.map(|number| number.parse().ok()).collect::<Option<_>>()?;
    Some(CpuTimes { all: numbers.iter().sum(), stolen: *numbers.get(7)? })
}

fn stolen(before: CpuTimes, after: CpuTimes) -> f64 {
    let all = after.all.saturating_sub(before.all);
    if all == 0 { 0.0 } else { after.stolen.saturating_sub(before.stolen) as f64 / all as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_a_share_of_all() {
        let before = times("cpu  100 0 0 100 0 0 0 0 50 0\ncpu0 1").unwrap();
        let after = times("cpu  150 0 0 125 0 0 0 25 90 0\n").unwrap();
        assert_eq!(stolen(before, after), 0.25);
        assert!(times("nothing").is_none());
    }

    #[test]
    fn each_sample_is_work_that_takes_time() {
        let mut monitor = NoiseMonitor::new();
        monitor.sample();
        let noise = monitor.finish();
        assert!(noise.samples_ms[0] > 0.1, "{noise:?}");
    }
}
