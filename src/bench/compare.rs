//! `--compare OLD.json`: tells changes since an earlier run from noise.
//!
//! The two runs share no rounds, so the confidence interval of the ratio of medians is computed from both sets of
//! samples. A change is reported only if the interval exceeds both the smallest relevant change and the noise of either
//! host, because slow drift of a host between the runs is not covered by an interval of one run.

use anyhow::{Context, Result, bail, ensure};

use super::format::{self, wrapped};
use super::report::{Estimate, MetricResults, NoiseLevel, Outcome, Report, VERSION};
use super::statistics::{self, finite, unpaired_ratio};
use super::verdict::{Judgment, judge};

/// The size limit of a report. A hundred rounds of everything with ten contenders take one megabyte.
pub const MAX_BYTES: u64 = 16 << 20;
/// The round limit of a report, because every round costs thousands of resampling steps.
pub const MAX_ROUNDS: usize = 1_000;
/// The confidence level. Comparisons have hundreds of ratios, of which only two or three then miss the true value.
const CONFIDENCE: f64 = 0.99;
/// The minimum number of samples on each side. Three against three differ completely by chance in one case out of ten.
const MIN_SAMPLES: usize = 4;
/// The smallest change that is reported.
const MIN_CHANGE: f64 = 0.03;
/// The largest difference of the hosts' reference work between the runs that is not reported.
const MIN_DRIFT: f64 = 0.05;

/// The classification of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Worse than before, beyond the noise.
    Regression,
    /// Better than before, beyond the noise.
    Improvement,
    /// No difference beyond the noise.
    Unchanged,
    /// More failed rounds than before.
    MoreFailures,
    /// Too few samples, or too noisy a host.
    Inconclusive,
}

/// One metric of one contender, in both runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Change {
    /// The name of the metric.
    pub metric: String,
    /// The title of the metric.
    pub title: String,
    /// The name of the contender.
    pub contender: String,
    /// The ratio of the new median to the old one, if both exist.
    pub ratio: Option<Estimate>,
    /// The classification.
    pub class: Class,
}

/// The differences between two runs.
#[derive(Debug, Clone, PartialEq)]
pub struct Comparison {
    /// Differences of the environment, such as another host or kernel.
    pub warnings: Vec<String>,
    /// The metrics that both runs have, in the order of the new run.
    pub changes: Vec<Change>,
    /// What only one of the runs has, as `metric, contender`.
    pub unmatched: Vec<String>,
}

/// Parses a saved report, possibly from another host.
pub fn parse(text: &str) -> Result<Report> {
    /// The part that all versions of the format have in common.
    #[derive(serde::Deserialize)]
    struct Versioned {
        version: u32,
    }
    ensure!(text.len() as u64 <= MAX_BYTES, "larger than {} MiB", MAX_BYTES >> 20);
    let not_ours = "not a report of husk bench (--output NAME writes one)";
    let Versioned { version } = serde_json::from_str(text).context(not_ours)?;
    ensure!(version == VERSION, "report version {version} is not supported; this husk reads version {VERSION}");
    let report: Report = serde_json::from_str(text).context(not_ours)?;
    let mut outcomes = report.metrics.iter().flat_map(|metric| &metric.results);
    let is_short =
        outcomes.all(|outcome| outcome.samples.len() <= MAX_ROUNDS) && report.noise.samples_ms.len() <= MAX_ROUNDS;
    ensure!(is_short, "a report with more than {MAX_ROUNDS} rounds");
    Ok(report)
}

