//! One thing that is done with each contender in each round, and the numbers that it gives.

mod instances;
mod isolation;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::time::Duration;
use std::{fmt, fs};

use anyhow::{Context as _, Result, bail, ensure};

use super::client;
use super::contender::{Contender, Ground, Job, Launch, WORK};
use super::plan::Plan;
use super::result::Walls;
use super::run::{self, Conditions, Expected, Run, Running};
use super::scenario::{MEASURES, Measure, Scenario};
use crate::foreign::one_line;

/// The port that the work program listens on in an instance.
const PORT: u16 = 7777;
/// The scratch disk of an instance that measures disks, in MiB.
const SCRATCH_MIB: u64 = 512;

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trial {
    /// A program that says one line and ends with a code of ours.
    Start {
        /// Whether the host forgets first what it has read.
        cold: bool,
    },
    /// All work that needs no disk, in one instance.
    Work,
    /// Reads and writes.
    Disk,
    /// Several idle instances.
    Memory,
    /// As many idle instances as fit, and many that start at once.
    Density,
    /// A server.
    Network,
    /// A neighbour of one that crashes.
    Isolation(Crash),
    /// The user's command.
    Command,
}

/// What crashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// The kernel of the instance.
    Kernel,
    /// A process that takes all memory.
    Memory,
}

impl fmt::Display for Trial {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            Trial::Start { cold: false } => "start",
            Trial::Start { cold: true } => "start with cold caches",
            Trial::Work => "work",
            Trial::Disk => "disk",
            Trial::Memory => "memory",
            Trial::Density => "density",
            Trial::Network => "network",
            Trial::Isolation(Crash::Kernel) => "a kernel's crash",
            Trial::Isolation(Crash::Memory) => "memory that runs out",
            Trial::Command => "command",
        })
    }
}

/// What all trials of a bench share.
#[derive(Debug)]
pub struct Context<'a> {
    /// The root and what else was prepared.
    pub ground: &'a Ground,
    /// What the user wants.
    pub plan: &'a Plan,
    /// How much work is done, by measure.
    pub amounts: &'a BTreeMap<String, u64>,
    /// The number of the next instance.
    pub next_instance: Cell<u32>,
}

