//! A strip plot of a metric's samples: one row per contender on a common axis, with the median and its interval.
//!
//! A plot is always 360 units wide, about the width of a phone, so that its text has the same size as the page's.

use std::fmt::Write;

use maud::{Markup, html};

use super::super::format;
use super::super::report::{MetricResults, Outcome, Report, Summary};
use super::{color_class, index_of};

const WIDTH: f64 = 360.0;
/// The ends of the axis.
const LEFT: f64 = 10.0;
const RIGHT: f64 = WIDTH - 10.0;
/// The right end of a logarithmic axis, and the left end of the zoomed axis next to it.
const SPLIT: (f64, f64) = (205.0, 225.0);
/// The range of the zoomed axis, as deviation from a contender's own median. Values outside are clamped.
const ZOOM: (f64, f64) = (-0.5, 1.0);
/// The height of a contender's row, including its name.
const ROW: f64 = 44.0;
/// The vertical center of the samples in a row.
const MIDDLE: f64 = 26.0;
/// The height of the tick labels and the unit.
const FOOT: f64 = 36.0;
/// The longest name that leaves room for the median.
const NAME_CHARS: usize = 26;
/// The ratio of the maximum to the minimum from which an axis is logarithmic.
const LOGARITHMIC_FROM: f64 = 6.0;

/// The largest value on an axis.
const LARGEST: f64 = 1e300;

/// Maps values to horizontal positions.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Axis {
    min: f64,
    max: f64,
    logarithmic: bool,
    left: f64,
    right: f64,
}

impl Axis {
    /// Returns an axis that covers all values.
    fn of(values: &[f64]) -> Self {
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        // Clamped, because differences of larger numbers may overflow.
        let [min, max] = [min, max].map(|end| if end.is_finite() { end.clamp(-LARGEST, LARGEST) } else { end });
        if !min.is_finite() || !max.is_finite() {
            return Self { min: 0.0, max: 1.0, logarithmic: false, left: LEFT, right: RIGHT };
        }
        if min > 0.0 && max / min >= LOGARITHMIC_FROM {
            return Self { min: min / 1.1, max: max * 1.1, logarithmic: true, left: LEFT, right: SPLIT.0 };
        }
        // A linear axis starts at 0 if the samples still get most of the width.
        let room = if max > min { (max - min) * 0.05 } else { max.abs() * 0.05 + f64::MIN_POSITIVE };
        let min = if min >= 0.0 && min < max / 2.0 { 0.0 } else { min - room };
        Self { min, max: max + room, logarithmic: false, left: LEFT, right: RIGHT }
    }

    /// Returns the zoomed axis: deviations of samples from the contender's own median, as a fraction of it.
    fn zoom(outcomes: &[&Outcome]) -> Self {
        let distances = outcomes.iter().flat_map(|outcome| {
            let median = outcome.summary.as_ref().map(|summary| summary.median.value);
            outcome.samples.iter().flatten().filter_map(move |sample| Some(sample / median? - 1.0))
        });
        let (min, max) =
            distances.fold((-0.05_f64, 0.05_f64), |(min, max), distance| (min.min(distance), max.max(distance)));
        let (min, max) = (min.max(ZOOM.0) * 1.1, max.min(ZOOM.1) * 1.1);
        Self { min, max, logarithmic: false, left: SPLIT.1, right: RIGHT }
    }

    fn x(&self, value: f64) -> f64 {
        let scale = |value: f64| if self.logarithmic { value.ln() } else { value };
        let share = (scale(value) - scale(self.min)) / (scale(self.max) - scale(self.min));
        self.left + share.clamp(0.0, 1.0) * (self.right - self.left)
    }

