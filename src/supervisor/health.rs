//! Checks the health of a machine from time to time: runs a command in it, on a thread of its own, for the main thread to note
//! the results.

use std::os::fd::{AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result};
use husk_protocol::{Process, ToHost};
use vmm_sys_util::eventfd::EventFd;

use crate::config::HealthCheck;
use crate::guest::capture;
use crate::sandbox;
use crate::state_dir::health::Probe;
use crate::state_dir::record::Inherited;
use crate::sys::event;

/// The maximum length of the output that is kept, as in Docker.
const OUTPUT_MAX_BYTES: usize = 4096;

/// The checks of a running machine. Dropping it ends them; one that is under way is forgotten.
pub(super) struct Prober {
    shared: Arc<Shared>,
    started: Instant,
    start_period: Duration,
    /// The thread ends when this is dropped.
    _stop: Sender<()>,
}

struct Shared {
    results: Mutex<Vec<Probe>>,
    /// Readable when there are results.
    arrived: EventFd,
    is_paused: AtomicBool,
    /// Whether the machine has been healthy.
    is_ready: AtomicBool,
}

impl Prober {
    /// Starts to check the machine whose vsock socket is at `vsock`, with a process that inherits from its own.
    pub fn start(check: HealthCheck, inherited: &Inherited, vsock: PathBuf) -> Result<Prober> {
        let shared = Arc::new(Shared {
            results: Mutex::default(),
            arrived: event::create().context("watch the health of the machine")?,
            is_paused: AtomicBool::new(false),
            is_ready: AtomicBool::new(false),
        });
        let (stop, stopped) = mpsc::channel();
        let (started, start_period) = (Instant::now(), Duration::from_millis(check.start_period_ms));
        let process = inherited.process(check.command.iter().map(|word| word.clone().into_bytes()).collect());
        let for_thread = shared.clone();
        let run = move || for_thread.probe_until(&stopped, &check, &process, &vsock, started);
        sandbox::spawn("health", run).context("start a thread")?;
        Ok(Prober { shared, started, start_period, _stop: stop })
    }

    /// Whether the machine has only just started.
    pub fn in_start_period(&self) -> bool {
        self.started.elapsed() < self.start_period
    }

    /// Notes whether the machine is paused, and cannot be checked.
    pub fn set_paused(&self, is_paused: bool) {
        self.shared.is_paused.store(is_paused, Ordering::Relaxed);
    }

    /// The new results.
    pub fn take(&self) -> Vec<Probe> {
        let _ = self.shared.arrived.read();
        std::mem::take(&mut *self.shared.results.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl AsRawFd for Prober {
    fn as_raw_fd(&self) -> RawFd {
        self.shared.arrived.as_raw_fd()
    }
}

impl Shared {
    fn probe_until(
        &self,
        stopped: &Receiver<()>,
        check: &HealthCheck,
        process: &Process,
        vsock: &Path,
        started: Instant,
    ) {
        loop {
            let is_starting = !self.is_ready.load(Ordering::Relaxed)
                && started.elapsed() < Duration::from_millis(check.start_period_ms);
            let wait_ms = if is_starting { check.start_interval_ms } else { check.interval_ms };
            if stopped.recv_timeout(Duration::from_millis(wait_ms.max(1))) != Err(RecvTimeoutError::Timeout) {
                return;
            }
            if self.is_paused.load(Ordering::Relaxed) {
                continue;
            }
            let probe = probe(vsock, process, Duration::from_millis(check.timeout_ms));
            self.is_ready.fetch_or(probe.exit_code == 0, Ordering::Relaxed);
            self.results.lock().unwrap_or_else(PoisonError::into_inner).push(probe);
            let _ = self.arrived.write(1);
        }
    }
}

/// Checks once, on the calling thread.
pub fn probe(vsock: &Path, process: &Process, timeout: Duration) -> Probe {
    let now = || humantime::format_rfc3339_nanos(SystemTime::now()).to_string();
    let start = now();
    let captured = capture::run(vsock, process, OUTPUT_MAX_BYTES, timeout);
    let (exit_code, output) = match captured {
        Ok(captured) => match captured.end {
            Some(ToHost::Exited(code)) => (i32::from(code), [captured.output, captured.errors].concat()),
            Some(ToHost::Signaled(number)) => (128 + i32::from(number), [captured.output, captured.errors].concat()),
            Some(ToHost::Failed { message, code }) => (i32::from(code), message.into_bytes()),
            Some(_) => (-1, Vec::new()),
            None => (-1, format!("the check took longer than {} s", timeout.as_secs_f64()).into_bytes()),
        },
        Err(error) => (-1, format!("{error:#}").into_bytes()),
    };
    let text = String::from_utf8_lossy(&output);
    let output = crate::foreign::start_of(&text, OUTPUT_MAX_BYTES).to_owned();
    Probe { start, end: now(), exit_code, output }
}
