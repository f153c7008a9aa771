//! `husk bench`: the same work in machines, in containers and on the bare host, and what the difference is.
//!
//! ```text
//! IMAGE ─ fixture ─> one root, as a directory and as a disk, with the work program in it
//! host ─ contender::find ─> those present, those absent
//! scenarios ─ rounds (A B C A B C …) ─ contender::launch ─ run: times of marks, taken here ─> samples
//! samples ─ statistics ─> report::Report ─> table, JSON, page, compare
//! ```
//!
//! The work program (`firmware/work`) reads no clock: it says that it begins and that it has ended, and all times are this
//! process's own. What a contender gets is the same file, the same arguments and the same limits.

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
pub mod workload;

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};

use self::benchmark::{Benchmark, Session};
use self::calibration::{Calibration, Calibrator};
use self::contender::{Contender, Fixture};
use self::fixture::{DATA, WorkDir};
use self::noise::NoiseMonitor;
use self::plan::{Plan, UsageError};
use self::report::{Limits, Method, MetricResults, Noise, Report, Unavailable};
use crate::foreign::one_line;

/// The share of cases in which an interval holds the true median.
const CONFIDENCE: f64 = 0.95;
/// Those that ratios are to, where the user names nobody: the first that takes part.
const BASELINES: [&str; 6] = ["crun", "runc", "podman", "docker", "bwrap", "host"];

/// Measures what the plan asks for with the image that `word` names, with progress on standard error. `None` if the image cannot
/// be had, which another process has said. To be called on the first thread, before another one starts: signals that ask for an
/// end are heard here, and end the bench in order.
pub fn run(word: &str, plan: &Plan) -> Result<Option<Report>> {
    let (started, began) = (SystemTime::now(), Instant::now());
    let chosen = choose(contender::find(), &plan.contenders)?;
    let Some(mut image) = fixture::find(word, None)? else { return Ok(None) };
    interrupt::install()?;
    let work_dir = WorkDir::claim(plan.work_dir.as_deref())?;
    let host = host_info::collect(Path::new("/"), &work_dir.dir);
    let fixture = fixture::prepare(&work_dir, &mut image, plan.sampling.data_mib() << 20, plan.limits.clone())?;
    let found = measure(&fixture, plan, chosen)?;
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

/// Everyone who is looked for, with what there is to say of them before anything is prepared; for `--list`.
pub fn contenders() -> Vec<report::ContenderInfo> {
    let limits = Limits { cpus: 1.0, memory_mib: 512, cpuset: None };
    let nowhere = Fixture { limits, ..Fixture::default() };
    contender::find().iter().map(|contender| contender.describe(&nowhere)).collect()
}

/// Those that the user names, or all.
fn choose(all: Vec<Box<dyn Contender>>, names: &[String]) -> Result<Vec<Box<dyn Contender>>> {
    let known: Vec<&str> = all.iter().map(|contender| contender.name()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(UsageError(format!("nobody is called {name:?}, type one of {}", known.join(", "))).into());
    }
    Ok(all.into_iter().filter(|one| names.is_empty() || names.iter().any(|name| name == one.name())).collect())
}

/// All of a report that comes from running something.
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
    // Whatever happened, nothing is left behind; the first error is the one to tell.
    let mut cleaned = Ok(());
    for (contender, info) in all.iter_mut().zip(&info) {
        match contender.clean_up(fixture) {
            // Of one that could not be prepared there is as a rule nothing, and nobody who could remove it.
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
    let (amounts, failures) = amounts(fixture, plan)?;
    for failure in failures {
        log::warn!("on the bare host: {failure}");
    }
    let session = Session { fixture, plan, amounts: &amounts, next_instance: Cell::new(0) };
    let mut monitor = NoiseMonitor::new();
    let metrics = rounds::measure(&session, &present, &mut monitor)?;
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
        ensure!(found.is_some(), "{wanted} takes no part: --baseline has to be one of {}", present.join(", "));
    }
    Ok((*found.context("nobody is here to be measured: `husk bench --list` says what installs them")?).to_owned())
}

/// How much work is done, found out on the bare host. Nothing where the plan has none.
fn amounts(fixture: &Fixture, plan: &Plan) -> Result<Calibration> {
    let metrics: Vec<_> = Benchmark::of(plan).into_iter().flat_map(|benchmark| benchmark.metrics(plan)).collect();
    let dir = fixture.dir.join("bare");
    fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
    let in_root = |path: &str| fixture.root.join(path.trim_start_matches('/'));
    let bare = Calibrator {
        program: &in_root(contender::WORKLOAD),
        data: &in_root(DATA),
        dir: &dir,
        cpus: plan.threads(),
        cpuset: plan.cpus.clone(),
    };
    Ok(bare.calibrate(&metrics, plan.sampling.target_time()))
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
    fn nobody_is_left_out_for_a_name_that_is_wrong() {
        let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let chosen = choose(contender::find(), &names(&["crun", "husk"])).unwrap();
        assert_eq!(chosen.iter().map(|one| one.name()).collect::<Vec<_>>(), ["crun", "husk"]);
        let error = choose(contender::find(), &names(&["crum"])).err().unwrap();
        assert!(error.to_string().contains("crun"), "{error}");
    }
}
