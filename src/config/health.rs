//! How the health of a machine is checked.

use serde::{Deserialize, Serialize};

/// A check, by Docker's rules.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct HealthCheck {
    /// The program and its arguments; the machine is healthy if it exits with 0.
    pub command: Vec<String>,
    /// The time from the end of a check to the next, in milliseconds.
    pub interval_ms: u64,
    /// The time after which a check has failed, in milliseconds.
    pub timeout_ms: u64,
    /// The time after the start in which failures do not count, until the first success, in milliseconds.
    pub start_period_ms: u64,
    /// The interval in that time, in milliseconds.
    pub start_interval_ms: u64,
    /// The number of failures in a row after which the machine is unhealthy.
    pub retries: u32,
}

impl Default for HealthCheck {
    fn default() -> HealthCheck {
        HealthCheck {
            command: Vec::new(),
            interval_ms: 30_000,
            timeout_ms: 30_000,
            start_period_ms: 0,
            start_interval_ms: 5_000,
            retries: 3,
        }
    }
}

impl HealthCheck {
    /// The command of Docker's `Test`, as in an image's configuration: `CMD` and arguments, or `CMD-SHELL` and a line for the
    /// shell. Empty for `NONE`; `None` if it is neither.
    pub fn command_of(test: &[String]) -> Option<Vec<String>> {
        match test.split_first().map(|(kind, rest)| (kind.as_str(), rest)) {
            Some(("NONE", _)) => Some(Vec::new()),
            Some(("CMD", rest)) => Some(rest.to_vec()),
            Some(("CMD-SHELL", [line, ..])) => Some(HealthCheck::shell(line)),
            _ => None,
        }
    }

    /// The command that gives `line` to the shell.
    pub fn shell(line: &str) -> Vec<String> {
        ["/bin/sh", "-c", line].map(str::to_owned).to_vec()
    }
}
