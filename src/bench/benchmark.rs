//! A benchmark: what is run once per contender and round, and the metrics it produces.

mod instances;
mod isolation;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail, ensure};

use super::contender::{Contender, Job, Launch, WORKLOAD};
use super::fixture::Fixture;
use super::network_client;
use super::plan::Plan;
use super::report::Isolation;
use super::run::{self, Expected, Run, RunOptions, Running};
use super::scenario::{METRICS, Metric, Scenario};
use crate::foreign::one_line;

/// The TCP port on which the workload program listens inside an instance.
const PORT: u16 = 7777;
/// The size of the scratch disk used by the disk benchmark, in MiB.
const SCRATCH_MIB: u64 = 512;

/// A benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Benchmark {
    /// A program that prints one line and exits with a given code.
    Start {
        /// Whether the host's page cache is dropped first.
        cold: bool,
    },
    /// All workload tasks that need no disk, in one instance.
    Work,
    /// Disk reads and writes.
    Disk,
    /// Memory usage of several idle instances.
    Memory,
    /// As many idle instances as fit into a memory budget, then concurrent starts.
    Density,
    /// A TCP server.
    Network,
    /// A neighbor of an instance that crashes.
    Isolation(Crash),
    /// The user's command.
    Command,
}

/// The kind of crash.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The kernel of the instance panics.
    Kernel,
    /// A process allocates until memory runs out.
    OutOfMemory,
}

impl fmt::Display for Benchmark {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Benchmark::Start { cold: false } => "start",
            Benchmark::Start { cold: true } => "start with cold caches",
            Benchmark::Work => "work",
            Benchmark::Disk => "disk",
            Benchmark::Memory => "memory",
            Benchmark::Density => "density",
            Benchmark::Network => "network",
            Benchmark::Isolation(Crash::Kernel) => "kernel crash",
            Benchmark::Isolation(Crash::OutOfMemory) => "out of memory",
            Benchmark::Command => "command",
        })
    }
}

/// State shared by all benchmarks of a run.
#[derive(Debug)]
pub struct BenchmarkContext<'a> {
    /// The files prepared for the contenders.
    pub fixture: &'a Fixture,
    /// The user's choices.
    pub plan: &'a Plan,
    /// The calibrated amount of work, by metric name.
    pub amounts: &'a BTreeMap<String, u64>,
    /// The number of the next instance.
    pub next_instance: Cell<u32>,
}

