//! `husk run`: runs a command from an image in a new machine.

mod docker;
mod health;
mod launch;
mod layer;
pub mod machine;
pub mod session;
mod settings;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{ArgAction, Args};
use husk_protocol::{Limit, Tmpfs};
use log::Level;

use self::docker::DockerFlags;
pub(super) use self::docker::refusal;
use self::health::HealthFlags;
use self::machine::MachineFlags;
use self::settings::GuestSettings;
use super::exit::Exit;
use super::lifecycle::{self, Foreground, LifecycleArgs, RecordInfo};
use super::mounts::MountFlags;
use super::mounts::place::{self, Created, Machine, Mounted};
use super::process::ProcessFlags;
use super::{signal, size};
use crate::config::Rate;
use crate::guest::process;
use crate::guest::{GuestSpec, RootFs};
use crate::state_dir::record::Inherited;
use crate::state_dir::{self, MachineDir, MachineEntry, StateDir};
use crate::timings::Timings;

const EXAMPLES: &str = "\
Examples:
  Run a command in a container image that docker or podman saved:
    husk run ./image.tar echo hello

  Run a shell on this terminal, with 2 CPUs and 2 GiB of memory:
    husk run -it --cpus 2 --memory 2G ./image.tar sh

  Run in the background, with a name for `husk logs`, `husk exec`, `husk stop` and so on:
    husk run -d --name web ./image.tar

  Keep what the command changes, and run it again:
    husk run --name job ./image.tar make
    husk start -a job

  Run in a pipeline:
    tar c . | husk run -i ./image.tar wc -c

  Boot a disk image with its own operating system:
    husk run ./disk.img

  Work in a folder of the host:
    husk run --rm -v ./src:/src -w /src ./image.tar make

  Start a machine that has booted already:
    husk warm debian:12
    husk run debian:12 echo hello";

const EXIT_CODES: &str = "\
Exit codes:
  125    husk, the host or the image failed before the command started
  126    the command cannot be invoked
  127    the command cannot be found
  128+n  the command or the machine was terminated by signal n
  80-83  the machine failed: reset, kernel panic, triple fault, KVM error (see `husk boot --help`)
  Any other code is the exit code of the command.";

#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "husk run [OPTIONS] IMAGE [COMMAND] [ARG]...")]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub(super) struct Run {
    /// Image to run, optionally followed by a command and its arguments
    ///
    /// IMAGE is an image name (pulled if it is not in local storage), an archive saved by docker, podman or skopeo, an
    /// OCI layout, a root filesystem (a tar archive or a directory), or a disk image. Write ./FILE for a file in the
    /// working directory: anything that is a valid image name is taken as a name.
    #[arg(required_unless_present = "from", num_args = 1.., trailing_var_arg = true)]
    #[arg(value_names = ["IMAGE", "COMMAND"])]
    words: Vec<OsString>,

    #[command(flatten)]
    process: ProcessFlags,

    #[command(flatten)]
    machine: MachineFlags,

    /// Override the entrypoint of the image, and drop its default command; a JSON array for several words
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<OsString>,

    /// Host name of the machine [default: its name or ID]
    #[arg(short = 'h', long, value_name = "NAME")]
    hostname: Option<String>,

    #[command(flatten)]
    lifecycle: LifecycleArgs,

    /// Signal to stop the command [default: from the image, or TERM]
    #[arg(long, value_name = "SIGNAL", value_parser = signal::signal)]
    stop_signal: Option<u8>,

    /// Store changes to the root filesystem on a disk of this size instead of in guest memory
    ///
    /// The disk ends with the machine. A machine that stays (in the background or with a name, and without --rm) always has one, of
    /// 10G by default, which takes as much space as is written to it.
    #[arg(long, value_name = "SIZE", value_parser = size::bytes, conflicts_with = "read_only")]
    scratch: Option<u64>,

    /// Store changes to the root filesystem on a persistent disk, for later runs of the same image
    ///
    /// The disk is created on first use, with the size given by --scratch or 10G. `husk disks` lists and removes
    /// persistent disks.
    #[arg(long, value_name = "NAME", conflicts_with = "read_only")]
    keep: Option<String>,

    /// Mount a tmpfs directory; can be repeated
    #[arg(long, value_name = "PATH[:OPTION,...]", value_parser = process::tmpfs)]
    tmpfs: Vec<Tmpfs>,

    #[command(flatten)]
    mounts: MountFlags,

    #[command(flatten)]
    settings: GuestSettings,

    #[command(flatten)]
    docker: DockerFlags,

    #[command(flatten)]
    health: HealthFlags,

    /// Set a resource limit (ulimit); can be repeated
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = process::limit)]
    ulimit: Vec<Limit>,

    /// Limit the read and write rate of each disk (bytes per second)
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    disk_bps: Option<u64>,

    /// Limit the I/O rate of each disk (operations per second)
    #[arg(long, value_name = "N")]
    disk_iops: Option<u64>,

    /// Boot the machine even if there is a warm image (`husk warm`)
    #[arg(long)]
    no_warm: bool,

    /// Start from a snapshot of a machine that waits for its command, made by `husk warm --output DIR`
    ///
    /// There is no IMAGE then: all words are the command. The machine has the CPUs, the memory and the kernel of the
    /// snapshot.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["os_init", "no_warm", "cpus", "memory", "kernel"])]
    #[arg(conflicts_with_all = ["transport", "nested"])]
    from: Option<PathBuf>,

    /// Run this program of the image as PID 1 in place of husk's init, with its console on this terminal
    ///
    /// A disk image always runs its own init, and PATH selects which one.
    #[arg(long, value_name = "PATH")]
    os_init: Option<OsString>,

    /// Print boot timings to standard error
    #[arg(long)]
    timings: bool,

    /// The ID of a stopped machine, whose image and changes this one has, to reach its files
    #[arg(long, hide = true)]
    files_of: Option<String>,

    /// Whether the machine is created, and not started (`husk create`).
    #[arg(skip)]
    pub(super) only_creates: bool,

    /// Print help
    #[arg(long, action = ArgAction::Help)]
    help: Option<bool>,
}

