//! One instance from its start to its end: when it spoke, when its work began and ended, and whether it did what was asked.
//!
//! ```text
//! Launch ─ watch (a thread): start, read, deadline, end ─> Console: what was heard, and when ─> judge ─> Run
//!                                                            └ meanwhile, for who waits: ready, ticks
//! ```
//!
//! All times are this process's. A result that failed is a failure, not a fast run: [`Run::failures`] says so, and whoever
//! takes a number from a run asks it first.

pub mod console;
mod watch;

use std::sync::mpsc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use vmm_sys_util::eventfd::EventFd;

use super::contender::Launch;
use crate::sandbox;
use console::Console;
use watch::Watch;

/// A piece of work that was done.
#[derive(Debug, Clone, PartialEq)]
pub struct Mark {
    /// The measure's name.
    pub name: String,
    /// How much was done.
    pub amount: u64,
    /// How long it took; 0 where it was too little work to be timed.
    pub seconds: f64,
}

/// How an instance ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Its process's exit code.
    Code(i32),
    /// The signal that its process died of.
    Signal(i32),
    /// It was not over in time, and was ended.
    Deadline,
    /// It did not start, for this reason.
    NotStarted(String),
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
    pub marks: Vec<Mark>,
    /// Why none of this may count: empty if all was as it was asked for.
    pub failures: Vec<String>,
    /// How it ended.
    pub end: End,
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
pub struct Conditions {
    /// The host's processors that it is kept to, if to any; `Limits::cpuset` as numbers.
    pub cpus: Option<Vec<u32>>,
    /// After so long it is ended, and has failed.
    pub deadline: Duration,
}

/// What the watching thread shares with whoever waits for an instance.
struct Shared {
    console: Mutex<Console>,
    changed: Condvar,
    stop: EventFd,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Console> {
        self.console.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Runs an instance to its end, and cleans up after it, whatever happens.
pub fn run(launch: Launch, expected: &Expected, conditions: &Conditions) -> Run {
    let (started, passes_exit_code) = (Instant::now(), launch.passes_exit_code);
    match Running::start(launch, conditions) {
        Ok(running) => running.wait(Some((expected, passes_exit_code))),
        Err(error) => {
            let why = format!("{error:#}");
            Run {
                started,
                first_output: None,
                ready: None,
                exited: Duration::ZERO,
                marks: Vec::new(),
                failures: vec![why.clone()],
                end: End::NotStarted(why),
                tail: String::new(),
            }
        }
    }
}

/// How the watching thread found it to end, and what went wrong on the way out.
type Ended = (End, Instant, Option<anyhow::Error>);

/// An instance that was started and goes on beside us. Dropped, it is ended.
pub struct Running {
    pid: u32,
    started: Instant,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Ended>>,
}

impl Running {
    /// Starts an instance. If it does not start, it has been cleaned up after.
    pub fn start(mut launch: Launch, conditions: &Conditions) -> Result<Running> {
        let stop = EventFd::new(libc::EFD_CLOEXEC | libc::EFD_NONBLOCK).context("make an event")?;
        let shared = Arc::new(Shared { console: Mutex::default(), changed: Condvar::new(), stop });
        let (tell, told) = mpsc::sync_channel(1);
        let (of_thread, conditions) = (shared.clone(), conditions.clone());
        let thread = sandbox::spawn("bench-run", move || {
            let begun = watch::spawn(&mut launch.command, conditions.cpus.as_deref()).and_then(|(child, started)| {
                let pid = child.id();
                Ok((Watch::new(child, of_thread.clone(), started + conditions.deadline)?, started, pid))
            });
            let ended = match begun {
                Ok((watch, started, pid)) => {
                    let _ = tell.send(Ok((started, pid)));
                    Some(watch.run())
                }
                Err(error) => {
                    let _ = tell.send(Err(error));
                    None
                }
            };
            // Who waits for it to be ready need not go on.
            of_thread.changed.notify_all();
            let cleaned = launch.clean_up.take().map_or(Ok(()), |clean_up| clean_up());
            let (end, at) = ended.unwrap_or((End::NotStarted(String::new()), Instant::now()));
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
    pub fn wait_ready(&self, patience: Duration) -> Result<Duration> {
        let deadline = Instant::now() + patience;
        let mut console = self.shared.lock();
        loop {
            if let Some(ready) = console.ready {
                return Ok(ready.saturating_duration_since(self.started));
            }
            if let Some(failure) = console.failures.first() {
                bail!("it failed before it was ready: {failure}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("it was not ready after {} ms: {}", patience.as_millis(), last_line(&console.tail()));
            }
            if !self.is_running() {
                bail!("it ended before it was ready: {}", last_line(&console.tail()));
            }
            // Not all of the time at once: the thread's end may have been missed.
            let part = left.min(Duration::from_millis(50));
            console = self.shared.changed.wait_timeout(console, part).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Starts to look for the longest silence anew; what began with the last tick counts.
    pub fn forget_silence(&self) {
        self.shared.lock().forget_silence();
    }

    /// The longest time without a tick since [`Running::forget_silence`], up to now.
    pub fn longest_silence(&self) -> Duration {
        self.shared.lock().longest_silence(Instant::now())
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
        let console = self.shared.lock();
        let mut failures = console.failures.clone();
        let (end, exited) = match ended {
            Some(Ok((end, exited, dirt))) => {
                failures.extend(dirt.map(|error| format!("clean up: {error:#}")));
                (end, exited)
            }
            _ => {
                failures.push("the thread beside it ended in the middle".into());
                (End::Deadline, Instant::now())
            }
        };
        if let Some((expected, passes_exit_code)) = expected {
            failures.extend(judge(expected, passes_exit_code, &end, &console));
        }
        let since = |at: Instant| at.saturating_duration_since(self.started);
        Run {
            started: self.started,
            first_output: console.first_output.map(since),
            ready: console.ready.map(since),
            exited: since(exited),
            marks: console.marks.clone(),
            failures,
            end,
            tail: console.tail(),
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
fn judge(expected: &Expected, passes_exit_code: bool, end: &End, console: &Console) -> Vec<String> {
    let mut failures = Vec::new();
    let said = last_line(&console.tail());
    let code = match (end, passes_exit_code) {
        (End::Deadline, _) => {
            failures.push(format!("it was not over in time: {said}"));
            None
        }
        (End::Signal(number), _) => {
            failures.push(format!("it was killed by signal {number}: {said}"));
            None
        }
        (End::NotStarted(why), _) => {
            failures.push(why.clone());
            None
        }
        (End::Code(code), true) => Some(*code),
        (End::Code(code), false) => {
            if console.exit.is_none() {
                failures.push(format!("it ended with code {code} and did not tell its command's: {said}"));
            }
            console.exit
        }
    };
    if let Some(code) = code.filter(|code| *code != expected.code) {
        failures.push(format!("its exit code was {code} and had to be {}: {said}", expected.code));
    }
    if let Some(name) = console.unfinished() {
        failures.push(format!("{name}: it began and did not end"));
    }
    for (name, amount) in &expected.work {
        match console.marks.iter().find(|mark| mark.name == *name) {
            Some(mark) if mark.seconds <= 0.0 => failures.push(format!("{name}: it is too little work to be timed")),
            Some(mark) if mark.amount == *amount => {}
            Some(mark) => failures.push(format!("{name}: {} was done of {amount}", mark.amount)),
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
