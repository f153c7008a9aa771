//! Draws conclusions from a report, in sentences: whether the host is emulated, failures, the noise of the host, and
//! what is better or worse.
//!
//! A difference is claimed only if its whole interval exceeds the [`margin`]. Five out of a hundred 95% intervals miss
//! the true value, though not by much; the margin keeps these from being claimed.

use super::format;
use super::report::{Estimate, Isolation, MetricResults, NoiseLevel, Report};
use super::scenario::Better;
use super::statistics::paired_ratio;

/// The smallest difference that is claimed. Changes of code layout alone cause differences of this size.
const MIN_DIFFERENCE: f64 = 0.02;
/// The same for a noisy host.
const MIN_DIFFERENCE_NOISY: f64 = 0.05;
/// How many items a sentence lists.
const MAX_LISTED: usize = 3;

/// The assessment of a ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgment {
    /// Better across the whole interval.
    Better,
    /// Worse across the whole interval.
    Worse,
    /// No difference beyond the noise.
    Inconclusive,
}

/// Returns how far the interval of a ratio must be from 1, or `None` if no conclusions are possible.
pub fn margin(level: NoiseLevel, spread: f64) -> Option<f64> {
    match level {
        NoiseLevel::Quiet => Some(MIN_DIFFERENCE),
        NoiseLevel::Noisy => Some(spread.max(MIN_DIFFERENCE_NOISY)),
        NoiseLevel::TooNoisy => None,
    }
}

/// Assesses a ratio.
pub fn judge(ratio: &Estimate, better: Better, margin: Option<f64>) -> Judgment {
    let Some(margin) = margin else { return Judgment::Inconclusive };
    match better {
        _ if ratio.low <= 1.0 + margin && ratio.high >= 1.0 / (1.0 + margin) => Judgment::Inconclusive,
        Better::Lower if ratio.high < 1.0 => Judgment::Better,
        Better::Higher if ratio.low > 1.0 => Judgment::Better,
        _ => Judgment::Worse,
    }
}

/// Returns the conclusions; the most important one comes first.
pub fn sentences(report: &Report) -> Vec<String> {
    let mut sentences: Vec<String> = emulation(report).into_iter().collect();
    sentences.extend(failures(report));
    sentences.extend(nesting(report));
    sentences.extend(noise_sentence(report));
    if report.noise.verdict != NoiseLevel::TooNoisy
        && let Some(head_to_head) = HeadToHead::of(report)
    {
        sentences.push(head_to_head.headline());
        sentences.extend(head_to_head.groups());
        sentences.extend(head_to_head.tallies());
    }
    sentences.extend(unavailable(report));
    sentences
}

/// Warns that no time is that of hardware. Comes before everything else, also in the table.
pub fn emulation(report: &Report) -> Option<String> {
    let emulator = report.host.emulator.as_ref()?;
    Some(format!(
        "Emulated host ({emulator}): only ratios are meaningful, best among contenders of the same kind, because VM \
         exits take far longer than on hardware. Absolute numbers are not those of any processor."
    ))
}

/// Warns that machines run in a machine.
fn nesting(report: &Report) -> Option<String> {
    let has_machines =
        report.contenders.iter().any(|one| one.unavailable.is_none() && one.isolation == Isolation::Machine);
    let hypervisor = report.host.hypervisor.as_ref().filter(|_| report.host.emulator.is_none() && has_machines)?;
    Some(format!("The host is itself a virtual machine ({hypervisor}): VM exits take longer than on hardware."))
}

/// Lists failures before what they affect, because a median without the failed rounds is biased.
fn failures(report: &Report) -> Vec<String> {
    let of = |name: &str| {
        let outcomes = report.metrics.iter().filter_map(|metric| Some((metric, metric.outcome_of(name)?)));
        let (mut failed, mut runs, mut titles) = (0, 0, Vec::new());
        for (metric, outcome) in outcomes {
            if !outcome.failures.is_empty() {
                failed += outcome.failures.len();
                runs += outcome.samples.len().max(outcome.failures.len());
                titles.push(format!("“{}”", metric.title));
            }
        }
        (failed > 0).then(|| {
            format!("{name} failed in {failed} of {} of {}.", format::count(runs, "round"), abbreviated(&titles))
        })
    };
    report.available().into_iter().filter_map(of).collect()
}