impl Run {
    /// Runs the command and waits until it has exited. `started` is when this process started.
    pub fn run(self, started: Instant) -> Exit {
        let mut created = Created::default();
        let ended = self.try_run(started, &mut created);
        created.settle();
        match ended {
            Ok(exit) => exit,
            Err(error) => {
                super::report(&error);
                Exit::NotRun
            }
        }
    }

    /// The number of words from the image on.
    pub fn trailing_words(&self) -> usize {
        self.words.len()
    }

    /// How often `--verbose` was meant among the volumes.
    pub fn take_verbosity(&mut self) -> u8 {
        self.mounts.take_verbosity()
    }

    /// Runs the command. `created_volumes` become the anonymous volumes that were created for it, until it has run.
    fn try_run(mut self, started: Instant, created_volumes: &mut Created) -> Result<Exit> {
        let in_foreground = if self.only_creates { Foreground::Created } else { Foreground::StaysIfNamed };
        self.lifecycle.in_foreground(in_foreground);
        let feeds = self.docker.attaches_only_input();
        if feeds && !self.only_creates {
            self.lifecycle.detach();
        }
        let timings = Arc::new(Timings::new(started));
        self.process.mask_values();
        if self.lifecycle.needs_front(self.docker.sig_proxy) {
            return lifecycle::run_behind();
        }
        let mounts = self.mounts.parse()?;
        let inherited = if self.lifecycle.is_again() { Vec::new() } else { self.mounts.inherited()? };
        if let Some(cpus) = self.docker.cpus()? {
            self.machine.cpus = cpus;
        }
        self.lifecycle.check_labels()?;
        let mut words = std::mem::take(&mut self.words).into_iter();
        let image = match &self.from {
            Some(dir) => self.machine.adopt(dir)?.into(),
            None => words.next().unwrap_or_default(),
        };
        // Before it is pulled.
        self.machine.check()?;
        self.process.check_files()?;
        let mut command: Vec<OsString> = words.collect();
        // After `--`, everything is the command.
        if command.first().is_some_and(|word| word == "--") {
            command.remove(0);
        }
        self.lifecycle.check_cidfile()?;
        let lender = self.files_of.as_ref().map(|id| StateDir::open()?.find(id)).transpose()?;
        let pinned = match &lender {
            Some(lender) => lender.record()?.image_id.clone(),
            None => self.lifecycle.earlier_image()?,
        };
        let root_fs = self.machine.root_fs(Path::new(&image), pinned.as_deref())?;
        let Some(mut root_fs) = root_fs else { return Ok(Exit::NotRun) };
        if matches!(root_fs, RootFs::Disk { .. }) && (self.scratch.is_some() || self.keep.is_some()) {
            bail!("a disk image is modified in place: remove --scratch and --keep");
        }
        if self.lifecycle.spawns_detached() {
            return if feeds && self.process.interactive {
                lifecycle::spawn_fed()
            } else {
                lifecycle::spawn_detached()
            };
        }
        let mut dir = self.lifecycle.dir()?;
        if self.lifecycle.stays() {
            dir.stay()?;
        }
        let layer = lender.as_ref().map_or_else(|| self.own_layer(&dir), MachineEntry::kept);
        let image_id = self.prepare_layer(&mut root_fs, layer, pinned.as_deref())?;
        let name = self.lifecycle.name.clone().unwrap_or_else(|| dir.id());
        let is_hostname_chosen = self.hostname.is_some();
        let machine = Machine {
            dir: &dir,
            is_kept: self.lifecycle.stays(),
            is_again: self.lifecycle.is_again(),
            volumes: &if lender.is_some() { Vec::new() } else { self.volumes_of(&root_fs) },
        };
        let Mounted { shares, volumes, records, locks: _locks, created } =
            place::open(mounts, inherited, &mut self.tmpfs, &machine)?;
        *created_volumes = created;
        if let RootFs::Image { defaults, .. } = &root_fs {
            self.machine.network.publish_all(self.settings.exposed(&defaults.exposed_ports))?;
        }
        let mut spec = self.guest_spec(root_fs, command, &dir)?;
        spec.mount(shares, volumes)?;
        spec.set_sysctls(self.settings.sysctls())?;
        spec.connect(self.machine.network.setup(&name)?.with_names(&self.settings.names()?)?);
        let kernel = self.machine.kernel()?;
        let verbose = log::log_enabled!(Level::Info);
        let mut config = self.machine.config(&spec, &kernel, &dir.file(state_dir::VSOCK), verbose)?;
        for disk in &mut config.disks {
            disk.rate = Rate { bytes_per_second: self.disk_bps, ops_per_second: self.disk_iops, ..Rate::default() };
        }
        config.validate()?;
        let stop_signal = self.stop_signal.unwrap_or(spec.stop_signal());
        let info = RecordInfo {
            image: image.to_string_lossy().into_owned(),
            image_id,
            command: spec.command(),
            process: spec.process().map(Inherited::from),
            identity: spec.identity_record(dir.id(), is_hostname_chosen),
            mounts: records,
            stop_signal,
            stop_timeout: self.docker.stop_timeout,
            health_check: spec.has_session().then(|| self.health.check(spec.health_check())).flatten(),
        };
        if self.lifecycle.only_creates() {
            return self.lifecycle.leave_created(dir, info, &config).map(|()| Exit::Success);
        }
        let endpoint = self.lifecycle.endpoint(dir, info, &config)?;
        let mut has_run = false;
        let ended = self.lifecycle.run_with_restarts(endpoint, spec.has_session(), |endpoint, signals| {
            let ended = self.run_machine(&spec, &kernel, &config, endpoint, signals, &timings);
            has_run |= endpoint.has_run();
            ended
        });
        if has_run {
            created_volumes.keep();
        }
        let exit = ended?;
        if self.timings {
            super::print_stderr(&timings.to_string());
        }
        Ok(exit)
    }

