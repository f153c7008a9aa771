//! The processes that a shim is the parent of: those that it has started, and those of containers, which become its children when the
//! command that has started them ends. One thread waits for all of them.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::process::Command;
use std::sync::mpsc;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::process::{WaitOptions, WaitStatus, wait};

use crate::oci::state::ProcessId;

/// How many ends are remembered of processes that nobody awaits: a container may end before it is known.
const REMEMBERED: usize = 64;
/// The exit code of a process whose end is not known.
const UNKNOWN: u32 = 255;

type Then = Box<dyn FnOnce(u32) + Send>;

/// The processes.
#[derive(Default)]
pub struct Children(Mutex<Known>);

#[derive(Default)]
struct Known {
    awaited: HashMap<u32, Then>,
    ended: VecDeque<(u32, u32)>,
}

impl fmt::Debug for Children {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Children")
    }
}

impl Children {
    /// Runs a command and returns its exit code.
    pub fn run(&self, command: &mut Command) -> Result<u32> {
        let (ended, end) = mpsc::channel();
        {
            // Its end is not noticed before it is awaited.
            let mut known = self.known();
            let child = command.spawn().context("start husk")?;
            known.awaited.insert(
                child.id(),
                Box::new(move |code| {
                    // Whoever waits is there until then.
                    let _ = ended.send(code);
                }),
            );
        }
        end.recv().context("wait for husk")
    }

    /// Calls `then` with the exit code of `pid`, a process that was left by a command, when it has ended.
    pub fn adopt(&self, pid: u32, then: impl FnOnce(u32) + Send + 'static) {
        let mut known = self.known();
        // A process that is there is no earlier one with its PID.
        if ProcessId::of(pid).is_some() {
            known.awaited.insert(pid, Box::new(then));
            return;
        }
        let before = known.ended.iter().rposition(|(ended, _)| *ended == pid).and_then(|at| known.ended.remove(at));
        match before {
            Some((_, code)) => {
                drop(known);
                then(code);
            }
            // It has ended, and is about to be noticed.
            None => drop(known.awaited.insert(pid, Box::new(then))),
        }
    }

    /// Notices all that have ended. To be called at each SIGCHLD.
    pub fn reap(&self) {
        loop {
            let mut known = self.known();
            let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) else { return };
            let (pid, code) = (pid.as_raw_nonzero().get().unsigned_abs(), code(status));
            match known.awaited.remove(&pid) {
                Some(then) => {
                    drop(known);
                    then(code);
                }
                None => {
                    known.ended.push_back((pid, code));
                    let surplus = known.ended.len().saturating_sub(REMEMBERED);
                    known.ended.drain(..surplus);
                }
            }
        }
    }

    fn known(&self) -> std::sync::MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn code(status: WaitStatus) -> u32 {
    let number = |number: i32| u32::try_from(number).unwrap_or(UNKNOWN);
    let exited = status.exit_status().map(number);
    exited.or_else(|| status.terminating_signal().map(|signal| 128 + number(signal))).unwrap_or(UNKNOWN)
}
