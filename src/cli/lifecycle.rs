//! Lifecycle flags of `run` and `boot`: the machine's name, running in the background, restarting and removal.

mod launch;
mod restart;

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Args;

pub use self::launch::{
    become_stopped, check_restartable, run_behind, spawn, spawn_detached, spawn_fed, start_stopped,
};
pub use self::restart::RestartPolicy;
use super::argv::{self, IN_BACKGROUND};
use super::exit::Exit;
use super::labels::LabelFlags;
use super::size;
use crate::config::{HealthCheck, MachineConfig};
use crate::console::stream_log;
use crate::monitor::release;
use crate::state_dir::events::Event;
use crate::state_dir::identity::IdentityRecord;
use crate::state_dir::mounts::MountRecord;
use crate::state_dir::origin::Origin;
use crate::state_dir::record::{Inherited, Record, State, now_ms};
use crate::state_dir::{MachineDir, StateDir, names};
use crate::supervisor::{self, ControlEndpoint};
use crate::sys::SignalFd;

/// Exponential backoff before a machine that failed is restarted.
const INITIAL_BACKOFF: Duration = Duration::from_millis(100);
const MAX_BACKOFF: Duration = Duration::from_secs(60);
/// After a run of this length the backoff starts over.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// Hidden flag: the ID of the machine to start again.
const AGAIN_FLAG: &str = "--again";
/// Hidden flag: it runs in the foreground, however it was started before.
const ATTACHED_FLAG: &str = "--attached";
/// Hidden flag: signals do not end the machine.
const UNSIGNALED_FLAG: &str = "--unsignaled";

// How a machine runs: its name, whether it is kept, and whether it is restarted.
#[derive(Debug, Args)]
pub(super) struct LifecycleArgs {
    /// Run the machine in the background and print its ID
    #[arg(short, long)]
    detach: bool,

    /// Assign a name to the machine
    #[arg(long, value_name = "NAME", value_parser = name)]
    pub name: Option<String>,

    /// Automatically remove the machine when it exits, with its logs and its changes; always on in the foreground, unless `husk
    /// run` has --name
    #[arg(long)]
    rm: bool,

    /// Restart policy to apply when the machine exits: no, on-failure, on-failure:MAX_RETRIES, always or unless-stopped
    #[arg(long, value_name = "POLICY", default_value = "no", hide_default_value = true, conflicts_with = "rm")]
    restart: RestartPolicy,

    /// Write the machine's ID to a file, which must not exist
    #[arg(long, value_name = "FILE")]
    cidfile: Option<PathBuf>,

    /// Maximum size of the output kept for `husk logs` [default: 16M]
    #[arg(long, value_name = "SIZE", value_parser = log_max)]
    log_max: Option<u64>,

    /// Option of the log: max-size=SIZE
    #[arg(long, value_name = "KEY=VALUE", value_parser = log_option, hide_short_help = true)]
    log_opt: Vec<LogOption>,

    #[command(flatten)]
    labels: LabelFlags,

    #[arg(long, hide = true)]
    in_background: bool,

    /// The ID of the stopped machine to start again
    #[arg(long, hide = true)]
    again: Option<String>,

    #[arg(long, hide = true)]
    attached: bool,

    /// Another process stands before this one, and ends by the signals that both get
    #[arg(long, hide = true)]
    unsignaled: bool,

    /// What becomes of a machine in the foreground.
    #[arg(skip)]
    foreground: Foreground,
}

/// An option of Docker's logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LogOption {
    MaxBytes(u64),
    /// A log has this anyway, or nothing depends on it.
    Idle,
}

/// What becomes of a machine that does not run in the background.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Foreground {
    /// It is removed when it ends.
    #[default]
    Goes,
    /// It stays if it has a name.
    StaysIfNamed,
    /// It is only created.
    Created,
}