    /// The volumes of the image, unless an init of the image is to mount what it needs.
    fn volumes_of(&self, root_fs: &RootFs) -> Vec<String> {
        match root_fs {
            RootFs::Image { defaults, .. } if self.os_init.is_none() => defaults.volumes.clone(),
            _ => Vec::new(),
        }
    }

    /// The contents of the machine, with all overrides and defaults applied.
    fn guest_spec(&mut self, root_fs: RootFs, command: Vec<OsString>, dir: &MachineDir) -> Result<GuestSpec> {
        let hostname = self.hostname.take().or_else(|| self.lifecycle.name.clone()).unwrap_or_else(|| dir.id());
        let program = self.os_init.take();
        if program.is_some() || matches!(root_fs, RootFs::Disk { .. }) {
            if program.is_none() && !command.is_empty() {
                bail!("a disk image runs its own init: use --os-init PATH to pass arguments to it");
            }
            let args = program.into_iter().chain(command).collect();
            return Ok(GuestSpec::with_own_init(root_fs, args, hostname, std::mem::take(&mut self.tmpfs)));
        }
        let mut overrides = self.process.overrides(command)?;
        (overrides.entrypoint, overrides.limits) = (self.entrypoint.take(), std::mem::take(&mut self.ulimit));
        overrides.rights = self.settings.rights()?;
        self.tmpfs.extend(self.settings.tmpfs()?);
        if !self.lifecycle.ignores_terminal() {
            self.process.check_terminal()?;
        }
        let ProcessFlags { tty, interactive, .. } = self.process;
        GuestSpec::with_process(root_fs, overrides, tty, interactive, hostname, std::mem::take(&mut self.tmpfs))
    }
}
