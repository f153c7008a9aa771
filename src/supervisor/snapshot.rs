//! Takes a snapshot of the machine, step by step, while the main thread goes on with answering.
//!
//! ```text
//! Request ─ begin ─> guest paused: the monitor writes memory, a job copies disks ─ continue_snapshot ─> guest goes on,
//!                    a job makes the snapshot durable ─ conclude ─> Reply
//! with --track:      the guest goes on only after that, with its memory mapped from the snapshot
//! ```

use std::ffi::OsString;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail, ensure};

use super::control::{self, Supervisor, Token};
use super::job::Job;
use crate::config::MachineConfig;
use crate::exit_latch::ExitReason;
use crate::monitor::{BEING_SAVED, PROGRESS_INTERVAL};
use crate::request::server::Caller;
use crate::request::{self, AfterSnapshot, Reply, SnapshotOptions};
use crate::resources::disk::copy;
use crate::resources::disk::stamp::{self, Stamp};
use crate::snapshot::warm::Fingerprint;
use crate::snapshot::{self, Base, Description, DisksInside, Received, SnapshotWriter};
use crate::state_dir;
use crate::state_dir::record::{State, now_ms};

/// Where a machine that waits for its process is saved, and what it was booted with.
#[derive(Debug)]
pub struct Save {
    /// The directory to create.
    pub path: PathBuf,
    /// What the snapshot depends on.
    pub fingerprint: Fingerprint,
}

/// A snapshot that is being taken.
pub(super) struct Snapshot {
    order: Order,
    step: Step,
}

/// What was ordered.
struct Order {
    /// The ID of the snapshot.
    id: String,
    /// That of which it has only the changes, if it is a diff snapshot.
    base: Option<Base>,
    /// Whether the machine remembers what changes from then on.
    tracks: bool,
    /// The machine's configuration, as it becomes part of the snapshot.
    config: MachineConfig,
    then: AfterSnapshot,
    fingerprint: Option<Fingerprint>,
    /// Who gets the reply.
    caller: Option<Caller>,
    /// Whether the guest was paused for this, and has to go on.
    holds_guest: bool,
    /// Whether the power button is to be pressed when it does.
    presses_button: bool,
}

enum Step {
    /// The guest is paused, and its memory and disks are written.
    Writing(Writing),
    /// They are written, and become durable.
    Finishing(Finishing),
}

struct Finishing {
    job: Job<()>,
    /// The memory of the snapshot.
    memory: File,
}

struct Writing {
    writer: SnapshotWriter,
    /// The machine's state, once it and the memory are written.
    state: Option<Vec<u8>>,
    /// The copying of disks, until it is done.
    disks: Option<Job<()>>,
    /// What has come of it.
    copied: Option<Result<()>>,
}

