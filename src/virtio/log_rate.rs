//! From what a guest can make happen again and again to a log that stays readable.

use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// Lets one line into the log in a second.
#[derive(Debug, Default)]
pub struct LogRate {
    last: Option<Instant>,
}

impl LogRate {
    /// Whether a line may be written now; it then counts as written.
    pub fn allows(&mut self) -> bool {
        let allowed = self.last.is_none_or(|last| last.elapsed() >= INTERVAL);
        if allowed {
            self.last = Some(Instant::now());
        }
        allowed
    }
}
