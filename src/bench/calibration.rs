//! Calibration: finds out on the host, before anything is compared, how much work makes a task long enough to be timed.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use super::contender::Launch;
use super::run::{Expected, RunOptions, run};
use super::scenario::{Metric, Unit};

/// The initial amount of work, a few milliseconds of any task.
const FIRST_OPERATIONS: u64 = 8;
const FIRST_BYTES: u64 = 1 << 20;
/// An upper bound that no real task reaches.
const AMOUNT_MAX: u64 = 1 << 50;
/// The timeout of a single calibration run.
const TIMEOUT: Duration = Duration::from_secs(120);

/// Runs tasks directly on the host to calibrate them.
#[derive(Debug, Clone)]
pub struct Calibrator<'a> {
    /// The workload program.
    pub program: &'a Path,
    /// The file read by the tasks that read the root.
    pub data: &'a Path,
    /// The directory for the files written by the disk tasks.
    pub dir: &'a Path,
    /// The number of threads of the tasks that use all processors.
    pub cpus: usize,
    /// The processors that the tasks are pinned to.
    pub cpuset: Option<Vec<u32>>,
}

/// The calibrated amounts by metric name, and one line for each task that cannot run here.
pub type Calibration = (BTreeMap<String, u64>, Vec<String>);

impl Calibrator<'_> {
    /// Returns the amount of work for each metric that takes about `target` on this host. Ignores metrics that are not
    /// workload tasks.
    pub fn calibrate(&self, metrics: &[&Metric], target: Duration) -> Calibration {
        let (mut amounts, mut failures) = (BTreeMap::new(), Vec::new());
        for metric in metrics.iter().filter(|metric| metric.is_workload) {
            match self.amount(metric, target) {
                Ok(amount) => drop(amounts.insert(metric.name.to_owned(), amount)),
                Err(error) => failures.push(format!("{error:#}")),
            }
        }
        (amounts, failures)
    }

    fn amount(&self, metric: &Metric, target: Duration) -> Result<u64> {
        let first = if metric.unit == Unit::MibPerSecond { FIRST_BYTES } else { FIRST_OPERATIONS };
        amount_for(target.as_secs_f64(), first, |amount| self.seconds(metric.name, amount))
    }

    /// Returns the duration of a task, or 0 if it is too short to be timed.
    fn seconds(&self, name: &str, amount: u64) -> Result<f64> {
        let mut command = Command::new(self.program);
        command.arg("do").arg(format!("{name}={amount}")).arg("--cpus").arg(self.cpus.to_string());
        command.arg("--root-data").arg(self.data).arg("--root").arg(self.dir).arg("--scratch").arg(self.dir);
        let launch = Launch { command, passes_exit_code: true, address: None, clean_up: None };
        let options = RunOptions { cpus: self.cpuset.clone(), timeout: TIMEOUT };
        let run = run(launch, &Expected::default(), &options);
        match (&run.failures[..], &run.timings[..]) {
            ([], [timing]) => Ok(timing.seconds),
            ([], _) => bail!("{name}: did not run"),
            ([failure, ..], _) => bail!("{failure}"),
        }
    }
}

/// The amount that takes about `target` seconds, from `first` up, if `run` returns the duration of an amount.
fn amount_for(target: f64, first: u64, mut run: impl FnMut(u64) -> Result<f64>) -> Result<u64> {
    let mut amount = first;
    loop {
        let mut seconds = run(amount)?;
        if seconds >= target / 4.0 {
            // The host may have paused the first one.
            seconds = seconds.min(run(amount)?);
        }
        if seconds >= target / 4.0 || amount >= AMOUNT_MAX {
            return Ok(round(scale(amount, target / seconds)));
        }
        // Grow quickly while the measured time is dominated by startup noise.
        amount *= if seconds < target / 64.0 { 8 } else { 2 };
    }
}

#[allow(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "two digits are enough, and a cast to an integer saturates"
)]
fn scale(amount: u64, factor: f64) -> u64 {
    ((amount as f64 * factor) as u64).clamp(1, AMOUNT_MAX)
}

/// Rounds to two significant digits; the timing is not more precise than that.
fn round(amount: u64) -> u64 {
    let unit = 10_u64.pow(amount.max(1).ilog10().saturating_sub(1));
    (amount + unit / 2) / unit * unit
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::workload;

    #[test]
    fn amounts_have_two_digits() {
        for (amount, rounded) in [(1, 1), (99, 99), (104, 100), (105, 110), (996, 1000), (123_456, 120_000)] {
            assert_eq!(round(amount), rounded);
        }
        assert_eq!(scale(10, f64::INFINITY), AMOUNT_MAX);
        assert_eq!(scale(10, 0.0), 1);
        assert_eq!(scale(10, 2.5), 25);
    }

    #[test]
    #[allow(clippy::cast_precision_loss, reason = "the amounts are small")]
    fn a_pause_of_the_host_does_not_end_the_calibration() {
        for paused in 0..6 {
            let mut runs = 0;
            let amount = amount_for(1.0, 8, |amount| {
                runs += 1;
                Ok(if runs - 1 == paused { 5.0 } else { amount as f64 / 100_000.0 })
            });
            assert_eq!(amount.unwrap(), 100_000, "the pause was in run {paused}");
        }
    }

    #[test]
    fn calibration_meets_the_target_duration_and_reports_failures() {
        let dir = tempfile::tempdir().unwrap();
        let program = workload::write(dir.path()).unwrap();
        let data = dir.path().join("there-is-none");
        let calibrator = Calibrator { program: &program, data: &data, dir: dir.path(), cpus: 2, cpuset: None };
        let named = |name| Metric::by_name(name).unwrap();
        let metrics = ["cpu-integer", "syscall", "memory-copy", "root-read", "start-exit-warm"].map(named);
        let target = Duration::from_millis(60);
        let (amounts, failures) = calibrator.calibrate(&metrics, target);
        assert_eq!(amounts.keys().collect::<Vec<_>>(), ["cpu-integer", "memory-copy", "syscall"]);
        let [failure] = &failures[..] else { panic!("{failures:?}") };
        assert!(failure.starts_with("root-read read ") && failure.contains("there-is-none"), "{failure}");
        for (name, amount) in amounts {
            assert_eq!(round(amount), amount);
            let seconds = calibrator.seconds(&name, amount).unwrap();
            // Other processes may be using the host.
            assert!((0.01..3.0).contains(&seconds), "{name}={amount}: {seconds}");
        }
    }
}
