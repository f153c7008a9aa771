//! The flags that determine the machine in which `husk run` runs a command: everything but the command itself.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use crate::boot::Part;
use crate::cli::cpus::{self, Cpus};
use crate::cli::limits::LimitFlags;
use crate::cli::network::NetworkFlags;
use crate::cli::pull::PullFlags;
use crate::cli::size;
use crate::config::{Invalid, MAX_CPUS, MAX_MEMORY_MIB, MIN_MEMORY_MIB, MachineConfig, Transport};
use crate::guest::{GuestSpec, RootFs, WritableLayer};
use crate::image::{ImageProcess, on_demand};
use crate::resources::guest_kernel::{Choice, GuestKernel};
use crate::resources::root_file::Kind;
use crate::resources::{self, BootFiles, Source};
use crate::snapshot::{Description, Snapshot};

// A warm image fits a machine with the same values.
/// The memory of a machine, as an argument.
const DEFAULT_MEMORY: &str = "512M";

/// As in Docker, 0 is what a machine has without the flag.
fn memory_mib(text: &str) -> Result<u64, String> {
    size::memory_mib(if text == "0" { DEFAULT_MEMORY } else { text })
}

#[derive(Debug, Args)]
pub(in crate::cli) struct MachineFlags {
    /// Mount the root filesystem as read-only
    #[arg(long)]
    pub(in crate::cli) read_only: bool,

    #[command(flatten)]
    pub(in crate::cli) pull: PullFlags,

    /// Limit the disk space for downloading and unpacking the image [default: the free disk space]
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    pub(in crate::cli) max_size: Option<u64>,

    /// Number of CPUs, 0.01 to 32; a fraction limits host CPU time, as for `husk boot`
    #[arg(long, value_name = "N", value_parser = cpus::cpus, default_value = "1")]
    pub(in crate::cli) cpus: Cpus,

    /// Guest memory size: 512M, 1.5G, 2GiB
    #[arg(short, long, value_name = "SIZE", value_parser = memory_mib, default_value = DEFAULT_MEMORY)]
    #[arg(allow_negative_numbers = true)]
    pub(in crate::cli) memory: u64,

    #[command(flatten)]
    pub(in crate::cli) limits: LimitFlags,

    /// How the guest finds its virtio devices: mmio boots fastest, pci has the faster interrupts; auto is mmio, unless
    /// the guest needs pci
    #[arg(long, value_name = "auto|mmio|pci")]
    pub(in crate::cli) transport: Option<Transport>,

    /// Enable nested virtualization, if the host's KVM supports it
    #[arg(long)]
    pub(in crate::cli) nested: bool,

    #[command(flatten)]
    pub(in crate::cli) network: NetworkFlags,

    /// Guest kernel: micro, stock, host or a path [default: the first one that is available]
    #[arg(long, value_name = "KERNEL")]
    pub(in crate::cli) kernel: Option<PathBuf>,
}

impl MachineFlags {
    /// Identifies the image: a file recognized by its content, or a source for the image store, where it is the one with the
    /// identity `pinned`, if given. Changes to it are in guest memory. `None` if it cannot be prepared, which has been reported.
    pub fn root_fs(&self, image: &Path, pinned: Option<&str>) -> Result<Option<RootFs>> {
        let (root, defaults, in_use, identity) = match on_demand::identify(image)? {
            Kind::Disk => return Ok(Some(RootFs::Disk { path: image.to_owned(), readonly: self.read_only })),
            Kind::Root { uuid } => (image.to_owned(), ImageProcess::default(), None, uuid),
            Kind::Other => {
                let name =
                    image.to_str().with_context(|| format!("the image name {} is not valid UTF-8", image.display()))?;
                let word = pinned.unwrap_or(name);
                let Some(prepared) =
                    on_demand::find_or_prepare(word, self.pull.finding(self.max_size, self.limits.sandbox()))?
                else {
                    return Ok(None);
                };
                (prepared.root, prepared.process, Some(prepared.in_use), prepared.id.first_half())
            }
        };
        let writable = if self.read_only { WritableLayer::None } else { WritableLayer::Memory };
        Ok(Some(RootFs::Image { root, identity, defaults: Box::new(defaults), writable, in_use }))
    }

    /// Takes the values of the machine in the snapshot `dir`, and returns its image.
    pub fn adopt(&mut self, dir: &Path) -> Result<String> {
        let Description { image, config, fingerprint, .. } = Snapshot::open(dir)?.description;
        fingerprint.with_context(|| {
            let name = dir.display();
            format!("the machine in the snapshot {name} already runs its command: use `husk restore {name}`")
        })?;
        self.cpus = Cpus { vcpus: config.cpus, limit_millicpus: None };
        self.memory = config.memory_target_mib.unwrap_or(config.memory_mib);
        self.limits.adopt(&config);
        if config.networks.is_empty() {
            self.network.default_to_none();
        }
        self.transport = Some(config.transport);
        self.kernel = Some(config.kernel);
        self.nested = config.nested;
        Ok(image)
    }

    /// Fails if the machine cannot be as the flags say, whatever its image.
    pub fn check(&self) -> Result<()> {
        if !(1..=MAX_CPUS).contains(&self.cpus.vcpus) {
            return Err(Invalid::Cpus(self.cpus.vcpus).into());
        }
        if self.memory < MIN_MEMORY_MIB {
            return Err(Invalid::TooLittleMemory(self.memory).into());
        }
        if self.memory > MAX_MEMORY_MIB {
            return Err(Invalid::TooMuchMemory(self.memory).into());
        }
        // A small host may have less than what nobody has asked for.
        if size::memory_mib(DEFAULT_MEMORY) != Ok(self.memory) {
            resources::host::check_memory(self.memory)?;
        }
        self.network.check()
    }

    /// The kernel that the machine boots.
    pub fn kernel(&self) -> Result<GuestKernel> {
        self.kernel.as_deref().map_or(Choice::Any, Choice::from_word).find()
    }

    /// The configuration of the machine for `spec`, with `socket` for its sessions. With `verbose` its kernel logs more.
    pub fn config(
        &self,
        spec: &GuestSpec,
        kernel: &GuestKernel,
        socket: &Path,
        verbose: bool,
    ) -> Result<MachineConfig> {
        let mut config = spec.machine_config(kernel, self.cpus.vcpus, self.memory, socket, verbose);
        config.cpu_limit_millicpus = self.cpus.limit_millicpus;
        self.limits.apply(Some(self.memory), &mut config);
        config.nested = self.nested;
        config.transport = GuestSpec::transport(self.transport.unwrap_or_default(), kernel)?;
        Ok(config)
    }
}

/// What a machine boots from that has husk's init.
pub fn boot_source(kernel: &GuestKernel, initramfs: File) -> Result<Source> {
    let kernel = resources::kernel::open(&kernel.path)?.kernel;
    // The initramfs and the command line in a unified kernel image belong to another system.
    let initrd = Some(Part::whole(initramfs).context("read the initrd")?);
    Ok(Source::Boot(Box::new(BootFiles { kernel, kernel_words: String::new(), initrd })))
}
