//! Rate-limits log messages that a guest can trigger.

use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// Allows one log line per second.
#[derive(Debug, Default)]
pub struct LogRate {
    last: Option<Instant>,
}

impl LogRate {
    /// Whether a line may be logged now. If so, it counts as logged.
    pub fn allows(&mut self) -> bool {
        let allowed = self.last.is_none_or(|last| last.elapsed() >= INTERVAL);
        if allowed {
            self.last = Some(Instant::now());
        }
        allowed
    }
}
