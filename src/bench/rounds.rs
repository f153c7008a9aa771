//! The rounds: every trial with every contender in turn, A B C A B C, until the numbers are as precise as was asked for.

use std::time::Instant;

use anyhow::Result;
use indicatif::{ProgressBar, ProgressStyle};

use super::contender::{Contender, Unable};
use super::noise::Watch;
use super::plan::Effort;
use super::result::{Measured, Outcome};
use super::scenario::Measure;
use super::statistics;
use super::trial::{Context, Found, Trial};
use crate::foreign::one_line;

/// Rounds of a trial that takes long.
const SLOW_ROUNDS: u32 = 6;
/// A contender that fails so often from the start is not tried any more.
const ENOUGH_FAILURES: usize = 2;

/// One who takes part in a trial.
struct Entrant<'a> {
    contender: &'a dyn Contender,
    measures: &'a [&'static Measure],
    /// One a measure, in their order.
    outcomes: Vec<Outcome>,
    failures_in_a_row: usize,
    out: bool,
}

/// Makes all trials of the plan. Returns what was measured, in the order of the trials.
pub fn measure(context: &Context, contenders: &[&dyn Contender], watch: &mut Watch) -> Result<Vec<Measured>> {
    let trials = Trial::of(context.plan);
    let bar = progress(trials.len() as u64);
    let mut measured = Vec::new();
    for trial in trials {
        measured.extend(one_trial(trial, context, contenders, watch, &bar)?);
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(measured)
}

fn progress(trials: u64) -> ProgressBar {
    let bar = ProgressBar::new(trials);
    if let Ok(style) = ProgressStyle::with_template("[{elapsed}] {bar:20} {pos}/{len} {msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(std::time::Duration::from_millis(500));
    bar
}

fn one_trial(
    trial: Trial,
    context: &Context,
    contenders: &[&dyn Contender],
    watch: &mut Watch,
    bar: &ProgressBar,
) -> Result<Vec<Measured>> {
    let measures = trial.measures(context.plan);
    let mut entrants: Vec<Entrant> =
        contenders.iter().map(|contender| Entrant::new(trial, context, *contender, &measures)).collect();
    let (warm_up, least, most) = rounds(trial, &context.plan.effort);
    for round in 0..warm_up + most {
        watch.sample();
        let counted = round.checked_sub(warm_up);
        for entrant in entrants.iter_mut().filter(|entrant| !entrant.out) {
            let name = entrant.contender.name();
            bar.set_message(format!("{trial}, round {}: {name}", counted.map_or(0, |round| round + 1)));
            let started = Instant::now();
            let found = trial.run(context, entrant.contender);
            log::debug!("{trial} with {name} took {:?}", started.elapsed());
            super::interrupt::check()?;
            entrant.take(found, counted);
        }
        let done = counted.map_or(0, |round| round + 1);
        if done >= least && entrants.iter().all(|entrant| entrant.is_precise(context.plan.effort.precision)) {
            break;
        }
    }
    Ok(by_measure(&measures, entrants))
}

/// Warm-up rounds, and counted rounds at least and at most.
fn rounds(trial: Trial, effort: &Effort) -> (u32, u32, u32) {
    let most = if trial.is_slow() { effort.most_rounds.min(SLOW_ROUNDS) } else { effort.most_rounds };
    // Caches that are emptied each time cannot be warmed.
    let warm_up = if trial == (Trial::Start { cold: true }) || trial.is_slow() { 0 } else { effort.warm_up_rounds };
    (warm_up, effort.least_rounds.min(most), most)
}

impl<'a> Entrant<'a> {
    fn new(
        trial: Trial,
        context: &Context,
        contender: &'a dyn Contender,
        measures: &'a [&'static Measure],
    ) -> Entrant<'a> {
        let skipped = trial.obstacle(contender, context.ground);
        let outcome = |_: &&Measure| Outcome {
            contender: contender.name().to_owned(),
            samples: Vec::new(),
            failures: Vec::new(),
            skipped: skipped.clone(),
            summary: None,
            ratio: None,
        };
        Entrant {
            contender,
            measures,
            outcomes: measures.iter().map(outcome).collect(),
            failures_in_a_row: 0,
            out: skipped.is_some(),
        }
    }

    /// Keeps what a round found. `round` is none in a warm-up, of which only a failure counts.
    fn take(&mut self, found: Result<Found>, round: Option<u32>) {
        let when = round.map_or("warm-up".to_owned(), |round| format!("round {}", round + 1));
        match found {
            Ok(found) => {
                self.failures_in_a_row = 0;
                self.keep(&found, &when, round.is_some());
            }
            Err(error) if error.is::<Unable>() => {
                self.out = true;
                for outcome in &mut self.outcomes {
                    outcome.skipped = Some(one_line(&format!("{error:#}")));
                }
                return;
            }
            Err(error) => {
                self.failures_in_a_row += 1;
                for outcome in self.outcomes.iter_mut().filter(|outcome| outcome.skipped.is_none()) {
                    outcome.failures.push(format!("{when}: {}", one_line(&format!("{error:#}"))));
                    if round.is_some() {
                        outcome.samples.push(None);
                    }
                }
            }
        }
        self.out = self.failures_in_a_row >= ENOUGH_FAILURES;
    }

    fn keep(&mut self, found: &Found, when: &str, counted: bool) {
        for (measure, outcome) in self.measures.iter().zip(&mut self.outcomes) {
            if let Some((_, why)) = found.pointless.iter().find(|(name, _)| *name == measure.name) {
                outcome.skipped = Some(why.clone());
                outcome.samples.clear();
            }
            if outcome.skipped.is_some() {
                continue;
            }
            let value = found.values.iter().find(|(name, _)| *name == measure.name).map(|(_, value)| *value);
            // A clock that stood still, or a division by it, is no number.
            let value = value.filter(|value| value.is_finite());
            if value.is_none() {
                let why = found.failures.iter().find(|(name, _)| *name == measure.name);
                outcome.failures.push(format!("{when}: {}", why.map_or("it gave no number", |(_, why)| why)));
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
        self.out || self.outcomes.iter().all(precise)
    }
}

fn by_measure(measures: &[&'static Measure], entrants: Vec<Entrant>) -> Vec<Measured> {
    let mut columns: Vec<_> = entrants.into_iter().map(|entrant| entrant.outcomes.into_iter()).collect();
    measures
        .iter()
        .map(|measure| Measured {
            name: measure.name.to_owned(),
            title: measure.title.to_owned(),
            scenario: measure.scenario,
            unit: measure.unit,
            better: measure.better(),
            results: columns.iter_mut().filter_map(Iterator::next).collect(),
        })
        .collect()
}