/// Compares two runs. Fails if they are not comparable.
pub fn compare(old: &Report, new: &Report) -> Result<Comparison> {
    let (before, now) = (&old.limits, &new.limits);
    if before != now {
        let limits = |limits: &super::report::Limits| {
            let cpuset = limits.cpuset.as_ref().map(|cpuset| format!(" --cpuset {cpuset}")).unwrap_or_default();
            format!("--cpus {} --memory {}M{cpuset}", limits.cpus, limits.memory_mib)
        };
        bail!("the old run had different limits: {}; this one has {}", limits(before), limits(now));
    }
    let mut comparison = Comparison { warnings: warnings(old, new), changes: Vec::new(), unmatched: Vec::new() };
    let margin = margin(old, new);
    for metric in &new.metrics {
        let Some(before) = old.metrics.iter().find(|before| before.name == metric.name) else {
            comparison.unmatched.push(format!("{}, only in the new run", metric.title));
            continue;
        };
        if before.unit != metric.unit || before.better != metric.better {
            bail!(
                "“{}” is in {:?} in the old run and in {:?} in this one: not comparable",
                metric.name,
                before.unit,
                metric.unit
            );
        }
        comparison.changes.extend(metric.results.iter().filter_map(|outcome| {
            let before = before.outcome_of(&outcome.contender)?;
            change(metric, before, outcome, margin)
        }));
        let unknown = |outcome: &&Outcome| before.outcome_of(&outcome.contender).is_none();
        let names = metric.results.iter().filter(unknown).map(|outcome| outcome.contender.as_str());
        comparison.unmatched.extend(names.map(|name| format!("{}, {name}, only in the new run", metric.title)));
        let gone = before.results.iter().filter(|before| metric.outcome_of(&before.contender).is_none());
        comparison
            .unmatched
            .extend(gone.map(|gone| format!("{}, {}, only in the old run", metric.title, gone.contender)));
    }
    let gone = old.metrics.iter().filter(|before| new.metrics.iter().all(|metric| metric.name != before.name));
    comparison.unmatched.extend(gone.map(|gone| format!("{}, only in the old run", gone.title)));
    Ok(comparison)
}

/// Returns how far an interval must be from 1, or `None` if one of the hosts was too noisy.
fn margin(old: &Report, new: &Report) -> Option<f64> {
    let noises = [&old.noise, &new.noise];
    let concludes = noises.iter().all(|noise| noise.verdict != NoiseLevel::TooNoisy && noise.spread.is_finite());
    concludes.then(|| noises.iter().fold(MIN_CHANGE, |margin, noise| margin.max(noise.spread)))
}

/// Compares one metric of one contender. Returns `None` if neither run measured it.
fn change(metric: &MetricResults, before: &Outcome, outcome: &Outcome, margin: Option<f64>) -> Option<Change> {
    let (old, new) = (finite(&before.samples), finite(&outcome.samples));
    if old.is_empty() && new.is_empty() {
        return None;
    }
    let ratio = unpaired_ratio(&new, &old, CONFIDENCE);
    let failed = |outcome: &Outcome| share(outcome.failures.len(), outcome.samples.len());
    let class = match ratio {
        _ if failed(outcome) > failed(before) => Class::MoreFailures,
        Some(ratio) if old.len().min(new.len()) >= MIN_SAMPLES && margin.is_some() => {
            match judge(&ratio, metric.better, margin) {
                Judgment::Better => Class::Improvement,
                Judgment::Worse => Class::Regression,
                Judgment::Inconclusive => Class::Unchanged,
            }
        }
        _ => Class::Inconclusive,
    };
    Some(Change {
        metric: metric.name.clone(),
        title: metric.title.clone(),
        contender: outcome.contender.clone(),
        ratio,
        class,
    })
}

#[allow(clippy::cast_precision_loss, reason = "counts of runs are small")]
fn share(part: usize, whole: usize) -> f64 {
    part as f64 / whole.max(1) as f64
}

/// Lists differences of the environment that may affect every number.
fn warnings(old: &Report, new: &Report) -> Vec<String> {
    let mut warnings = Vec::new();
    let mut differs = |what: &str, before: &str, now: &str| {
        if before != now {
            warnings.push(format!("different {what}: {before} before, {now} now"));
        }
    };
    let none = || "none".to_owned();
    differs("processor", &old.host.processor, &new.host.processor);
    differs("host kernel", &old.host.kernel, &new.host.kernel);
    differs("KVM", &old.host.kvm, &new.host.kvm);
    let hypervisor = |report: &Report| report.host.hypervisor.clone().unwrap_or_else(none);
    differs("hypervisor of the host", &hypervisor(old), &hypervisor(new));
    let emulator = |report: &Report| report.host.emulator.clone().unwrap_or_else(none);
    differs("emulator of the host", &emulator(old), &emulator(new));
    let governor = |report: &Report| report.host.governor.clone().unwrap_or_else(none);
    differs("governor", &governor(old), &governor(new));
    differs("image", &old.image.id, &new.image.id);
    differs("file system", &old.host.file_system, &new.host.file_system);
    for contender in &new.contenders {
        let Some(before) = old.contenders.iter().find(|before| before.name == contender.name) else { continue };
        let kernel = |of: &Option<String>| of.clone().unwrap_or_else(none);
        if before.unavailable.is_none() && contender.unavailable.is_none() {
            differs(&format!("kernel in {}", contender.name), &kernel(&before.kernel), &kernel(&contender.kernel));
            differs(&format!("version of {}", contender.name), &kernel(&before.version), &kernel(&contender.version));
        }
    }
    if old.method.amounts != new.method.amounts {
        warnings.push("different amounts of work per sample".to_owned());
    }
    let host = unpaired_ratio(&new.noise.samples_ms, &old.noise.samples_ms, statistics::CONFIDENCE);
    if let Some(host) = host.filter(|host| (host.value - 1.0).abs() > MIN_DRIFT) {
        warnings.push(format!("the host took {} times as long for the reference work", format::ratio(host.value)));
    }
    warnings
}