impl Supervisor<'_> {
    /// Saves a machine that waits for its process, and ends it.
    pub(super) fn save_and_end(&mut self, save: &Save) -> Result<()> {
        let config = &self.endpoint.record.config;
        let (config, disks) = snapshot::portable(config, DisksInside::Own, None)?;
        let order = Order {
            id: snapshot::new_id()?,
            base: None,
            tracks: false,
            config,
            then: AfterSnapshot::Stop,
            fingerprint: Some(save.fingerprint.clone()),
            caller: None,
            holds_guest: true,
            presses_button: false,
        };
        self.begin(order, &save.path, &disks)
    }

    /// Begins to write a snapshot to the directory `path`. If the machine is to go on, it does so as soon as its state, memory and
    /// disks are written, and before they are durable. If that fails, it goes on in any case. `caller` gets the reply, unless this
    /// fails.
    pub(super) fn snapshot(&mut self, caller: Caller, path: &Path, options: SnapshotOptions) -> Result<()> {
        ensure!(self.snapshot.is_none(), BEING_SAVED);
        let holds_guest = match self.endpoint.record.state {
            State::Running { .. } => true,
            State::Paused { .. } => false,
            _ => bail!("the machine is still starting: try again"),
        };
        let SnapshotOptions { then, with_disks, track: tracks, base } = options;
        let base = base.map(|base| self.known(base)).transpose()?;
        let suspends = then == AfterSnapshot::Suspend;
        let keeps = self.endpoint.record.keep;
        ensure!(!suspends || keeps, "only a machine that was started with --detach and without --rm can be suspended");
        let inside = match (with_disks, suspends) {
            (true, _) => DisksInside::Writable,
            // The machine continues with its layer.
            (false, true) => DisksInside::Nameless,
            (false, false) => DisksInside::Own,
        };
        let layer = self.endpoint.dir.kept().map(|kept| kept.join(state_dir::LAYER));
        let (config, disks) = snapshot::portable(&self.endpoint.record.config, inside, layer.as_deref())?;
        let (id, caller, fingerprint) = (snapshot::new_id()?, Some(caller), None);
        let order = Order { id, base, tracks, config, then, fingerprint, caller, holds_guest, presses_button: false };
        if !suspends {
            return self.begin(order, path, &disks);
        }
        // What a killed husk has left there is the machine's own.
        self.endpoint.record.snapshot = Some(path.to_owned());
        self.endpoint.write_record()?;
        let begun = state_dir::remove_snapshot(path).and_then(|()| self.begin(order, path, &disks));
        if begun.is_err() {
            self.endpoint.discard_snapshot()?;
        }
        begun
    }

    /// The snapshot since which changes are to be saved. Fails if they are not known.
    fn known(&self, base: request::Base) -> Result<Base> {
        let path = PathBuf::from(OsString::from_vec(base.path));
        ensure!(
            self.bases.contains(&base.id),
            "it is not known what has changed since {}: that must be the snapshot that the machine was restored from, one that was \
             taken of it with --track, or a later one",
            path.display()
        );
        Ok(Base { path, id: base.id })
    }

    fn begin(&mut self, order: Order, path: &Path, disks: &[(usize, PathBuf)]) -> Result<()> {
        let mut writer = SnapshotWriter::create(path)?;
        let copy = |(index, path): &(usize, PathBuf)| Ok((copy::source(path)?, writer.disk(*index)?));
        let copies = disks.iter().map(copy).collect::<Result<Vec<_>>>()?;
        let holds_guest = order.holds_guest;
        let begun = self.begin_writing(order, writer, copies);
        if begun.is_err() && holds_guest {
            self.resume_guest()?;
        }
        begun
    }

    fn begin_writing(&mut self, order: Order, mut writer: SnapshotWriter, copies: Vec<(File, File)>) -> Result<()> {
        let changed = order.base.as_ref().map(|_| writer.changed()).transpose()?;
        self.monitor.pause()?;
        for (index, server) in self.monitor.outside().servers().iter().enumerate() {
            let known = server.save()?;
            writer.share(index)?.write_all(&known).context("write what the guest knows of a share")?;
        }
        let copy_all = move |is_cancelled: &AtomicBool| {
            let is_cancelled = || is_cancelled.load(Ordering::Relaxed);
            copies.iter().try_for_each(|(from, to)| copy::copy(from, to, &is_cancelled, &|_| {}))
        };
        let disks = if order.config.disks.iter().any(snapshot::is_inside) { Some(Job::start(copy_all)?) } else { None };
        disks.iter().try_for_each(|job| control::watch(&self.epoll, job.as_raw_fd(), Token::Snapshot))?;
        self.monitor.begin_save(writer.memory(), changed.as_ref())?;
        let watched = control::watch(&self.epoll, self.monitor.calls_fd(), Token::Snapshot);
        let step = Step::Writing(Writing { writer, state: None, disks, copied: None });
        self.snapshot = Some(Snapshot { order, step });
        watched
    }

    /// Whether the guest must stay as it is for a snapshot, also if it was paused before: the machine cannot be changed now.
    pub(super) fn is_held(&self) -> bool {
        let is_held = |Snapshot { order, step }: &Snapshot| {
            matches!(step, Step::Writing(_)) || order.holds_guest || order.tracks || order.ends_machine()
        };
        self.snapshot.as_ref().is_some_and(is_held)
    }

    /// Presses the power button when the guest goes on. Returns false if it is running.
    pub(super) fn press_when_saved(&mut self) -> bool {
        let held = self.snapshot.as_mut().filter(|snapshot| snapshot.order.holds_guest);
        held.map(|snapshot| snapshot.order.presses_button = true).is_some()
    }

    /// The maximum time to wait before [`Supervisor::continue_snapshot`], in milliseconds; -1 if there is none.
    pub(super) fn snapshot_timeout_ms(&self) -> i32 {
        match &self.snapshot {
            Some(Snapshot { step: Step::Writing(_), .. }) => PROGRESS_INTERVAL.as_millis() as i32,
            _ => -1,
        }
    }

    /// Goes on with a snapshot, if one is being taken and the machine has not ended, which [`Supervisor::end_snapshot`] handles.
    /// Fails only if nobody was told why.
    pub(super) fn continue_snapshot(&mut self) -> Result<()> {
        if self.monitor.exit_latch().reason().is_some() {
            return Ok(());
        }
        let Some(Snapshot { mut order, step }) = self.snapshot.take() else { return Ok(()) };
        let step = match step {
            Step::Writing(mut writing) => match self.is_written(&mut writing) {
                Ok(false) => Ok(Step::Writing(writing)),
                Ok(true) => self.begin_finishing(&mut order, writing).map(Step::Finishing),
                Err(error) => Err(error),
            },
            Step::Finishing(Finishing { job, memory }) if job.is_done() => {
                let result = job.result().and_then(|()| self.note_base(&order, &memory));
                return self.conclude(order, result);
            }
            Step::Finishing(finishing) => Ok(Step::Finishing(finishing)),
        };
        match step {
            Ok(step) => {
                self.snapshot = Some(Snapshot { order, step });
                Ok(())
            }
            Err(error) => self.conclude(order, Err(error)),
        }
    }

    /// Whether memory and disks are written, so that the guest may go on.
    fn is_written(&mut self, writing: &mut Writing) -> Result<bool> {
        if writing.state.is_none() {
            let saved = self.monitor.saved();
            if !matches!(saved, Ok(None)) {
                control::unwatch(&self.epoll, self.monitor.calls_fd())?;
            }
            writing.state = saved?;
        }
        if let Some(job) = writing.disks.take_if(|job| job.is_done()) {
            control::unwatch(&self.epoll, job.as_raw_fd())?;
            writing.copied = Some(job.result());
        }
        // Before the monitor has written the memory, it cannot be told that that is of no use.
        if writing.state.is_none() || writing.disks.is_some() {
            return Ok(false);
        }
        writing.copied.take().unwrap_or(Ok(())).context("copy the disks").map(|()| true)
    }

    /// Lets the guest go on, unless it is to end or to be tracked, and starts to make the snapshot durable.
    fn begin_finishing(&mut self, order: &mut Order, writing: Writing) -> Result<Finishing> {
        let state = writing.state.context("the machine has no state")?;
        // The machine must neither write to its disks nor print in between.
        let description = self.describe(order, stamp::all(&order.config.disks)?);
        // Before the file is durable, a failing disk could lose what the guest believes to have in memory.
        if !order.ends_machine() && !order.tracks {
            self.let_go(order)?;
        }
        let writer = writing.writer;
        let memory = writer.memory_to_read()?;
        let job = Job::start(move |_| writer.finish(&description, &state))?;
        control::watch(&self.epoll, job.as_raw_fd(), Token::Snapshot)?;
        Ok(Finishing { job, memory })
    }

    /// Notes that the changes since a snapshot can be saved, now that it is complete: all pages that are not those of the file that is
    /// mapped. If the machine is to be tracked, that is the snapshot's own file from now on.
    fn note_base(&mut self, order: &Order, memory: &File) -> Result<()> {
        if order.tracks {
            self.bases.clear();
            self.monitor.track(memory).context("the snapshot is complete, but the machine cannot be tracked")?;
        } else if self.bases.is_empty() {
            return Ok(());
        }
        self.bases.push(order.id.clone());
        Ok(())
    }

    /// Resumes the guest if it was paused for the snapshot.
    fn let_go(&mut self, order: &mut Order) -> Result<()> {
        if std::mem::take(&mut order.holds_guest) {
            self.resume_guest()?;
        }
        if std::mem::take(&mut order.presses_button) {
            self.monitor.press_power_button()?;
        }
        Ok(())
    }

    /// Ends the machine, if that was ordered, or lets it go on, and tells who waits for it.
    fn conclude(&mut self, mut order: Order, mut result: Result<()>) -> Result<()> {
        let suspends = order.then == AfterSnapshot::Suspend;
        if result.is_ok() && order.ends_machine() {
            self.endpoint.is_suspended = suspends;
            self.endpoint.end_requested = true;
            self.monitor.exit_latch().declare(ExitReason::Saved);
        } else {
            let released = self.let_go(&mut order);
            let discards = suspends && result.is_err();
            let discarded = if discards { self.endpoint.discard_snapshot() } else { Ok(()) };
            result = result.and(released).and(discarded);
        }
        let Some(caller) = order.caller else { return result };
        let reply = result.map_or_else(|error| Reply::Refused(format!("{error:#}")), |()| Reply::Done);
        self.endpoint.server.answer(caller, &reply);
        Ok(())
    }

    /// The machine has ended: what is not written is given up.
    pub(super) fn end_snapshot(&mut self) -> Result<()> {
        let Some(Snapshot { mut order, step }) = self.snapshot.take() else { return Ok(()) };
        self.monitor.end();
        let result = match step {
            Step::Finishing(Finishing { job, .. }) => job.result(),
            Step::Writing(_) => Err(anyhow::anyhow!("the machine has ended meanwhile")),
        };
        (order.holds_guest, order.presses_button) = (false, false);
        if order.then == AfterSnapshot::Suspend {
            return self.conclude(order, result.and_then(|()| bail!("the machine has ended meanwhile")));
        }
        self.conclude(order, result)
    }

    fn describe(&self, order: &Order, disks: Vec<Stamp>) -> Description {
        let record = &self.endpoint.record;
        Description {
            id: order.id.clone(),
            base: order.base.clone(),
            husk: env!("CARGO_PKG_VERSION").into(),
            created_ms: now_ms(),
            image: record.image.clone(),
            command: record.command.clone(),
            process: record.process.clone(),
            identity: record.identity.clone(),
            mounts: record.mounts.clone(),
            stop_signal: record.stop_signal,
            stop_timeout_ms: record.stop_timeout_ms,
            health_check: record.health_check.clone(),
            config: order.config.clone(),
            disks,
            received: self.session.as_ref().map_or_else(Received::default, |session| session.received()),
            fingerprint: order.fingerprint.clone(),
        }
    }

    pub(super) fn resume_guest(&mut self) -> Result<()> {
        self.monitor.resume()?;
        self.check_guest_clock();
        Ok(())
    }
}

impl Order {
    fn ends_machine(&self) -> bool {
        self.then != AfterSnapshot::Continue
    }
}
