//! `husk oci warm`: makes the snapshots that the machines of containers start from.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::thread::UnshareFlags;

use crate::cli::run::machine;
use crate::cli::run::session::{self, Start};
use crate::cli::size;
use crate::config::{MAX_CPUS, Transport};
use crate::console::stream_log;
use crate::image::Pruned;
use crate::oci::machine::{DEFAULT_MEMORY_MIB, POD_CPUS, POD_MEMORY_MIB, Shape};
use crate::oci::{state, warm};
use crate::resources::{self, lock};
use crate::snapshot::warm::{self as images, Fingerprint};
use crate::state_dir::record::Record;
use crate::state_dir::{self, StateDir};
use crate::supervisor::{self, ControlEndpoint, Save};
use crate::timings::Timings;

const EXAMPLES: &str = "\
Examples:
  Let containers without limits start without booting, with and without a network:
    husk oci warm

  Containers with a memory limit of 256 MiB and two CPUs, which have 32 MiB more for the kernel:
    husk oci warm --memory 288M --cpus 2

  Pods of Kubernetes without limits:
    husk oci warm --pod --interfaces 1

A container starts from a warm machine by itself if its machine would boot in the same way: with
the same kernel, CPUs, memory and number of interfaces; the annotation io.husk.warm=false boots it.
Run this again when husk, a kernel, or the processor has changed: outdated ones are removed.";

/// Why there is no machine with a network.
const NEEDS_ROOT: &str =
    "create a network namespace: use sudo, or for rootless containers `podman unshare husk oci warm`";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Warm {
    /// Number of vCPUs [default: 1, or 2 with --pod]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=i64::from(MAX_CPUS)))]
    cpus: Option<u32>,

    /// Memory of the machine [default: 512M, or 1G with --pod]
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory_mib)]
    memory: Option<u64>,

    /// Make a machine as a Kubernetes pod without limits has it
    #[arg(long)]
    pod: bool,

    /// Number of network interfaces; can be repeated
    #[arg(long, value_name = "N", default_values_t = [0, 1], value_parser = clap::value_parser!(u8).range(..=8))]
    interfaces: Vec<u8>,

    /// Guest kernel: micro, stock, host or a path [default: the first one that is available]
    #[arg(long, value_name = "KERNEL")]
    kernel: Option<PathBuf>,

    /// How the guest finds its devices, as the annotation io.husk.transport
    #[arg(long, value_name = "auto|mmio|pci", default_value = "auto")]
    transport: Transport,
}

impl Warm {
    /// Makes the machines that are not there yet, and prints where they are.
    pub(super) fn run(self) -> Result<()> {
        let shape = Shape {
            cpus: self.cpus.unwrap_or(if self.pod { POD_CPUS } else { 1 }),
            memory_mib: self.memory.unwrap_or(if self.pod { POD_MEMORY_MIB } else { DEFAULT_MEMORY_MIB }),
            kernel: self.kernel,
            cmdline: String::new(),
            transport: self.transport,
            warm: true,
        };
        let dir = warm::dir()?;
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let mut all: Vec<usize> = self.interfaces.iter().map(|count| usize::from(*count)).collect();
        all.sort_unstable();
        let mut is_alone = false;
        for interfaces in all {
            if interfaces > 0 && !is_alone {
                // Their network devices are nobody's.
                crate::sys::namespaces::unshare(UnshareFlags::NEWNET).context(NEEDS_ROOT)?;
                is_alone = true;
            }
            let path = make(&dir, &shape, interfaces)?;
            crate::cli::print(&format!("{}\n", path.display()))?;
        }
        let all = fs::read_dir(&dir).with_context(|| format!("read {}", dir.display()))?;
        let all = all.flatten().map(|entry| entry.path()).filter(|path| path.is_dir());
        images::prune_all(all, &mut Pruned::default())
    }
}

/// Makes the warm machine with `interfaces` network interfaces, unless there is one that is not outdated. Returns its directory.
fn make(dir: &Path, shape: &Shape, interfaces: usize) -> Result<PathBuf> {
    let machine_dir = StateDir::at(state::machines()?)?.create(None)?;
    let spec = warm::spec(machine_dir.id().as_ref(), interfaces);
    let kernel = shape.kernel()?;
    let config = warm::config(&spec, shape, &kernel, &machine_dir.file(state_dir::VSOCK))?;
    let path = images::place_in(dir, &config)?;
    let _alone = lock::alone_within(&path.with_extension("lock"), lock::LONG_TIMEOUT)?;
    if images::find_in(dir, &config).is_some() {
        return Ok(path);
    }
    state_dir::remove_snapshot(&path)?;
    let record = Record::new(machine_dir.id(), "warm".into(), Vec::new(), config.clone());
    let mut endpoint = ControlEndpoint::open(machine_dir, record, stream_log::DEFAULT_MAX_BYTES)?;
    let signals = supervisor::block_signals(true)?;
    let initramfs = spec.waiting_initramfs(&[], &kernel, config.virtio_bus())?;
    let opened = resources::open_for(&config, machine::boot_source(&kernel, initramfs)?)?;
    let start = Start::Wait(Save { path: path.clone(), fingerprint: Fingerprint::of(&config)? });
    let timings = Arc::new(Timings::new(Instant::now()));
    let ended = session::run(&config, opened, start, &mut endpoint, &signals, &timings);
    let code = ended.as_ref().map_or(1, session::Ended::code);
    endpoint.close(code, None)?;
    let ended = ended?;
    if !path.exists() {
        bail!("the machine has ended before it was warm: {}; {}", ended.reason, ended.last_words().join("; "));
    }
    Ok(path)
}