impl Comparison {
    /// Returns the number of changes of this class.
    pub fn count(&self, class: Class) -> usize {
        self.changes.iter().filter(|change| change.class == class).count()
    }

    /// Formats the comparison for a terminal: warnings first, then changes, then a summary.
    pub fn table(&self, width: usize) -> String {
        let mut lines: Vec<String> =
            self.warnings.iter().flat_map(|warning| wrapped("warning: ", warning, width)).collect();
        for (class, heading) in [
            (Class::MoreFailures, "MORE FAILURES"),
            (Class::Regression, "REGRESSIONS"),
            (Class::Improvement, "IMPROVEMENTS"),
        ] {
            let changes: Vec<&Change> = self.changes.iter().filter(|change| change.class == class).collect();
            if !changes.is_empty() {
                lines.push(heading.to_owned());
                lines.extend(changes.iter().flat_map(|change| wrapped("  ", &change.line(), width)));
            }
        }
        lines.extend(wrapped("", &self.summary(), width));
        lines.extend(self.unmatched.iter().flat_map(|unmatched| wrapped("not compared: ", unmatched, width)));
        lines.iter().fold(String::new(), |text, line| text + line.trim_end() + "\n")
    }

    fn summary(&self) -> String {
        format!(
            "{} compared: {}, {}, {} without a difference beyond the noise, {} inconclusive (too few samples, or too noisy), \
             {} with more failures.",
            format::count(self.changes.len(), "number"),
            format::count(self.count(Class::Regression), "regression"),
            format::count(self.count(Class::Improvement), "improvement"),
            self.count(Class::Unchanged),
            self.count(Class::Inconclusive),
            self.count(Class::MoreFailures)
        )
    }
}

