//! Formats a report for a terminal: whether the host is emulated, contenders side by side, in several blocks if the
//! terminal is narrow, then versions, missing results and the verdict.

use super::report::{ContenderInfo, MetricResults, NoiseLevel, Outcome, Report};
use super::{format, verdict};

/// The default width.
pub const WIDTH: usize = 100;
/// The width of row labels.
const LABEL: usize = 16;
/// The width of a contender's column.
const COLUMN: usize = 14;

/// Formats the table with at most `width` columns, and at least one contender per block.
pub fn table(report: &Report, width: usize) -> String {
    let present = report.available();
    let columns = (width.saturating_sub(LABEL) / COLUMN).max(1);
    let mut lines = Vec::new();
    let warning = verdict::emulation(report);
    if let Some(warning) = &warning {
        lines.extend(format::wrapped("", warning, width));
        lines.push(String::new());
    }
    for block in present.chunks(columns) {
        lines.extend(heading(block));
        for (scenario, metrics) in report.groups() {
            lines.push(String::new());
            lines.push(format::scenario(scenario).to_uppercase());
            lines.extend(metrics.iter().flat_map(|metric| rows(metric, block, &report.method.baseline)));
        }
        lines.push(String::new());
    }
    lines.extend(format::wrapped("", &legend(report), width));
    lines.extend(format::wrapped("", &versions(report), width));
    lines.extend(missing(report, width));
    lines.push(String::new());
    for sentence in report.verdict.iter().filter(|sentence| Some(*sentence) != warning.as_ref()) {
        lines.extend(format::wrapped("", sentence, width));
    }
    lines.iter().fold(String::new(), |text, line| text + line.trim_end() + "\n")
}

/// Formats the contenders' names, wrapped to the width of a column.
fn heading(block: &[&str]) -> Vec<String> {
    let names: Vec<Vec<String>> = block.iter().map(|name| broken(name, COLUMN - 2)).collect();
    let deepest = names.iter().map(Vec::len).max().unwrap_or_default();
    let line = |row: usize| {
        let cells = names.iter().map(|name| {
            let above = deepest - name.len();
            row.checked_sub(above).and_then(|row| name.get(row)).cloned().unwrap_or_default()
        });
        joined("", cells)
    };
    (0..deepest).map(line).collect()
}

/// Formats a metric: title, medians and ratios.
fn rows(metric: &MetricResults, block: &[&str], baseline: &str) -> [String; 3] {
    let outcomes: Vec<Option<&Outcome>> = block.iter().map(|name| metric.outcome_of(name)).collect();
    let ratio_label = format!("  × {}", format::shortened(baseline, LABEL - 5));
    [
        format!("{} ({})", metric.title, metric.direction()),
        joined("  median", outcomes.iter().map(|outcome| median_cell(*outcome))),
        joined(&ratio_label, outcomes.iter().map(|outcome| ratio_cell(*outcome))),
    ]
}

/// Formats the median with its uncertainty, `!` if rounds failed; a single sample; or why there is none.
fn median_cell(outcome: Option<&Outcome>) -> String {
    let Some(outcome) = outcome else { return "-".to_owned() };
    if outcome.skipped.is_some() {
        return "skipped".to_owned();
    }
    let mark = if outcome.failures.is_empty() { "" } else { "!" };
    match (&outcome.summary, outcome.samples.iter().flatten().next()) {
        (Some(summary), _) => {
            let off = format::plus_minus(&summary.median);
            format!("{}{mark} ±{}", format::number(summary.median.value), shorter(&format::number(off)))
        }
        (None, Some(only)) => format!("{}{mark}", format::number(*only)),
        (None, None) if outcome.failures.is_empty() => "-".to_owned(),
        (None, None) => "FAILED".to_owned(),
    }
}

fn ratio_cell(outcome: Option<&Outcome>) -> String {
    match outcome.and_then(|outcome| outcome.ratio) {
        Some(ratio) if ratio.low == ratio.high => format::ratio(ratio.value),
        Some(ratio) => format!("{} {}", format::ratio(ratio.value), brief(&ratio)),
        None => String::new(),
    }
}

/// Formats an interval in the remaining width of a column.
fn brief(ratio: &super::report::Estimate) -> String {
    let interval = format::ratio_interval(ratio);
    if format::ratio(ratio.value).chars().count() + 1 + interval.chars().count() < COLUMN {
        return interval;
    }
    format!("±{}", shorter(&format::ratio(format::plus_minus(ratio))))
}

