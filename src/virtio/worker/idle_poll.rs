//! Polls a queue for some microseconds before its worker sleeps, when that has paid off recently.
//!
//! Waking a sleeping thread takes as long as many requests, and the driver pays for a doorbell. A driver that keeps the
//! device busy submits its next request before the thread has even slept.

use std::hint;
use std::time::{Duration, Instant};

/// How long a queue is polled. About what going to sleep and waking up costs, so that polling in vain at most doubles
/// the cost of a sleep.
const WINDOW: Duration = Duration::from_micros(20);
/// A sleep up to this long, which includes waking up, would have been avoided by polling, or nearly.
const SHORT_SLEEP: Duration = Duration::from_micros(60);
/// After this many polls in vain in a row, even though sleeps are short, something keeps the driver from running
/// meanwhile: most likely it shares its processor with this thread.
const VAIN_MAX: u32 = 2;
/// The number of sleeps after which polling is then tried again.
const SLEEPS_UNTIL_RETRY: u32 = 1000;

/// Whether a worker polls. Used by its thread only.
#[derive(Debug, Default)]
pub struct IdlePoll {
    /// Whether the last sleep was short.
    is_worthwhile: bool,
    /// Consecutive polls in vain.
    vain: u32,
    /// Sleeps left without polling.
    paused_for: u32,
    /// When the thread was last out of work.
    idle_since: Option<Instant>,
}

impl IdlePoll {
    /// Polls `has_work` if that is worthwhile. Returns whether there is work; otherwise the thread sleeps next.
    pub fn wait(&mut self, mut has_work: impl FnMut() -> bool) -> bool {
        let start = Instant::now();
        if self.is_due() {
            loop {
                if has_work() {
                    self.vain = 0;
                    return true;
                }
                if start.elapsed() >= WINDOW {
                    break;
                }
                hint::spin_loop();
            }
            self.note_vain_poll();
        }
        self.idle_since = Some(start);
        false
    }

    /// Takes the duration of the last sleep, which ends with this call, into account. Has no effect without a sleep.
    pub fn woken(&mut self) {
        if let Some(since) = self.idle_since.take() {
            self.note_sleep(since.elapsed());
        }
    }

    fn is_due(&self) -> bool {
        self.is_worthwhile && self.paused_for == 0
    }

    fn note_vain_poll(&mut self) {
        self.vain += 1;
        if self.vain == VAIN_MAX {
            (self.vain, self.paused_for) = (0, SLEEPS_UNTIL_RETRY);
        }
    }

    fn note_sleep(&mut self, slept: Duration) {
        self.is_worthwhile = slept < SHORT_SLEEP;
        self.paused_for = self.paused_for.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_short_sleep_leads_to_polling() {
        let mut poll = IdlePoll::default();
        assert!(!poll.is_due(), "before the first sleep");
        poll.note_sleep(WINDOW);
        assert!(poll.is_due());
        assert!(poll.wait(|| true));
        poll.note_sleep(SHORT_SLEEP);
        assert!(!poll.is_due());
        assert!(!poll.wait(|| unreachable!("not polled")));
    }

    #[test]
    fn polling_in_vain_ends_soon_and_is_tried_again() {
        let mut poll = IdlePoll::default();
        poll.note_sleep(WINDOW);
        let mut polls_before = Vec::new();
        for sleep in 0..=SLEEPS_UNTIL_RETRY + 1 {
            if poll.is_due() {
                poll.note_vain_poll();
                polls_before.push(sleep);
            }
            poll.note_sleep(WINDOW);
        }
        assert_eq!(polls_before, [0, 1, SLEEPS_UNTIL_RETRY + 1]);
    }

    #[test]
    fn a_poll_ends_without_work() {
        let mut poll = IdlePoll::default();
        poll.note_sleep(WINDOW);
        assert!(!poll.wait(|| false));
        assert!(poll.idle_since.is_some());
        poll.woken();
        assert!(poll.idle_since.is_none());
    }
}