fn noise_sentence(report: &Report) -> Option<String> {
    let noise = &report.noise;
    let measured = format!(
        "the reference work varied by {}, and steal time was {}",
        format::percent(noise.spread),
        format::percent(noise.stolen)
    );
    match noise.verdict {
        NoiseLevel::Quiet => None,
        NoiseLevel::Noisy => Some(format!(
            "The host was noisy ({measured}): differences below {} are indistinguishable from noise.",
            format::percent(margin(noise.verdict, noise.spread).unwrap_or_default())
        )),
        NoiseLevel::TooNoisy => Some(format!("The host was too noisy for conclusions: {measured}.")),
    }
}

fn unavailable(report: &Report) -> Option<String> {
    let unavailable = report.contenders.iter().filter(|contender| contender.unavailable.is_some());
    let names: Vec<String> = unavailable.map(|contender| contender.name.clone()).collect();
    (!names.is_empty()).then(|| format!("Not compared because unavailable: {}.", format::list(&names)))
}

/// Compares husk with the baseline, and with all others.
struct HeadToHead<'a> {
    report: &'a Report,
    husk: &'a str,
    other: &'a str,
    margin: Option<f64>,
}

impl<'a> HeadToHead<'a> {
    /// Returns `None` without husk or without other contenders.
    fn of(report: &'a Report) -> Option<Self> {
        let present = report.available();
        let husk = *present.iter().find(|name| name.split(' ').next() == Some("husk"))?;
        let baseline = report.method.baseline.as_str();
        let rival = present.iter().find(|name| **name == baseline && baseline != husk);
        let other = rival.or_else(|| present.iter().find(|name| **name != husk))?;
        Some(Self { report, husk, other, margin: margin(report.noise.verdict, report.noise.spread) })
    }

    /// Returns the ratio of husk to another contender.
    fn ratio(&self, metric: &MetricResults, other: &str) -> Option<Estimate> {
        paired_ratio(&metric.outcome_of(self.husk)?.samples, &metric.outcome_of(other)?.samples)
    }

    /// Summarizes the most important metrics in one sentence.
    fn headline(&self) -> String {
        let clause = |metric: &MetricResults| {
            let (does, what) = headline_words(&metric.name)?;
            let ratio = self.ratio(metric, self.other)?;
            let is_conclusive = judge(&ratio, metric.better, self.margin) != Judgment::Inconclusive;
            is_conclusive.then(|| {
                let [ours, theirs] = [self.husk, self.other].map(|name| median(metric, name));
                let times = format::ratio(ratio.value);
                format!("{does} {ours}{what}, {times} times {}’s {theirs} ({})", self.other, range(&ratio))
            })
        };
        if self.report.metrics.iter().all(|metric| self.ratio(metric, self.other).is_none()) {
            return format!("{} and {} have too few rounds in common to compare.", self.husk, self.other);
        }
        let clauses: Vec<String> = self.report.metrics.iter().filter_map(clause).collect();
        if clauses.is_empty() {
            return format!("{} and {}: no difference beyond the noise in the main metrics.", self.husk, self.other);
        }
        format!("{} {}.", self.husk, format::list(&clauses))
    }

    /// Summarizes each scenario in one sentence.
    fn groups(&self) -> Vec<String> {
        let sentence = |(scenario, metrics): (_, Vec<&MetricResults>)| {
            let (mut better, mut worse, mut open) = (Vec::new(), Vec::new(), Vec::new());
            for metric in metrics {
                let Some(ratio) = self.ratio(metric, self.other) else { continue };
                let claim = claim(metric, [self.husk, self.other], &ratio);
                match judge(&ratio, metric.better, self.margin) {
                    Judgment::Better => better.push(claim),
                    Judgment::Worse => worse.push(claim),
                    Judgment::Inconclusive => open.push(format!("“{}”", metric.title)),
                }
            }
            let (husk, other) = (self.husk, self.other);
            let parts = [
                (better, format!("{husk} is better than {other} in ")),
                (worse, format!("{husk} is worse than {other} in ")),
                (open, "no difference beyond the noise in ".to_owned()),
            ];
            let parts: Vec<String> = parts
                .into_iter()
                .filter(|(claims, _)| !claims.is_empty())
                .map(|(claims, words)| words + &abbreviated(&claims))
                .collect();
            (!parts.is_empty()).then(|| format!("{}: {}.", format::scenario(scenario), parts.join("; ")))
        };
        self.report.groups().into_iter().filter_map(sentence).collect()
    }

