//! One instance from its start to its end: when it spoke, when its work began and ended, and whether it did what was asked.
//!
//! ```text
//! Launch ─ watch (a thread): start, read, deadline, end ─> OutputParser: what was heard, and when ─> judge ─> Run
//!                                                            └ meanwhile, for who waits: ready, ticks
//! ```
//!
//! All times are this process's. A result that failed is a failure, not a fast run: [`Run::failures`] says so, and whoever
//! takes a number from a run asks it first.

pub mod output;
mod supervisor;

use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use vmm_sys_util::eventfd::EventFd;

use super::contender::Launch;
use crate::sandbox;
use output::OutputParser;
use supervisor::Supervisor;

/// A piece of work that was done.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskTiming {
    /// The measure's name.
    pub name: String,
    /// How much was done.
    pub amount: u64,
    /// How long it took; 0 where it was too little work to be timed.
    pub seconds: f64,
}

/// How an instance ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Termination {
    /// Its process's exit code.
    Exited(i32),
    /// The signal that its process died of.
    Signaled(i32),
    /// It was not over in time, and was ended.
    TimedOut,
    /// It did not start, for this reason.
    FailedToStart(String),
}

/// What became of an instance.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// When it was started.
    pub started: Instant,
    /// From there to its first byte, whoever wrote that.
    pub first_output: Option<Duration>,
    /// From there to the work program's `ready`.
    pub ready: Option<Duration>,
    /// From there to the end of its process.
    pub exited: Duration,
    /// The work that was done, in its order.
    pub timings: Vec<TaskTiming>,
    /// Why none of this may count: empty if all was as it was asked for.
    pub failures: Vec<String>,
    /// How it ended.
    pub end: Termination,
    /// The last that it printed, for a person, with nothing in it that a terminal would obey.
    pub tail: String,
}

/// What has to have happened for a run to count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// The command's exit code.
    pub code: i32,
    /// The work, and how much of each.
    pub work: Vec<(String, u64)>,
}

/// Under which conditions an instance runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunOptions {
    /// The host's processors that it is kept to, if to any; `Limits::cpuset` as numbers.
    pub cpus: Option<Vec<u32>>,
    /// After so long it is ended, and has failed.
    pub timeout: Duration,
}

