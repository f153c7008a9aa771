//! `husk run`: runs a command from an image in a new machine.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::{ArgAction, Args};
use husk_protocol::{Limit, Tmpfs, ToHost};
use log::Level;

use super::cpus::{self, Cpus};
use super::exit::Exit;
use super::lifecycle::{self, LifecycleArgs, RecordInfo};
use super::limits::LimitFlags;
use super::network::NetworkFlags;
use super::process::ProcessFlags;
use super::usage::NO_VOLUMES;
use super::{boot, signal, size};
use crate::boot::Part;
use crate::config::{MachineConfig, Rate, Transport};
use crate::console::log::{Log, Tail};
use crate::exit_latch::ExitReason;
use crate::guest::process::{self, Defaults};
use crate::guest::session::{Endpoints, Session};
use crate::guest::{GuestSpec, RootFs, WritableLayer};
use crate::image::ext4::Journal;
use crate::image::{ImageProcess, Store, on_demand};
use crate::resources::guest_kernel::{Choice, GuestKernel};
use crate::resources::root_file::Kind;
use crate::resources::{self, BootFiles, Source};
use crate::state_dir::record::Inherited;
use crate::state_dir::{self, MachineDir};
use crate::supervisor::{self, ControlEndpoint, Stdio};
use crate::sys::{SignalFd, socket};
use crate::timings::{Step, Timings};

const EXAMPLES: &str = "\
Examples:
  Run a command in a container image that docker or podman saved:
    husk run ./image.tar echo hello

  Run a shell on this terminal, with 2 CPUs and 2 GiB of memory:
    husk run -it --cpus 2 --memory 2G ./image.tar sh

  Run in the background, with a name for `husk logs`, `husk exec`, `husk stop` and so on:
    husk run -d --name web ./image.tar

  Run in a pipeline:
    tar c . | husk run -i ./image.tar wc -c

  Boot a disk image with its own operating system:
    husk run ./disk.img";

const EXIT_CODES: &str = "\
Exit codes:
  125    husk, the host or the image failed before the command started
  126    the command cannot be invoked
  127    the command cannot be found
  128+n  the command or the machine was terminated by signal n
  80-83  the machine failed: reset, kernel panic, triple fault, KVM error (see `husk boot --help`)
  Any other code is the exit code of the command.";

/// The number of kernel messages shown to explain a failure.
const TAIL_LINES: usize = 20;

/// The default size of a persistent disk, which is sparse.
const DEFAULT_DISK_BYTES: u64 = 10 << 30;

