//! `husk bench`: turns flags into a plan, and a report into a table and two files.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::Args;

use super::cpus::{self, Cpus};
use super::exit::Exit;
use super::{limits, size, time};
use crate::bench::compare::{self, Class};
use crate::bench::plan::{Plan, Sampling, UsageError};
use crate::bench::report::{self, Limits, Report};
use crate::bench::scenario::Scenario;
use crate::bench::{self, page, table};
use crate::resources::text;

const EXAMPLES: &str = "\
Examples:
  Get a first impression in a few minutes:
    husk bench --quick debian:12

  Compare the start of husk and two container runtimes to within 2%:
    sudo husk bench --scenario start --contenders husk,crun,runc --precision 2 debian:12

  Benchmark a command in the image:
    husk bench debian:12 -- sha256sum /usr/bin/perl

  Check for regressions:
    husk bench --output before debian:12; ...; husk bench --compare before.json --output after debian:12

  Show the results of an earlier run:
    husk bench --from before.json

docs/benchmark.md explains the metrics and their limits. Exit codes: 0 success, 1 something failed or, with --compare, became
slower; 2 usage error.";

/// A CPU list, as typed and as numbers.
#[derive(Debug, Clone)]
struct Pinned {
    text: String,
    cpus: Vec<u32>,
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "husk bench [OPTIONS] IMAGE [-- COMMAND [ARG]...]")]
pub(super) struct Bench {
    /// The image that all contenders run; anything that `husk run` accepts except a disk image
    #[arg(value_name = "IMAGE", required_unless_present_any = ["from", "list", "schema"])]
    image: Option<String>,

    /// A command in the image to measure, instead of the scenarios
    #[arg(last = true, value_name = "COMMAND", conflicts_with = "scenario")]
    command: Vec<String>,

    /// Scenarios to run [default: all, or a subset with --quick]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "LIST")]
    scenario: Vec<Scenario>,

    /// Contenders to compare, see --list [default: all that are available]
    #[arg(long, alias = "against", value_delimiter = ',', value_name = "LIST")]
    contenders: Vec<String>,

    /// Baseline for ratios [default: crun, or the first available of runc, podman, docker, bubblewrap and the host]
    #[arg(long, value_name = "NAME")]
    baseline: Option<String>,

    /// Run three rounds of the most important scenarios, with less work in each
    #[arg(long)]
    quick: bool,

    /// Run exactly N rounds instead of sampling until the results are precise
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,

    /// Stop sampling when half the width of the 95% interval is below this percentage of the median
    #[arg(long, value_name = "PERCENT", default_value_t = 5.0, value_parser = percent)]
    precision: f64,

    /// CPUs of each instance; a fraction limits CPU time
    #[arg(long, value_name = "N", value_parser = cpus::cpus, default_value = "1")]
    cpus: Cpus,

    /// Memory of each instance
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory_mib, default_value = "512M")]
    memory: u64,

    /// CPUs of the host to pin everything to, such as 0-2,4
    #[arg(long, value_name = "LIST", value_parser = cpuset)]
    cpuset: Option<Pinned>,

    /// Memory budget of the density scenario [default: a quarter of the available memory, 4 GiB at most]
    #[arg(long, value_name = "SIZE", value_parser = size::memory_mib)]
    budget: Option<u64>,

    /// Timeout of each instance
    #[arg(long, alias = "deadline", value_name = "TIME", value_parser = time::duration, default_value = "120")]
    timeout: Duration,

    /// Directory for temporary files, on the disk to measure [default: next to the image store]
    #[arg(long, alias = "folder", value_name = "DIR")]
    work_dir: Option<PathBuf>,

    /// Write NAME.json and NAME.html [default: husk-bench- and the time]
    #[arg(long, value_name = "NAME")]
    output: Option<PathBuf>,

    /// Print JSON instead of the table
    #[arg(long)]
    json: bool,

    /// Report changes since an earlier run
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,

    /// Do not run anything; show the results of an earlier run
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["image", "command"])]
    from: Option<PathBuf>,

    /// Do not run anything; list contenders, and how to install those that are unavailable
    #[arg(long)]
    list: bool,

    /// Do not run anything; print the JSON schema of reports
    #[arg(long)]
    schema: bool,
}

impl Bench {
    /// Runs the benchmarks, prints the table and writes the files; progress goes to standard error.
    pub fn run(self) -> Result<Exit> {
        if self.schema {
            super::print(&report::schema())?;
            return Ok(Exit::Success);
        }
        if self.list {
            super::print(&table::contenders(&bench::contenders(), width()))?;
            return Ok(Exit::Success);
        }
        // Report an unreadable file before minutes of work.
        let old = self.compare.as_deref().map(read).transpose()?;
        let report = match &self.from {
            Some(path) => read(path)?,
            None => match self.measure()? {
                Some(report) => report,
                None => return Ok(Exit::Failure),
            },
        };
        let text = if self.json { report.to_json()? } else { table::table(&report, width()) };
        super::print(&text)?;
        if self.from.is_none() || self.output.is_some() {
            self.write(&report)?;
        }
        let is_worse = old.map(|old| self.print_changes(&old, &report)).transpose()?.unwrap_or(false);
        Ok(if is_worse || report.has_failures() { Exit::Failure } else { Exit::Success })
    }