/// The contents of a machine's record, apart from its name and configuration.
pub struct RecordInfo {
    /// The image or kernel, as specified by the user.
    pub image: String,
    /// The image's identity, if it has one.
    pub image_id: Option<String>,
    /// The command, if known.
    pub command: Vec<String>,
    /// What the processes of `husk exec` inherit.
    pub process: Option<Inherited>,
    /// What it is called and how it is connected, with husk's init.
    pub identity: Option<IdentityRecord>,
    /// What it mounts.
    pub mounts: Vec<MountRecord>,
    /// The signal that stops its process.
    pub stop_signal: u8,
    /// How long a stop waits for that.
    pub stop_timeout: Option<Duration>,
    /// How its health is checked.
    pub health_check: Option<HealthCheck>,
}

impl LifecycleArgs {
    /// Of a machine without a name, in the foreground.
    pub fn foreground() -> LifecycleArgs {
        LifecycleArgs {
            detach: false,
            name: None,
            rm: false,
            restart: RestartPolicy::default(),
            cidfile: None,
            log_max: None,
            log_opt: Vec::new(),
            labels: LabelFlags::default(),
            in_background: false,
            again: None,
            attached: false,
            unsignaled: false,
            foreground: Foreground::Goes,
        }
    }

    /// Determines what becomes of the machine if it does not run in the background.
    pub fn in_foreground(&mut self, foreground: Foreground) {
        self.foreground = foreground;
    }

    /// Runs the machine in the background.
    pub fn detach(&mut self) {
        self.detach = true;
    }

    /// The maximum size of the log, if the user has set it.
    fn log_max_bytes(&self) -> Option<u64> {
        let given = self.log_opt.iter().rev().find_map(|option| match option {
            LogOption::MaxBytes(bytes) => Some(*bytes),
            LogOption::Idle => None,
        });
        self.log_max.or(given)
    }

    /// Whether the machine is created and not started.
    pub fn only_creates(&self) -> bool {
        self.foreground == Foreground::Created && self.again.is_none()
    }

    /// Whether this process only starts the one that runs the machine in the background.
    pub fn spawns_detached(&self) -> bool {
        self.detach && !self.in_background && !self.attached
    }

    /// Whether signals are to end the process that the user sees, and leave the machine running: another one has to run it.
    pub fn needs_front(&self, sig_proxy: bool) -> bool {
        !sig_proxy && !self.is_detached() && !self.is_again() && !self.unsignaled && !self.only_creates()
    }

    /// Whether another process, in front of this one, gets the signals, and may end.
    pub fn is_unsignaled(&self) -> bool {
        self.unsignaled
    }

    /// Whether the machine runs without this process's terminal and input.
    pub fn is_detached(&self) -> bool {
        (self.detach || self.in_background) && !self.attached
    }

    /// Whether the machine stays when it has ended, until it is removed.
    pub fn stays(&self) -> bool {
        let stays_in_foreground = match self.foreground {
            Foreground::Goes => false,
            Foreground::StaysIfNamed => self.name.is_some(),
            Foreground::Created => true,
        };
        !self.rm && (self.detach || self.again.is_some() || stays_in_foreground)
    }

    /// Whether this process's terminal and input need not be what the machine's process expects.
    pub fn ignores_terminal(&self) -> bool {
        self.is_detached() || self.attached || self.only_creates()
    }

    /// Whether the machine has run before.
    pub fn is_again(&self) -> bool {
        self.again.is_some()
    }

    /// Whether the machine may be restarted within this process.
    pub fn may_restart(&self) -> bool {
        self.restart.may_restart()
    }

    /// The identity of the image that a machine which is started again had before.
    pub fn earlier_image(&self) -> Result<Option<String>> {
        let Some(id) = &self.again else { return Ok(None) };
        Ok(StateDir::open()?.find(id)?.record()?.image_id.clone())
    }

    /// Fails if a label is invalid.
    pub fn check_labels(&self) -> Result<()> {
        self.labels.labels().map(drop)
    }