#[derive(Debug, Args)]
#[command(disable_help_flag = true, override_usage = "husk run [OPTIONS] IMAGE [COMMAND] [ARG]...")]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub(super) struct Run {
    /// Image to run, optionally followed by a command and its arguments
    ///
    /// IMAGE is an image name (pulled if it is not in local storage), an archive saved by docker, podman or skopeo, an
    /// OCI layout, a root filesystem (a tar archive or a directory), or a disk image. Write ./FILE for a file in the
    /// working directory: anything that is a valid image name is taken as a name.
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_names = ["IMAGE", "COMMAND"])]
    words: Vec<OsString>,

    #[command(flatten)]
    process: ProcessFlags,

    /// Override the entrypoint of the image, and drop its default command
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

    /// Mount the root filesystem as read-only
    #[arg(long)]
    read_only: bool,

    /// Store changes to the root filesystem on a temporary disk of this size instead of in guest memory
    #[arg(long, value_name = "SIZE", value_parser = size::bytes, conflicts_with = "read_only")]
    scratch: Option<u64>,

    /// Store changes to the root filesystem on a persistent disk, for later runs of the same image
    ///
    /// The disk is created on first use, with the size given by --scratch or 10G. `husk disks` lists and removes
    /// persistent disks.
    #[arg(long, value_name = "NAME", conflicts_with = "read_only")]
    keep: Option<String>,

    /// Limit the disk space for downloading and unpacking the image [default: the free disk space]
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    max_size: Option<u64>,

    /// Mount a tmpfs directory; can be repeated
    #[arg(long, value_name = "PATH[:OPTION,...]", value_parser = process::tmpfs)]
    tmpfs: Vec<Tmpfs>,

    /// Set a resource limit (ulimit); can be repeated
    #[arg(long, value_name = "NAME=SOFT[:HARD]", value_parser = process::limit)]
    ulimit: Vec<Limit>,

    /// Number of CPUs, 0.01 to 32; a fraction limits host CPU time, as for `husk boot`
    #[arg(long, value_name = "N", value_parser = cpus::cpus, default_value = "1")]
    cpus: Cpus,

    /// Guest memory size: 512M, 1.5G, 2GiB
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory_mib, default_value = "512M")]
    #[arg(allow_negative_numbers = true)]
    memory: u64,

    #[command(flatten)]
    limits: LimitFlags,

    /// How the guest finds its virtio devices: mmio boots fastest, pci has the faster interrupts; auto is mmio, unless
    /// the guest needs pci
    #[arg(long, value_name = "auto|mmio|pci")]
    transport: Option<Transport>,

    /// Enable nested virtualization, if the host's KVM supports it
    #[arg(long)]
    nested: bool,

    /// Limit the read and write rate of each disk (bytes per second)
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    disk_bps: Option<u64>,

    /// Limit the I/O rate of each disk (operations per second)
    #[arg(long, value_name = "N")]
    disk_iops: Option<u64>,

    #[command(flatten)]
    network: NetworkFlags,

    /// Guest kernel: micro, stock, host or a path [default: the first one that is available]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<PathBuf>,

    /// Run an init of the image as PID 1, with its console on this terminal
    ///
    /// A disk image always runs its own init, and PATH selects which one. For a container image, --init without PATH
    /// has no effect: husk's init already reaps processes and forwards signals.
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    init: Option<OsString>,

    /// Print boot timings to standard error
    #[arg(long)]
    timings: bool,

    /// Print help
    #[arg(long, action = ArgAction::Help)]
    help: Option<bool>,
}

impl Run {
    /// Runs the command and waits until it has exited. `started` is when this process started.
    pub fn run(self, started: Instant) -> Exit {
        match self.try_run(started) {
            Ok(exit) => exit,
            Err(error) => {
                super::report(&error);
                Exit::NotRun
            }
        }
    }

    fn try_run(mut self, started: Instant) -> Result<Exit> {
        let timings = Arc::new(Timings::new(started));
        self.process.mask_values();
        let mut words = std::mem::take(&mut self.words).into_iter();
        let image = words.next().unwrap_or_default();
        reject_volume_as_image(&image)?;
        let mut command: Vec<OsString> = words.collect();
        // After `--`, everything is the command.
        if command.first().is_some_and(|word| word == "--") {
            command.remove(0);
        }
        let Some(root_fs) = self.find_root_fs(Path::new(&image))? else { return Ok(Exit::NotRun) };
        if self.lifecycle.spawns_detached() {
            return lifecycle::spawn_detached();
        }
        let dir = self.lifecycle.dir()?;
        let name = self.lifecycle.name.clone().unwrap_or_else(|| dir.id());
        let mut spec = self.guest_spec(root_fs, command, &dir)?;
        spec.connect(self.network.setup(&name)?);
        let kernel = self.kernel.as_deref().map_or(Choice::Any, Choice::from_word).find()?;
        let verbose = log::log_enabled!(Level::Info);
        let mut config =
            spec.machine_config(&kernel, self.cpus.vcpus, self.memory, &dir.file(state_dir::VSOCK), verbose);
        config.cpu_limit_millicpus = self.cpus.limit_millicpus;
        self.limits.apply(Some(self.memory), &mut config);
        config.nested = self.nested;
        config.transport = GuestSpec::transport(self.transport.unwrap_or_default(), &kernel)?;
        for disk in &mut config.disks {
            disk.rate = Rate { bytes_per_second: self.disk_bps, ops_per_second: self.disk_iops, ..Rate::default() };
        }
        config.validate()?;
        let stop_signal = self.stop_signal.unwrap_or(spec.stop_signal());
        let info = RecordInfo {
            image: image.to_string_lossy().into_owned(),
            command: spec.command(),
            process: spec.process().map(Inherited::from),
            stop_signal,
        };
        let endpoint = self.lifecycle.endpoint(dir, info, &config)?;
        let exit = self.lifecycle.run_with_restarts(endpoint, spec.has_session(), |endpoint, signals| {
            self.run_machine(&spec, &kernel, &config, endpoint, signals, &timings)
        })?;
        if self.timings {
            super::print_stderr(&timings.to_string());
        }
        Ok(exit)
    }

