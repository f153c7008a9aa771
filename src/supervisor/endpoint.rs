//! Where a running machine is known to others: its directory, its record, and the requests that come to it. One for all
//! the machines that follow each other under one name when they are started again.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::requests::{self, NotRunning};
use crate::console::hub::Hub;
use crate::console::stream_log::StreamLog;
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::guest::signal;
use crate::request::server::Server;
use crate::state_dir::record::{Record, State, now_ms};
use crate::state_dir::{self, MachineDir, husk_log};
use crate::sys::SignalFd;

/// A machine's place among its user's machines.
#[derive(Debug)]
pub struct ControlEndpoint {
    pub(super) server: Server,
    pub(super) record: Record,
    hub: Option<Arc<Hub>>,
    /// Whether whoever started the machine in the background is still to be told that it runs.
    unannounced: bool,
    /// Whether somebody asked for the machine's end, so that it is not started again.
    pub(super) end_wanted: bool,
    /// When an end that was asked for in order is made.
    pub(super) stop_by: Option<Instant>,
    started: Instant,
    // So late that what is in it goes first.
    pub(super) dir: MachineDir,
}

impl ControlEndpoint {
    /// Opens for requests, writes `record` down, and for a machine in the background starts its log of at most
    /// `log_max_bytes`.
    pub fn open(dir: MachineDir, record: Record, log_max_bytes: u64) -> Result<ControlEndpoint> {
        let server = Server::listen(&dir.file(state_dir::CONTROL))?;
        let hub = if record.detached {
            let path = dir.file(state_dir::STREAMS_LOG);
            let log = StreamLog::open(path, log_max_bytes).context("open the machine's log")?;
            Some(Arc::new(Hub::new(log)))
        } else {
            None
        };
        dir.write(&record)?;
        let (unannounced, started) = (record.detached, Instant::now());
        Ok(ControlEndpoint { server, record, hub, unannounced, end_wanted: false, stop_by: None, started, dir })
    }

    /// The path of a file in the machine's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.file(name)
    }

    /// Where the machine's streams go, if it runs in the background.
    pub fn hub(&self) -> Option<&Arc<Hub>> {
        self.hub.as_ref()
    }

    /// Whether the machine runs in the background, where no terminal and no input of ours is its own.
    pub fn is_detached(&self) -> bool {
        self.hub.is_some()
    }

    /// Whether the machine has run, and whoever started it knows.
    pub fn is_announced(&self) -> bool {
        !self.unannounced
    }

    /// The signal that asks the machine's process for its end.
    pub(super) fn stop_signal(&self) -> u8 {
        self.record.stop_signal
    }

    /// Removes what killed machines left behind. To be called while the guest has something to do.
    pub(super) fn remove_stale(&self) {
        if let Err(error) = self.dir.state_dir().remove_stale() {
            log::info!("clean up after killed machines: {error:#}");
        }
    }

    /// How often it was started again.
    pub fn restarts(&self) -> u32 {
        self.record.restarts
    }

    /// How long the machine has been there.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Writes down what the machine does now.
    pub(super) fn enter(&mut self, state: State) -> Result<()> {
        self.record.state = state;
        self.write_down()
    }

    /// Writes down what is known of the machine now.
    pub(super) fn write_down(&self) -> Result<()> {
        self.dir.write(&self.record)
    }

    /// Notes that the machine runs. Whoever started it in the background is told its ID, and then left alone. Harmless
    /// when repeated.
    pub(super) fn note_running(&mut self) -> Result<()> {
        if self.record.state == State::Starting {
            self.enter(State::Running { since_ms: now_ms() })?;
        }
        if std::mem::take(&mut self.unannounced) {
            // If they are gone already, nobody would ever know of this machine.
            writeln!(std::io::stdout(), "{}", self.dir.id()).context("report that the machine is running")?;
            let nowhere = File::options().write(true).open("/dev/null").context("open /dev/null")?;
            rustix::stdio::dup2_stdout(&nowhere).context("leave standard output")?;
            husk_log::begin(self.file(state_dir::HUSK_LOG)).context("start husk's log")?;
            self.dir.keep();
        }
        Ok(())
    }

    /// How long to wait at most for an end that was asked for, in milliseconds; -1 is for ever. Makes it when time is
    /// up.
    pub(super) fn timeout_ms(&self, exit_latch: &ExitLatch) -> i32 {
        let Some(stop_by) = self.stop_by else { return -1 };
        let left = stop_by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            exit_latch.declare(ExitReason::Killed(libc::SIGKILL));
        }
        i32::try_from(left.as_millis()).unwrap_or(i32::MAX)
    }

    /// Waits `wait` before the machine is started again, and says so to who asks; false if its end is asked for by
    /// then, by a request or by one of `signals`.
    pub fn wait_to_restart(&mut self, wait: Duration, signals: &SignalFd) -> Result<bool> {
        self.enter(State::Restarting { since_ms: now_ms() })?;
        self.stop_by = None;
        let until = Instant::now() + wait;
        let epoll = Epoll::new().context("epoll")?;
        for fd in [self.as_raw_fd(), signals.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).context("watch requests")?;
        }
        while !self.end_wanted {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.record.restarts += 1;
                self.enter(State::Starting)?;
                return Ok(true);
            }
            // An interrupted wait is a short one.
            let _ = epoll.wait(left.as_millis() as i32 + 1, &mut [EpollEvent::default()]);
            while let Some(number) = signals.read().context("read a signal")? {
                self.end_wanted |= signal::asks_for_end(number);
            }
            self.answer_without_guest("the machine has failed and is being restarted: try again");
        }
        Ok(false)
    }

    /// Wants the end of the machine, and makes it when `timeout` has passed, or when it was to be made before.
    pub(super) fn want_end_within(&mut self, timeout: Duration) {
        self.end_wanted = true;
        let stop_by = Instant::now().checked_add(timeout);
        self.stop_by = match (self.stop_by, stop_by) {
            (Some(earlier), Some(later)) => Some(earlier.min(later)),
            (earlier, later) => earlier.or(later),
        };
    }

    /// Answers those who ask while there is no guest: its end is all that can be had, anything else is refused for the
    /// reason `why`. Returns whether it is wanted at once.
    pub(super) fn answer_without_guest(&mut self, why: &str) -> bool {
        let mut recipient = NotRunning { endpoint: self, why, at_once: false };
        requests::answer(&mut recipient);
        recipient.at_once
    }

    /// Notes that the machine has ended for good, and tells who waits for it. `reason` is what was not the guest's own
    /// doing.
    pub fn close(mut self, code: u8, reason: Option<String>) -> Result<()> {
        if let Some(hub) = &self.hub {
            hub.close(self.end_wanted);
        }
        let keep = self.record.keep && self.dir.is_kept();
        let written = if keep { self.enter(State::Exited { code, at_ms: now_ms(), reason }) } else { Ok(()) };
        if !keep {
            self.dir.forget();
        }
        self.server.tell_end(code);
        for socket in [state_dir::CONTROL, &format!("{}_{}", state_dir::VSOCK, husk_protocol::PORT)] {
            let _ = fs::remove_file(self.file(socket));
        }
        written
    }
}

impl AsRawFd for ControlEndpoint {
    fn as_raw_fd(&self) -> RawFd {
        self.server.as_raw_fd()
    }
}
