//! Opens everything that a configuration refers to. No other module opens these paths.
//!
//! Everything is opened before the first part of a machine is built, so that invalid input is rejected early without
//! side effects, and later stages need no access to the file system.

pub mod bridge;
mod cache;
pub mod disk;
mod firewall;
pub mod guest_kernel;
pub mod host;
pub mod kernel;
pub mod lock;
pub mod memory_use;
pub mod modules;
pub mod net;
pub mod passt;
mod ports;
pub(crate) mod programs;
pub mod resolver;
pub mod root_file;
pub mod text;
pub mod vsock;

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::IntoRawFd;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvm_ioctls::Kvm;

use crate::boot::{Kernel, KernelImage, Part};
use crate::config::MachineConfig;
use crate::sandbox::affinity;
use crate::sandbox::cgroup::{CgroupLimits, ResourceLimits};
use host::KVM_API_VERSION;

/// KVM's device node.
const KVM_PATH: &str = "/dev/kvm";

/// The resources of a machine: open files in configuration order, and its cgroups.
pub struct Resources {
    /// /dev/kvm.
    pub kvm: Kvm,
    /// The kernel, with its format identified.
    pub kernel: Kernel,
    /// The command line in the kernel's image.
    pub kernel_words: String,
    /// The initramfs: the one specified, or else the one in the kernel's image.
    pub initrd: Option<Part>,
    /// The disks, locked for as long as they are open.
    pub disks: Vec<disk::DiskFile>,
    /// The cgroups that limit this process's CPU time and memory.
    pub cgroup_limits: CgroupLimits,
    /// The host side of the vsock device.
    pub vsock: Option<vsock::VsockSocket>,
    /// The host side of the network interfaces.
    pub networks: Vec<net::Network>,
    /// Those that start passt when the guest needs it.
    pub starters: Vec<passt::Starter>,
}

/// Opens all resources that `config` refers to. Stops at the first failure, with the path and the reason.
pub fn open(config: &MachineConfig) -> Result<Resources> {
    let KernelImage { kernel, initrd, cmdline: kernel_words } = kernel::open(&config.kernel)?;
    let initrd = config.initrd.as_deref().map_or(Ok(initrd), |path| open_initrd(path).map(Some))?;
    let disks = disk::open_all(&config.disks)?;
    let kvm = open_kvm()?;
    // Last, since only these have side effects.
    let cgroup_limits = CgroupLimits::new(&ResourceLimits {
        cpu_millicpus: config.cpu_limit_millicpus,
        cpu_shares: config.cpu_shares,
        memory_bytes: config.host_memory_mib.map(|mib| mib << 20),
    })?;
    if !config.cpuset.is_empty() {
        affinity::pin_to(&config.cpuset)?;
    }
    let vsock = config.vsock.as_ref().map(vsock::open).transpose()?;
    let (mut networks, mut starters) = (Vec::new(), Vec::new());
    for network in &config.networks {
        let (network, starter) = net::open(network, config)?;
        networks.push(network);
        starters.extend(starter);
    }
    Ok(Resources { kvm, kernel, kernel_words, initrd, disks, cgroup_limits, vsock, networks, starters })
}

fn open_initrd(path: &Path) -> Result<Part> {
    let context = || format!("open initrd {}", path.display());
    let file = File::open(path).with_context(context)?;
    ensure!(file.metadata().with_context(context)?.is_file(), "initrd {} is not a file", path.display());
    Part::whole(file).with_context(context)
}

/// Opens /dev/kvm. The error tells the user how to get access.
#[allow(unsafe_code)]
pub fn open_kvm() -> Result<Kvm> {
    use std::os::fd::FromRawFd;

    let file = OpenOptions::new().read(true).write(true).open(KVM_PATH).map_err(|e| {
        let advice = match e.kind() {
            ErrorKind::NotFound => "load KVM with `sudo modprobe -a kvm_intel kvm_amd`",
            ErrorKind::PermissionDenied => "join its group with `sudo usermod -aG kvm $USER` and log in again",
            _ => "see `husk doctor`",
        };
        anyhow::Error::new(e).context(format!("open {KVM_PATH} ({advice})"))
    })?;
    // SAFETY: the descriptor was just opened and its only owner gives it up here.
    let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
    let version = kvm.get_api_version();
    ensure!(version == KVM_API_VERSION, "{KVM_PATH} has KVM API version {version}, not {KVM_API_VERSION}");
    Ok(kvm)
}
