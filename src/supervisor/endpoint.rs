//! A running machine's presence on the host: its directory, its record and its control socket. One endpoint serves all
//! restarts of a machine under the same name.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::notify;
use super::requests::{self, NotRunning};
use crate::console::hub::Hub;
use crate::console::stream_log::StreamLog;
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::guest::signal;
use crate::request::server::Server;
use crate::state_dir::events::Event;
use crate::state_dir::health::{Health, Probe};
use crate::state_dir::record::{Record, State, now_ms};
use crate::state_dir::{self, MachineDir, husk_log};
use crate::sys::SignalFd;
use crate::virtio::log_rate::LogRate;

/// What the creator of a machine's container reads when it is created.
pub const CREATED: &[u8] = b"created\n";

/// What notes that memory was short.
type Mark = Box<dyn Fn() -> Result<()>>;

/// A machine's entry among the user's machines.
pub struct ControlEndpoint {
    pub(super) server: Server,
    pub(super) record: Record,
    hub: Option<Arc<Hub>>,
    /// Whether the machine has not run yet: the process that started it in the background has not been notified.
    unannounced: bool,
    /// Whether a stop was requested, so that the machine is not restarted.
    pub(super) end_requested: bool,
    /// When a requested stop becomes a forced one.
    pub(super) stop_by: Option<Instant>,
    /// Whether a stop was requested, as opposed to a signal.
    is_stopped: bool,
    /// Whether it has never run before.
    is_new: bool,
    /// Whether the machine was suspended, or has not continued since.
    pub(super) is_suspended: bool,
    /// The ID of the snapshot from which the machine is about to be restored.
    pub(super) restored_from: Option<String>,
    /// Who waits until the container of the machine is created.
    creator: Option<UnixStream>,
    /// How often the guest may have it noted that it is short of memory.
    out_of_memory_rate: LogRate,
    /// What is done the first time.
    mark_out_of_memory: Option<Mark>,
    started: Instant,
    // Declared last, so that the files in it are dropped first.
    pub(super) dir: MachineDir,
}

impl ControlEndpoint {
    /// Opens the control socket, writes `record`, and for a machine that runs in the background or stays starts its log of at
    /// most `log_max_bytes`.
    pub fn open(dir: MachineDir, record: Record, log_max_bytes: u64) -> Result<ControlEndpoint> {
        let server = Server::listen(&dir.file(state_dir::CONTROL))?;
        let hub = if record.detached || record.keep {
            let path = dir.file(state_dir::STREAMS_LOG);
            let log = StreamLog::open(path, log_max_bytes).context("open the machine's log")?;
            Some(Arc::new(Hub::new(log)))
        } else {
            None
        };
        let is_new = dir.record().is_err();
        dir.write(&record)?;
        let (unannounced, started) = (true, Instant::now());
        let (end_requested, stop_by) = (false, None);
        let is_complete = |path: &PathBuf| path.join(state_dir::SNAPSHOT_STATE).exists();
        let is_suspended = record.snapshot.as_ref().is_some_and(is_complete);
        Ok(ControlEndpoint {
            server,
            record,
            hub,
            unannounced,
            end_requested,
            stop_by,
            is_stopped: false,
            is_new,
            is_suspended,
            restored_from: None,
            creator: None,
            out_of_memory_rate: LogRate::default(),
            mark_out_of_memory: None,
            started,
            dir,
        })
    }

    /// Notes the ID of the snapshot from which the machine is about to be restored.
    pub fn note_origin(&mut self, snapshot_id: &str) {
        self.restored_from = Some(snapshot_id.to_owned());
    }

    /// Notes who waits until the container of the machine is created, and reads a line that says so then.
    pub fn report_creation_to(&mut self, creator: UnixStream) {
        self.creator = Some(creator);
    }

    /// Whether the container of the machine is created, and its creator knows that.
    pub fn is_created(&self) -> bool {
        self.creator.is_none()
    }

    /// Tells the creator of the machine's container that it is created. Does nothing when repeated.
    pub(super) fn note_created(&mut self) {
        if let Some(mut creator) = self.creator.take() {
            // One that is gone has cleaned up, or will.
            let _ = creator.write_all(CREATED);
        }
    }

