//! The rounds: every benchmark with every contender in turn, A B C A B C, until the numbers are as precise as was asked for.

use std::time::Instant;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::benchmark::{Benchmark, Measurements, Session};
use super::contender::{Contender, Unsupported};
use super::noise::NoiseMonitor;
use super::plan::Sampling;
use super::report::{MetricResults, Outcome};
use super::scenario::Metric;
use super::statistics;
use crate::foreign::one_line;

/// Rounds of a benchmark that takes long.
const SLOW_ROUNDS: u32 = 6;
/// A contender that fails so often from the start is not tried any more.
const MAX_CONSECUTIVE_FAILURES: usize = 2;

/// One who takes part in a benchmark.
struct Participant<'a> {
    contender: &'a dyn Contender,
    metrics: &'a [&'static Metric],
    /// One a measure, in their order.
    outcomes: Vec<Outcome>,
    consecutive_failures: usize,
    excluded: bool,
}

/// Makes all benchmarks of the plan. Returns what was measured, in the order of the benchmarks.
pub fn measure(
    session: &Session,
    contenders: &[&dyn Contender],
    monitor: &mut NoiseMonitor,
) -> Result<Vec<MetricResults>> {
    let benchmarks = Benchmark::of(session.plan);
    let bar = progress(benchmarks.len() as u64);
    let mut measured = Vec::new();
    for benchmark in benchmarks {
        measured.extend(run_benchmark(benchmark, session, contenders, monitor, &bar)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(measured)
}

fn progress(benchmarks: u64) -> ProgressBar {
    let bar = ProgressBar::new(benchmarks);
    if let Ok(style) = ProgressStyle::with_template("[{elapsed}] {bar:20} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(std::time::Duration::from_millis(500));
    bar
}

fn run_benchmark(
    benchmark: Benchmark,
    session: &Session,
    contenders: &[&dyn Contender],
    monitor: &mut NoiseMonitor,
    bar: &ProgressBar,
) -> Result<Vec<MetricResults>> {
    let metrics = benchmark.metrics(session.plan);
    let mut participants: Vec<Participant> =
        contenders.iter().map(|contender| Participant::new(benchmark, session, *contender, &metrics)).collect();
    let (warm_up, min, max) = rounds(benchmark, &session.plan.sampling);
    for round in 0..warm_up + max {
        monitor.sample();
        let counted = round.checked_sub(warm_up);
        for participant in participants.iter_mut().filter(|participant| !participant.excluded) {
            let name = participant.contender.name();
            bar.set_message(format!("{benchmark}, round {}: {name}", counted.map_or(0, |round| round + 1)));
            let started = Instant::now();
            let measurements = benchmark.run(session, participant.contender);
            log::debug!("{benchmark} with {name} took {:?}", started.elapsed());
            super::interrupt::check()?;
            participant.take(measurements, counted);
        }
        let done = counted.map_or(0, |round| round + 1);
        if done >= min && participants.iter().all(|participant| participant.is_precise(session.plan.sampling.precision))
        {
            break;
        }
    }
    Ok(by_metric(&metrics, participants))
}

/// Warm-up rounds, and counted rounds at least and at most.
fn rounds(benchmark: Benchmark, sampling: &Sampling) -> (u32, u32, u32) {
    let max = if benchmark.is_slow() { sampling.max_rounds.min(SLOW_ROUNDS) } else { sampling.max_rounds };
    // Caches that are emptied each time cannot be warmed.
    let warm_up =
        if benchmark == (Benchmark::Start { cold: true }) || benchmark.is_slow() { 0 } else { sampling.warm_up_rounds };
    (warm_up, sampling.min_rounds.min(max), max)
}

impl<'a> Participant<'a> {
    fn new(
        benchmark: Benchmark,
        session: &Session,
        contender: &'a dyn Contender,
        metrics: &'a [&'static Metric],
    ) -> Participant<'a> {
        let skipped = benchmark.skip_reason(contender, session.fixture);
        let outcome = |_: &&Metric| Outcome {
            contender: contender.name().to_owned(),
            samples: Vec::new(),
            failures: Vec::new(),
            skipped: skipped.clone(),
            summary: None,
            ratio: None,
        };
        Participant {
            contender,
            metrics,
            outcomes: metrics.iter().map(outcome).collect(),
            consecutive_failures: 0,
            excluded: skipped.is_some(),
        }
    }

    /// Keeps what a round found. `round` is none in a warm-up, of which only a failure counts.
    fn take(&mut self, measurements: Result<Measurements>, round: Option<u32>) {
        let when = round.map_or("warm-up".to_owned(), |round| format!("round {}", round + 1));
        match measurements {
            Ok(measurements) => {
                self.consecutive_failures = 0;
                self.keep(&measurements, &when, round.is_some());
            }
            Err(error) if error.is::<Unsupported>() => {
                self.excluded = true;
                for outcome in &mut self.outcomes {
                    outcome.skipped = Some(one_line(&format!("{error:#}")));
                }
                return;
            }
            Err(error) => {
                self.consecutive_failures += 1;
                for outcome in self.outcomes.iter_mut().filter(|outcome| outcome.skipped.is_none()) {
                    outcome.failures.push(format!("{when}: {}", one_line(&format!("{error:#}"))));
                    if round.is_some() {
                        outcome.samples.push(None);
                    }
                }
            }
        }
        self.excluded = self.consecutive_failures >= MAX_CONSECUTIVE_FAILURES;
    }

    fn keep(&mut self, measurements: &Measurements, when: &str, counted: bool) {
        for (metric, outcome) in self.metrics.iter().zip(&mut self.outcomes) {
            if let Some((_, reason)) = measurements.skipped.iter().find(|(name, _)| *name == metric.name) {
                outcome.skipped = Some(reason.clone());
                outcome.samples.clear();
            }
            if outcome.skipped.is_some() {
                continue;
            }
            let value = measurements.values.iter().find(|(name, _)| *name == metric.name).map(|(_, value)| *value);
            // A clock that stood still, or a division by it, is no number.
            let value = value.filter(|value| value.is_finite());
            if value.is_none() {
                let reason = measurements.failures.iter().find(|(name, _)| *name == metric.name);
                outcome.failures.push(format!("{when}: {}", reason.map_or("it gave no number", |(_, reason)| reason)));
            }
            if counted {
                outcome.samples.push(value);
            }
        }
    }

    /// Whether more rounds would tell nothing more that was asked for.
    fn is_precise(&self, precision: f64) -> bool {
        let precise =
            |outcome: &Outcome| outcome.skipped.is_some() || statistics::is_enough(&outcome.samples, precision);
        self.excluded || self.outcomes.iter().all(precise)
    }
}

fn by_metric(metrics: &[&'static Metric], participants: Vec<Participant>) -> Vec<MetricResults> {
    let mut columns: Vec<_> = participants.into_iter().map(|participant| participant.outcomes.into_iter()).collect();
    metrics
        .iter()
        .map(|metric| MetricResults {
            name: metric.name.to_owned(),
            title: metric.title.to_owned(),
            scenario: metric.scenario,
            unit: metric.unit,
            better: metric.better(),
            results: columns.iter_mut().filter_map(Iterator::next).collect(),
        })
        .collect()
}