/// The results of one contender in one round.
#[derive(Debug, Default)]
pub struct Measurements {
    /// Values by metric name.
    pub values: Vec<(&'static str, f64)>,
    /// Metrics that failed while others succeeded, with the reason.
    pub failures: Vec<(&'static str, String)>,
    /// Metrics that are meaningless on this host, with the reason.
    pub skipped: Vec<(&'static str, String)>,
}

impl Benchmark {
    /// Returns the benchmarks selected by the plan, in execution order.
    pub fn selected(plan: &Plan) -> Vec<Benchmark> {
        let all = [
            Benchmark::Start { cold: false },
            Benchmark::Start { cold: true },
            Benchmark::Memory,
            Benchmark::Density,
            Benchmark::Work,
            Benchmark::Disk,
            Benchmark::Network,
            Benchmark::Isolation(Crash::Kernel),
            Benchmark::Isolation(Crash::OutOfMemory),
            Benchmark::Command,
        ];
        all.into_iter().filter(|benchmark| !benchmark.metrics(plan).is_empty()).collect()
    }

    /// Returns the metrics that this benchmark produces, in order.
    pub fn metrics(self, plan: &Plan) -> Vec<&'static Metric> {
        let asked = |metric: &&Metric| plan.scenarios.contains(&metric.scenario) && self.produces(metric);
        METRICS.iter().filter(asked).collect()
    }

    fn produces(self, metric: &Metric) -> bool {
        let name = metric.name;
        match (self, metric.scenario) {
            (Benchmark::Start { cold }, Scenario::Start) => name.ends_with("-cold") == cold,
            (Benchmark::Memory, Scenario::Memory)
            | (Benchmark::Density, Scenario::Density)
            | (Benchmark::Disk, Scenario::Disk)
            | (Benchmark::Network, Scenario::Network)
            | (Benchmark::Command, Scenario::Command) => true,
            (Benchmark::Isolation(Crash::Kernel), Scenario::Isolation) => name == "isolation-kernel",
            (Benchmark::Isolation(Crash::OutOfMemory), Scenario::Isolation) => name == "isolation-memory",
            (Benchmark::Work, scenario) => metric.is_workload && scenario != Scenario::Disk,
            _ => false,
        }
    }

    /// Whether rounds are slow, or vary so little, that a few are enough.
    pub const fn is_slow(self) -> bool {
        matches!(self, Benchmark::Memory | Benchmark::Density | Benchmark::Network | Benchmark::Isolation(_))
    }

    /// Returns why this benchmark cannot run with this contender or on this host.
    pub fn skip_reason(self, contender: &dyn Contender, fixture: &Fixture) -> Option<String> {
        match (self, contender.isolation()) {
            (Benchmark::Isolation(Crash::Kernel), Isolation::None | Isolation::Container) => {
                Some("it shares the host's kernel: a crash would take down the host".to_owned())
            }
            (Benchmark::Isolation(Crash::Kernel), Isolation::Machine) if !contender.exits_on_kernel_crash() => {
                Some("it reboots a machine whose kernel has crashed, which would then crash forever".to_owned())
            }
            (Benchmark::Isolation(Crash::OutOfMemory), Isolation::None) => Some("it has no memory limit".to_owned()),
            (Benchmark::Isolation(Crash::OutOfMemory), _) => contender.unenforced_limits(fixture),
            (Benchmark::Start { cold: true }, _) => drop_caches().err().map(|error| one_line(&format!("{error:#}"))),
            _ => None,
        }
    }

    /// Runs the benchmark once.
    pub fn run(self, context: &BenchmarkContext, contender: &dyn Contender) -> Result<Measurements> {
        match self {
            Benchmark::Start { cold } => context.start(contender, cold),
            Benchmark::Work => context.work(contender, self.metrics(context.plan), None),
            Benchmark::Disk => context.work(contender, self.metrics(context.plan), Some(SCRATCH_MIB)),
            Benchmark::Memory => context.memory(contender),
            Benchmark::Density => context.density(contender),
            Benchmark::Network => context.network(contender),
            Benchmark::Isolation(crash) => context.isolation(contender, crash),
            Benchmark::Command => context.command(contender),
        }
    }
}

impl BenchmarkContext<'_> {
    /// Prepares an instance that runs the workload program.
    fn launch(&self, contender: &dyn Contender, words: &[&str]) -> Result<Launch> {
        self.launch_with(contender, words, |_| ())
    }

    fn launch_with(&self, contender: &dyn Contender, words: &[&str], more: impl FnOnce(&mut Job)) -> Result<Launch> {
        let command = std::iter::once(WORKLOAD).chain(words.iter().copied()).map(str::to_owned).collect();
        let mut job = Job { command, scratch_mib: None, port: None, instance: self.instance() };
        more(&mut job);
        contender.launch(self.fixture, &job)
    }

    fn instance(&self) -> u32 {
        let number = self.next_instance.get();
        self.next_instance.set(number.wrapping_add(1));
        number
    }

    fn timeout(&self) -> Duration {
        self.plan.timeout
    }

    /// Options for an instance that stays up while others start and stop next to it.
    fn long_running_options(&self) -> RunOptions {
        RunOptions { timeout: self.plan.timeout.saturating_mul(200), ..self.options() }
    }

    fn options(&self) -> RunOptions {
        RunOptions { cpus: self.plan.cpus.clone(), timeout: self.plan.timeout }
    }

    /// The exit code differs every time, so that a contender that ignores the program's exit code is detected.
    fn start(&self, contender: &dyn Contender, cold: bool) -> Result<Measurements> {
        let code = 1 + (self.next_instance.get() % 100) as i32;
        let launch = self.launch(contender, &["hello", "--exit", &code.to_string()])?;
        if cold {
            drop_caches()?;
        }
        let run = ensure_success(run::run(launch, &Expected { code, work: Vec::new() }, &self.options()))?;
        let first = run.ready.context("it exited without output")?;
        let [output, exit] =
            if cold { ["start-output-cold", "start-exit-cold"] } else { ["start-output-warm", "start-exit-warm"] };
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(Measurements {
            values: vec![(output, millis(first)), (exit, millis(run.exited))],
            ..Measurements::default()
        })
    }

    fn work(
        &self,
        contender: &dyn Contender,
        metrics: Vec<&'static Metric>,
        scratch: Option<u64>,
    ) -> Result<Measurements> {
        let amount = |metric: &&'static Metric| {
            let amount = self.amounts.get(metric.name);
            amount.map(|amount| (metric.name.to_owned(), *amount))
        };
        let work: Vec<(String, u64)> = metrics.iter().filter_map(amount).collect();
        ensure!(!work.is_empty(), "no task could be calibrated on the host");
        let tasks: Vec<String> = work.iter().map(|(name, amount)| format!("{name}={amount}")).collect();
        let cpus = self.plan.threads().to_string();
        let mut words = vec!["do", "--cpus", &cpus];
        words.extend(tasks.iter().map(String::as_str));
        let launch = self.launch_with(contender, &words, |job| job.scratch_mib = scratch)?;
        let run = run::run(launch, &Expected { code: 0, work: Vec::new() }, &self.options());
        // A failed task does not invalidate the others; an instance that terminated abnormally invalidates all of them.
        let ended = matches!(run.end, run::Termination::Exited(_));
        ensure!(ended && !run.timings.is_empty(), run.failures.join("; "));
        let mut measurements = Measurements::default();
        for metric in metrics {
            let asked = self.amounts.get(metric.name);
            let timing = run.timings.iter().find(|timing| timing.name == metric.name && Some(&timing.amount) == asked);
            match timing.filter(|timing| timing.seconds > 0.0) {
                Some(timing) => {
                    measurements.values.push((metric.name, metric.from_workload(timing.amount, timing.seconds)))
                }
                None => measurements.failures.push((metric.name, reason(&run, metric.name))),
            }
        }
        Ok(measurements)
    }

