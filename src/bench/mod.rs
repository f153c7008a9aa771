//! `husk bench`: compares machines, containers and the bare host under the same workloads.
//!
//! ```text
//! IMAGE ─ fixture ─> one root, as a directory and as a disk, with the workload program
//! host ─ contender::find ─> available and unavailable contenders
//! benchmarks ─ rounds (A B C A B C …) ─ Contender::launch ─ run: timestamps taken on the host ─> samples
//! samples ─ statistics ─> report::Report ─> table, JSON, page, compare
//! ```
//!
//! The workload program (`firmware/workload`) reads no clock. It prints a line when a task begins and ends, and husk
//! timestamps these lines on the host. All contenders get the same files, arguments and limits.

mod benchmark;
pub mod calibration;
pub mod compare;
pub mod contender;
#[doc(hidden)]
pub mod example;
pub mod fixture;
mod format;
mod host_info;
mod interrupt;
mod memory_usage;
mod network_client;
mod noise;
pub mod page;
pub mod plan;
pub mod report;
mod rounds;
pub mod run;
pub mod scenario;
pub mod statistics;
pub mod table;
pub mod verdict;
pub mod work_dir;
pub mod workload;

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};

use self::benchmark::{Benchmark, BenchmarkContext};
use self::calibration::{Calibration, Calibrator};
use self::contender::Contender;
use self::fixture::{DATA, Fixture};
use self::noise::NoiseMonitor;
use self::plan::{Plan, UsageError};
use self::report::{Limits, Method, MetricResults, Noise, Report, Unavailable};
use self::work_dir::WorkDir;
use crate::foreign::one_line;

/// The confidence level of intervals.
const CONFIDENCE: f64 = 0.95;
/// The default baselines; the first available one is used.
const BASELINES: [&str; 6] = ["crun", "runc", "podman", "docker", "bwrap", "host"];

/// Runs the benchmarks of a plan with the image that `word` names, with progress on standard error. Returns `None` if a
/// child process has reported why the image is unavailable. Must be called on the main thread before other threads
/// start, because it blocks signals to handle interruption.
pub fn run(word: &str, plan: &Plan) -> Result<Option<Report>> {
    let (started, began) = (SystemTime::now(), Instant::now());
    let selected = select(contender::find(), &plan.contenders)?;
    let Some(mut image) = fixture::find(word, None)? else { return Ok(None) };
    interrupt::install()?;
    let work_dir = WorkDir::claim(plan.work_dir.as_deref())?;
    let host = host_info::collect(Path::new("/"), &work_dir.dir);
    let fixture = fixture::prepare(&work_dir, &mut image, plan.sampling.data_mib() << 20, plan.limits.clone())?;
    let found = measure(&fixture, plan, selected)?;
    drop(work_dir);
    let mut report = Report {
        version: report::VERSION,
        husk: env!("CARGO_PKG_VERSION").to_owned(),
        started: humantime::format_rfc3339_seconds(started).to_string(),
        duration_s: began.elapsed().as_secs_f64(),
        command_line: plan.command_line.clone(),
        image: image.info,
        limits: plan.limits.clone(),
        host,
        noise: found.noise,
        method: found.method,
        contenders: found.contenders,
        metrics: found.metrics,
        verdict: Vec::new(),
    };
    statistics::summarize(&mut report);
    report.verdict = verdict::sentences(&report);
    Ok(Some(report))
}

/// Describes all known contenders before anything is prepared; for `--list`.
pub fn contenders() -> Vec<report::ContenderInfo> {
    let limits = Limits { cpus: 1.0, memory_mib: 512, cpuset: None };
    let fixture = Fixture { limits, ..Fixture::default() };
    contender::find().iter().map(|contender| contender.describe(&fixture)).collect()
}

/// Returns the contenders with these names, or all of them.
fn select(all: Vec<Box<dyn Contender>>, names: &[String]) -> Result<Vec<Box<dyn Contender>>> {
    let known: Vec<&str> = all.iter().map(|contender| contender.name()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(UsageError(format!("unknown contender {name:?}: type one of {}", known.join(", "))).into());
    }
    Ok(all.into_iter().filter(|one| names.is_empty() || names.iter().any(|name| name == one.name())).collect())
}

/// The measured part of a report.
struct Results {
    contenders: Vec<report::ContenderInfo>,
    metrics: Vec<MetricResults>,
    method: Method,
    noise: Noise,
}