/// What one contender came to in one round.
#[derive(Debug, Default)]
pub struct Found {
    /// Numbers, by measure.
    pub values: Vec<(&'static str, f64)>,
    /// Measures that failed by themselves.
    pub failures: Vec<(&'static str, String)>,
    /// Measures that can tell nothing here, and why.
    pub pointless: Vec<(&'static str, String)>,
}

impl Trial {
    /// The trials that the plan asks for, in the order in which they are made.
    pub fn of(plan: &Plan) -> Vec<Trial> {
        let all = [
            Trial::Start { cold: false },
            Trial::Start { cold: true },
            Trial::Memory,
            Trial::Density,
            Trial::Work,
            Trial::Disk,
            Trial::Network,
            Trial::Isolation(Crash::Kernel),
            Trial::Isolation(Crash::Memory),
            Trial::Command,
        ];
        all.into_iter().filter(|trial| !trial.measures(plan).is_empty()).collect()
    }

    /// The numbers that it gives, in their order.
    pub fn measures(self, plan: &Plan) -> Vec<&'static Measure> {
        let asked = |measure: &&Measure| plan.scenarios.contains(&measure.scenario) && self.gives(measure);
        MEASURES.iter().filter(asked).collect()
    }

    fn gives(self, measure: &Measure) -> bool {
        let name = measure.name;
        match (self, measure.scenario) {
            (Trial::Start { cold }, Scenario::Start) => name.ends_with("-cold") == cold,
            (Trial::Memory, Scenario::Memory)
            | (Trial::Density, Scenario::Density)
            | (Trial::Disk, Scenario::Disk)
            | (Trial::Network, Scenario::Network)
            | (Trial::Command, Scenario::Command) => true,
            (Trial::Isolation(Crash::Kernel), Scenario::Isolation) => name == "isolation-kernel",
            (Trial::Isolation(Crash::Memory), Scenario::Isolation) => name == "isolation-memory",
            (Trial::Work, scenario) => measure.is_work && scenario != Scenario::Disk,
            _ => false,
        }
    }

    /// Whether a round of it takes so long, or differs so little from the one before, that a few are enough.
    pub const fn is_slow(self) -> bool {
        matches!(self, Trial::Memory | Trial::Density | Trial::Network | Trial::Isolation(_))
    }

    /// Why it cannot be made with this contender, or on this host.
    pub fn obstacle(self, contender: &dyn Contender, ground: &Ground) -> Option<String> {
        match (self, contender.walls()) {
            (Trial::Isolation(Crash::Kernel), Walls::None | Walls::Container) => {
                Some("its kernel is the host's: a crash would take the host and all neighbours with it".to_owned())
            }
            (Trial::Isolation(Crash::Kernel), Walls::Machine) if !contender.ends_with_its_kernel() => {
                Some("it starts a machine anew whose kernel has crashed, which would crash without end".to_owned())
            }
            (Trial::Isolation(Crash::Memory), Walls::None) => {
                Some("nothing stands between it and the host's memory".to_owned())
            }
            (Trial::Isolation(Crash::Memory), _) => contender.limits_not_applied(ground),
            (Trial::Start { cold: true }, _) => forget_caches().err().map(|error| one_line(&format!("{error:#}"))),
            _ => None,
        }
    }

    /// Makes it once.
    pub fn run(self, context: &Context, contender: &dyn Contender) -> Result<Found> {
        match self {
            Trial::Start { cold } => context.start(contender, cold),
            Trial::Work => context.work(contender, self.measures(context.plan), None),
            Trial::Disk => context.work(contender, self.measures(context.plan), Some(SCRATCH_MIB)),
            Trial::Memory => context.memory(contender),
            Trial::Density => context.density(contender),
            Trial::Network => context.network(contender),
            Trial::Isolation(crash) => context.isolation(contender, crash),
            Trial::Command => context.command(contender),
        }
    }
}

impl Context<'_> {
    /// An instance that runs the work program.
    fn launch(&self, contender: &dyn Contender, words: &[&str]) -> Result<Launch> {
        self.launch_with(contender, words, |_| ())
    }

    fn launch_with(&self, contender: &dyn Contender, words: &[&str], more: impl FnOnce(&mut Job)) -> Result<Launch> {
        let command = std::iter::once(WORK).chain(words.iter().copied()).map(str::to_owned).collect();
        let mut job = Job { command, scratch_mib: None, port: None, instance: self.instance() };
        more(&mut job);
        contender.launch(self.ground, &job)
    }

    fn instance(&self) -> u32 {
        let number = self.next_instance.get();
        self.next_instance.set(number.wrapping_add(1));
        number
    }

    fn deadline(&self) -> Duration {
        self.plan.deadline
    }

    /// For one that others are started beside, each of which has the deadline to itself.
    fn long_conditions(&self) -> Conditions {
        Conditions { deadline: self.plan.deadline.saturating_mul(200), ..self.conditions() }
    }

    fn conditions(&self) -> Conditions {
        Conditions { cpus: self.plan.cpus.clone(), deadline: self.plan.deadline }
    }

    /// The code is another one each time, so that nobody is believed who ends with a code of its own.
    fn start(&self, contender: &dyn Contender, cold: bool) -> Result<Found> {
        let code = 1 + (self.next_instance.get() % 100) as i32;
        let launch = self.launch(contender, &["hello", "--exit", &code.to_string()])?;
        if cold {
            forget_caches()?;
        }
        let run = succeeded(run::run(launch, &Expected { code, work: Vec::new() }, &self.conditions()))?;
        let first = run.ready.context("it ended without a word")?;
        let [output, exit] =
            if cold { ["start-output-cold", "start-exit-cold"] } else { ["start-output-warm", "start-exit-warm"] };
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        Ok(Found { values: vec![(output, millis(first)), (exit, millis(run.exited))], ..Found::default() })
    }

    fn work(&self, contender: &dyn Contender, measures: Vec<&'static Measure>, scratch: Option<u64>) -> Result<Found> {
        let amount = |measure: &&'static Measure| {
            let amount = self.amounts.get(measure.name);
            amount.map(|amount| (measure.name.to_owned(), *amount))
        };
        let work: Vec<(String, u64)> = measures.iter().filter_map(amount).collect();
        ensure!(!work.is_empty(), "none of it could be done on the bare host");
        let tasks: Vec<String> = work.iter().map(|(name, amount)| format!("{name}={amount}")).collect();
        let cpus = self.plan.threads().to_string();
        let mut words = vec!["do", "--cpus", &cpus];
        words.extend(tasks.iter().map(String::as_str));
        let launch = self.launch_with(contender, &words, |job| job.scratch_mib = scratch)?;
        let run = run::run(launch, &Expected { code: 0, work: Vec::new() }, &self.conditions());
        // One piece that failed does not spoil the others; an instance that ended badly spoils all.
        let ended = matches!(run.end, run::End::Code(_));
        ensure!(ended && !run.marks.is_empty(), run.failures.join("; "));
        let mut found = Found::default();
        for measure in measures {
            let asked = self.amounts.get(measure.name);
            let mark = run.marks.iter().find(|mark| mark.name == measure.name && Some(&mark.amount) == asked);
            match mark.filter(|mark| mark.seconds > 0.0) {
                Some(mark) => found.values.push((measure.name, measure.of_work(mark.amount, mark.seconds))),
                None => found.failures.push((measure.name, why(&run, measure.name))),
            }
        }
        Ok(found)
    }