    /// Returns two to seven round values along the axis.
    fn ticks(&self) -> Vec<f64> {
        let between = |ticks: Vec<f64>| -> Vec<f64> {
            ticks.into_iter().filter(|tick| (self.min..=self.max).contains(tick)).collect()
        };
        if self.logarithmic {
            #[allow(clippy::cast_possible_truncation, reason = "a decade of a finite number is from -324 to 308")]
            let decade = |value: f64| value.log10().floor() as i32;
            let decades = decade(self.min)..=decade(self.max);
            let steps: &[f64] = match decades.clone().count() {
                ..=2 => &[1.0, 2.0, 5.0],
                3 => &[1.0, 3.0],
                _ => &[1.0],
            };
            let every = decades.clone().count().div_ceil(6);
            return between(
                decades
                    .step_by(every)
                    .flat_map(|decade| steps.iter().map(move |step| step * 10_f64.powi(decade)))
                    .collect(),
            );
        }
        let rough = (self.max - self.min) * 80.0 / (self.right - self.left);
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 2.5, 5.0, 10.0]
            .map(|step| step * power)
            .into_iter()
            .find(|step| *step >= rough)
            .unwrap_or(rough);
        let first = (self.min / step).ceil();
        between((0..6).map(|tick| (first + f64::from(tick)) * step).collect())
    }
}

/// Renders the plot, with its title as the caption.
pub fn figure(report: &Report, metric: &MetricResults) -> Markup {
    let names = report.available();
    let rows: Vec<(&str, Option<&Outcome>)> = names.iter().map(|name| (*name, metric.outcome_of(name))).collect();
    let shown: Vec<&Outcome> = rows.iter().filter_map(|(_, outcome)| *outcome).collect();
    let values: Vec<f64> = shown.iter().flat_map(|outcome| outcome.samples.iter().flatten().copied()).collect();
    let axis = Axis::of(&values);
    let zoom = axis.logarithmic.then(|| Axis::zoom(&shown));
    #[allow(clippy::cast_precision_loss, reason = "a handful")]
    let bottom = ROW * rows.len() as f64;
    let height = bottom + FOOT;
    let unit = metric.unit.symbol();
    let words = [unit, metric.better.phrase()];
    let label = words.iter().filter(|word| !word.is_empty()).copied().collect::<Vec<_>>().join(", ");
    html! {
        figure {
            figcaption { (metric.title) }
            svg.plot viewBox={ "0 0 " (WIDTH) " " (height) } role="img" aria-label={ (metric.title) " (" (label) ")" } {
                title { (metric.title) " (" (label) ")" }
                desc { (description(&rows, unit)) }
                (scale(axis, bottom, &label, tick_label))
                @if let Some(zoom) = zoom { (scale(zoom, bottom, "deviation from own median", share_label)) }
                @for (row, (name, outcome)) in rows.iter().enumerate() {
                    (strip(index_of(report, name), row, name, *outcome, (axis, zoom), unit))
                }
            }
        }
    }
}

/// Renders an axis with tick labels and grid lines.
fn scale(axis: Axis, bottom: f64, label: &str, number: fn(f64) -> String) -> Markup {
    html! {
        @for tick in axis.ticks() {
            line.grid x1=(at(axis.x(tick))) x2=(at(axis.x(tick))) y1="0" y2=(at(bottom + 4.0)) {}
            text.tick x=(at(axis.x(tick).clamp(LEFT + 6.0, RIGHT - 8.0))) y=(at(bottom + 17.0)) { (number(tick)) }
        }
        line.axis x1=(axis.left) x2=(axis.right) y1=(at(bottom)) y2=(at(bottom)) {}
        text.unit x=(axis.left) y=(at(bottom + 32.0)) { (label) }
    }
}

/// Renders one contender's row.
fn strip(
    index: usize,
    row: usize,
    name: &str,
    outcome: Option<&Outcome>,
    (axis, zoom): (Axis, Option<Axis>),
    unit: &str,
) -> Markup {
    #[allow(clippy::cast_precision_loss, reason = "a handful")]
    let top = ROW * row as f64;
    let middle = top + MIDDLE;
    let name = format::shortened(name, NAME_CHARS);
    let summary = outcome.and_then(|outcome| outcome.summary.as_ref());
    html! {
        path.(color_class(index)) d=(shape(index, LEFT + 4.0, top + 10.0)) {}
        text.name x=(LEFT + 12.0) y=(at(top + 14.0)) { (name) }
        text.value x=(RIGHT) y=(at(top + 14.0)) { (value(outcome, unit)) }
        @if let Some(outcome) = outcome { (samples(index, outcome, middle, |value| axis.x(value))) }
        @if let Some(summary) = summary { (interval(summary, middle, |value| axis.x(value))) }
        @if let (Some(zoom), Some(outcome), Some(summary)) = (zoom, outcome, summary) {
            @let x = |value: f64| zoom.x(value / summary.median.value - 1.0);
            (samples(index, outcome, middle, x))
            (interval(summary, middle, x))
        }
    }
}

