//! Runs every benchmark with every contender in turn, A B C A B C, until the results are precise enough.

use std::time::Instant;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::benchmark::{Benchmark, BenchmarkContext, Measurements};
use super::contender::{Contender, Unsupported};
use super::noise::NoiseMonitor;
use super::plan::Sampling;
use super::report::{MetricResults, Outcome};
use super::scenario::Metric;
use super::statistics;
use crate::foreign::one_line;

/// The maximum number of rounds of a slow benchmark.
const SLOW_ROUNDS: u32 = 6;
/// After this many consecutive failures, a contender is excluded from the benchmark.
const MAX_CONSECUTIVE_FAILURES: usize = 2;

/// A contender's results in a benchmark.
struct Participant<'a> {
    contender: &'a dyn Contender,
    metrics: &'a [&'static Metric],
    /// One outcome per metric, in the same order.
    outcomes: Vec<Outcome>,
    consecutive_failures: usize,
    excluded: bool,
}

/// Runs all benchmarks of the plan and returns their results in execution order.
pub fn measure(
    context: &BenchmarkContext,
    contenders: &[&dyn Contender],
    monitor: &mut NoiseMonitor,
) -> Result<Vec<MetricResults>> {
    let benchmarks = Benchmark::selected(context.plan);
    let bar = progress(benchmarks.len() as u64);
    let mut measured = Vec::new();
    for benchmark in benchmarks {
        measured.extend(run_benchmark(benchmark, context, contenders, monitor, &bar)?);
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
    context: &BenchmarkContext,
    contenders: &[&dyn Contender],
    monitor: &mut NoiseMonitor,
    bar: &ProgressBar,
) -> Result<Vec<MetricResults>> {
    let metrics = benchmark.metrics(context.plan);
    let mut participants: Vec<Participant> =
        contenders.iter().map(|contender| Participant::new(benchmark, context, *contender, &metrics)).collect();
    let (warm_up, min, max) = round_limits(benchmark, &context.plan.sampling);
    for round in 0..warm_up + max {
        monitor.sample();
        let counted = round.checked_sub(warm_up);
        for participant in participants.iter_mut().filter(|participant| !participant.excluded) {
            let name = participant.contender.name();
            bar.set_message(format!("{benchmark}, round {}: {name}", counted.map_or(0, |round| round + 1)));
            let started = Instant::now();
            let measurements = benchmark.run(context, participant.contender);
            log::debug!("{benchmark} with {name} took {:?}", started.elapsed());
            super::interrupt::check()?;
            participant.record(measurements, counted);
        }
        let done = counted.map_or(0, |round| round + 1);
        if done >= min && participants.iter().all(|participant| participant.is_precise(context.plan.sampling.precision))
        {
            break;
        }
    }
    Ok(by_metric(&metrics, participants))
}

/// Returns the number of warm-up rounds, and the minimum and maximum number of counted rounds.
fn round_limits(benchmark: Benchmark, sampling: &Sampling) -> (u32, u32, u32) {
    let max = if benchmark.is_slow() { sampling.max_rounds.min(SLOW_ROUNDS) } else { sampling.max_rounds };
    // Dropped caches cannot be warmed up.
    let warm_up =
        if benchmark == (Benchmark::Start { cold: true }) || benchmark.is_slow() { 0 } else { sampling.warm_up_rounds };
    (warm_up, sampling.min_rounds.min(max), max)
}

impl<'a> Participant<'a> {
    fn new(
        benchmark: Benchmark,
        context: &BenchmarkContext,
        contender: &'a dyn Contender,
        metrics: &'a [&'static Metric],
    ) -> Participant<'a> {
        let skipped = benchmark.skip_reason(contender, context.fixture);
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

    /// Records the results of a round. `round` is `None` for a warm-up round, of which only failures are kept.
    fn record(&mut self, measurements: Result<Measurements>, round: Option<u32>) {
        let when = round.map_or("warm-up".to_owned(), |round| format!("round {}", round + 1));
        match measurements {
            Ok(measurements) => {
                self.consecutive_failures = 0;
                self.record_values(&measurements, &when, round.is_some());
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

    fn record_values(&mut self, measurements: &Measurements, when: &str, counted: bool) {
        for (metric, outcome) in self.metrics.iter().zip(&mut self.outcomes) {
            if let Some((_, reason)) = measurements.skipped.iter().find(|(name, _)| *name == metric.name) {
                outcome.skipped = Some(reason.clone());
                outcome.samples.clear();
            }
            if outcome.skipped.is_some() {
                continue;
            }
            let value = measurements.values.iter().find(|(name, _)| *name == metric.name).map(|(_, value)| *value);
            // A task that took no time yields no number.
            let value = value.filter(|value| value.is_finite());
            if value.is_none() {
                let reason = measurements.failures.iter().find(|(name, _)| *name == metric.name);
                outcome.failures.push(format!("{when}: {}", reason.map_or("no result", |(_, reason)| reason)));
            }
            if counted {
                outcome.samples.push(value);
            }
        }
    }

    /// Whether the precision is reached, so that no more rounds are needed.
    fn is_precise(&self, precision: f64) -> bool {
        let precise =
            |outcome: &Outcome| outcome.skipped.is_some() || statistics::is_precise_enough(&outcome.samples, precision);
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
