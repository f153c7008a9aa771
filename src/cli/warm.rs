//! `husk warm`: makes the snapshot that machines for an image start from.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::exit::Exit;
use super::lifecycle::{LifecycleArgs, RecordInfo};
use super::run::machine::{self, MachineFlags};
use super::run::session::{self, Ended, Start};
use crate::config::MachineConfig;
use crate::guest::process::Overrides;
use crate::guest::{GuestSpec, RootFs};
use crate::resources::{self, lock};
use crate::snapshot::warm::{self, Fingerprint};
use crate::state_dir;
use crate::supervisor::{ControlEndpoint, Save};
use crate::sys::SignalFd;
use crate::timings::Timings;

const EXAMPLES: &str = "\
Examples:
  Let machines for an image start without booting:
    husk warm debian:12
    husk run debian:12 echo hello

  For machines of another size:
    husk warm --cpus 2 --memory 2G debian:12

  For runs of programs other than the image's default command:
    husk warm debian:12 apt-get perl

`husk run` uses a warm image if the machine would boot in the same way: with the same image,
kernel, CPUs, memory and networks. It boots as usual if husk, the kernels or
the processor have changed since; run `husk warm` again then. `husk images` shows the disk
space of warm images, `husk prune` removes outdated ones, and `husk rmi` those of an image.";

#[derive(Debug, Args)]
#[command(override_usage = "husk warm [OPTIONS] IMAGE [PROGRAM]...", after_help = EXAMPLES)]
pub(super) struct Warm {
    /// Image, as for `husk run`
    #[arg(value_name = "IMAGE")]
    image: OsString,

    /// Programs that runs will probably use, besides the image's default command
    ///
    /// They and their libraries are read into memory in advance, so that runs need not read them from the disk.
    #[arg(value_name = "PROGRAM")]
    programs: Vec<String>,

    #[command(flatten)]
    machine: MachineFlags,

    /// Write the snapshot to this directory instead of the image store, for `husk run --from`
    #[arg(short, long, value_name = "DIR")]
    output: Option<PathBuf>,
}

impl Warm {
    /// Boots the machine until it waits for its command, and saves it there. `started` is when this process started.
    pub fn run(self, started: Instant) -> Result<Exit> {
        let root_fs = match self.machine.root_fs(Path::new(&self.image), None)? {
            Some(RootFs::Disk { .. }) => {
                bail!("a disk image boots its own init, and only a container image can be warm")
            }
            Some(root_fs) => root_fs,
            None => return Ok(Exit::Failure),
        };
        let programs = self.programs(&root_fs);
        let mut lifecycle = LifecycleArgs::foreground();
        let dir = lifecycle.dir()?;
        // The command is not part of the snapshot.
        let overrides = Overrides { command: vec!["true".into()], ..Overrides::default() };
        let mut spec = GuestSpec::with_process(root_fs, overrides, false, false, dir.id(), Vec::new())?;
        spec.connect(self.machine.network.setup(&dir.id())?);
        let kernel = self.machine.kernel()?;
        let mut config = self.machine.config(&spec, &kernel, &dir.file(state_dir::VSOCK), false)?;
        config.spare_slots = true;
        config.validate()?;
        let Some((path, _alone)) = self.place(&config, &programs)? else { return Ok(Exit::Success) };
        let (image, stop_signal) = (self.image.to_string_lossy().into_owned(), spec.stop_signal());
        let info = RecordInfo {
            image,
            image_id: None,
            command: Vec::new(),
            process: None,
            identity: None,
            mounts: Vec::new(),
            stop_signal,
            stop_timeout: None,
            health_check: None,
        };
        let endpoint = lifecycle.endpoint(dir, info, &config)?;
        let timings = Arc::new(Timings::new(started));
        let boot = |endpoint: &mut ControlEndpoint, signals: &SignalFd| {
            let fingerprint = Fingerprint::of(&config)?.with_programs(&programs);
            let initramfs = spec.waiting_initramfs(&programs, &kernel, config.virtio_bus())?;
            let opened = resources::open_for(&config, machine::boot_source(&kernel, initramfs)?)?;
            let start = Start::Wait(Save { path: path.clone(), fingerprint });
            session::run(&config, opened, start, endpoint, signals, &timings).map(Ended::exit)
        };
        let exit = lifecycle.run_with_restarts(endpoint, true, boot)?;
        if exit == Exit::Success {
            super::print(&format!("{}\n", path.display()))?;
        }
        Ok(exit)
    }

    /// The programs to read in advance: those that were asked for, what the image runs, and what its entrypoint, if that is a
    /// script, will probably run in its place.
    fn programs(&self, root_fs: &RootFs) -> Vec<String> {
        let RootFs::Image { defaults, .. } = root_fs else { return Vec::new() };
        let of_image = defaults.entrypoint.first().into_iter().chain(defaults.cmd.first());
        self.programs.iter().chain(of_image).cloned().collect()
    }

    /// The directory of the snapshot, and in the image store a lock, so that no other husk makes it. `None` if there is one
    /// already that is not outdated and has the programs; others are removed.
    fn place(&self, config: &MachineConfig, programs: &[String]) -> Result<Option<(PathBuf, Option<File>)>> {
        if let Some(path) = &self.output {
            return Ok(Some((path.clone(), None)));
        }
        let path = warm::place(config)?;
        let parent = path.parent().context("the image store has no directory for it")?;
        fs::create_dir_all(parent).with_context(|| format!("create {}", parent.display()))?;
        let alone = lock::alone_within(&path.with_extension("lock"), lock::LONG_TIMEOUT)?;
        let found = warm::find(config).and_then(|found| found.description.fingerprint);
        if found.is_some_and(|fingerprint| fingerprint.has_programs(programs)) {
            super::print(&format!("{}\n", path.display()))?;
            return Ok(None);
        }
        state_dir::remove_snapshot(&path)?;
        Ok(Some((path, Some(alone))))
    }
}