/// Renders the samples of all rounds; outliers are hollow.
fn samples(index: usize, outcome: &Outcome, middle: f64, x: impl Fn(f64) -> f64) -> Markup {
    let outliers = outcome.summary.as_ref().map_or(&[][..], |summary| &summary.outliers);
    html! {
        path.dots.(color_class(index)) d=(marks(index, outcome, middle, &x, |round| !outliers.contains(&round))) {}
        @if !outliers.is_empty() {
            path.dots.out.(color_class(index)) d=(marks(index, outcome, middle, &x, |round| outliers.contains(&round))) {}
        }
    }
}

/// Renders the interval of the median as a bar below the samples, and the median as a triangle.
fn interval(summary: &Summary, middle: f64, x: impl Fn(f64) -> f64) -> Markup {
    let [low, value, high] = [summary.median.low, summary.median.value, summary.median.high].map(x);
    html! {
        path.bar d={ "M" (at(low)) " " (at(middle + 7.0)) "v3m0-1.5H" (at(high)) "m0-1.5v3" } {}
        path.median d={ "M" (at(value)) " " (at(middle + 8.5)) "l3 5h-6z" } {}
    }
}

/// Formats a tick label without trailing zeros.
fn tick_label(value: f64) -> String {
    let text = format::number(value);
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = &text[digits.len()..];
    let short = if digits.contains('.') { digits.trim_end_matches('0').trim_end_matches('.') } else { digits };
    format!("{short}{unit}")
}

/// Returns the selected samples as one path, with vertical jitter so that equal samples are visible.
fn marks(
    index: usize,
    outcome: &Outcome,
    middle: f64,
    x: impl Fn(f64) -> f64,
    is_chosen: impl Fn(u32) -> bool,
) -> String {
    let mut path = String::new();
    for (round, sample) in (0_u32..).zip(&outcome.samples) {
        if let Some(sample) = sample.filter(|_| is_chosen(round)) {
            let aside = f64::from(round * 3 % 7) - 3.0;
            path += &shape(index, x(sample), middle + aside * 1.2);
        }
    }
    path
}

/// Formats a deviation from the median: `+20%`.
fn share_label(share: f64) -> String {
    let percent = (share * 100.0).round();
    if percent == 0.0 { "0".to_owned() } else { format!("{percent:+}%") }
}

/// Returns a contender's marker at a point, as path data.
pub fn shape(index: usize, x: f64, y: f64) -> String {
    const SHAPES: [(f64, f64, &str); 8] = [
        (-2.4, 0.0, "a2.4 2.4 0 1 0 4.8 0a2.4 2.4 0 1 0-4.8 0z"),
        (-2.2, -2.2, "h4.4v4.4h-4.4z"),
        (0.0, -2.8, "l2.7 4.8h-5.4z"),
        (0.0, -3.1, "l2.9 3.1-2.9 3.1-2.9-3.1z"),
        (0.0, 2.8, "l2.7-4.8h-5.4z"),
        (-0.9, -2.9, "h1.8v2h2v1.8h-2v2h-1.8v-2h-2v-1.8h2z"),
        (-2.8, 0.0, "l4.8 2.7v-5.4z"),
        (2.8, 0.0, "l-4.8 2.7v-5.4z"),
    ];
    let (dx, dy, path) = SHAPES.get(index % SHAPES.len()).copied().unwrap_or(SHAPES[0]);
    format!("M{} {}{path}", at(x + dx), at(y + dy))
}

