//! Sets the wall clock from the host's after the guest was stopped or restored: a request, its response, and a single correction.

use std::time::{Duration, Instant, SystemTime};

use nix::sys::time::TimeSpec;
use nix::time::{ClockId, clock_settime};

use crate::report;

/// A response that took longer is too imprecise: the request is repeated, a limited number of times.
const ROUND_TRIP_MAX: Duration = Duration::from_millis(20);
const QUESTIONS_MAX: u32 = 5;
/// Smaller deviations are left to time synchronization in the guest, and to programs that depend on a steady clock.
const TOLERANCE: Duration = Duration::from_millis(10);

/// The state of a clock request.
#[derive(Debug, Default)]
pub struct Clock {
    asked_at: Option<Instant>,
    questions: u32,
}

/// What to do with a response.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// There was no request.
    Ignore,
    /// It arrived too late: repeat the request.
    AskAgain,
    /// The time, as precisely as possible.
    Now(Duration),
}

impl Clock {
    /// Records that the host is asked now.
    pub fn ask(&mut self) {
        (self.asked_at, self.questions) = (Some(Instant::now()), 1);
    }

    /// Sets the wall clock from the host's response. Returns whether the request must be repeated.
    pub fn hear(&mut self, since_1970_ns: u64) -> bool {
        match self.judge(Duration::from_nanos(since_1970_ns), Instant::now()) {
            Verdict::Ignore => false,
            Verdict::AskAgain => true,
            Verdict::Now(now) => {
                set(now);
                false
            }
        }
    }

    fn judge(&mut self, host: Duration, now: Instant) -> Verdict {
        let Some(asked_at) = self.asked_at.take() else { return Verdict::Ignore };
        let round_trip = now.saturating_duration_since(asked_at);
        if round_trip > ROUND_TRIP_MAX && self.questions < QUESTIONS_MAX {
            (self.asked_at, self.questions) = (Some(now), self.questions + 1);
            return Verdict::AskAgain;
        }
        // The host read its clock sometime in between.
        Verdict::Now(host + round_trip.min(ROUND_TRIP_MAX) / 2)
    }
}

/// Sets the wall clock, unless it deviates little.
pub fn set(now: Duration) {
    let ours = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    if now.abs_diff(ours) > TOLERANCE {
        let set = clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(now));
        let _ = set.inspect_err(|error| report::say(&format!("set the clock: {error}")));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: Duration = Duration::from_secs(1_800_000_000);

    #[test]
    fn a_response_is_assumed_at_half_the_round_trip() {
        let mut clock = Clock::default();
        assert_eq!(clock.judge(HOST, Instant::now()), Verdict::Ignore, "nobody asked");
        clock.ask();
        let asked_at = clock.asked_at.unwrap();
        let heard = clock.judge(HOST, asked_at + Duration::from_millis(10));
        assert_eq!(heard, Verdict::Now(HOST + Duration::from_millis(5)));
        assert_eq!(clock.judge(HOST, Instant::now()), Verdict::Ignore, "it is answered");
    }

    #[test]
    fn a_late_response_is_requested_again_a_limited_number_of_times() {
        let mut clock = Clock::default();
        clock.ask();
        let mut now = clock.asked_at.unwrap();
        for _ in 1..QUESTIONS_MAX {
            now += Duration::from_secs(3600);
            assert_eq!(clock.judge(HOST, now), Verdict::AskAgain);
        }
        let heard = clock.judge(HOST, now + Duration::from_secs(2));
        assert_eq!(heard, Verdict::Now(HOST + ROUND_TRIP_MAX / 2));
    }
}
