//! The page's tables: what is missing, ratios, and all numbers.

use maud::{Markup, html};

use super::super::result::{Measured, Outcome, Report};
use super::super::scenario::Better;
use super::super::text;
use super::super::verdict::{Judgement, judge, margin};
use super::{badge, download};

/// Which of two is better, in words.
pub fn better(better: Better) -> &'static str {
    match better {
        Better::Lower => "less is better",
        Better::Higher => "more is better",
    }
}

/// A table in a box of its own, which scrolls where the page is too narrow; also by keys.
fn scrolled(label: &str, table: &Markup) -> Markup {
    html! { div.scroll role="region" aria-label=(label) tabindex="0" { (table) } }
}

/// What failed, what was skipped, who is absent.
pub fn missing(report: &Report) -> Markup {
    let with_failures = |outcome: &&Outcome| !outcome.failures.is_empty();
    let failures: Vec<(&Measured, &Outcome)> = report
        .measures
        .iter()
        .flat_map(|measure| measure.results.iter().filter(with_failures).map(move |outcome| (measure, outcome)))
        .collect();
    let absent: Vec<_> =
        report.contenders.iter().filter_map(|contender| Some((&contender.name, contender.absent.as_ref()?))).collect();
    let skipped = text::skipped(report);
    html! {
        section #missing aria-labelledby="missing-title" {
            h2 #missing-title { "What is missing" }
            @if failures.is_empty() && absent.is_empty() && skipped.is_empty() {
                p { "Nothing: everyone who was looked for took part, and no run failed." }
            }
            @if !failures.is_empty() {
                h3 { "Failed runs" }
                p { "A failed run gives no number." }
                @for (measure, outcome) in failures {
                    details {
                        summary { (outcome.contender) ", " (measure.title) ": " (text::count(outcome.failures.len(), "failed run")) }
                        ul { @for failure in &outcome.failures { li { code { (failure) } } } }
                    }
                }
            }
            @if !skipped.is_empty() {
                h3 { "Not measured" }
                ul { @for (who, titles) in skipped { li { (who) ": " (titles.join("; ")) } } }
            }
            @if !absent.is_empty() {
                h3 { "Absent" }
                ul {
                    @for (name, absent) in absent {
                        li {
                            (name) ": " (absent.why)
                            @if let Some(install) = &absent.install { "; to have it: " code { (install) } }
                        }
                    }
                }
            }
        }
    }
}

/// Everyone in proportion to the baseline.
pub fn ratios(report: &Report) -> Markup {
    let names = text::present(report);
    let table = html! {
        table.ratios {
            caption { "Ratios to " (report.method.baseline) ", with their intervals" }
            thead {
                tr {
                    th scope="col" { "Measure" }
                    @for name in &names { th scope="col" { (badge(report, name)) " " (name) } }
                }
            }
            @for (scenario, measures) in text::groups(report) {
                tbody {
                    tr.group { th scope="rowgroup" colspan=(names.len() + 1) { span { (text::scenario(scenario)) } } }
                    @for measure in measures {
                        tr {
                            th scope="row" { (measure.title) " " small { (better(measure.better)) } }
                            @for name in &names { (ratio_cell(report, measure, name)) }
                        }
                    }
                }
            }
        }
    };
    html! {
        section #ratios aria-labelledby="ratios-title" {
            h2 #ratios-title { "Ratios" }
            p {
                "Each number is a contender’s value in proportion to " strong { (report.method.baseline) } "’s, round by round. "
                span.key.b2 { "▲ better" } " " span.key.w2 { "▼ worse" } " " span.key { "≈ no difference beyond the noise" }
            }
            (scrolled("Ratios", &table))
        }
    }
}

fn ratio_cell(report: &Report, measure: &Measured, name: &str) -> Markup {
    let outcome = text::outcome_of(measure, name);
    let Some(ratio) = outcome.and_then(|outcome| outcome.ratio) else {
        let why = match outcome {
            Some(Outcome { skipped: Some(_), .. }) => "skipped",
            Some(outcome) if !outcome.failures.is_empty() => "failed",
            _ => "–",
        };
        return html! { td.none { (why) } };
    };
    if name == report.method.baseline {
        return html! { td { "1" } };
    }
    let (sign, word) = match judge(&ratio, measure.better, margin(report.noise.verdict, report.noise.spread)) {
        Judgement::Better => ("▲", "better"),
        Judgement::Worse => ("▼", "worse"),
        Judgement::Open => ("≈", "no difference beyond the noise"),
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
            span.sign aria-hidden="true" { (sign) } " " strong { (text::ratio(ratio.value)) } span.spoken { " times, " (word) }
            " " small { (text::ratio_interval(&ratio)) }
        }
    }
}

/// All that was measured, as numbers.
pub fn numbers(report: &Report) -> Markup {
    let table = html! {
        table.numbers {
            caption { "Medians with their intervals, extremes, and runs" }
            thead {
                tr {
                    @for title in ["Measure", "Contender"] { th scope="col" { (title) } }
                    @for title in ["Median", "From", "To", "Least", "Greatest", "Runs", "Failed", "Outliers"] {
                        th.number scope="col" { (title) }
                    }
                    th scope="col" { "Unit" }
                }
            }
            @for measure in &report.measures {
                tbody { @for (row, outcome) in measure.results.iter().enumerate() { (number_row(measure, outcome, row == 0)) } }
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

fn number_row(measure: &Measured, outcome: &Outcome, is_first: bool) -> Markup {
    let succeeded = outcome.samples.iter().flatten().count();
    let only = outcome.samples.iter().flatten().next().copied();
    html! {
        tr {
            @if is_first { th scope="rowgroup" rowspan=(measure.results.len()) { (measure.title) } }
            th scope="row" { (outcome.contender) }
            @if let Some(summary) = &outcome.summary {
                @for value in [summary.median.value, summary.median.low, summary.median.high, summary.least, summary.greatest] {
                    td { (text::number(value)) }
                }
            } @else if let Some(only) = only {
                td { (text::number(only)) }
                td.none colspan="4" { "one run has no interval" }
            } @else {
                td.none colspan="5" { @if outcome.skipped.is_some() { "skipped" } @else { "failed" } }
            }
            td { (succeeded) }
            td { (outcome.failures.len()) }
            td { (outcome.summary.as_ref().map_or(0, |summary| summary.outliers.len())) }
            td.unit { (measure.unit.symbol()) }
        }
    }
}
