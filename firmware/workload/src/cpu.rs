//! CPU tasks: neither memory beyond registers nor system calls.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::Builder;

use husk_init::errors::{Context, Failure};

use crate::task::Task;

/// The maximum number of operations that a thread takes at once, a few milliseconds' worth, so that all threads finish
/// together.
const SHARE_MAX: u64 = 1 << 18;
/// These threads need almost no stack.
const STACK_BYTES: usize = 64 << 10;
/// Any nonzero value; xorshift never leaves zero.
const SEED: u64 = 0x9e37_79b9_7f4a_7c15;

/// Executes integer operations. Each is a step of xorshift64* (Marsaglia 2003, Vigna 2016: three shifts, three
/// exclusive ors, a multiplication), a rotation by as many bits as the state says, and an addition. Each depends on the
/// previous one.
pub fn integer(operations: u64) {
    let mut state = black_box(SEED);
    let mut sum = 0_u64;
    for _ in 0..operations {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let value = state.wrapping_mul(0x2545_f491_4f6c_dd1d);
        sum = sum.wrapping_add(value).rotate_left((state & 63) as u32);
    }
    black_box(sum);
}

/// Executes floating-point operations. Each is a polynomial of the third degree (three multiplications, three
/// additions), a square root and a division in double precision. Each depends on the result of the previous one.
pub fn float(operations: u64) {
    let mut x = black_box(1.5_f64);
    for _ in 0..operations {
        // Between 1 and 2 for any argument in that range, so that no operation hits a rare slow case.
        let polynomial = ((0.1 * x + 0.2) * x + 0.3) * x + 0.4;
        x = 1.0 + polynomial.sqrt() / (1.0 + polynomial);
    }
    black_box(x);
}

/// A single-threaded task.
pub fn one(work: fn(u64), amount: u64) -> Result<Task, Failure> {
    Ok(Box::new(move || {
        work(amount);
        Ok(())
    }))
}

/// A multithreaded task: threads take shares until none is left. They are created before the task starts.
pub fn all(work: fn(u64), amount: u64, cpus: usize) -> Result<Task, Failure> {
    let start = Arc::new(Barrier::new(cpus + 1));
    let left = Arc::new(AtomicU64::new(amount));
    let share = (amount / (cpus as u64 * 64)).clamp(1, SHARE_MAX);
    let mut threads = Vec::new();
    for _ in 0..cpus {
        let (start, left) = (start.clone(), left.clone());
        let body = move || {
            start.wait();
            while let Some(share) = take(&left, share) {
                work(share);
            }
        };
        threads.push(Builder::new().stack_size(STACK_BYTES).spawn(body).context("start a thread")?);
    }
    Ok(Box::new(move || {
        start.wait();
        threads.drain(..).try_for_each(|thread| thread.join().map_err(|_| Failure::new("a thread ended in the middle")))
    }))
}

/// Takes up to `share` of what is left.
fn take(left: &AtomicU64, share: u64) -> Option<u64> {
    let before = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| Some(left.saturating_sub(share)));
    before.ok().map(|before| before.min(share)).filter(|share| *share > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    static DONE: AtomicU64 = AtomicU64::new(0);

    #[test]
    fn threads_do_all_work_once_and_not_early() {
        for (amount, cpus) in [(1, 3), (1_000_003, 2), (1000, 1)] {
            DONE.store(0, Ordering::SeqCst);
            let mut task = all(|share| _ = DONE.fetch_add(share, Ordering::SeqCst), amount, cpus).unwrap();
            assert_eq!(DONE.load(Ordering::SeqCst), 0);
            task().unwrap();
            assert_eq!(DONE.load(Ordering::SeqCst), amount);
        }
    }

    #[test]
    fn floating_point_values_stay_in_a_stable_range() {
        let mut x = 1.5_f64;
        for _ in 0..1000 {
            let polynomial = ((0.1 * x + 0.2) * x + 0.3) * x + 0.4;
            x = 1.0 + polynomial.sqrt() / (1.0 + polynomial);
            assert!((1.0..2.0).contains(&x), "{x}");
        }
    }
}