    /// Fails if the file for the machine's ID exists.
    pub fn check_cidfile(&self) -> Result<()> {
        let taken = self.again.is_none() && self.cidfile.as_ref().is_some_and(|path| path.exists());
        ensure!(
            !taken,
            "{} exists: make sure that its machine is not needed, and remove it",
            self.cidfile.as_deref().unwrap_or(Path::new("")).display()
        );
        Ok(())
    }

    /// Creates the machine's directory, with its name. In the background this also leaves the terminal's session.
    ///
    /// From then on a signal does not end this process, which would leave the directory behind: [`Self::run_with_restarts`]
    /// reads it.
    pub fn dir(&mut self) -> Result<MachineDir> {
        supervisor::block_signals(false)?;
        if self.in_background {
            rustix::process::setsid().context("leave the terminal")?;
        }
        let state_dir = StateDir::open()?;
        let Some(id) = &self.again else { return state_dir.create(self.name.as_deref()) };
        let dir = state_dir.reopen(id)?;
        // It may have been renamed.
        self.name = dir.record()?.name;
        Ok(dir)
    }

    /// Opens the machine's endpoint.
    pub fn endpoint(&self, dir: MachineDir, info: RecordInfo, config: &MachineConfig) -> Result<ControlEndpoint> {
        let record = self.begin(&dir, info, config, State::Starting)?;
        ControlEndpoint::open(dir, record, self.log_max_bytes().unwrap_or(stream_log::DEFAULT_MAX_BYTES))
    }

    /// Leaves a machine that was created, and not started, to `husk start`. Prints its ID.
    pub fn leave_created(&self, mut dir: MachineDir, info: RecordInfo, config: &MachineConfig) -> Result<()> {
        let record = self.begin(&dir, info, config, State::Created)?;
        dir.write(&record)?;
        dir.keep();
        dir.state_dir().note(&[Event::of(&record, "create")]);
        super::print(&format!("{}\n", dir.id()))
    }

