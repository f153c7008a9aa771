//! Rate limits in bytes and operations per second: token buckets for any device.
//!
//! A device asks its [`Limiter`] for each request, on its worker's thread. A refused request stays in the guest's
//! queue, and the limiter's descriptor becomes readable when it may pass. A [`RateControl`] changes the limits
//! concurrently.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::config::Rate;
use crate::sys::timer::Timer;

/// The default burst is the amount of this duration.
const DEFAULT_BURST: Duration = Duration::from_millis(100);
/// The minimum delay before a wakeup: at high rates, several requests pass per wakeup.
const INTERVAL: Duration = Duration::from_millis(1);

/// A token bucket that fills at a constant rate up to its burst.
///
/// If there is at least one token, any number may be taken: the excess is a debt that delays the next request, so that
/// the rate holds however large requests are.
#[derive(Debug, Clone)]
pub struct Bucket {
    per_second: u64,
    /// The time to fill it.
    fills_in: Duration,
    /// When the bucket was empty, or when its debt will be paid.
    empty_at: Instant,
}

impl Bucket {
    /// Creates a full bucket. Without `burst` its capacity is a tenth of a second's amount.
    pub fn new(per_second: u64, burst: Option<u64>, now: Instant) -> Bucket {
        let per_second = per_second.max(1);
        let fills_in = burst.map_or(DEFAULT_BURST, |burst| time_for(burst, per_second));
        Bucket { per_second, fills_in, empty_at: now.checked_sub(fills_in).unwrap_or(now) }
    }

    /// Takes `amount`, or returns how long to wait before asking again.
    pub fn take(&mut self, amount: u64, now: Instant) -> Result<(), Duration> {
        self.has_any(now)?;
        self.owe(amount, now);
        Ok(())
    }

    /// Takes `amount` unconditionally.
    fn owe(&mut self, amount: u64, now: Instant) {
        let full_since = now.checked_sub(self.fills_in).unwrap_or(now);
        let empty_at = self.empty_at.max(full_since).checked_add(time_for(amount, self.per_second));
        // An overflow is replaced by a very long debt.
        self.empty_at = empty_at.unwrap_or(now + Duration::from_secs(u32::MAX.into()));
    }

    /// Whether there are tokens; if not, how long to wait.
    pub fn has_any(&self, now: Instant) -> Result<(), Duration> {
        match self.empty_at.saturating_duration_since(now) {
            Duration::ZERO => Ok(()),
            wait => Err(wait.max(INTERVAL.min(self.fills_in))),
        }
    }
}

