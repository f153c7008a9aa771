//! Parses an untrusted report of `husk bench` and renders everything that is made from one.
//!
//! Covers: bench/compare.rs bench/table.rs bench/verdict.rs bench/page
#![no_main]

use husk::bench::{compare, example, page, report::Report, statistics, table, verdict};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

#[derive(Debug, Arbitrary)]
struct Foreign {
    text: String,
    names: Vec<String>,
    samples: Vec<Vec<Option<f64>>>,
    noise_ms: Vec<f64>,
    spread: f64,
    confidence: f64,
    width: u8,
}

fuzz_target!(|foreign: Foreign| {
    let _ = compare::parse(&foreign.text);
    let new = small();
    let Ok(text) = serde_json::to_string(&filled(&foreign)) else { return };
    let Ok(mut old) = compare::parse(&text) else { return };
    if let Ok(comparison) = compare::compare(&old, &new) {
        let shown = comparison.table(usize::from(foreign.width));
        assert!(!shown.chars().any(|c| c.is_control() && c != '\n'));
    }
    let _ = compare::compare(&new, &old);
    statistics::summarize(&mut old);
    old.verdict = verdict::sentences(&old);
    assert!(!table::table(&old, usize::from(foreign.width)).chars().any(|c| c.is_control() && c != '\n'));
    let page = page::page(&old);
    assert!(!page.contains("<script"));
});

/// A report with one metric, so that an execution is fast.
fn small() -> Report {
    let mut report = example::report();
    report.metrics.truncate(1);
    report
}

/// A report with as many of the foreign names and numbers as fit.
fn filled(foreign: &Foreign) -> Report {
    let mut report = small();
    for (contender, name) in report.contenders.iter_mut().zip(&foreign.names) {
        contender.name.clone_from(name);
    }
    for metric in &mut report.metrics {
        for (outcome, name) in metric.results.iter_mut().zip(&foreign.names) {
            outcome.contender.clone_from(name);
        }
        for (outcome, samples) in metric.results.iter_mut().zip(&foreign.samples) {
            outcome.samples.clone_from(samples);
        }
    }
    report.noise.samples_ms.clone_from(&foreign.noise_ms);
    report.noise.spread = foreign.spread;
    report.method.confidence = foreign.confidence;
    report
}
