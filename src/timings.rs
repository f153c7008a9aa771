//! Timestamps of a machine's startup and exit steps on one clock, printed by `--timings`.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// A step in the life of a machine, in chronological order, except that [`Step::KvmReady`] and [`Step::KernelLoaded`] may
/// be swapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Image, kernel and initramfs are available.
    Prepared,
    /// The virtual machine exists, with memory and interrupt controller.
    KvmReady,
    /// Kernel, initramfs and tables are in guest memory.
    KernelLoaded,
    /// The first vCPU is about to execute its first instruction.
    FirstInstruction,
    /// The guest wrote its first byte to the console.
    FirstOutput,
    /// The guest wrote a marker: its PID 1 is running.
    Pid1,
    /// The machine's process is running.
    Process,
    /// The process has exited and all of its output has left the guest.
    ProcessEnd,
    /// The machine has ended.
    End,
}

/// Steps that exist only for machines created from an image.
const STEPS_OF_RUN: [Step; 3] = [Step::Prepared, Step::Process, Step::ProcessEnd];

const STEPS: [(Step, &str); 9] = [
    (Step::Prepared, "image and kernel ready"),
    (Step::KvmReady, "KVM ready"),
    (Step::KernelLoaded, "kernel loaded"),
    (Step::FirstInstruction, "first guest instruction"),
    (Step::FirstOutput, "first kernel output"),
    (Step::Pid1, "PID 1"),
    (Step::Process, "process started"),
    (Step::ProcessEnd, "process exited"),
    (Step::End, "exit"),
];

/// The clock and the timestamps. Each is set once, from any thread, without a lock.
pub struct Timings {
    start: Instant,
    marks: [OnceLock<Duration>; STEPS.len()],
}

impl Timings {
    /// Starts the clock at `start`, the earliest known time of the process.
    pub fn new(start: Instant) -> Timings {
        Timings { start, marks: Default::default() }
    }

    /// Marks `step` as reached now; only the first call counts.
    pub fn mark(&self, step: Step) {
        self.marks[step as usize].get_or_init(|| self.start.elapsed());
    }

    /// All marks, for [`Timings::adopt`].
    pub fn marks(&self) -> Vec<Option<Duration>> {
        self.marks.iter().map(|mark| mark.get().copied()).collect()
    }

    /// Adds the marks of another process, whose clock has the same start. Those that are set already stay.
    pub fn adopt(&self, marks: &[Option<Duration>]) {
        for (ours, theirs) in self.marks.iter().zip(marks) {
            if let Some(at) = theirs {
                ours.get_or_init(|| *at);
            }
        }
    }

    /// When `step` was reached, relative to the start.
    pub fn reached(&self, step: Step) -> Option<Duration> {
        self.marks[step as usize].get().copied()
    }
}

impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<24}{:>12}{:>12}", "step", "at (ms)", "took (ms)")?;
        writeln!(f, "{:<24}{:>12.3}{:>12}", "process start", 0.0, "")?;
        let mut before = Duration::ZERO;
        let mut steps = STEPS.map(|(step, name)| (self.reached(step), step, name));
        // KVM is set up and the kernel loaded at the same time, in either order.
        steps.sort_by_key(|(at, ..)| at.unwrap_or(Duration::MAX));
        for (at, step, name) in steps {
            match at {
                Some(at) => {
                    let took = at.saturating_sub(before);
                    writeln!(f, "{name:<24}{:>12.3}{:>12.3}", millis(at), millis(took))?;
                    before = at;
                }
                None if STEPS_OF_RUN.contains(&step) => {}
                None => writeln!(f, "{name:<24}{:>12}{:>12}", "-", "-")?,
            }
        }
        Ok(())
    }
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_set_once_and_unreached_steps_are_shown() {
        let timings = Timings::new(Instant::now());
        timings.mark(Step::KvmReady);
        let first = timings.reached(Step::KvmReady);
        timings.mark(Step::KvmReady);
        assert_eq!(timings.reached(Step::KvmReady), first);
        let text = timings.to_string();
        assert!(text.lines().any(|l| l.starts_with("PID 1") && l.ends_with('-')), "{text}");
    }
}
