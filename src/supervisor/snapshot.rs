//! Takes a snapshot of the machine.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};

use super::control::Supervisor;
use crate::config::MachineConfig;
use crate::exit_latch::ExitReason;
use crate::request::AfterSnapshot;
use crate::resources::disk::stamp::{self, Stamp};
use crate::snapshot::warm::Fingerprint;
use crate::snapshot::{self, Description, SnapshotWriter};
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

impl Supervisor<'_> {
    /// Saves a machine that waits for its process, and ends it.
    pub(super) fn save_and_end(&mut self, save: &Save) -> Result<()> {
        self.write(&save.path, true, AfterSnapshot::Stop, Some(save.fingerprint.clone()))
    }

    /// Writes a snapshot to the directory `path`. If the machine is to go on, it does so as soon as its state and memory are
    /// written, and before they are durable. If that fails, it goes on in any case.
    pub(super) fn snapshot(&mut self, path: &Path, then: AfterSnapshot) -> Result<()> {
        let was_running = match self.endpoint.record.state {
            State::Running { .. } => true,
            State::Paused { .. } => false,
            _ => bail!("the machine is still starting: try again"),
        };
        if then == AfterSnapshot::Suspend {
            let keeps = self.endpoint.record.keep;
            ensure!(keeps, "only a machine that was started with --detach and without --rm can be suspended");
        }
        if then != AfterSnapshot::Suspend {
            return self.write(path, was_running, then, None);
        }
        // What a killed husk has left there is the machine's own.
        self.endpoint.record.snapshot = Some(path.to_owned());
        self.endpoint.write_record()?;
        let written = state_dir::remove_snapshot(path).and_then(|()| self.write(path, was_running, then, None));
        if written.is_err() {
            self.endpoint.discard_snapshot()?;
        }
        written
    }

    fn write(
        &mut self,
        path: &Path,
        was_running: bool,
        then: AfterSnapshot,
        fingerprint: Option<Fingerprint>,
    ) -> Result<()> {
        let config = snapshot::with_absolute_paths(&self.endpoint.record.config)?;
        let writer = SnapshotWriter::create(path)?;
        // The machine must not write to its disks in between.
        let saved = self.monitor.save(writer.memory()).and_then(|state| Ok((state, stamp::all(&config.disks)?)));
        let goes_on = was_running && (then == AfterSnapshot::Continue || saved.is_err());
        if goes_on {
            self.resume_guest()?;
        }
        let finished =
            saved.and_then(|(state, disks)| writer.finish(&self.describe(config, disks, fingerprint), &state));
        match finished {
            Ok(()) if then != AfterSnapshot::Continue => {
                self.endpoint.is_suspended = then == AfterSnapshot::Suspend;
                self.endpoint.end_requested = true;
                self.monitor.exit_latch().declare(ExitReason::Saved);
            }
            Err(_) if was_running && !goes_on => self.resume_guest()?,
            _ => {}
        }
        finished
    }

    fn describe(&self, config: MachineConfig, disks: Vec<Stamp>, fingerprint: Option<Fingerprint>) -> Description {
        let record = &self.endpoint.record;
        Description {
            husk: env!("CARGO_PKG_VERSION").into(),
            created_ms: now_ms(),
            image: record.image.clone(),
            command: record.command.clone(),
            process: record.process.clone(),
            stop_signal: record.stop_signal,
            config,
            disks,
            fingerprint,
        }
    }

    pub(super) fn resume_guest(&mut self) -> Result<()> {
        self.monitor.resume()?;
        self.check_guest_clock();
        Ok(())
    }
}
