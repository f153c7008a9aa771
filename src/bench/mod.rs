//! `husk bench`: the same work in machines, in containers and on the bare host, and what the difference is.
//!
//! ```text
//! IMAGE ─ ground ─> one root, as a folder and as a disk, with the work program in it
//! host ─ contender::find ─> those present, those absent
//! scenarios ─ rounds (A B C A B C …) ─ contender::launch ─ run: times of marks, taken here ─> samples
//! samples ─ statistics ─> result::Report ─> table, JSON, page, compare
//! ```
//!
//! The work program (`firmware/work`) reads no clock: it says that it begins and that it has ended, and all times are this
//! process's own. What a contender gets is the same file, the same arguments and the same limits.

pub mod amounts;
mod client;
pub mod compare;
pub mod contender;
mod cost;
mod facts;
pub mod ground;
mod interrupt;
mod noise;
pub mod page;
pub mod plan;
pub mod result;
mod rounds;
pub mod run;
#[doc(hidden)]
pub mod sample;
pub mod scenario;
pub mod statistics;
pub mod table;
mod text;
mod trial;
pub mod verdict;
pub mod work;

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};

use self::amounts::{Amounts, Bare};
use self::contender::{Contender, Ground};
use self::ground::{DATA, Plot};
use self::noise::Watch;
use self::plan::{Plan, Wrong};
use self::result::{Absent, Limits, Measured, Method, Noise, Report};
use self::trial::{Context, Trial};
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
    let chosen = choose(contender::find(), &plan.against)?;
    let Some(mut image) = ground::find(word, None)? else { return Ok(None) };
    interrupt::watch()?;
    let plot = Plot::claim(plan.folder.as_deref())?;
    let host = facts::host(Path::new("/"), &plot.folder);
    let ground = ground::lay(&plot, &mut image, plan.effort.data_mib() << 20, plan.limits.clone())?;
    let found = measure(&ground, plan, chosen)?;
    drop(plot);
    let mut report = Report {
        version: result::VERSION,
        husk: env!("CARGO_PKG_VERSION").to_owned(),
        started: humantime::format_rfc3339_seconds(started).to_string(),
        took_s: began.elapsed().as_secs_f64(),
        command_line: plan.command_line.clone(),
        image: image.about,
        limits: plan.limits.clone(),
        host,
        noise: found.noise,
        method: found.method,
        contenders: found.contenders,
        measures: found.measures,
        verdict: Vec::new(),
    };
    statistics::summarise(&mut report);
    report.verdict = verdict::sentences(&report);
    Ok(Some(report))
}

/// Everyone who is looked for, with what there is to say of them before anything is prepared; for `--list`.
pub fn contenders() -> Vec<result::Contender> {
    let limits = Limits { cpus: 1.0, memory_mib: 512, cpuset: None };
    let nowhere = Ground { limits, ..Ground::default() };
    contender::find().iter().map(|contender| contender.about(&nowhere)).collect()
}

/// Those that the user names, or all.
fn choose(all: Vec<Box<dyn Contender>>, names: &[String]) -> Result<Vec<Box<dyn Contender>>> {
    let known: Vec<&str> = all.iter().map(|contender| contender.name()).collect();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        return Err(Wrong(format!("nobody is called {name:?}, type one of {}", known.join(", "))).into());
    }
    Ok(all.into_iter().filter(|one| names.is_empty() || names.iter().any(|name| name == one.name())).collect())
}

/// All of a report that comes from running something.
struct Found {
    contenders: Vec<result::Contender>,
    measures: Vec<Measured>,
    method: Method,
    noise: Noise,
}

fn measure(ground: &Ground, plan: &Plan, mut all: Vec<Box<dyn Contender>>) -> Result<Found> {
    let mut about: Vec<result::Contender> = all.iter().map(|contender| contender.about(ground)).collect();
    for (contender, about) in all.iter_mut().zip(&mut about).filter(|(_, about)| about.absent.is_none()) {
        interrupt::check()?;
        if let Err(error) = contender.prepare(ground) {
            about.absent = Some(Absent { why: one_line(&format!("{error:#}")), install: None });
        }
    }
    let found = measure_present(ground, plan, &all, &about);
    // Whatever happened, nothing is left behind; the first error is the one to tell.
    let mut cleaned = Ok(());
    for (contender, about) in all.iter_mut().zip(&about) {
        match contender.clean_up(ground) {
            // Of one that could not be prepared there is as a rule nothing, and nobody who could remove it.
            Err(error) if about.absent.is_some() => log::info!("{}: {error:#}", about.name),
            Err(error) if cleaned.is_ok() => cleaned = Err(error),
            _ => {}
        }
    }
    let (measures, method, noise) = found?;
    cleaned?;
    Ok(Found { contenders: about, measures, method, noise })
}

fn measure_present(
    ground: &Ground,
    plan: &Plan,
    all: &[Box<dyn Contender>],
    about: &[result::Contender],
) -> Result<(Vec<Measured>, Method, Noise)> {
    let is_present = |(_, about): &(_, &result::Contender)| about.absent.is_none();
    let present: Vec<&dyn Contender> =
        all.iter().map(AsRef::as_ref).zip(about).filter(is_present).map(|(one, _)| one).collect();
    let names: Vec<&str> = present.iter().map(|contender| contender.name()).collect();
    let baseline = baseline(&names, plan.baseline.as_deref())?;
    let (amounts, failures) = amounts(ground, plan)?;
    for failure in failures {
        log::warn!("on the bare host: {failure}");
    }
    let context = Context { ground, plan, amounts: &amounts, next_instance: Cell::new(0) };
    let mut watch = Watch::new();
    let measures = rounds::measure(&context, &present, &mut watch)?;
    let effort = &plan.effort;
    let method = Method {
        warm_up_rounds: effort.warm_up_rounds,
        rounds: (effort.least_rounds, effort.most_rounds),
        precision: effort.precision,
        confidence: CONFIDENCE,
        baseline,
        amounts,
    };
    Ok((measures, method, watch.end()))
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
fn amounts(ground: &Ground, plan: &Plan) -> Result<Amounts> {
    let measures: Vec<_> = Trial::of(plan).into_iter().flat_map(|trial| trial.measures(plan)).collect();
    let folder = ground.folder.join("bare");
    fs::create_dir_all(&folder).with_context(|| format!("make {}", folder.display()))?;
    let in_root = |path: &str| ground.root.join(path.trim_start_matches('/'));
    let bare = Bare {
        program: &in_root(contender::WORK),
        data: &in_root(DATA),
        folder: &folder,
        cpus: plan.threads(),
        cpuset: plan.cpus.clone(),
    };
    Ok(bare.amounts(&measures, plan.effort.work_time()))
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