    /// Counts how often husk is better and worse than each other contender.
    fn tallies(&self) -> Vec<String> {
        let tally = |other: &str| {
            let judge = |metric| Some(judge(&self.ratio(metric, other)?, metric.better, self.margin));
            let judged: Vec<Judgment> = self.report.metrics.iter().filter_map(judge).collect();
            let of = |judgment| judged.iter().filter(|judged| **judged == judgment).count();
            (!judged.is_empty()).then(|| {
                format!(
                    "Against {other}, in {}: {} is better in {}, worse in {}, without a difference beyond the noise in {}.",
                    format::count(judged.len(), "metric"),
                    self.husk,
                    of(Judgment::Better),
                    of(Judgment::Worse),
                    of(Judgment::Inconclusive)
                )
            })
        };
        self.report.available().into_iter().filter(|other| *other != self.husk).filter_map(tally).collect()
    }
}

/// Returns the words around the value of a metric in the headline.
fn headline_words(metric: &str) -> Option<(&'static str, &'static str)> {
    Some(match metric {
        "command" => ("runs the command in", ""),
        "start-output-warm" => ("starts in", ""),
        "memory-idle" => ("uses", " when idle"),
        "cpu-integer" => ("does integer work in", ""),
        "root-read-random" => ("reads its root at", ""),
        "network-to" => ("receives", ""),
        _ => return None,
    })
}

/// Formats a comparison of two contenders: the values, then their ratio.
fn claim(metric: &MetricResults, contenders: [&str; 2], ratio: &Estimate) -> String {
    let [ours, theirs] = contenders.map(|name| median(metric, name));
    let times = format::ratio(ratio.value);
    format!("“{}” ({ours}, {times} times {theirs}; {})", metric.title, range(ratio))
}

/// Formats the median of a contender that has a ratio.
fn median(metric: &MetricResults, contender: &str) -> String {
    let summary = metric.outcome_of(contender).and_then(|outcome| outcome.summary.as_ref());
    summary.map_or_else(|| "-".to_owned(), |summary| format::quantity(summary.median.value, metric.unit))
}

fn range(ratio: &Estimate) -> String {
    format!("{} to {}", format::ratio(ratio.low), format::ratio(ratio.high))
}