/// What the watching thread shares with whoever waits for an instance.
struct Shared {
    output: Mutex<OutputParser>,
    changed: Condvar,
    stop: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, OutputParser> {
        self.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs an instance to its end, and cleans up after it, whatever happens.
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

/// How the watching thread found it to end, and what went wrong on the way out.
type Ended = (Termination, Instant, Option<anyhow::Error>);

/// An instance that was started and goes on beside us. Dropped, it is ended.
pub struct Running {
    pid: u32,
    started: Instant,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Ended>>,
}

impl Running {
    /// Starts an instance. If it does not start, it has been cleaned up after.
    pub fn start(mut launch: Launch, options: &RunOptions) -> Result<Running> {
        let stop = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).context("make an event")?;
        let shared = Arc::new(Shared { output: Mutex::default(), changed: Condvar::new(), stop });
        let (tell, told) = mpsc::sync_channel(1);
        let (of_thread, options) = (shared.clone(), options.clone());
        let thread = sandbox::spawn("bench-run", move || {
            let begun = supervisor::spawn(&mut launch.command, options.cpus.as_deref()).and_then(|(child, started)| {
                let pid = child.id();
                Ok((Supervisor::new(child, of_thread.clone(), started + options.timeout)?, started, pid))
            });
            let ended = match begun {
                Ok((supervisor, started, pid)) => {
                    let _ = tell.send(Ok((started, pid)));
                    Some(supervisor.run())
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                    None
                }
            };
            // Who waits for it to be ready need not go on.
            of_thread.changed.notify_all();
            let cleaned = launch.clean_up.take().map_or(Ok(()), |clean_up| clean_up());
            let (end, at) = ended.unwrap_or((Termination::FailedToStart(String::new()), Instant::now()));
            (end, at, cleaned.err())
        })
        .context("start a thread")?;
        match told.recv() {
            Ok(Ok((started, pid))) => Ok(Running { pid, started, shared, thread: Some(thread) }),
            Ok(Err(error)) => {
                let _ = thread.join();
                Err(error)
            }
            Err(_) => Err(anyhow!("the thread beside an instance ended before it")),
        }
    }

    /// The process ID of what was started.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether its process has not ended yet.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Waits until the work program in it says `ready`, and returns how long that took from the start on.
    pub fn wait_ready(&self, timeout: Duration) -> Result<Duration> {
        let deadline = Instant::now() + timeout;
        let mut output = self.shared.lock();
        loop {
            if let Some(ready) = output.ready {
                return Ok(ready.saturating_duration_since(self.started));
            }
            if let Some(failure) = output.failures.first() {
                bail!("it failed before it was ready: {failure}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("it was not ready after {} ms: {}", timeout.as_millis(), last_line(&output.tail()));
            }
            if !self.is_running() {
                bail!("it ended before it was ready: {}", last_line(&output.tail()));
            }
            // Not all of the time at once: the thread's end may have been missed.
            let part = left.min(Duration::from_millis(50));
            output = self.shared.changed.wait_timeout(output, part).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Starts to look for the longest silence anew; what began with the last tick counts.
    pub fn reset_stall(&self) {
        self.shared.lock().reset_stall();
    }

    /// The longest time without a tick since [`Running::reset_stall`], up to now.
    pub fn longest_stall(&self) -> Duration {
        self.shared.lock().longest_stall(Instant::now())
    }

    /// How many times it ticked.
    pub fn ticks(&self) -> u64 {
        self.shared.lock().ticks
    }

    /// Has it end (SIGTERM, then SIGKILL), and cleans up. An exit code of its own is not expected.
    pub fn end(self) -> Run {
        let _ = self.shared.stop.write(1);
        self.wait(None)
    }

    /// Waits for its end, and cleans up. With something expected (and whether the exit code is the command's), it is judged.
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
                failures.push("the thread beside it ended in the middle".into());
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

/// What of a run is not as it was asked for.
fn judge(expected: &Expected, passes_exit_code: bool, end: &Termination, output: &OutputParser) -> Vec<String> {
    let mut failures = Vec::new();
    let said = last_line(&output.tail());
    let code = match (end, passes_exit_code) {
        (Termination::TimedOut, _) => {
            failures.push(format!("it was not over in time: {said}"));
            None
        }
        (Termination::Signaled(number), _) => {
            failures.push(format!("it was killed by signal {number}: {said}"));
            None
        }
        (Termination::FailedToStart(reason), _) => {
            failures.push(reason.clone());
            None
        }
        (Termination::Exited(code), true) => Some(*code),
        (Termination::Exited(code), false) => {
            if output.exit.is_none() {
                failures.push(format!("it ended with code {code} and did not tell its command's: {said}"));
            }
            output.exit
        }
    };
    if let Some(code) = code.filter(|code| *code != expected.code) {
        failures.push(format!("its exit code was {code} and had to be {}: {said}", expected.code));
    }
    if let Some(name) = output.unfinished() {
        failures.push(format!("{name}: it began and did not end"));
    }
    for (name, amount) in &expected.work {
        match output.timings.iter().find(|timing| timing.name == *name) {
            Some(timing) if timing.seconds <= 0.0 => {
                failures.push(format!("{name}: it is too little work to be timed"))
            }
            Some(timing) if timing.amount == *amount => {}
            Some(timing) => failures.push(format!("{name}: {} was done of {amount}", timing.amount)),
            None => failures.push(format!("{name}: it was not done")),
        }
    }
    failures
}

/// The last words of a text.
fn last_line(text: &str) -> String {
    const SHOWN_MAX: usize = 200;
    let line = text.lines().rev().map(str::trim).find(|line| !line.is_empty());
    line.map_or("it printed nothing".into(), |line| line.chars().take(SHOWN_MAX).collect())
}

#[cfg(test)]
mod tests;