impl Change {
    fn line(&self) -> String {
        let ratio = self.ratio.map_or_else(String::new, |ratio| {
            format!(": {} times the old ({})", format::ratio(ratio.value), format::ratio_interval(&ratio))
        });
        format!("{}, “{}”{ratio}", self.contender, self.title)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::example::{report, report_of};

    fn class_of(comparison: &Comparison, metric: &str, contender: &str) -> Class {
        let is = |change: &&Change| change.metric == metric && change.contender == contender;
        comparison.changes.iter().find(is).unwrap().class
    }

    #[test]
    fn a_change_of_a_fifth_is_detected_in_both_directions() {
        let (old, slower) = (report(), report_of(2, 1.2));
        let worse = compare(&old, &slower).unwrap();
        let better = compare(&slower, &old).unwrap();
        let of_husk = |comparison: &Comparison, class| {
            comparison.changes.iter().filter(|change| change.contender == "husk" && change.class == class).count()
        };
        let all = worse.changes.iter().filter(|change| change.contender == "husk").count();
        assert_eq!((of_husk(&worse, Class::Regression), of_husk(&better, Class::Improvement)), (all, all));
        assert_eq!((worse.count(Class::Regression), worse.count(Class::Improvement)), (all, 0), "{worse:?}");
        let change = worse.changes.iter().find(|change| change.contender == "husk").unwrap();
        assert!((1.15..1.25).contains(&change.ratio.unwrap().value), "{change:?}");
    }

    #[test]
    fn unchanged_results_rarely_give_a_false_alarm() {
        let old = report();
        let (mut alarms, mut compared) = (0, 0);
        for seed in 2..6 {
            let comparison = compare(&old, &report_of(seed, 1.0)).unwrap();
            alarms += comparison.count(Class::Regression) + comparison.count(Class::Improvement);
            compared += comparison.changes.len();
        }
        assert!(compared > 800 && alarms * 400 <= compared, "{alarms} of {compared}");
    }

    #[test]
    fn a_noisy_host_hides_a_small_change() {
        let (mut old, new) = (report(), report_of(2, 1.2));
        old.noise.spread = 0.24;
        assert_eq!(class_of(&compare(&old, &new).unwrap(), "syscall", "husk"), Class::Unchanged);
        old.noise.verdict = NoiseLevel::TooNoisy;
        assert_eq!(class_of(&compare(&old, &new).unwrap(), "syscall", "husk"), Class::Inconclusive);
    }

    #[test]
    fn few_runs_are_not_judged_and_failures_are_not_slowdowns() {
        let (old, mut new) = (report(), report_of(2, 2.0));
        for metric in &mut new.metrics {
            let husk = metric.results.iter_mut().find(|outcome| outcome.contender == "husk").unwrap();
            if metric.name == "exec" {
                husk.failures.push("round 1: it hung".to_owned());
            }
            husk.samples.truncate(MIN_SAMPLES - 1);
        }
        let comparison = compare(&old, &new).unwrap();
        assert_eq!(class_of(&comparison, "syscall", "husk"), Class::Inconclusive);
        assert_eq!(class_of(&comparison, "exec", "husk"), Class::MoreFailures);
        assert_eq!(class_of(&comparison, "exec", "qemu-microvm"), Class::Unchanged, "as often as before");
    }

    #[test]
    fn incomparable_reports_are_rejected_in_one_line() {
        let old = report();
        let mut other = old.clone();
        other.limits.memory_mib = 1024;
        let error = format!("{:#}", compare(&old, &other).unwrap_err());
        assert_eq!(
            error,
            "the old run had different limits: --cpus 2 --memory 512M --cpuset 2-3; this one has --cpus 2 --memory 1024M --cpuset 2-3"
        );
        let mut other = old.clone();
        other.metrics[0].unit = crate::bench::scenario::Unit::Microseconds;
        let error = format!("{:#}", compare(&old, &other).unwrap_err());
        assert!(
            error.starts_with("“start-output-warm” is in Milliseconds in the old run and in Microseconds in this one"),
            "{error}"
        );
    }

    #[test]
    fn a_different_host_causes_a_warning() {
        let old = report();
        let mut new = old.clone();
        assert_eq!(compare(&old, &new).unwrap().warnings, Vec::<String>::new());
        new.host.kernel = "6.1.0".to_owned();
        new.contenders[5].kernel = Some("7.0".to_owned());
        for sample in &mut new.noise.samples_ms {
            *sample *= 1.5;
        }
        new.metrics.remove(0);
        new.metrics[0].results.remove(0);
        let comparison = compare(&old, &new).unwrap();
        assert_eq!(
            comparison.warnings,
            [
                "different host kernel: 6.12.8-amd64 before, 6.1.0 now",
                "different kernel in husk: 6.12.8-husk before, 7.0 now",
                "the host took 1.50 times as long for the reference work",
            ]
        );
        assert_eq!(
            comparison.unmatched,
            [
                "Start to exit, caches warm, host, only in the old run",
                "Start to first output, caches warm, only in the old run"
            ]
        );
    }

    #[test]
    fn a_table_lists_changes_first() {
        let table = compare(&report(), &report_of(2, 1.2)).unwrap().table(100);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines[0], "REGRESSIONS");
        assert!(lines[1].starts_with("  husk, “Start to first output, caches warm”: 1.2"), "{table}");
        assert!(lines.iter().all(|line| line.chars().count() <= 100), "{table}");
        assert!(table.contains("33 regressions, 0 improvements"), "{table}");
    }

    #[test]
    fn a_report_survives_a_round_trip() {
        let report = report();
        assert_eq!(parse(&serde_json::to_string(&report).unwrap()).unwrap(), report);
    }

    #[test]
    fn an_invalid_report_is_rejected_in_one_line() {
        let refusal = |text: &str| format!("{:#}", parse(text).unwrap_err());
        for text in ["", "{}", "[1, 2]", "{\"version\": 2}", "{\"version\": -1}", "\u{0}", &"[".repeat(1 << 20)] {
            let error = refusal(text);
            assert!(error.starts_with("not a report of husk bench (--output NAME writes one): "), "{error}");
            assert!(!error.contains('\n') && error.len() < 200, "{error}");
        }
        assert_eq!(refusal("{\"version\": 3}"), "report version 3 is not supported; this husk reads version 2");
        assert_eq!(refusal(&" ".repeat((16 << 20) + 1)), "larger than 16 MiB");
        let mut long = report();
        long.metrics[3].results[2].samples = vec![Some(1.0); MAX_ROUNDS + 1];
        assert_eq!(refusal(&serde_json::to_string(&long).unwrap()), "a report with more than 1000 rounds");
        let too_large = serde_json::to_string(&report()).unwrap().replacen("1234.5", "1e999", 1);
        assert!(refusal(&too_large).contains("number out of range"));
    }
}