    fn network(&self, contender: &dyn Contender) -> Result<Found> {
        let amounts = if self.plan.effort.quick {
            client::Amounts { bytes: 64 << 20, round_trips: 200, requests: 200 }
        } else {
            client::Amounts { bytes: 256 << 20, round_trips: 1000, requests: 300 }
        };
        let port = PORT.to_string();
        let launch = self.launch_with(contender, &["serve", &port], |job| job.port = Some(PORT))?;
        let address = launch.address.context("its port cannot be reached from here")?;
        let server = Running::start(launch, &self.conditions())?;
        server.wait_ready(self.deadline())?;
        let answers = client::ask(address, amounts, self.deadline());
        dirt(&server.end())?;
        let answers = answers?;
        let values = vec![
            ("network-to", answers.to_mib_per_s),
            ("network-from", answers.from_mib_per_s),
            ("network-latency", answers.round_trip_us),
            ("network-requests", answers.requests_per_s),
        ];
        Ok(Found { values, ..Found::default() })
    }

    fn command(&self, contender: &dyn Contender) -> Result<Found> {
        let command = self.plan.command.clone();
        let job = Job { command, scratch_mib: None, port: None, instance: self.instance() };
        let launch = contender.launch(self.ground, &job)?;
        let run = succeeded(run::run(launch, &Expected::default(), &self.conditions()))?;
        Ok(Found { values: vec![("command", run.exited.as_secs_f64() * 1e3)], ..Found::default() })
    }
}

/// A run that did what was asked.
fn succeeded(run: Run) -> Result<Run> {
    ensure!(run.failures.is_empty(), run.failures.join("; "));
    Ok(run)
}

/// Of an instance that was made to end, what it left behind.
fn dirt(run: &Run) -> Result<()> {
    let left = run.failures.iter().find(|failure| failure.starts_with("clean up: "));
    left.map_or(Ok(()), |left| bail!("{left}"))
}

/// Why a measure has no number: its own failure, or whatever went wrong.
fn why(run: &Run, name: &str) -> String {
    if run.marks.iter().any(|mark| mark.name == name) {
        return "its two marks came at the same moment, or for another amount: too little work to be timed".to_owned();
    }
    let own = run.failures.iter().find(|failure| failure.contains(name));
    own.or(run.failures.first()).map_or_else(|| "it was not done".to_owned(), String::clone)
}

/// Writes what is dirty, and has the host forget what it has read (proc_sys_vm(5), drop_caches).
fn forget_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("have the host forget what it has read, which only root may")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::contender;
    use crate::bench::contender::tests::ground;

    #[test]
    fn a_kernel_crashes_where_nobody_else_has_it_and_the_machine_ends() {
        let contenders = contender::find();
        let obstacle = |name| {
            let contender = contenders.iter().find(|contender| contender.name() == name).unwrap();
            Trial::Isolation(Crash::Kernel).obstacle(&**contender, &ground())
        };
        assert!(obstacle("crun").unwrap().starts_with("its kernel is the host's"));
        assert!(obstacle("cloud-hypervisor").unwrap().starts_with("it starts a machine anew"));
        assert_eq!([obstacle("qemu-microvm"), obstacle("firecracker")], [None, None]);
    }
}