    /// The record of a machine that begins in `state`. Notes how it was started, and writes its ID where that is wanted.
    fn begin(&self, dir: &MachineDir, info: RecordInfo, config: &MachineConfig, state: State) -> Result<Record> {
        let RecordInfo { image, image_id, command, process, identity, mounts, stop_signal, stop_timeout, health_check } =
            info;
        let earlier = if self.again.is_some() { Some(dir.record()?) } else { None };
        let labels = self.labels.labels()?;
        if earlier.is_none() {
            if self.stays() || state == State::Created {
                let mut words = argv::all().to_vec();
                // What husk has added, each before the user's own words.
                for ours in [IN_BACKGROUND, UNSIGNALED_FLAG] {
                    if let Some(place) = words.iter().position(|word| word == ours) {
                        words.remove(place);
                    }
                }
                Origin::here(words)?.write(dir)?;
            }
            self.write_cidfile(dir)?;
        }
        // A suspended machine continues without the flags that it was started with.
        let earlier_check = earlier
            .as_ref()
            .filter(|earlier| earlier.snapshot.is_some())
            .and_then(|earlier| earlier.health_check.clone());
        Ok(Record {
            id: dir.id(),
            name: self.name.clone(),
            pid: std::process::id(),
            image,
            image_id: image_id.or_else(|| earlier.as_ref()?.image_id.clone()),
            command,
            created_ms: earlier.as_ref().map_or_else(now_ms, |earlier| earlier.created_ms),
            max_retries: self.restart.max_retries,
            restarts_always: self.restart.always,
            log_max_bytes: self.log_max_bytes(),
            snapshot: earlier.and_then(|earlier| earlier.snapshot),
            state,
            restarts: 0,
            detached: self.is_detached(),
            keep: self.stays(),
            stop_signal,
            labels,
            stop_timeout_ms: stop_timeout.map(|timeout| u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)),
            health_check: health_check.or(earlier_check),
            health: None,
            oom_killed: false,
            process,
            identity,
            mounts,
            sandbox_lacks: Vec::new(),
            config: config.clone(),
        })
    }

    fn write_cidfile(&self, dir: &MachineDir) -> Result<()> {
        let Some(path) = &self.cidfile else { return Ok(()) };
        let written = File::create_new(path).and_then(|mut file| file.write_all(dir.id().as_bytes()));
        if written.as_ref().is_err_and(|error| error.kind() == ErrorKind::AlreadyExists) {
            return self.check_cidfile();
        }
        written.with_context(|| format!("write {}", path.display()))
    }

    /// Runs the machine with `run`, restarts it by the restart policy, and records its exit. Must be called before
    /// other threads exist, so that signals stay blocked in all of them until the exit is recorded.
    pub fn run_with_restarts(
        &self,
        mut endpoint: ControlEndpoint,
        has_session: bool,
        mut run: impl FnMut(&mut ControlEndpoint, &SignalFd) -> Result<Exit>,
    ) -> Result<Exit> {
        let mut signals = supervisor::block_signals(has_session)?;
        if self.unsignaled {
            // The others stay pending.
            signals = SignalFd::block(&[libc::SIGWINCH]).context("block signals")?;
        }
        let mut wait = INITIAL_BACKOFF;
        loop {
            let started = Instant::now();
            let ended = run(&mut endpoint, &signals);
            let code = ended.as_ref().map_or(Exit::NotRun.code(), |exit| exit.code());
            let again = self.restart.restarts_after(code, endpoint.restarts()) && endpoint.may_run_again();
            if started.elapsed() > STABLE_AFTER {
                wait = INITIAL_BACKOFF;
            }
            if again {
                endpoint.note_failure(code);
                release::await_exit();
            }
            if !again || !endpoint.wait_to_restart(wait, &signals)? {
                if !endpoint.was_announced() && self.again.is_none() {
                    // There is no such machine.
                    self.cidfile.iter().for_each(|path| drop(fs::remove_file(path)));
                }
                let reason = ended.as_ref().err().map(|error| format!("{error:#}"));
                let noted = endpoint.close(code, reason);
                // Signals received by now have nothing left to end.
                while signals.read().is_ok_and(|signal| signal.is_some()) {}
                return ended.and_then(|exit| noted.map(|()| exit));
            }
            if let Err(error) = ended {
                super::report(&error);
            }
            wait = (2 * wait).min(MAX_BACKOFF);
        }
    }
}

fn name(text: &str) -> Result<String, String> {
    names::check(text).map(|()| text.to_owned()).map_err(|error| error.to_string())
}

/// Parses an option of Docker's logs.
fn log_option(text: &str) -> Result<LogOption, String> {
    match text.split_once('=') {
        // Smaller logs would not hold what `husk logs` needs.
        Some(("max-size", size)) => Ok(LogOption::MaxBytes(size::bytes(size)?.max(stream_log::MIN_BYTES))),
        Some(("max-file" | "mode" | "compress" | "tag", _)) => Ok(LogOption::Idle),
        _ => Err("use max-size=SIZE, or --log-max SIZE".into()),
    }
}

/// Parses the maximum size of a log.
fn log_max(text: &str) -> Result<u64, String> {
    let bytes = size::bytes(text)?;
    let least_kib = stream_log::MIN_BYTES >> 10;
    if bytes >= stream_log::MIN_BYTES { Ok(bytes) } else { Err(format!("the minimum log size is {least_kib}K")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_has_the_size_of_dockers_option() {
        assert_eq!(log_option("max-size=10m"), Ok(LogOption::MaxBytes(10 << 20)));
        assert_eq!(log_option("max-size=1"), Ok(LogOption::MaxBytes(stream_log::MIN_BYTES)));
        assert_eq!(log_option("max-file=3"), Ok(LogOption::Idle));
        assert!(log_option("path=/x").unwrap_err().contains("--log-max"));
    }
}