fn measure(fixture: &Fixture, plan: &Plan, mut all: Vec<Box<dyn Contender>>) -> Result<Results> {
    let mut info: Vec<report::ContenderInfo> = all.iter().map(|contender| contender.describe(fixture)).collect();
    for (contender, info) in all.iter_mut().zip(&mut info).filter(|(_, info)| info.unavailable.is_none()) {
        interrupt::check()?;
        if let Err(error) = contender.prepare(fixture) {
            info.unavailable = Some(Unavailable { reason: one_line(&format!("{error:#}")), install: None });
        }
    }
    let found = measure_present(fixture, plan, &all, &info);
    // Clean up all of them, and report the first error.
    let mut cleaned = Ok(());
    for (contender, info) in all.iter_mut().zip(&info) {
        match contender.clean_up(fixture) {
            // A failed preparation usually leaves nothing, or nothing that can be removed.
            Err(error) if info.unavailable.is_some() => log::info!("{}: {error:#}", info.name),
            Err(error) if cleaned.is_ok() => cleaned = Err(error),
            _ => {}
        }
    }
    let (metrics, method, noise) = found?;
    cleaned?;
    Ok(Results { contenders: info, metrics, method, noise })
}

fn measure_present(
    fixture: &Fixture,
    plan: &Plan,
    all: &[Box<dyn Contender>],
    info: &[report::ContenderInfo],
) -> Result<(Vec<MetricResults>, Method, Noise)> {
    let is_present = |(_, info): &(_, &report::ContenderInfo)| info.unavailable.is_none();
    let present: Vec<&dyn Contender> =
        all.iter().map(AsRef::as_ref).zip(info).filter(is_present).map(|(one, _)| one).collect();
    let names: Vec<&str> = present.iter().map(|contender| contender.name()).collect();
    let baseline = baseline(&names, plan.baseline.as_deref())?;
    let (amounts, failures) = calibrate(fixture, plan)?;
    for failure in failures {
        log::warn!("on the bare host: {failure}");
    }
    let context = BenchmarkContext { fixture, plan, amounts: &amounts, next_instance: Cell::new(0) };
    let mut monitor = NoiseMonitor::new();
    let metrics = rounds::measure(&context, &present, &mut monitor)?;
    let sampling = &plan.sampling;
    let method = Method {
        warm_up_rounds: sampling.warm_up_rounds,
        rounds: (sampling.min_rounds, sampling.max_rounds),
        precision: sampling.precision,
        confidence: CONFIDENCE,
        baseline,
        amounts,
    };
    Ok((metrics, method, monitor.finish()))
}

fn baseline(present: &[&str], wanted: Option<&str>) -> Result<String> {
    let found = match wanted {
        Some(wanted) => present.iter().find(|name| **name == wanted),
        None => BASELINES.iter().find(|name| present.contains(name)).or(present.first()),
    };
    if let Some(wanted) = wanted {
        ensure!(
            found.is_some(),
            "{wanted} is not among the contenders: --baseline must be one of {}",
            present.join(", ")
        );
    }
    Ok((*found.context("no contender is available: `husk bench --list` tells how to install them")?).to_owned())
}

/// Calibrates the workload on the bare host.
fn calibrate(fixture: &Fixture, plan: &Plan) -> Result<Calibration> {
    let metrics: Vec<_> = Benchmark::selected(plan).into_iter().flat_map(|benchmark| benchmark.metrics(plan)).collect();
    let dir = fixture.dir.join("bare");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let in_root = |path: &str| fixture.root.join(path.trim_start_matches('/'));
    let calibrator = Calibrator {
        program: &in_root(contender::WORKLOAD),
        data: &in_root(DATA),
        dir: &dir,
        cpus: plan.threads(),
        cpuset: plan.cpus.clone(),
    };
    Ok(calibrator.calibrate(&metrics, plan.sampling.target_time()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_baseline_is_a_container_where_there_is_one() {
        assert_eq!(baseline(&["host", "runc", "crun", "husk"], None).unwrap(), "crun");
        assert_eq!(baseline(&["host", "husk"], None).unwrap(), "host");
        assert_eq!(baseline(&["qemu", "husk"], None).unwrap(), "qemu");
        assert_eq!(baseline(&["crun", "husk"], Some("husk")).unwrap(), "husk");
        let error = baseline(&["crun", "husk"], Some("runc")).unwrap_err();
        assert!(error.to_string().contains("one of crun, husk"), "{error}");
        assert!(baseline(&[], None).unwrap_err().to_string().contains("--list"));
    }

    #[test]
    fn an_unknown_contender_is_an_error() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let selected = select(contender::find(), &names(&["crun", "husk"])).unwrap();
        assert_eq!(selected.iter().map(|one| one.name()).collect::<Vec<_>>(), ["crun", "husk"]);
        let error = select(contender::find(), &names(&["crum"])).err().unwrap();
        assert!(error.to_string().contains("crun"), "{error}");
    }
}
