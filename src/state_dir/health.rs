//! The health of a machine, as its checks have found it. Part of its record.

use serde::{Deserialize, Serialize};

use crate::config::HealthCheck;

/// The number of results that are kept.
const LOG_MAX: usize = 5;

/// The health of a machine that is checked.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Health {
    /// What is known.
    pub status: HealthStatus,
    /// How many checks in a row have failed.
    pub failing_streak: u32,
    /// The last results, oldest first.
    pub log: Vec<Probe>,
}

/// What is known about a machine's health.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HealthStatus {
    /// Nothing yet.
    #[default]
    Starting,
    /// The last check that counts has succeeded.
    Healthy,
    /// Too many checks in a row have failed.
    Unhealthy,
}

impl HealthStatus {
    /// Docker's word.
    pub fn name(self) -> &'static str {
        match self {
            HealthStatus::Starting => "starting",
            HealthStatus::Healthy => "healthy",
            HealthStatus::Unhealthy => "unhealthy",
        }
    }
}

/// The result of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Probe {
    /// When it began, in RFC 3339.
    pub start: String,
    /// When it ended.
    pub end: String,
    /// The exit code of its command; -1 if it took too long or was not started.
    pub exit_code: i32,
    /// The beginning of what it has printed, or why it was not started.
    pub output: String,
}

impl Health {
    /// Notes a result. `in_start_period` says whether the machine has only just started. Returns whether the status has changed.
    pub fn note(&mut self, check: &HealthCheck, probe: Probe, in_start_period: bool) -> bool {
        let before = self.status;
        if probe.exit_code == 0 {
            (self.status, self.failing_streak) = (HealthStatus::Healthy, 0);
        } else if before != HealthStatus::Starting || !in_start_period {
            self.failing_streak = self.failing_streak.saturating_add(1);
            if self.failing_streak >= check.retries.max(1) {
                self.status = HealthStatus::Unhealthy;
            }
        }
        self.log.push(probe);
        let excess = self.log.len().saturating_sub(LOG_MAX);
        self.log.drain(..excess);
        self.status != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(exit_code: i32) -> Probe {
        Probe { start: String::new(), end: String::new(), exit_code, output: String::new() }
    }

    #[test]
    fn only_failures_in_a_row_make_a_machine_unhealthy() {
        let check = HealthCheck { retries: 2, ..HealthCheck::default() };
        let mut health = Health::default();
        let mut after = |code| {
            let changed = health.note(&check, probe(code), false);
            (health.status, changed)
        };
        use HealthStatus::{Healthy, Starting, Unhealthy};
        assert_eq!([after(1), after(0), after(1)], [(Starting, false), (Healthy, true), (Healthy, false)]);
        assert_eq!([after(-1), after(1), after(0)], [(Unhealthy, true), (Unhealthy, false), (Healthy, true)]);
        assert_eq!((health.log.len(), health.failing_streak), (LOG_MAX, 0));
    }

    #[test]
    fn failures_do_not_count_while_a_machine_starts() {
        let check = HealthCheck { retries: 1, ..HealthCheck::default() };
        let mut health = Health::default();
        assert!(!health.note(&check, probe(1), true));
        assert_eq!((health.status, health.failing_streak), (HealthStatus::Starting, 0));
        // A success ends the period early.
        assert!(health.note(&check, probe(0), true) && health.note(&check, probe(1), true));
        assert_eq!(health.status, HealthStatus::Unhealthy);
    }
}