/// Shortens an uncertainty to one or two digits: `0.05` instead of `0.051`, `1.2` instead of `1.23`.
fn shorter(number: &str) -> String {
    match number.split_once('.') {
        Some((whole, part)) if part.chars().all(|c| c.is_ascii_digit()) => {
            let zeros = part.chars().take_while(|c| *c == '0').count();
            let digits = if whole == "0" { zeros + 1 } else { 1 };
            format!("{whole}.{}", part.chars().take(digits).collect::<String>())
        }
        _ => number.to_owned(),
    }
}

fn joined(label: &str, cells: impl Iterator<Item = String>) -> String {
    cells.fold(format!("{label:<LABEL$}"), |line, cell| line + &format!("{cell:>COLUMN$}"))
}

fn legend(report: &Report) -> String {
    let noise = &report.noise;
    let method = &report.method;
    let steady = match noise.verdict {
        NoiseLevel::Quiet => "quiet",
        NoiseLevel::Noisy => "noisy",
        NoiseLevel::TooNoisy => "too noisy for conclusions",
    };
    format!(
        "Medians with {} confidence intervals; × {}: ratios to the baseline, paired by round. !: some rounds failed. \
         The host was {steady}: the reference work varied by {}, and steal time was {}.",
        format::percent(method.confidence),
        method.baseline,
        format::percent(noise.spread),
        format::percent(noise.stolen)
    )
}

/// Lists the versions of available contenders.
fn versions(report: &Report) -> String {
    let version = |one: &ContenderInfo| one.version.as_ref().map(|version| format!("{} {version}", one.name));
    let versions: Vec<String> = report.contenders.iter().filter_map(version).collect();
    if versions.is_empty() { String::new() } else { format!("Versions: {}.", versions.join(", ")) }
}

/// Lists failed, skipped and unavailable contenders with reasons.
fn missing(report: &Report, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for metric in &report.metrics {
        for outcome in &metric.results {
            if let Some(first) = outcome.failures.first() {
                let runs = format::count(outcome.failures.len(), "failed round");
                let line = format!("{}, “{}”: {runs}; first: {first}", outcome.contender, metric.title);
                lines.extend(format::wrapped("failed       ", &line, width));
            }
        }
    }
    for (contender, titles) in report.skipped() {
        lines.extend(format::wrapped("skipped      ", &format!("{contender} (“{}”)", titles.join("”, “")), width));
    }
    lines.extend(report.contenders.iter().flat_map(|contender| unavailable(contender, width)));
    if !lines.is_empty() {
        lines.insert(0, String::new());
    }
    lines
}

/// Formats why a contender is unavailable and how to install it; empty if it is available.
fn unavailable(contender: &ContenderInfo, width: usize) -> Vec<String> {
    let Some(unavailable) = &contender.unavailable else { return Vec::new() };
    let install = unavailable.install.as_ref().map(|install| format!("; to install: {install}")).unwrap_or_default();
    format::wrapped("unavailable  ", &format!("{}: {}{install}", contender.name, unavailable.reason), width)
}

/// Lists all known contenders: available ones with version and notes, then unavailable ones.
pub fn contenders(all: &[ContenderInfo], width: usize) -> String {
    let mut lines = Vec::new();
    for contender in all.iter().filter(|contender| contender.unavailable.is_none()) {
        let version = contender.version.as_deref().unwrap_or_default();
        lines.extend(format::wrapped("available    ", &format!("{}: {version}", contender.name), width));
        lines.extend(contender.notes.iter().flat_map(|note| format::wrapped("               ", note, width)));
    }
    lines.extend(all.iter().flat_map(|contender| unavailable(contender, width)));
    lines.join("\n") + "\n"
}