/// The time in which `amount` accumulates, rounded up.
fn time_for(amount: u64, per_second: u64) -> Duration {
    const NANOS: u128 = 1_000_000_000;
    let nanos = (u128::from(amount) * NANOS).div_ceil(per_second.into());
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Decides whether a device's requests may proceed. Used by one thread at a time; several limiters may share the limits.
#[derive(Debug)]
pub struct Limiter {
    shared: Arc<LimiterState>,
    alarm: Arc<Timer>,
    /// The generation for which `is_unlimited` is known.
    generation: u64,
    is_unlimited: bool,
}

#[derive(Debug)]
struct LimiterState {
    rate: Mutex<Rate>,
    /// Counts changes of the rate.
    generation: AtomicU64,
    buckets: Mutex<Buckets>,
    /// One for each limiter.
    alarms: Mutex<Vec<Arc<Timer>>>,
}

/// The buckets of the limits that there are.
#[derive(Debug, Default)]
struct Buckets {
    /// The generation of these limits.
    generation: u64,
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl LimiterState {
    fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// The buckets of the current limits, which are full after a change.
    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        let mut buckets = lock(&self.buckets);
        let generation = self.generation();
        if generation != buckets.generation {
            *buckets = Buckets::full(*lock(&self.rate), generation);
        }
        buckets
    }
}

impl Buckets {
    fn full(rate: Rate, generation: u64) -> Buckets {
        let now = Instant::now();
        let bucket = |limit: Option<u64>, burst| limit.map(|limit| Bucket::new(limit, burst, now));
        Buckets {
            generation,
            bytes: bucket(rate.bytes_per_second, rate.burst_bytes),
            ops: bucket(rate.ops_per_second, rate.burst_ops),
        }
    }

    /// Takes from both buckets or from neither.
    fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        // An operation without data need not wait for the byte limit.
        let buckets = || self.bytes.iter().filter(|_| bytes > 0).chain(&self.ops);
        if let Some(wait) = buckets().filter_map(|bucket| bucket.has_any(now).err()).max() {
            return Err(wait);
        }
        for (bucket, amount) in [(&mut self.bytes, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket.as_mut().filter(|_| amount > 0) {
                bucket.take(amount, now)?;
            }
        }
        Ok(())
    }
}

/// Changes a device's limits, from any thread.
#[derive(Debug, Clone)]
pub struct RateControl {
    shared: Arc<LimiterState>,
}

impl RateControl {
    /// Creates limits that any number of limiters share.
    pub fn new(rate: Rate) -> RateControl {
        let shared = LimiterState {
            rate: Mutex::new(rate),
            generation: AtomicU64::new(0),
            buckets: Mutex::new(Buckets::full(rate, 0)),
            alarms: Mutex::default(),
        };
        RateControl { shared: Arc::new(shared) }
    }

    /// Creates a limiter. The limits hold for all limiters together.
    pub fn limiter(&self) -> io::Result<Limiter> {
        let alarm = Arc::new(Timer::new()?);
        lock(&self.shared.alarms).push(alarm.clone());
        let generation = self.shared.generation();
        Ok(Limiter { shared: self.shared.clone(), alarm, generation, is_unlimited: self.rate().is_unlimited() })
    }

    /// The current limits.
    pub fn rate(&self) -> Rate {
        *lock(&self.shared.rate)
    }

    /// Replaces all limits, effective for the next request; waiting requests are retried. Debts are forgiven.
    pub fn set(&self, rate: Rate) {
        *lock(&self.shared.rate) = rate;
        self.shared.generation.fetch_add(1, Ordering::Release);
        lock(&self.shared.alarms).iter().for_each(|alarm| alarm.ring());
    }
}

impl Limiter {
    /// Creates a limiter with these limits, and its control.
    pub fn new(rate: Rate) -> io::Result<(Limiter, RateControl)> {
        let control = RateControl::new(rate);
        Ok((control.limiter()?, control))
    }

    /// Becomes readable (edge) when a refused request should be retried.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.alarm.as_fd()
    }

    /// Whether one operation on `bytes` may proceed; if so, it counts. If not, the descriptor signals when to ask
    /// again.
    pub fn admit(&mut self, bytes: u64) -> bool {
        let generation = self.shared.generation();
        if generation != self.generation {
            self.generation = generation;
            self.is_unlimited = lock(&self.shared.rate).is_unlimited();
        }
        if self.is_unlimited {
            return true;
        }
        let taken = self.shared.buckets().take(bytes, Instant::now());
        match taken {
            Ok(()) => true,
            Err(wait) => {
                self.alarm.set(wait);
                // If limits were set in the meantime, the alarm signaled for them has just been overwritten.
                if self.shared.generation() != generation {
                    self.alarm.ring();
                }
                false
            }
        }
    }

    /// Adds `bytes` to an operation that was already admitted. The excess delays the next one.
    pub fn charge(&mut self, bytes: u64) {
        if let Some(bucket) = &mut self.shared.buckets().bytes {
            bucket.owe(bytes, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// The amount that passes in `time` when `amount` is requested repeatedly, waiting as instructed.
    fn passed(bucket: &mut Bucket, amount: u64, start: Instant, time: Duration) -> u64 {
        let (mut now, mut passed) = (start, 0);
        while now < start + time {
            match bucket.take(amount, now) {
                Ok(()) => passed += amount,
                Err(wait) => now += wait,
            }
        }
        passed
    }

    #[test]
    fn the_rate_holds_for_any_request_size() {
        let now = Instant::now();
        for per_second in [1, 100, 3_000, 1_000_000, 5_000_000_000] {
            for amount in [1, 7, per_second / 10 + 1, per_second * 3] {
                // Requesting each of them would take too long.
                if per_second / amount > 1_000_000 {
                    continue;
                }
                let mut bucket = Bucket::new(per_second, None, now);
                let passed = passed(&mut bucket, amount, now, 100 * SECOND) as f64 / per_second as f64;
                // Plus a tenth of a second for the burst, and one request that may run ahead.
                let most = 100.1 + amount as f64 / per_second as f64 * 2.0 + 0.1;
                assert!((99.9..most).contains(&passed), "{per_second} by {amount}: {passed} s worth in 100 s");
            }
        }
    }

    #[test]
    fn a_burst_passes_at_once_and_refills_over_time() {
        let now = Instant::now();
        let mut bucket = Bucket::new(100, Some(50), now);
        let mut at_once = |now| (0..1000).take_while(|_| bucket.take(1, now).is_ok()).count();
        assert_eq!(at_once(now), 51, "the last one is a debt");
        assert_eq!(at_once(now), 0);
        // Ten accumulate in that time, of which one pays the debt.
        assert!((10..=11).contains(&at_once(now + SECOND / 10)));
        assert_eq!(at_once(now + 1000 * SECOND), 51, "however long the pause was");
    }

    #[test]
    fn a_huge_debt_and_a_stopped_clock_are_handled() {
        let now = Instant::now();
        let mut bucket = Bucket::new(1, Some(u64::MAX), now);
        assert_eq!(bucket.take(u64::MAX, now), Ok(()));
        let mut bucket = Bucket::new(0, Some(0), now);
        assert_eq!(bucket.take(u64::MAX, now), Ok(()));
        assert!(bucket.take(1, now).is_err() && bucket.take(1, now).is_err());
    }

    #[test]
    fn no_interval_has_more_than_its_rate_a_burst_and_one_request() {
        for seed in 0..2000 {
            let mut random = fastrand::Rng::with_seed(seed);
            let per_second = 1 + (random.u64(..) >> random.u32(24..64));
            let burst = random.bool().then(|| 1 + random.u64(..per_second.saturating_mul(3)));
            let amount_max = 1 + random.u64(..per_second.saturating_mul(2));
            let (start, mut now) = (Instant::now(), Instant::now());
            let mut bucket = Bucket::new(per_second, burst, start);
            // When something passed, and how much has in all, including that.
            let mut history = vec![(start, 0)];
            for _ in 0..200 {
                // A guest's requests do not come at the times that it is told.
                now += SECOND.mul_f64(random.f64() * 0.3) * random.u32(..2);
                let amount = 1 + random.u64(..amount_max);
                match bucket.take(amount, now) {
                    Ok(()) => history.push((now, history.last().unwrap().1 + u128::from(amount))),
                    Err(wait) => {
                        assert!(bucket.has_any(now + wait).is_ok(), "seed {seed}: it waited in vain");
                        let short = wait.saturating_sub(INTERVAL.max(Duration::from_nanos(1)));
                        assert!(
                            short.is_zero() || bucket.has_any(now + short).is_err(),
                            "seed {seed}: it waited too long"
                        );
                    }
                }
            }
            let burst = burst.unwrap_or(per_second / 10 + 1);
            for (at, pair) in history.windows(2).enumerate() {
                let (first, before) = (pair[1].0, pair[0].1);
                for (last, sum) in &history[at + 1..] {
                    // Rounded to nanoseconds for each request.
                    let time = (*last - first).as_nanos() + 2 * history.len() as u128;
                    let most = time * u128::from(per_second) / 1_000_000_000 + u128::from(burst + amount_max) + 1;
                    assert!(sum - before <= most, "seed {seed}: {} rather than {most}", sum - before);
                }
            }
        }
    }

    #[test]
    fn a_refused_request_takes_from_neither_bucket() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let rate = Rate {
                bytes_per_second: random.bool().then(|| 1 + random.u64(..10_000)),
                ops_per_second: random.bool().then(|| 1 + random.u64(..100)),
                ..Rate::default()
            };
            let (mut buckets, mut now) = (Buckets::full(rate, 0), Instant::now());
            for _ in 0..100 {
                now += SECOND.mul_f64(random.f64() * 0.05);
                let before = format!("{buckets:?}");
                let bytes = random.u64(..1000) * random.u64(..2);
                let is_free =
                    |bucket: &Option<Bucket>| bucket.as_ref().is_none_or(|bucket| bucket.has_any(now).is_ok());
                let wanted = (bytes == 0 || is_free(&buckets.bytes)) && is_free(&buckets.ops);
                let taken = buckets.take(bytes, now);
                assert_eq!(taken.is_ok(), wanted, "seed {seed}");
                assert!(taken.is_ok() || format!("{buckets:?}") == before, "seed {seed}");
            }
        }
    }

    fn limiter(bytes_per_second: Option<u64>, ops_per_second: Option<u64>) -> (Limiter, RateControl) {
        Limiter::new(Rate { bytes_per_second, ops_per_second, ..Rate::default() }).unwrap()
    }

    fn is_readable(limiter: &Limiter, timeout_ms: i32) -> bool {
        use std::os::fd::AsRawFd;
        use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, limiter.wake_fd().as_raw_fd(), EpollEvent::new(EventSet::IN, 0)).unwrap();
        epoll.wait(timeout_ms, &mut [EpollEvent::default()]).unwrap() == 1
    }

    #[test]
    fn both_limits_hold_and_the_descriptor_signals_when_to_retry() {
        let (mut limiter, _control) = limiter(Some(1 << 30), Some(20));
        let admitted = (0..100).take_while(|_| limiter.admit(512)).count();
        assert_eq!(admitted, 3, "two of the burst, and one ahead");
        assert!(!is_readable(&limiter, 0));
        assert!(is_readable(&limiter, 1000));
        assert!(limiter.admit(1 << 30));
        assert!(is_readable(&limiter, 0) || !limiter.admit(1));
        std::thread::sleep(Duration::from_millis(60));
        assert!(!limiter.admit(1), "there is a debt of bytes");
        assert!(limiter.admit(0), "what moves none does not wait for it");
        limiter.charge(1 << 40);
        std::thread::sleep(Duration::from_millis(60));
        assert!(limiter.admit(0) && !limiter.admit(1), "what was charged later is waited for, too");
    }

    #[test]
    fn limits_change_while_a_request_waits() {
        let (mut limiter, control) = limiter(None, None);
        assert!((0..100_000).all(|_| limiter.admit(1 << 40)), "nothing is limited");
        let slow = Rate { bytes_per_second: Some(1), ..Rate::default() };
        control.set(slow);
        assert_eq!(control.rate(), slow);
        assert!(limiter.admit(1000) && !limiter.admit(1000));
        assert!(!is_readable(&limiter, 50), "a thousand seconds are not over");
        control.set(Rate::default());
        assert!(is_readable(&limiter, 0) && limiter.admit(1000));
    }

    #[test]
    fn limiters_of_the_same_limits_share_them_and_are_all_woken() {
        let (mut first, control) = limiter(None, Some(20));
        let mut second = control.limiter().unwrap();
        let admitted = (0..100).filter(|round| if round % 2 == 0 { first.admit(1) } else { second.admit(1) }).count();
        assert_eq!(admitted, 3, "two of the burst, and one ahead");
        assert!(is_readable(&first, 1000) && is_readable(&second, 1000));
        control.set(Rate { ops_per_second: Some(1), burst_ops: Some(1), ..Rate::default() });
        assert!(first.admit(1) && second.admit(1) && !first.admit(1) && !second.admit(1));
        control.set(Rate::default());
        assert!(is_readable(&first, 0) && is_readable(&second, 0) && first.admit(1) && second.admit(1));
    }

    #[test]
    fn a_zero_limit_and_a_burst_without_a_limit_are_invalid() {
        let rate = |bytes_per_second, burst_bytes, ops_per_second, burst_ops| {
            Rate { bytes_per_second, burst_bytes, ops_per_second, burst_ops }.makes_sense()
        };
        assert!(rate(None, None, None, None) && rate(Some(1), Some(1), Some(1), Some(1)));
        assert!(!rate(Some(0), None, None, None) && !rate(None, None, Some(1), Some(0)));
        assert!(!rate(None, Some(1), Some(1), None));
    }
}
