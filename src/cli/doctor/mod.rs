//! `husk doctor`: checks the host, with one line per check and a remedy for each failure.

mod checks;

use std::fmt::Write as _;
use std::io::IsTerminal;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::exit::Exit;
use crate::{foreign, resources};

const EXAMPLES: &str = "\
Examples:
  husk doctor
  husk doctor --json | jq '.checks[] | select(.status == \"fail\")'

The exit code is 0 if a stock guest kernel can run on this host, and 1 if it cannot.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Doctor {
    /// Format the output as JSON
    #[arg(long)]
    json: bool,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Guests run, but something is slower or missing.
    Warn,
    /// Unmodified guests do not run.
    Fail,
}

/// A line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    detail: String,
    /// How to fix it; required for every failed check.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

#[derive(Serialize)]
struct Report {
    stock_guests: bool,
    checks: Vec<Check>,
}

impl Doctor {
    /// Examines the host and prints the report.
    pub fn run(self) -> Result<Exit> {
        let checks = checks::all(&resources::host::probe());
        let report = Report { stock_guests: checks.iter().all(|check| check.status != Status::Fail), checks };
        let text = if self.json {
            foreign::json(&report).context("print the report")? + "\n"
        } else {
            let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            report.text(colour)
        };
        super::print_raw(&text)?;
        Ok(if report.stock_guests { Exit::Success } else { Exit::Failure })
    }
}

impl Report {
    fn text(&self, colour: bool) -> String {
        let width = self.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
        let mut text = String::new();
        for check in &self.checks {
            let (word, sgr) = match check.status {
                Status::Ok => ("ok  ", "32"),
                Status::Warn => ("warn", "33"),
                Status::Fail => ("fail", "31;1"),
            };
            let word = if colour { format!("\x1b[{sgr}m{word}\x1b[0m") } else { word.to_owned() };
            let _ = writeln!(text, "{word}  {:width$}  {}", check.name, foreign::line(&check.detail));
            if let Some(remedy) = &check.remedy {
                let _ = writeln!(text, "      {:width$}  > {}", "", foreign::line(remedy));
            }
        }
        let can = if self.stock_guests { "can" } else { "cannot" };
        let _ = writeln!(text, "\nStock guest kernels {can} run on this host.");
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let check = |name, status, remedy: Option<&str>| Check {
            name,
            status,
            detail: "found".into(),
            remedy: remedy.map(str::to_owned),
        };
        let checks = vec![check("KVM", Status::Ok, None), check("memory", Status::Fail, Some("buy some"))];
        Report { stock_guests: false, checks }
    }

    #[test]
    fn lines_are_aligned_and_a_remedy_follows_its_check() {
        let expected = "ok    KVM     found\nfail  memory  found\n              > buy some\n\nStock guest kernels cannot run on this host.\n";
        assert_eq!(report().text(false), expected);
        assert!(report().text(true).contains("\x1b[31;1mfail\x1b[0m  memory"));
    }

    #[test]
    fn json_omits_unneeded_remedies() {
        let json = serde_json::to_value(report()).unwrap();
        assert_eq!(json["checks"][0], serde_json::json!({"name": "KVM", "status": "ok", "detail": "found"}));
        assert_eq!(json["checks"][1]["remedy"], "buy some");
    }
}