    /// Identifies the image: a file recognized by its content, or a source for the image store. `None` if it cannot be
    /// prepared, which has been reported.
    fn find_root_fs(&self, image: &Path) -> Result<Option<RootFs>> {
        let (root, defaults, in_use, identity) = match on_demand::identify(image)? {
            Kind::Disk if self.scratch.is_some() || self.keep.is_some() => {
                bail!("a disk image is modified in place: remove --scratch and --keep")
            }
            Kind::Disk => return Ok(Some(RootFs::Disk { path: image.to_owned(), readonly: self.read_only })),
            Kind::Root { uuid } => (image.to_owned(), Defaults::default(), None, uuid),
            Kind::Other => {
                let word =
                    image.to_str().with_context(|| format!("the image name {} is not valid UTF-8", image.display()))?;
                let Some(prepared) = on_demand::find_or_prepare(word, self.max_size, self.limits.sandbox())? else {
                    return Ok(None);
                };
                let ImageProcess { entrypoint, cmd, env, working_dir, user, stop_signal, .. } = prepared.process;
                let defaults = Defaults { entrypoint, cmd, env, working_dir, user, stop_signal };
                (prepared.root, defaults, Some(prepared.in_use), prepared.id.first_half())
            }
        };
        Ok(Some(RootFs::Image { root, defaults, writable: self.writable_layer(identity)?, in_use }))
    }

    /// The writable layer for the image `identity`.
    fn writable_layer(&self, identity: [u8; 16]) -> Result<WritableLayer> {
        let size_bytes = self.scratch.unwrap_or(DEFAULT_DISK_BYTES);
        Ok(match &self.keep {
            Some(name) => WritableLayer::Disk(Store::open_default()?.kept_disk(name, size_bytes, identity)?),
            None if self.scratch.is_some() => {
                // A restarted guest finds the data that its predecessor left.
                let journal = if self.lifecycle.may_restart() { Journal::Yes } else { Journal::No };
                WritableLayer::Disk(Store::open_default()?.scratch(size_bytes, journal)?)
            }
            None if self.read_only => WritableLayer::None,
            None => WritableLayer::Memory,
        })
    }

    /// The contents of the machine, with all overrides and defaults applied.
    fn guest_spec(&mut self, root_fs: RootFs, command: Vec<OsString>, dir: &MachineDir) -> Result<GuestSpec> {
        let hostname = self.hostname.take().or_else(|| self.lifecycle.name.clone()).unwrap_or_else(|| dir.id());
        let own_init = self.init.take().filter(|path| !path.is_empty() || matches!(root_fs, RootFs::Disk { .. }));
        if own_init.is_some() || matches!(root_fs, RootFs::Disk { .. }) {
            let program = own_init.filter(|path| !path.is_empty());
            if program.is_none() && !command.is_empty() {
                bail!("a disk image runs its own init: use --init=PATH to pass arguments to it");
            }
            let args = program.into_iter().chain(command).collect();
            return Ok(GuestSpec::with_own_init(root_fs, args, hostname, std::mem::take(&mut self.tmpfs)));
        }
        let mut overrides = self.process.overrides(command)?;
        (overrides.entrypoint, overrides.limits) = (self.entrypoint.take(), std::mem::take(&mut self.ulimit));
        if !self.lifecycle.is_detached() {
            self.process.check_terminal()?;
        }
        let ProcessFlags { tty, interactive, .. } = self.process;
        GuestSpec::with_process(root_fs, overrides, tty, interactive, hostname, std::mem::take(&mut self.tmpfs))
    }

