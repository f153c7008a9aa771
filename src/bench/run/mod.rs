//! Runs one instance: when it printed what, how long its tasks took, and whether it did what was expected.
//!
//! ```text
//! Launch ─ monitor (a thread): start, read, timeout, stop ─> OutputParser: messages and timestamps ─> judge ─> Run
//!                                                                └ meanwhile, for callers that wait: ready, ticks
//! ```
//!
//! All timestamps are taken by this process. A failed run has no valid timings: callers must check [`Run::failures`]
//! before they use them.

mod monitor;
pub mod output;

use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use vmm_sys_util::eventfd::EventFd;

use super::contender::Launch;
use crate::sandbox;
use crate::sys::event;
use monitor::InstanceMonitor;
use output::OutputParser;

/// The duration of a completed task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskTiming {
    /// The metric of the task.
    pub name: String,
    /// The amount of work done.
    pub amount: u64,
    /// The duration, or 0 if the task was too short to be timed.
    pub seconds: f64,
}

/// How an instance terminated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Termination {
    /// It exited with this code.
    Exited(i32),
    /// It was killed by this signal.
    Signaled(i32),
    /// It was stopped because of the timeout.
    TimedOut,
    /// It failed to start, for this reason.
    FailedToStart(String),
}

/// The result of running an instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// When it was started.
    pub started: Instant,
    /// The time until its first byte of output.
    pub first_output: Option<Duration>,
    /// The time until the workload program's `ready` message.
    pub ready: Option<Duration>,
    /// The time until the process exited.
    pub exited: Duration,
    /// The completed tasks, in order.
    pub timings: Vec<TaskTiming>,
    /// Reasons why the run does not count; empty on success.
    pub failures: Vec<String>,
    /// How the instance terminated.
    pub end: Termination,
    /// The end of the output, without terminal control characters.
    pub tail: String,
}

/// What a successful run looks like.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// The command's exit code.
    pub code: i32,
    /// The tasks and their amounts of work.
    pub work: Vec<(String, u64)>,
}

/// Options of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOptions {
    /// The host's CPUs that the instance is pinned to; `Limits::cpuset` as numbers.
    pub cpus: Option<Vec<u32>>,
    /// The instance is stopped and counts as failed after this time.
    pub timeout: Duration,
}

/// State shared by the monitor thread and callers.
struct MonitorState {
    output: Mutex<OutputParser>,
    changed: Condvar,
    stop: EventFd,
}

impl MonitorState {
    fn lock(&self) -> MutexGuard<'_, OutputParser> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs an instance to completion and cleans up.
pub fn run(launch: Launch, expected: &Expected, options: &RunOptions) -> Run {
    let (started, passes_exit_code) = (Instant::now(), launch.passes_exit_code);
    match Running::start(launch, options) {
        Ok(running) => running.wait(Some((expected, passes_exit_code))),
        Err(error) => {
            let reason = format!("{error:#}");
            Run {
                started,
                first_output: None,
                ready: None,
                exited: Duration::ZERO,
                timings: Vec::new(),
                failures: vec![reason.clone()],
                end: Termination::FailedToStart(reason),
                tail: String::new(),
            }
        }
    }
}

/// The result of the monitor thread, with a cleanup error if any.
type Ended = (Termination, Instant, Option<anyhow::Error>);

/// A running instance, stopped on drop.
pub struct Running {
    pid: u32,
    started: Instant,
    shared: Arc<MonitorState>,
    thread: Option<JoinHandle<Ended>>,
}

impl Running {
    /// Starts an instance. Cleans up if that fails.
    pub fn start(mut launch: Launch, options: &RunOptions) -> Result<Running> {
        let stop = event::create().context("create an eventfd")?;
        let shared = Arc::new(MonitorState { output: Mutex::default(), changed: Condvar::new(), stop });
        let (sender, receiver) = mpsc::sync_channel(1);
        let (of_thread, options) = (shared.clone(), options.clone());
        let thread = sandbox::spawn("bench-run", move || {
            let begun = monitor::spawn(&mut launch.command, options.cpus.as_deref()).and_then(|(child, started)| {
                let pid = child.id();
                Ok((InstanceMonitor::new(child, of_thread.clone(), started + options.timeout)?, started, pid))
            });
            let ended = match begun {
                Ok((monitor, started, pid)) => {
                    let _ = sender.send(Ok((started, pid)));
                    Some(monitor.run())
                }
                Err(error) => {
                    let _ = sender.send(Err(error));
                    None
                }
            };
            // Wake up callers that wait for `ready`.
            of_thread.changed.notify_all();
            let cleaned = launch.clean_up.take().map_or(Ok(()), |clean_up| clean_up());
            let (end, at) = ended.unwrap_or((Termination::FailedToStart(String::new()), Instant::now()));
            (end, at, cleaned.err())
        })
        .context("start a thread")?;
        match receiver.recv() {
            Ok(Ok((started, pid))) => Ok(Running { pid, started, shared, thread: Some(thread) }),
            Ok(Err(error)) => {
                let _ = thread.join();
                Err(error)
            }
            Err(_) => Err(anyhow!("the monitor thread of an instance panicked")),
        }
    }