    fn measure(&self) -> Result<Option<Report>> {
        let image = self.image.as_deref().context("no image was given")?;
        bench::run(image, &self.plan()?)
    }

    fn plan(&self) -> Result<Plan> {
        let sampling = match (self.quick, self.runs) {
            (_, Some(runs)) => Sampling { quick: self.quick, ..Sampling::exactly(runs) },
            (true, None) => Sampling::quick(),
            (false, None) => Sampling::until_precise(),
        };
        let scenarios = match (&*self.command, &*self.scenario) {
            ([], []) => Plan::default_scenarios(self.quick),
            ([], chosen) => chosen.to_vec(),
            _ => vec![Scenario::Command],
        };
        if self.command.is_empty() && scenarios.contains(&Scenario::Command) {
            return Err(UsageError("--scenario command needs a command: type it after the image and --".into()).into());
        }
        let cpus = self.cpus.limit_millicpus.map_or(f64::from(self.cpus.vcpus), |millis| f64::from(millis) / 1000.0);
        Ok(Plan {
            scenarios,
            command: self.command.clone(),
            contenders: self.contenders.clone(),
            baseline: self.baseline.clone(),
            sampling: Sampling { precision: self.precision / 100.0, ..sampling },
            limits: Limits {
                cpus,
                memory_mib: self.memory,
                cpuset: self.cpuset.as_ref().map(|pinned| pinned.text.clone()),
            },
            cpus: self.cpuset.as_ref().map(|pinned| pinned.cpus.clone()),
            budget_mib: self.budget,
            timeout: self.timeout,
            work_dir: self.work_dir.clone(),
            command_line: std::env::args().collect(),
        })
    }

    fn write(&self, report: &Report) -> Result<()> {
        let name = self.output.clone().unwrap_or_else(|| default_output(SystemTime::now()));
        let named = |extension: &str| {
            let mut path = name.clone().into_os_string();
            path.push(extension);
            PathBuf::from(path)
        };
        for (path, contents) in [(named(".json"), report.to_json()?), (named(".html"), page::page(report))] {
            text::write(&path, &contents)?;
            eprintln!("wrote {}", path.display());
        }
        Ok(())
    }

    /// Prints the changes and returns whether anything became worse.
    fn print_changes(&self, old: &Report, new: &Report) -> Result<bool> {
        let comparison = compare::compare(old, new)?;
        super::print(&comparison.table(width()))?;
        Ok(comparison.count(Class::Regression) > 0)
    }
}

fn read(path: &Path) -> Result<Report> {
    let text = text::read_at_most(compare::MAX_BYTES, path)?;
    compare::parse(&text).with_context(|| format!("read {}", path.display()))
}

/// Returns the width of the terminal, or a default without one.
fn width() -> usize {
    const PAGE: usize = 100;
    if !std::io::stdout().is_terminal() {
        return PAGE;
    }
    rustix::termios::tcgetwinsize(std::io::stdout()).map_or(PAGE, |size| usize::from(size.ws_col).max(60))
}

/// Returns a name such as `husk-bench-2026-01-31T12-00-00Z`, valid on any file system.
fn default_output(now: SystemTime) -> PathBuf {
    format!("husk-bench-{}", humantime::format_rfc3339_seconds(now).to_string().replace(':', "-")).into()
}

fn cpuset(text: &str) -> Result<Pinned, String> {
    limits::cpuset(text).map(|set| Pinned { text: text.to_owned(), cpus: set.0 })
}

fn percent(text: &str) -> Result<f64, String> {
    let number = text.trim_end_matches('%').parse::<f64>().ok().filter(|number| (0.1..=50.0).contains(number));
    number.ok_or_else(|| format!("{text:?} is not a precision: type a percentage from 0.1 to 50"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_file_name_has_no_colon() {
        let name = default_output(SystemTime::UNIX_EPOCH);
        assert_eq!(name, Path::new("husk-bench-1970-01-01T00-00-00Z"));
    }

    #[test]
    fn a_precision_is_a_percentage() {
        assert_eq!(percent("2.5"), Ok(2.5));
        assert_eq!(percent("5%"), Ok(5.0));
        for text in ["", "0", "-1", "51", "NaN", "x"] {
            assert!(percent(text).is_err(), "{text}");
        }
    }
}
