//! Takes a snapshot of the machine.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};

use super::control::Supervisor;
use crate::config::MachineConfig;
use crate::exit_latch::ExitReason;
use crate::resources::disk::stamp;
use crate::snapshot::{self, Description, SnapshotWriter};
use crate::state_dir::record::{State, now_ms};

impl Supervisor<'_> {
    /// Writes a snapshot to the directory `path`. With `stop` the machine ends then; otherwise it goes on as soon as its state
    /// and memory are written, and before they are durable. If that fails, it goes on too.
    pub(super) fn snapshot(&mut self, path: &Path, stop: bool) -> Result<()> {
        let was_running = match self.endpoint.record.state {
            State::Running { .. } => true,
            State::Paused { .. } => false,
            _ => bail!("the machine is still starting: try again"),
        };
        let config = with_absolute_paths(&self.endpoint.record.config)?;
        let writer = SnapshotWriter::create(path)?;
        // The machine must not write to its disks in between.
        let saved = self.monitor.save(writer.memory()).and_then(|state| Ok((state, stamp::all(&config.disks)?)));
        let goes_on = was_running && !(stop && saved.is_ok());
        if goes_on {
            self.resume_guest()?;
        }
        let finished = saved.and_then(|(state, disks)| writer.finish(&self.describe(config, disks), &state));
        match finished {
            Ok(()) if stop => self.monitor.exit_latch().declare(ExitReason::Saved),
            Err(_) if was_running && !goes_on => self.resume_guest()?,
            _ => {}
        }
        finished
    }

    fn describe(&self, config: MachineConfig, disks: Vec<stamp::Stamp>) -> Description {
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
        }
    }

    pub(super) fn resume_guest(&mut self) -> Result<()> {
        self.monitor.resume()?;
        self.check_guest_clock();
        Ok(())
    }
}

/// The configuration as it is understood in any directory.
fn with_absolute_paths(config: &MachineConfig) -> Result<MachineConfig> {
    let mut config = config.clone();
    let disks = config.disks.iter_mut().flat_map(|disk| {
        let backing = disk.backing.iter_mut().map(|backing| &mut backing.path);
        backing.chain([&mut disk.path])
    });
    let sockets = config.vsock.iter_mut().map(|vsock| &mut vsock.socket);
    let absolute = |path: &mut PathBuf| snapshot::absolute(path).map(|absolute| *path = absolute);
    disks.chain(sockets).chain(&mut config.initrd).chain([&mut config.kernel]).try_for_each(absolute)?;
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BackingConfig, DiskConfig, VsockConfig};

    #[test]
    fn all_paths_become_absolute() {
        let backing = vec![BackingConfig { path: "base.img".into(), format: None }];
        let config = MachineConfig {
            kernel: "vmlinux".into(),
            initrd: Some("/initrd".into()),
            disks: vec![DiskConfig { backing, ..DiskConfig::of("../disk.img".into()) }],
            vsock: Some(VsockConfig { socket: "v.sock".into(), cid: 3 }),
            ..MachineConfig::default()
        };
        let text = serde_json::to_string(&with_absolute_paths(&config).unwrap()).unwrap();
        let here = std::env::current_dir().unwrap();
        for path in ["vmlinux", "base.img", "../disk.img", "v.sock"] {
            assert!(text.contains(&format!("\"{}/{path}\"", here.display())), "{path}: {text}");
        }
        assert!(text.contains("\"/initrd\""), "{text}");
    }
}