    /// The path of a file in the machine's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.file(name)
    }

    /// The log of the machine's streams and those who are attached to them, if it runs in the background or stays.
    pub fn hub(&self) -> Option<&Arc<Hub>> {
        self.hub.as_ref()
    }

    /// Whether the guest has run, and its process if it has one.
    pub fn has_run(&self) -> bool {
        self.record.state != State::Starting
    }

    /// Whether the machine runs in the background, without this process's terminal and input.
    pub fn is_detached(&self) -> bool {
        self.record.detached
    }

    /// Whether the machine has run, and the process that started it was notified.
    pub fn was_announced(&self) -> bool {
        !self.unannounced
    }

    /// Whether the machine may be restarted: it has run, and nobody has asked for its end or has suspended it.
    pub fn may_run_again(&self) -> bool {
        self.was_announced() && !self.end_requested && !self.is_suspended
    }

    /// The signal that asks the machine's process to terminate.
    pub(super) fn stop_signal(&self) -> u8 {
        self.record.stop_signal
    }

    /// Removes what killed machines left behind. Best called while the guest is busy booting.
    pub(super) fn remove_stale(&self) {
        if let Err(error) = self.dir.state_dir().remove_stale() {
            log::info!("clean up after killed machines: {error:#}");
        }
    }

    /// Notes which layers the sandbox lacks. They are recorded when the machine is running.
    pub(super) fn note_sandbox(&mut self, lacks: Vec<String>) {
        for layer in &lacks {
            log::info!("the sandbox lacks a layer that this host does not allow: {layer}");
        }
        self.record.sandbox_lacks = lacks;
    }

    /// How many times the machine was restarted.
    pub fn restarts(&self) -> u32 {
        self.record.restarts
    }

    /// The time since the machine was created.
    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Removes the snapshot that belongs to the machine, which has its memory open, and then forgets it.
    pub(super) fn discard_snapshot(&mut self) -> Result<()> {
        if let Some(path) = &self.record.snapshot {
            state_dir::remove_snapshot(path).unwrap_or_else(|error| log::warn!("{error:#}"));
        }
        self.record.snapshot = None;
        self.write_record()
    }

    /// Notes what happened to the machine.
    pub(super) fn note(&self, events: impl IntoIterator<Item = Event>) {
        self.dir.state_dir().note(&events.into_iter().collect::<Vec<_>>());
    }

    /// Notes that a signal was sent to the machine's process, or to the machine.
    pub(super) fn note_signal(&self, signal: u8) {
        self.note([Event::of(&self.record, "kill").with("signal", signal)]);
    }

    /// Notes that a stop was requested.
    pub(super) fn note_stop(&mut self) {
        self.is_stopped = true;
        self.note_signal(self.record.stop_signal);
    }

    /// Notes that the machine has ended, and will be restarted.
    pub fn note_failure(&self, code: u8) {
        self.note([Event::of(&self.record, "die").with("exitCode", code)]);
    }

    /// Notes the results of health checks.
    pub(super) fn note_health(&mut self, probes: Vec<Probe>, in_start_period: bool) -> Result<()> {
        for probe in probes {
            let (Some(health), Some(check)) = (&mut self.record.health, &self.record.health_check) else {
                return Ok(());
            };
            let has_changed = health.note(check, probe, in_start_period);
            let action = format!("health_status: {}", health.status.name());
            if has_changed {
                self.note([Event::of(&self.record, action)]);
            }
            self.write_record()?;
        }
        Ok(())
    }

    /// Has this done when the guest's kernel has killed processes because memory was short: the first time only.
    pub fn mark_out_of_memory_by(&mut self, mark: impl Fn() -> Result<()> + 'static) {
        self.mark_out_of_memory = Some(Box::new(mark));
    }

    /// Whether the guest's kernel has killed processes because memory was short.
    pub fn ran_out_of_memory(&self) -> bool {
        self.record.oom_killed
    }

    /// Notes that the guest's kernel has killed processes because memory was short.
    pub(super) fn note_out_of_memory(&mut self) -> Result<()> {
        if self.out_of_memory_rate.allows() {
            self.note([Event::of(&self.record, "oom")]);
        }
        if std::mem::replace(&mut self.record.oom_killed, true) {
            return Ok(());
        }
        // The machine goes on without it.
        if let Err(error) = self.mark_out_of_memory.as_ref().map_or(Ok(()), |mark| mark()) {
            log::warn!("{error:#}");
        }
        self.write_record()
    }

    /// Records the machine's new state.
    pub(super) fn enter(&mut self, state: State) -> Result<()> {
        self.record.state = state;
        self.write_record()
    }

    /// Writes the current record.
    pub(super) fn write_record(&self) -> Result<()> {
        self.dir.write(&self.record)
    }

    /// Records that the machine is running. The process that started it in the background receives its ID and is then
    /// detached. Does nothing when repeated.
    pub(super) fn note_running(&mut self) -> Result<()> {
        if self.record.state == State::Starting {
            self.record.oom_killed = false;
            self.record.health = self.record.health_check.as_ref().map(|_| Health::default());
            self.enter(State::Running { since_ms: now_ms() })?;
            let created = std::mem::take(&mut self.is_new).then(|| Event::of(&self.record, "create"));
            self.note(created.into_iter().chain([Event::of(&self.record, "start")]));
            if std::mem::take(&mut self.is_suspended) {
                self.discard_snapshot()?;
            }
        }
        if std::mem::take(&mut self.unannounced) {
            if self.record.detached {
                self.detach()?;
            }
            if self.record.detached || self.record.keep {
                self.dir.keep();
            }
            notify::ready();
        }
        Ok(())
    }

    /// Notifies the process that started the machine in the background, and leaves its streams.
    fn detach(&self) -> Result<()> {
        // If that process is gone, the machine would go unnoticed.
        writeln!(std::io::stdout(), "{}", self.dir.id()).context("report that the machine is running")?;
        let nowhere = File::options().write(true).open("/dev/null").context("open /dev/null")?;
        rustix::stdio::dup2_stdout(&nowhere).context("leave standard output")?;
        husk_log::begin(self.file(state_dir::HUSK_LOG)).context("start husk's log")
    }

    /// The time until a requested stop is forced, in milliseconds; -1 if there is none. Forces the stop when the time
    /// is up.
    pub(super) fn timeout_ms(&self, exit_latch: &ExitLatch) -> i32 {
        let Some(stop_by) = self.stop_by else { return -1 };
        let left = stop_by.saturating_duration_since(Instant::now());
        if left.is_zero() {
            exit_latch.declare(ExitReason::Killed(libc::SIGKILL));
        }
        i32::try_from(left.as_millis()).unwrap_or(i32::MAX)
    }

    /// Waits `wait` before a restart, and reports that state to clients. Returns false if a stop is requested
    /// meanwhile, by a request or by one of `signals`.
    pub fn wait_to_restart(&mut self, wait: Duration, signals: &SignalFd) -> Result<bool> {
        self.enter(State::Restarting { since_ms: now_ms() })?;
        self.stop_by = None;
        let until = Instant::now() + wait;
        let epoll = Epoll::new().context("epoll")?;
        for fd in [self.as_raw_fd(), signals.as_raw_fd()] {
            epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).context("watch requests")?;
        }
        while !self.end_requested {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                self.record.restarts += 1;
                self.enter(State::Starting)?;
                return Ok(true);
            }
            // An interrupted wait only makes this one shorter.
            let _ = epoll.wait(left.as_millis() as i32 + 1, &mut [EpollEvent::default()]);
            while let Some(number) = signals.read().context("read a signal")? {
                self.end_requested |= signal::is_termination(number);
            }
            self.answer_without_guest("the machine has failed and is being restarted: try again");
        }
        Ok(false)
    }

    /// Requests the end of the machine and forces it after `timeout`, or at an earlier deadline that was already set.
    pub(super) fn request_end_within(&mut self, timeout: Duration) {
        self.end_requested = true;
        let stop_by = Instant::now().checked_add(timeout);
        self.stop_by = match (self.stop_by, stop_by) {
            (Some(earlier), Some(later)) => Some(earlier.min(later)),
            (earlier, later) => earlier.or(later),
        };
    }

    /// Whether a stop was requested of a machine whose disks are being prepared. Other requests are refused.
    pub fn is_to_end(&mut self) -> bool {
        self.answer_without_guest("the machine is still starting: try again");
        self.end_requested
    }

    /// Answers requests while there is no guest: only a stop is possible, anything else is refused with the reason
    /// `why`. Returns whether an immediate end was requested.
    pub(super) fn answer_without_guest(&mut self, why: &str) -> bool {
        let mut recipient = NotRunning { endpoint: self, why, at_once: false };
        requests::answer(&mut recipient);
        recipient.at_once
    }

    /// Records that the machine has ended for good, and notifies waiting clients. `reason` is a cause other than the
    /// guest's own exit.
    pub fn close(mut self, code: u8, reason: Option<String>) -> Result<()> {
        if let Some(hub) = &self.hub {
            hub.close(self.end_requested);
        }
        let keep = self.record.keep && self.dir.is_kept();
        let end = match self.is_suspended {
            true => State::Suspended { since_ms: now_ms() },
            false => State::Exited { code, at_ms: now_ms(), reason },
        };
        let written = if keep { self.enter(end) } else { Ok(()) };
        if !keep {
            self.dir.forget();
        }
        if self.has_run() {
            let died = Event::of(&self.record, "die").with("exitCode", code);
            let stopped = self.is_stopped.then(|| Event::of(&self.record, "stop"));
            let removed = (!keep).then(|| Event::of(&self.record, "destroy"));
            self.note([Some(died), stopped, removed].into_iter().flatten());
        }
        self.server.notify_end(code);
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