/// Lists the first items and counts the rest.
fn abbreviated(claims: &[String]) -> String {
    match claims.split_at_checked(MAX_LISTED) {
        Some((first, more @ [_, _, ..])) => format!("{} and {} more", first.join(", "), more.len()),
        _ => format::list(claims),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::example;
    use crate::bench::statistics::summarize;

    #[test]
    fn one_round_is_too_few_to_compare() {
        let mut report = example::report();
        report
            .metrics
            .iter_mut()
            .flat_map(|metric| &mut metric.results)
            .for_each(|outcome| outcome.samples.truncate(1));
        summarize(&mut report);
        let printed = sentences(&report).join("\n");
        assert!(printed.contains("too few rounds in common") && !printed.contains("no difference"), "{printed}");
    }

    fn ratio(low: f64, value: f64, high: f64) -> Estimate {
        Estimate { value, low, high }
    }

    /// Returns a report with samples of husk and crun for one metric.
    fn report_with(name: &str, husk: &[f64], crun: &[f64]) -> Report {
        let mut report = example::report();
        report.host.hypervisor = None;
        report.metrics.retain(|metric| metric.name == name);
        report.contenders.retain(|contender| ["crun", "husk"].contains(&contender.name.as_str()));
        for metric in &mut report.metrics {
            metric.results.retain(|outcome| ["crun", "husk"].contains(&outcome.contender.as_str()));
            for outcome in &mut metric.results {
                let samples = if outcome.contender == "husk" { husk } else { crun };
                outcome.samples = samples.iter().copied().map(Some).collect();
            }
        }
        summarize(&mut report);
        report
    }

    #[test]
    fn a_difference_is_claimed_only_beyond_the_margin() {
        let quiet = margin(NoiseLevel::Quiet, 0.03);
        assert_eq!(judge(&ratio(1.2, 1.3, 1.4), Better::Lower, quiet), Judgment::Worse);
        assert_eq!(judge(&ratio(1.2, 1.3, 1.4), Better::Higher, quiet), Judgment::Better);
        assert_eq!(judge(&ratio(0.7, 0.8, 0.9), Better::Lower, quiet), Judgment::Better);
        assert_eq!(judge(&ratio(0.9, 1.1, 1.2), Better::Lower, quiet), Judgment::Inconclusive);
        assert_eq!(
            judge(&ratio(1.01, 1.02, 1.03), Better::Lower, quiet),
            Judgment::Inconclusive,
            "too little to matter"
        );
        let noisy = margin(NoiseLevel::Noisy, 0.15);
        assert_eq!(judge(&ratio(1.1, 1.3, 1.5), Better::Lower, noisy), Judgment::Inconclusive);
        assert_eq!(judge(&ratio(1.2, 1.3, 1.5), Better::Lower, noisy), Judgment::Worse);
        assert_eq!(
            judge(&ratio(8.0, 9.0, 10.0), Better::Lower, margin(NoiseLevel::TooNoisy, 0.5)),
            Judgment::Inconclusive
        );
    }

    #[test]
    fn the_first_sentence_summarizes_husks_cost() {
        let husk: Vec<f64> = (0..20).map(|round| 13.0 + f64::from(round % 5) * 0.1).collect();
        let crun: Vec<f64> = (0..20).map(|round| 10.0 + f64::from(round % 5) * 0.1).collect();
        let printed = sentences(&report_with("start-output-warm", &husk, &crun));
        assert_eq!(printed[0], "husk starts in 13.2 ms, 1.29 times crun’s 10.2 ms (1.29 to 1.30).");
        assert_eq!(
            printed[1],
            "Start: husk is worse than crun in “Start to first output, caches warm” (13.2 ms, 1.29 times 10.2 ms; \
             1.29 to 1.30)."
        );
        assert_eq!(
            printed[2],
            "Against crun, in 1 metric: husk is better in 0, worse in 1, without a difference beyond the noise in 0."
        );
    }

    #[test]
    fn higher_rates_are_better() {
        let printed = sentences(&report_with("root-read-random", &[300.0; 8], &[200.0; 8]));
        assert_eq!(printed[0], "husk reads its root at 300/s, 1.50 times crun’s 200/s (1.50 to 1.50).");
        assert!(printed[1].starts_with("Disks: husk is better than crun in"), "{printed:?}");
    }

    #[test]
    fn equal_results_are_not_distinguished() {
        let mut random = fastrand::Rng::with_seed(1);
        let mut draw = || (0..20).map(|_| 10.0 + example::normal(&mut random)).collect::<Vec<f64>>();
        let printed = sentences(&report_with("start-output-warm", &draw(), &draw()));
        assert_eq!(printed[0], "husk and crun: no difference beyond the noise in the main metrics.");
    }

    #[test]
    fn failures_come_first() {
        let report = example::report();
        assert_eq!(
            sentences(&report)[0],
            "qemu-microvm failed in 23 of 40 rounds of “Process, from fork to exit” and \
             “Program, from fork and exec to exit”."
        );
    }

    #[test]
    fn an_emulated_host_is_named_before_anything_else() {
        let mut report = example::report();
        assert!(sentences(&report).iter().any(|sentence| sentence.contains("itself a virtual machine (KVM)")));
        report.host.emulator = Some("QEMU TCG".to_owned());
        let printed = sentences(&report);
        assert!(printed[0].starts_with("Emulated host (QEMU TCG): only ratios are meaningful"), "{printed:?}");
        assert!(printed[1].starts_with("qemu-microvm failed") && !printed.join("").contains("itself"), "{printed:?}");
        report.noise.verdict = NoiseLevel::TooNoisy;
        assert!(sentences(&report)[0].starts_with("Emulated host"));
    }

    #[test]
    fn a_noisy_host_allows_no_conclusions() {
        let mut report = report_with("start-output-warm", &[30.0; 8], &[10.0; 8]);
        report.noise.verdict = NoiseLevel::TooNoisy;
        report.noise.spread = 0.4;
        assert_eq!(
            sentences(&report),
            ["The host was too noisy for conclusions: the reference work varied by 40%, and steal time was 0.2%."]
        );
    }

    #[test]
    fn without_husk_or_without_others_nothing_is_claimed() {
        let mut report = example::report();
        report.host.hypervisor = None;
        report.contenders.retain(|contender| contender.name == "husk");
        assert_eq!(sentences(&report), Vec::<String>::new());
        report.contenders.clear();
        assert_eq!(sentences(&report), Vec::<String>::new());
    }

    #[test]
    fn absent_contenders_are_listed() {
        let last = sentences(&example::report()).pop().unwrap();
        assert_eq!(last, "Not compared because unavailable: bubblewrap and firecracker.");
    }
}
