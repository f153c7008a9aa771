//! The tables of the page: missing results, medians with ratios, and all numbers.

use maud::{Markup, html};

use super::super::format;
use super::super::report::{MetricResults, Outcome, Report};
use super::super::verdict::{Judgment, judge, margin};
use super::{badge, download};

/// Wraps a wide table in a box that scrolls, also by keyboard.
fn scrolled(label: &str, table: &Markup) -> Markup {
    html! { div.scroll role="region" aria-label=(label) tabindex="0" { (table) } }
}

/// Renders failed, skipped and unavailable contenders.
pub fn missing(report: &Report) -> Markup {
    let with_failures = |outcome: &&Outcome| !outcome.failures.is_empty();
    let failures: Vec<(&MetricResults, &Outcome)> = report
        .metrics
        .iter()
        .flat_map(|metric| metric.results.iter().filter(with_failures).map(move |outcome| (metric, outcome)))
        .collect();
    let unavailable: Vec<_> = report
        .contenders
        .iter()
        .filter_map(|contender| Some((&contender.name, contender.unavailable.as_ref()?)))
        .collect();
    let skipped = report.skipped();
    html! {
        section #missing aria-labelledby="missing-title" {
            h2 #missing-title { "Missing results" }
            @if failures.is_empty() && unavailable.is_empty() && skipped.is_empty() {
                p { "Nothing: all contenders took part, and no round failed." }
            }
            @if !failures.is_empty() {
                h3 { "Failed rounds" }
                p { "A failed round yields no sample." }
                @for (metric, outcome) in failures {
                    details {
                        summary { (outcome.contender) ", " (metric.title) ": " (format::count(outcome.failures.len(), "failed round")) }
                        ul { @for failure in &outcome.failures { li { code { (failure) } } } }
                    }
                }
            }
            @if !skipped.is_empty() {
                h3 { "Skipped" }
                ul { @for (contender, titles) in skipped { li { (contender) ": " (titles.join("; ")) } } }
            }
            @if !unavailable.is_empty() {
                h3 { "Unavailable" }
                ul {
                    @for (name, unavailable) in unavailable {
                        li {
                            (name) ": " (unavailable.reason)
                            @if let Some(install) = &unavailable.install { "; to install: " code { (install) } }
                        }
                    }
                }
            }
        }
    }
}

/// Renders the medians, each with its ratio to the baseline.
pub fn results(report: &Report) -> Markup {
    let names = report.available();
    let table = html! {
        table.results {
            caption { "Medians, and ratios to " (report.method.baseline) " with confidence intervals" }
            thead {
                tr {
                    th scope="col" { "Measure" }
                    @for name in &names { th scope="col" { (badge(report, name)) " " (name) } }
                }
            }
            @for (scenario, metrics) in report.groups() {
                tbody {
                    tr.group { th scope="rowgroup" colspan=(names.len() + 1) { span { (format::scenario(scenario)) } } }
                    @for metric in metrics {
                        tr {
                            th scope="row" { (metric.title) " " small { (metric.direction()) } }
                            @for name in &names { (result_cell(report, metric, name)) }
                        }
                    }
                }
            }
        }
    };
    html! {
        section #results aria-labelledby="results-title" {
            h2 #results-title { "Medians and ratios" }
            p {
                "The median of each contender, and its ratio to that of " strong { (report.method.baseline) } ", paired by round. "
                span.key.b2 { "▲ better" } " " span.key.w2 { "▼ worse" } " " span.key { "≈ no difference beyond the noise" }
            }
            (scrolled("Medians and ratios", &table))
        }
    }
}

fn result_cell(report: &Report, metric: &MetricResults, name: &str) -> Markup {
    let outcome = metric.outcome_of(name);
    let Some(median) = outcome.and_then(central) else {
        let reason = match outcome {
            Some(Outcome { skipped: Some(_), .. }) => "skipped",
            Some(outcome) if !outcome.failures.is_empty() => "failed",
            _ => "–",
        };
        return html! { td.none { (reason) } };
    };
    let median = html! { strong { (format::number(median)) } };
    let Some(ratio) = outcome.and_then(|outcome| outcome.ratio) else { return html! { td { (median) } } };
    if name == report.method.baseline {
        return html! { td { (median) " " small { "1" } } };
    }
    let (sign, word) = match judge(&ratio, metric.better, margin(report.noise.verdict, report.noise.spread)) {
        Judgment::Better => ("▲", "better"),
        Judgment::Worse => ("▼", "worse"),
        Judgment::Inconclusive => ("≈", "no difference beyond the noise"),
    };
    let heat = match (word, ratio.value.max(1.0 / ratio.value)) {
        ("better", ..1.25) => "b1",
        ("better", ..2.5) => "b2",
        ("better", _) => "b3",
        ("worse", ..1.25) => "w1",
        ("worse", ..2.5) => "w2",
        ("worse", _) => "w3",
        _ => "",
    };
    html! {
        td.(heat) {
            (median) " "
            small {
                span.sign aria-hidden="true" { (sign) } " " (format::ratio(ratio.value)) span.spoken { " times, " (word) ", " }
                " (" (format::ratio_interval(&ratio)) ")"
            }
        }
    }
}

/// Returns the median, or the only sample.
fn central(outcome: &Outcome) -> Option<f64> {
    let median = outcome.summary.as_ref().map(|summary| summary.median.value);
    median.or_else(|| outcome.samples.iter().flatten().next().copied())
}

/// Renders all results as numbers.
pub fn numbers(report: &Report) -> Markup {
    let table = html! {
        table.numbers {
            caption { "Medians with confidence intervals, ranges and numbers of rounds" }
            thead {
                tr {
                    @for title in ["Measure", "Contender"] { th scope="col" { (title) } }
                    @for title in ["Median", "Low", "High", "Min", "Max", "Rounds", "Failed", "Outliers"] {
                        th.number scope="col" { (title) }
                    }
                    th scope="col" { "Unit" }
                }
            }
            @for metric in &report.metrics {
                tbody { @for (row, outcome) in metric.results.iter().enumerate() { (number_row(metric, outcome, row == 0)) } }
            }
        }
    };
    html! {
        section #numbers aria-labelledby="numbers-title" {
            h2 #numbers-title { "Numbers" }
            (download(report))
            details {
                summary { "All numbers as a table" }
                (scrolled("Numbers", &table))
            }
        }
    }
}

fn number_row(metric: &MetricResults, outcome: &Outcome, is_first: bool) -> Markup {
    let succeeded = outcome.samples.iter().flatten().count();
    let only = outcome.samples.iter().flatten().next().copied();
    html! {
        tr {
            @if is_first { th scope="rowgroup" rowspan=(metric.results.len()) { (metric.title) } }
            th scope="row" { (outcome.contender) }
            @if let Some(summary) = &outcome.summary {
                @for value in [summary.median.value, summary.median.low, summary.median.high, summary.min, summary.max] {
                    td { (format::number(value)) }
                }
            } @else if let Some(only) = only {
                td { (format::number(only)) }
                td.none colspan="4" { "no interval of one sample" }
            } @else {
                td.none colspan="5" { @if outcome.skipped.is_some() { "skipped" } @else { "failed" } }
            }
            td { (succeeded) }
            td { (outcome.failures.len()) }
            td { (outcome.summary.as_ref().map_or(0, |summary| summary.outliers.len())) }
            td.unit { (metric.unit.symbol()) }
        }
    }
}