/// Formats the value at the end of a contender's row.
fn value(outcome: Option<&Outcome>, unit: &str) -> String {
    let Some(outcome) = outcome else { return "not measured".to_owned() };
    let failed =
        if outcome.failures.is_empty() { String::new() } else { format!("{} failed; ", outcome.failures.len()) };
    match (&outcome.skipped, &outcome.summary, outcome.samples.iter().flatten().next()) {
        (Some(_), ..) => "skipped".to_owned(),
        (_, Some(summary), _) => format!("{failed}{} {unit}", format::number(summary.median.value)),
        (_, _, Some(only)) => format!("{failed}{} {unit}, one sample", format::number(*only)),
        _ if outcome.failures.is_empty() => "not measured".to_owned(),
        _ => "failed".to_owned(),
    }
}

/// Describes the plot in words, for screen readers.
fn description(rows: &[(&str, Option<&Outcome>)], unit: &str) -> String {
    let mut words = String::new();
    for (name, outcome) in rows {
        let _ = write!(words, "{name}: {}", value(*outcome, unit).trim_end());
        if let Some(summary) = outcome.and_then(|outcome| outcome.summary.as_ref()) {
            let Summary { median, min, max, .. } = summary;
            let [low, high, min, max] = [median.low, median.high, *min, *max].map(format::number);
            let _ = write!(words, " ({low} to {high}), range {min} to {max}");
        }
        words += ". ";
    }
    words
}

/// Formats a coordinate. A tenth of a unit is below the resolution of a screen.
fn at(coordinate: f64) -> String {
    let text = format!("{coordinate:.1}");
    text.strip_suffix(".0").map_or_else(|| text.clone(), str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::example;

    #[test]
    fn an_axis_fits_its_values() {
        let wide = Axis::of(&[1.7, 52.0, 260.0]);
        assert!(wide.logarithmic);
        assert_eq!(wide.ticks(), [3.0, 10.0, 30.0, 100.0]);
        assert_eq!(wide.right, SPLIT.0);
        let zoom = Axis::of(&[95.0, 100.0, 105.0]);
        assert!(!zoom.logarithmic && zoom.min > 90.0, "{zoom:?}");
        assert_eq!(zoom.ticks(), [95.0, 100.0, 105.0]);
        let from_zero = Axis::of(&[10.0, 40.0]);
        assert_eq!((from_zero.min, from_zero.logarithmic), (0.0, false));
        for values in [
            &[5.0, 5.0][..],
            &[0.0, 0.0],
            &[],
            &[1e-300, 1e300],
            &[-1e308, 1e308],
            &[1.0, f64::MAX],
            &[0.0, 9.0],
            &[-1.0, 1.0],
            &[1e-320, 1e-320],
        ] {
            let axis = Axis::of(values);
            assert!(axis.ticks().len() <= 7, "{values:?}: {:?}", axis.ticks());
            for value in values {
                assert!((LEFT..=RIGHT).contains(&axis.x(*value)), "{values:?}: {axis:?}");
            }
        }
    }

    #[test]
    fn ticks_are_round() {
        assert_eq!([0.05, 3.0, 10.0, 100.0, 1e4, 2.5e6].map(tick_label), ["0.05", "3", "10", "100", "10k", "2.5M"]);
    }

    #[test]
    fn every_sample_is_a_mark() {
        let report = example::report();
        let metric = &report.metrics[0];
        let drawn = figure(&report, metric).into_string();
        let samples = metric.results.iter().flat_map(|outcome| outcome.samples.iter().flatten()).count();
        let marks = |drawn: &str| -> usize {
            let of_samples = drawn.split("class=\"dots").skip(1).map(|path| path.split("></path>").next().unwrap());
            of_samples.map(|path| path.matches('M').count()).sum()
        };
        // Once on the main axis, once on the zoomed one.
        assert_eq!(marks(&drawn), 2 * samples, "{drawn}");
    }

    #[test]
    fn a_chart_has_a_text_alternative() {
        let report = example::report();
        let fork = report.metrics.iter().find(|metric| metric.name == "fork").unwrap();
        let drawn = figure(&report, fork).into_string();
        assert!(drawn.contains("qemu-microvm: failed. "), "{drawn}");
        assert!(drawn.contains("<title>Process, from fork to exit (µs, lower is better)</title>"), "{drawn}");
        assert!(drawn.contains("<desc>host: 6"), "{drawn}");
    }
}