    /// The process ID of [`Launch::command`].
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether the process has not exited yet.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Waits for the workload program's `ready` message, and returns the time since the start.
    pub fn wait_ready(&self, timeout: Duration) -> Result<Duration> {
        let deadline = Instant::now() + timeout;
        let mut output = self.shared.lock();
        loop {
            if let Some(ready) = output.ready {
                return Ok(ready.saturating_duration_since(self.started));
            }
            if let Some(failure) = output.failures.first() {
                bail!("failed before it was ready: {failure}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("not ready after {} ms: {}", timeout.as_millis(), last_line(&output.tail()));
            }
            if !self.is_running() {
                bail!("exited before it was ready: {}", last_line(&output.tail()));
            }
            // Wait in slices, since the notification may come before the thread has finished.
            let part = left.min(Duration::from_millis(50));
            output = self.shared.changed.wait_timeout(output, part).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Resets the longest stall. A stall that is still going on is counted from the last tick.
    pub fn reset_stall(&self) {
        self.shared.lock().reset_stall();
    }

    /// Returns the longest time without a tick since [`Running::reset_stall`].
    pub fn longest_stall(&self) -> Duration {
        self.shared.lock().longest_stall(Instant::now())
    }

    /// Returns the number of ticks.
    pub fn ticks(&self) -> u64 {
        self.shared.lock().ticks
    }

    /// Stops the instance (SIGTERM, then SIGKILL) and cleans up. Its exit code is ignored.
    pub fn end(self) -> Run {
        let _ = self.shared.stop.write(1);
        self.wait(None)
    }

    /// Waits for the instance and cleans up. `expected` has the expectations, and whether the exit code is the
    /// command's.
    fn wait(mut self, expected: Option<(&Expected, bool)>) -> Run {
        let ended = self.thread.take().map(JoinHandle::join);
        let output = self.shared.lock();
        let mut failures = output.failures.clone();
        let (end, exited) = match ended {
            Some(Ok((end, exited, clean_up_error))) => {
                failures.extend(clean_up_error.map(|error| format!("clean up: {error:#}")));
                (end, exited)
            }
            _ => {
                failures.push("the monitor thread panicked".into());
                (Termination::TimedOut, Instant::now())
            }
        };
        if let Some((expected, passes_exit_code)) = expected {
            failures.extend(judge(expected, passes_exit_code, &end, &output));
        }
        let since = |at: Instant| at.saturating_duration_since(self.started);
        Run {
            started: self.started,
            first_output: output.first_output.map(since),
            ready: output.ready.map(since),
            exited: since(exited),
            timings: output.timings.clone(),
            failures,
            end,
            tail: output.tail(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            let _ = self.shared.stop.write(1);
            let _ = thread.join();
        }
    }
}

/// Returns the expectations that a run did not meet.
fn judge(expected: &Expected, passes_exit_code: bool, end: &Termination, output: &OutputParser) -> Vec<String> {
    let mut failures = Vec::new();
    let printed = last_line(&output.tail());
    let code = match (end, passes_exit_code) {
        (Termination::TimedOut, _) => {
            failures.push(format!("timed out: {printed}"));
            None
        }
        (Termination::Signaled(number), _) => {
            failures.push(format!("killed by signal {number}: {printed}"));
            None
        }
        (Termination::FailedToStart(reason), _) => {
            failures.push(reason.clone());
            None
        }
        (Termination::Exited(code), true) => Some(*code),
        (Termination::Exited(code), false) => {
            if output.exit.is_none() {
                failures.push(format!("exited with code {code} without reporting the command's exit code: {printed}"));
            }
            output.exit
        }
    };
    if let Some(code) = code.filter(|code| *code != expected.code) {
        failures.push(format!("exit code {code} instead of {}: {printed}", expected.code));
    }
    if let Some(name) = output.unfinished() {
        failures.push(format!("{name}: did not finish"));
    }
    for (name, amount) in &expected.work {
        match output.timings.iter().find(|timing| timing.name == *name) {
            Some(timing) if timing.seconds <= 0.0 => failures.push(format!("{name}: too short to be timed")),
            Some(timing) if timing.amount == *amount => {}
            Some(timing) => failures.push(format!("{name}: did {} of {amount}", timing.amount)),
            None => failures.push(format!("{name}: did not run")),
        }
    }
    failures
}

/// Returns the last nonempty line of a text.
fn last_line(text: &str) -> String {
    const SHOWN_MAX: usize = 200;
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty());
    line.map_or("no output".into(), |line| line.chars().take(SHOWN_MAX).collect())
}

#[cfg(test)]
mod tests;