    /// Runs the machine once.
    fn run_machine(
        &self,
        spec: &GuestSpec,
        kernel: &GuestKernel,
        config: &MachineConfig,
        endpoint: &mut ControlEndpoint,
        signals: &SignalFd,
        timings: &Arc<Timings>,
    ) -> Result<Exit> {
        let initramfs = spec.initramfs(kernel, config.virtio_bus())?;
        resources::host::warn_of_pvm();
        timings.mark(Step::Prepared);
        let kernel = resources::kernel::open(&kernel.path)?.kernel;
        // The initramfs and the command line in a unified kernel image belong to another system.
        let initrd = Some(Part::whole(initramfs).context("read the initrd")?);
        let source = Source::Boot(Box::new(BootFiles { kernel, kernel_words: String::new(), initrd }));
        let (resources, outside) = resources::open_for(config, source)?;
        if !spec.has_session() {
            let opened = (resources, outside);
            return Ok(boot::report(&supervisor::run(
                config,
                opened,
                timings.clone(),
                signals,
                Stdio::Console,
                endpoint,
            )?));
        }
        let service = endpoint.file(&format!("{}_{}", state_dir::VSOCK, husk_protocol::PORT));
        // Left behind by a failed run.
        let _ = std::fs::remove_file(&service);
        let listener = socket::listen(&service, 0o600).with_context(|| format!("listen on {}", service.display()))?;
        let on_terminal = spec.on_terminal();
        let endpoints = endpoint.hub().map_or(Endpoints::Stdio, |hub| Endpoints::Hub(hub.clone()));
        let mut session = Session::new(listener, spec.wants_stdin(), on_terminal, endpoints, timings.clone())?;
        // Without input, Ctrl-C raises a signal in this process, which is forwarded like any other.
        let takes_keys = on_terminal && spec.wants_stdin();
        // In the background standard error is a file, which a guest must not fill: `husk logs --kernel` shows its
        // messages.
        let verbose = log::log_enabled!(Level::Info) && !endpoint.is_detached();
        let log = Log::create(endpoint.file(state_dir::CONSOLE_LOG), verbose).context("create the machine's log")?;
        let tail = log.tail();
        let stdio = Stdio::Session { session: &mut session, takes_keys, log };
        let reason = supervisor::run(config, (resources, outside), timings.clone(), signals, stdio, endpoint)?;
        Ok(exit_status(session.end(), &reason, &tail, verbose))
    }
}

/// Rejects the value of Docker's `-v` in the place of the image: husk's `-v` is `--verbose` and takes no value.
fn reject_volume_as_image(word: &OsStr) -> Result<()> {
    let text = word.to_string_lossy();
    let is_volume = log::log_enabled!(Level::Info) && text.contains(":/") && !Path::new(word).exists();
    ensure!(!is_volume, "{text}: {NO_VOLUMES}");
    Ok(())
}

/// The command's exit status if known, otherwise the machine's. Reports the reason of a failure.
fn exit_status(end: Option<&ToHost>, reason: &ExitReason, tail: &Tail, told_already: bool) -> Exit {
    match end {
        Some(ToHost::Exited(code)) => return Exit::Reported(*code),
        Some(ToHost::Signaled(number)) => return Exit::Signal(*number),
        Some(ToHost::Failed { message, code }) => {
            super::print_error(message);
            return Exit::Reported(*code);
        }
        Some(ToHost::Admitted | ToHost::Started(_) | ToHost::AskTime | ToHost::Resumed { .. } | ToHost::Waiting)
        | None => {}
    }
    let exit = match boot::report(reason) {
        Exit::Failure => Exit::NotRun,
        exit => exit,
    };
    if !matches!(exit, Exit::Success | Exit::Signal(_)) && !told_already {
        for line in tail.lines(TAIL_LINES) {
            super::print_stderr(&format!("guest: {line}\n"));
        }
    }
    exit
}
