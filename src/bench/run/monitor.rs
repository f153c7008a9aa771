//! The monitor thread of an instance: starts the process, reads its output, and stops it on timeout.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStderr, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, test_kill_process_group};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::super::interrupt;
use super::{MonitorState, Termination};
use crate::sys::affinity::{self, CpuMask};

/// How long an instance may take to exit after SIGTERM.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// How long it may take after SIGKILL; freeing much memory takes time.
const KILL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long output is read after the exit, if another process still holds the pipe.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(500);
/// How long the release of a machine is waited for after the exit.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);
/// The capacity of a pipe.
const CHUNK_BYTES: usize = 64 << 10;

const STDOUT: u64 = 0;
const STDERR: u64 = 1;
const PROCESS: u64 = 2;
const STOP: u64 = 3;
const INTERRUPT: u64 = 4;

/// Starts a command in its own process group, pinned to `cpus`, with its output captured and empty input.
pub fn spawn(command: &mut Command, cpus: Option<&[u32]>) -> Result<(Child, Instant)> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    // A child inherits the CPU affinity of the thread that starts it, so it is set temporarily.
    let before = match cpus {
        Some(cpus) => {
            let before = affinity::get(0).context("get the CPU affinity of a thread")?;
            affinity::set(0, &CpuMask::of(cpus)).context("pin an instance to CPUs")?;
            Some(before)
        }
        None => None,
    };
    let started = Instant::now();
    let child = command.spawn();
    if let Some(before) = before {
        affinity::set(0, &before).context("restore the CPU affinity of a thread")?;
    }
    let child = child.with_context(|| format!("start {}", command.get_program().to_string_lossy()))?;
    Ok((child, started))
}

/// A running process.
pub struct InstanceMonitor {
    pub child: Child,
    pub shared: Arc<MonitorState>,
    /// When it is stopped.
    pub deadline: Instant,
    epoll: Epoll,
    stdout: Option<ChildStdout>,
    stderr: Option<ChildStderr>,
    process: OwnedFd,
}

/// How far stopping has escalated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pressure {
    None,
    PendingRequest,
    Killed,
}

impl InstanceMonitor {
    pub fn new(mut child: Child, shared: Arc<MonitorState>, deadline: Instant) -> Result<InstanceMonitor> {
        let prepare = |child: &mut Child| -> Result<_> {
            let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("open a pidfd")?;
            Ok((Epoll::new().context("create an epoll instance")?, process))
        };
        let prepared = prepare(&mut child);
        let (epoll, process) = prepared.inspect_err(|_| {
            kill(&child, Signal::KILL);
            let _ = child.wait();
        })?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let monitor = InstanceMonitor { child, shared, deadline, epoll, stdout, stderr, process };
        monitor.add(monitor.process.as_raw_fd(), PROCESS);
        monitor.add(monitor.shared.stop.as_raw_fd(), STOP);
        interrupt::fd().iter().for_each(|fd| monitor.add(*fd, INTERRUPT));
        monitor.stdout.iter().for_each(|stdout| monitor.add(stdout.as_fd().as_raw_fd(), STDOUT));
        monitor.stderr.iter().for_each(|stderr| monitor.add(stderr.as_fd().as_raw_fd(), STDERR));
        Ok(monitor)
    }

    fn add(&self, fd: i32, token: u64) {
        let event = EpollEvent::new(EventSet::IN, token);
        if let Err(error) = self.epoll.ctl(ControlOperation::Add, fd, event) {
            self.shared.lock().add_failure(format!("poll an instance: {error}"));
        }
    }

