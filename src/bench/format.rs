//! Formats numbers for people, with three significant digits.

use super::report::Estimate;
use super::scenario::{Scenario, Unit};

/// Formats a number in at most six characters, from a thousandth to a trillion.
pub fn number(value: f64) -> String {
    let magnitude = value.abs();
    match magnitude {
        _ if magnitude >= 999.5e9 => format!("{value:.0e}"),
        _ if magnitude >= 999_500_000.0 => format!("{}G", three_digits(value / 1e9)),
        _ if magnitude >= 999_500.0 => format!("{}M", three_digits(value / 1e6)),
        _ if magnitude >= 9_999.5 => format!("{}k", three_digits(value / 1e3)),
        _ => three_digits(value),
    }
}

/// Formats a number with its unit: `13.2 ms`, `577/s`.
pub fn quantity(value: f64, unit: Unit) -> String {
    let space = if matches!(unit, Unit::PerSecond | Unit::Count) { "" } else { " " };
    format!("{}{space}{}", number(value), unit.symbol())
}

fn three_digits(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_owned(),
        magnitude if magnitude >= 99.95 => format!("{value:.0}"),
        magnitude if magnitude >= 9.995 => format!("{value:.1}"),
        magnitude if magnitude >= 0.9995 => format!("{value:.2}"),
        magnitude if magnitude >= 0.000_5 => format!("{value:.3}"),
        _ => format!("{value:.0e}"),
    }
}

/// Formats a ratio, with two decimals near 1: `1.32`, `0.081`, `12.6`.
pub fn ratio(value: f64) -> String {
    match value.abs() {
        magnitude if magnitude >= 99.5 => number(value),
        magnitude if magnitude >= 9.95 => format!("{value:.1}"),
        magnitude if magnitude >= 0.1995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// Formats the interval of a ratio: `1.21–1.43`.
pub fn ratio_interval(estimate: &Estimate) -> String {
    format!("{}–{}", ratio(estimate.low), ratio(estimate.high))
}

/// Formats a fraction as a percentage: `3.2%`.
pub fn percent(share: f64) -> String {
    let percent = share * 100.0;
    if percent.abs() >= 9.95 { format!("{percent:.0}%") } else { format!("{percent:.1}%") }
}

/// Returns the larger distance of the interval's ends from the value.
pub fn plus_minus(estimate: &Estimate) -> f64 {
    (estimate.high - estimate.value).max(estimate.value - estimate.low)
}

/// Formats a command line with shell quoting.
pub fn command_line(words: &[String]) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=/.,:@%+".contains(c);
    let quoted = words.iter().map(|word| {
        if !word.is_empty() && word.chars().all(is_plain) {
            word.clone()
        } else {
            format!("'{}'", word.replace('\'', "'\\''"))
        }
    });
    quoted.collect::<Vec<_>>().join(" ")
}

/// `1 run`, `2 runs`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// `a`, `a and b`, `a, b and c`.
pub fn list(words: &[String]) -> String {
    match words {
        [] => String::new(),
        [word] => word.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}

/// Returns the heading of a scenario.
pub const fn scenario(scenario: Scenario) -> &'static str {
    match scenario {
        Scenario::Start => "Start",
        Scenario::Memory => "Memory",
        Scenario::Density => "Density",
        Scenario::Cpu => "Processor",
        Scenario::MemoryBandwidth => "Memory bandwidth",
        Scenario::Syscall => "System calls",
        Scenario::Fork => "Processes",
        Scenario::Exec => "Programs",
        Scenario::ContextSwitch => "Context switches",
        Scenario::Disk => "Disks",
        Scenario::Network => "Network",
        Scenario::Isolation => "Isolation",
        Scenario::Command => "Command",
    }
}

/// Wraps text, with a label on the first line and matching indentation on the others. Control characters are dropped,
/// since the text may be untrusted.
pub fn wrapped(label: &str, text: &str, width: usize) -> Vec<String> {
    let indent = label.chars().count();
    let text: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            Some(_) => lines.push(" ".repeat(indent) + word),
            None => lines.push(label.to_owned() + word),
        }
    }
    lines
}

/// Truncates a name to `width` characters.
pub fn shortened(name: &str, width: usize) -> String {
    if name.chars().count() <= width {
        return name.to_owned();
    }
    name.chars().take(width - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits() {
        let cases = [
            (0.0, "0"),
            (0.1234, "0.123"),
            (0.000_01, "1e-5"),
            (1.0, "1.00"),
            (9.996, "10.0"),
            (45.26, "45.3"),
            (999.6, "1000"),
            (9_999.4, "9999"),
            (12_345.0, "12.3k"),
            (999_600.0, "1.00M"),
            (2_345_678.0, "2.35M"),
            (2e15, "2e15"),
            (-45.26, "-45.3"),
        ];
        for (value, text) in cases {
            assert_eq!(number(value), text);
        }
        let quantities =
            [(13.2, Unit::Milliseconds, "13.2 ms"), (577.0, Unit::PerSecond, "577/s"), (7.0, Unit::Count, "7.00")];
        for (value, unit, text) in quantities {
            assert_eq!(quantity(value, unit), text);
        }
        assert_eq!([1.3219, 0.0811, 0.1024, 12.6, 0.31].map(ratio), ["1.32", "0.081", "0.102", "12.6", "0.31"]);
    }

    #[test]
    fn quoted_words_are_parsed_back_by_a_shell() {
        let words = ["husk", "bench", "", "a b", "it's", "--runs=3", "$HOME"].map(str::to_owned);
        assert_eq!(command_line(&words), "husk bench '' 'a b' 'it'\\''s' --runs=3 '$HOME'");
    }

    #[test]
    fn words_are_listed() {
        let words = ["a", "b", "c"].map(str::to_owned);
        assert_eq!([0, 1, 2, 3].map(|count| list(&words[..count])), ["", "a", "a and b", "a, b and c"]);
        assert_eq!((count(1, "run"), count(3, "run")), ("1 run".to_owned(), "3 runs".to_owned()));
    }
}
