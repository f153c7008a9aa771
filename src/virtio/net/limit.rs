//! A direction of a queue pair with respect to the device's rate limit, which all pairs share.

use crate::backend::rate::Limiter;

/// A direction's state with respect to its limiter.
#[derive(Default)]
pub struct Limit {
    /// The size with which the next frame was admitted, if it was then delayed for another reason.
    admitted_bytes: Option<usize>,
    /// Whether a frame was admitted in the last turn, and whether the last one was refused.
    admitted_any: bool,
    refused: bool,
}

impl Limit {
    /// Whether the next frame may pass. When checked again it counts only once, and by its growth: a guest may replace
    /// it with a longer one while it waits.
    pub fn admits(&mut self, limiter: &mut Limiter, frame_bytes: usize) -> bool {
        let admits = match self.admitted_bytes {
            Some(before) => {
                limiter.charge(frame_bytes.saturating_sub(before) as u64);
                true
            }
            None => limiter.admit(frame_bytes as u64),
        };
        self.admitted_bytes = admits.then(|| self.admitted_bytes.unwrap_or_default().max(frame_bytes));
        self.admitted_any |= admits;
        self.refused = !admits;
        admits
    }

    /// Begins a turn of the worker.
    pub fn begin_turn(&mut self) {
        (self.admitted_any, self.refused) = (false, false);
    }

    /// The position, after a turn, among the pairs that wait for the limiter.
    pub fn place(&self) -> Place {
        match self {
            Limit { refused: false, .. } => Place::None,
            Limit { admitted_any: true, .. } => Place::Last,
            _ => Place::AsBefore,
        }
    }

    /// Moves on to the next frame.
    pub fn pass(&mut self) {
        self.admitted_bytes = None;
    }
}

/// A pair's position in the queue of those delayed by a limiter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// It is not delayed.
    None,
    /// At its previous position or the end: nothing passed.
    AsBefore,
    /// At the end: it has used its share.
    Last,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Rate;

    #[test]
    fn a_frame_that_grows_while_it_waits_is_charged_for_its_growth() {
        let rate = Rate { bytes_per_second: Some(1000), burst_bytes: Some(100), ..Rate::default() };
        let (mut limiter, _control) = Limiter::new(rate).unwrap();
        let mut limit = Limit::default();
        for _ in 0..20 {
            assert!(limit.admits(&mut limiter, 14), "the same one counts once");
        }
        assert!(limit.admits(&mut limiter, 60_000) && limit.admits(&mut limiter, 14));
        limit.pass();
        assert!(!limit.admits(&mut limiter, 14), "a minute's worth has passed");
    }
}