    fn network(&self, contender: &dyn Contender) -> Result<Measurements> {
        let workload = if self.plan.sampling.quick {
            network_client::Workload { bytes: 64 << 20, round_trips: 200, requests: 200 }
        } else {
            network_client::Workload { bytes: 256 << 20, round_trips: 1000, requests: 300 }
        };
        let port = PORT.to_string();
        let launch = self.launch_with(contender, &["serve", &port], |job| job.port = Some(PORT))?;
        let address = launch.address.context("its port is unreachable from the host")?;
        let server = Running::start(launch, &self.options())?;
        server.wait_ready(self.timeout())?;
        let results = network_client::measure(address, workload, self.timeout());
        check_cleanup(&server.end())?;
        let results = results?;
        let values = vec![
            ("network-to", results.to_mib_per_s),
            ("network-from", results.from_mib_per_s),
            ("network-latency", results.round_trip_us),
            ("network-requests", results.requests_per_s),
        ];
        Ok(Measurements { values, ..Measurements::default() })
    }

    fn command(&self, contender: &dyn Contender) -> Result<Measurements> {
        let command = self.plan.command.clone();
        let job = Job { command, scratch_mib: None, port: None, instance: self.instance() };
        let launch = contender.launch(self.fixture, &job)?;
        let run = ensure_success(run::run(launch, &Expected::default(), &self.options()))?;
        Ok(Measurements { values: vec![("command", run.exited.as_secs_f64() * 1e3)], ..Measurements::default() })
    }
}

/// Returns the run if it succeeded.
fn ensure_success(run: Run) -> Result<Run> {
    ensure!(run.failures.is_empty(), run.failures.join("; "));
    Ok(run)
}

/// Fails if an instance that was stopped left something behind.
fn check_cleanup(run: &Run) -> Result<()> {
    let left = run.failures.iter().find(|failure| failure.starts_with("clean up: "));
    left.map_or(Ok(()), |left| bail!("{left}"))
}

/// Returns why a metric has no value: its own failure, or else the first failure of the run.
fn reason(run: &Run, name: &str) -> String {
    if run.timings.iter().any(|timing| timing.name == name) {
        return "too short to be timed, or a different amount of work".to_owned();
    }
    let own = run.failures.iter().find(|failure| failure.contains(name));
    own.or(run.failures.first()).map_or_else(|| "did not run".to_owned(), String::clone)
}

/// Writes back dirty pages and drops the host's page cache (proc_sys_vm(5), drop_caches).
fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop the page cache, which requires root")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::contender;
    use crate::bench::contender::tests::fixture;

    #[test]
    fn kernel_crashes_are_limited_to_dedicated_kernels_that_exit() {
        let contenders = contender::find();
        let skip_reason = |name| {
            let contender = contenders.iter().find(|contender| contender.name() == name).unwrap();
            Benchmark::Isolation(Crash::Kernel).skip_reason(&**contender, &fixture())
        };
        assert!(skip_reason("crun").unwrap().starts_with("it shares the host's kernel"));
        assert!(skip_reason("cloud-hypervisor").unwrap().starts_with("it reboots a machine"));
        assert_eq!([skip_reason("qemu-microvm"), skip_reason("firecracker")], [None, None]);
    }
}