    fn remove(&self, fd: i32) {
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    /// Supervises the process until it exits. Returns how and when it did.
    pub fn run(mut self) -> (Termination, Instant) {
        let (mut pressure, mut next, mut late) = (Pressure::None, self.deadline, false);
        let exited = loop {
            let tokens = self.wait(next);
            let mut asked = false;
            for token in tokens.iter().flatten() {
                match *token {
                    STDOUT | STDERR => self.read(*token),
                    STOP => {
                        self.remove(self.shared.stop.as_raw_fd());
                        asked = true;
                    }
                    // Not read here, so that all supervisors see it.
                    INTERRUPT => {
                        interrupt::fd().iter().for_each(|fd| self.remove(*fd));
                        asked = true;
                    }
                    _ => {}
                }
            }
            if tokens.contains(&Some(PROCESS)) {
                break Some(Instant::now());
            }
            if !asked && Instant::now() < next {
                continue;
            }
            match pressure {
                Pressure::None => {
                    late = !asked;
                    kill(&self.child, Signal::TERM);
                    (pressure, next) = (Pressure::PendingRequest, Instant::now() + END_TIMEOUT);
                }
                Pressure::PendingRequest => {
                    kill(&self.child, Signal::KILL);
                    (pressure, next) = (Pressure::Killed, Instant::now() + KILL_TIMEOUT);
                }
                Pressure::Killed => break None,
            }
        };
        // The process ID and group cannot be reused before the process is waited for.
        kill(&self.child, Signal::KILL);
        let Some(exited) = exited else {
            self.shared.lock().add_failure("still running after SIGKILL".into());
            return (Termination::TimedOut, Instant::now());
        };
        self.drain(exited + DRAIN_TIMEOUT);
        let status = self.child.wait();
        self.await_release();
        let end = match status {
            _ if late => Termination::TimedOut,
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Termination::Exited(code),
                (None, signal) => Termination::Signaled(signal.unwrap_or_default()),
            },
            Err(error) => {
                self.shared.lock().add_failure(format!("wait for it: {error}"));
                Termination::TimedOut
            }
        };
        (end, exited)
    }

    /// Waits until the rest of the process group is gone. A monitor may exit before the kernel releases its machine, which
    /// must not slow down the next instance.
    fn await_release(&self) {
        let until = Instant::now() + RELEASE_TIMEOUT;
        while Instant::now() < until && test_kill_process_group(Pid::from_child(&self.child)).is_ok() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits for events until a point in time.
    fn wait(&self, until: Instant) -> [Option<u64>; 5] {
        let mut events = [EpollEvent::default(); 5];
        let left = until.saturating_duration_since(Instant::now());
        // Rounded up, to avoid busy waiting for the last fraction.
        let timeout_ms = i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX);
        let count = self.epoll.wait(timeout_ms, &mut events).unwrap_or(0);
        let mut tokens = [None; 5];
        tokens.iter_mut().zip(events.iter().take(count)).for_each(|(token, event)| *token = Some(event.data()));
        tokens
    }

    /// Reads available output, or notes that it has ended.
    fn read(&mut self, token: u64) {
        let mut chunk = [0; CHUNK_BYTES];
        let stream = match token {
            STDOUT => self.stdout.as_mut().map(|stream| (stream.read(&mut chunk), stream.as_raw_fd())),
            _ => self.stderr.as_mut().map(|stream| (stream.read(&mut chunk), stream.as_raw_fd())),
        };
        let at = Instant::now();
        let Some((count, fd)) = stream else { return };
        match count {
            Ok(count) if count > 0 => {
                let bytes = chunk.get(..count).unwrap_or_default();
                let mut output = self.shared.lock();
                match token {
                    STDOUT => output.feed(bytes, at),
                    _ => output.keep_tail(bytes),
                }
                drop(output);
                self.shared.changed.notify_all();
            }
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            _ => {
                self.remove(fd);
                match token {
                    STDOUT => self.stdout = None,
                    _ => self.stderr = None,
                }
            }
        }
    }

    /// Reads the remaining output. A process outside the group may keep the pipe open forever, hence the limit.
    fn drain(&mut self, until: Instant) {
        self.remove(self.process.as_raw_fd());
        while (self.stdout.is_some() || self.stderr.is_some()) && Instant::now() < until {
            for token in self.wait(until).into_iter().flatten() {
                match token {
                    STDOUT | STDERR => self.read(token),
                    _ => self.remove(self.shared.stop.as_raw_fd()),
                }
            }
        }
    }
}

/// Signals the process group. Errors mean that it has already exited.
fn kill(child: &Child, signal: Signal) {
    let _ = kill_process_group(Pid::from_child(child), signal);
}