/// Splits a name into pieces of at most `width` characters, preferably between words or after a hyphen.
fn broken(name: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for line in format::wrapped("", name, width) {
        let mut rest: Vec<char> = line.chars().collect();
        while rest.len() > width {
            let after_hyphen = rest.iter().take(width).rposition(|c| *c == '-').map(|at| at + 1);
            lines.push(rest.drain(..after_hyphen.unwrap_or(width)).collect());
        }
        lines.push(rest.into_iter().collect());
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::example;
    use crate::bench::statistics::summarize;

    fn widest(table: &str) -> usize {
        table.lines().map(|line| line.chars().count()).max().unwrap()
    }

    #[test]
    fn six_contenders_fit_one_block() {
        let mut report = example::report();
        report.contenders.retain(|contender| !contender.name.contains("<b"));
        let table = table(&report, WIDTH);
        assert!(widest(&table) <= WIDTH, "{table}");
        assert_eq!(table.matches("PROCESSOR").count(), 1, "{table}");
    }

    #[test]
    fn more_contenders_or_narrower_lines_need_more_blocks() {
        let report = example::report();
        for (width, blocks) in [(WIDTH, 2), (60, 3), (30, 7), (1, 7)] {
            let table = table(&report, width);
            assert_eq!(table.matches("PROCESSOR").count(), blocks, "{width}: {table}");
        }
        // No title with its unit, and no word, is longer than 60 columns.
        let narrow = table(&report, 75);
        assert!(widest(&narrow) <= 75, "{narrow}");
    }

    #[test]
    fn a_long_name_is_broken_after_a_hyphen() {
        assert_eq!(broken("cloud-hypervisor", 12), ["cloud-", "hypervisor"]);
        assert_eq!(broken("qemu-microvm", 12), ["qemu-microvm"]);
        assert_eq!(broken("cloudhypervisor", 12), ["cloudhypervi", "sor"]);
    }

    #[test]
    fn medians_are_shown_with_intervals_and_ratios() {
        let mut report = example::report();
        report.contenders.retain(|contender| ["crun", "husk"].contains(&contender.name.as_str()));
        for (name, times) in [("crun", [10.0, 10.5, 11.0]), ("husk", [20.0, 21.0, 22.0])] {
            let outcome = report.metrics[0].results.iter_mut().find(|outcome| outcome.contender == name).unwrap();
            outcome.samples = times.map(Some).to_vec();
        }
        summarize(&mut report);
        let table = table(&report, WIDTH);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(
            lines[..6],
            [
                "                          crun          husk",
                "",
                "START",
                "Start to first output, caches warm (ms, lower is better)",
                "  median             10.5 ±0.5     21.0 ±1.0",
                "  × crun                  1.00          2.00",
            ]
        );
    }

    #[test]
    fn an_emulated_host_is_the_first_line() {
        let mut report = example::report();
        report.host.emulator = Some("Bochs".to_owned());
        report.verdict = verdict::sentences(&report);
        let table = table(&report, WIDTH);
        assert!(table.starts_with("Emulated host (Bochs): only ratios are meaningful"), "{table}");
        assert_eq!(table.matches("Emulated host").count(), 1, "{table}");
        assert!(table.contains("Versions: host 1.2.3-4+deb13u1, crun 1.2.3"), "{table}");
    }

    #[test]
    fn missing_results_are_listed_with_a_reason() {
        let table = table(&example::report(), 400);
        for line in [
            "failed       qemu-microvm, “Process, from fork to exit”: 20 failed rounds; first: round 0: exit code 137 <killed> & no mark came",
            "unavailable  bubblewrap: there is no bwrap on the path; to install: apt-get install bubblewrap",
            "unavailable  firecracker: there is no firecracker on the path",
        ] {
            assert!(table.lines().any(|is| is == line), "{line}: {table}");
        }
        assert!(
            table.contains("skipped      host: the host has no instances (“Idle instances in the budget”, “"),
            "{table}"
        );
        assert!(table.contains("FAILED"));
        assert!(table.contains("The host was quiet: the reference work varied by"));
        assert!(table.contains(&example::report().verdict[1]));
    }

    #[test]
    fn one_sample_is_shown_by_itself() {
        let mut report = example::report();
        let density = report.metrics.iter_mut().find(|metric| metric.name == "density-instances").unwrap();
        for outcome in &mut density.results {
            outcome.samples.truncate(1);
        }
        summarize(&mut report);
        let outcome =
            report.metrics.iter().find(|metric| metric.name == "density-instances").unwrap().results[5].clone();
        assert_eq!(median_cell(Some(&outcome)), format::number(outcome.samples[0].unwrap()));
    }

    #[test]
    fn names_are_sanitized_for_the_terminal() {
        let mut report = example::report();
        report.contenders[1].name = "\u{1b}[2Jcrun\r\n".to_owned();
        assert!(!table(&report, WIDTH).chars().any(|c| c.is_control() && c != '\n'));
    }
}
