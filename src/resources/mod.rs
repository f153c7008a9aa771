//! Opens everything that a configuration refers to. No other module opens these paths.
//!
//! Everything is opened before the first part of a machine is built, so that invalid input is rejected early without
//! side effects, and later stages need no access to the file system.

pub mod attendant;
pub mod bridge;
mod cache;
pub mod data_dir;
pub mod disk;
mod firewall;
pub mod guest_kernel;
pub mod host;
pub mod interface;
pub mod kernel;
pub mod lock;
pub mod memory_use;
pub mod modules;
pub mod net;
mod netlink;
pub mod passt;
pub mod ports;
pub(crate) mod programs;
mod published;
pub mod resolver;
pub mod root_file;
pub mod share;
pub mod text;
pub mod vsock;

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, IntoRawFd, RawFd};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use kvm_ioctls::Kvm;

use crate::boot::{Kernel, KernelImage, Part};
use crate::config::MachineConfig;
use crate::fs::process::{FILES_MAX, Process};
use crate::sandbox::affinity;
use crate::sandbox::cgroup::{CgroupLimits, ResourceLimits};
use host::KVM_API_VERSION;

/// KVM's device node.
const KVM_PATH: &str = "/dev/kvm";

/// The resources of a machine: open files in configuration order.
pub struct Resources {
    /// /dev/kvm.
    pub kvm: Kvm,
    /// Where the guest starts.
    pub source: Source,
    /// The disks, locked for as long as they are open.
    pub disks: Vec<disk::DiskFile>,
    /// The host side of the vsock device.
    pub vsock: Option<vsock::VsockSocket>,
    /// The host side of the network interfaces.
    pub networks: Vec<net::Network>,
    /// The folders that are shared.
    pub shares: Vec<share::SharedFolder>,
}

/// Where a guest starts: the content of its memory and the first state of its vCPUs.
pub enum Source {
    /// At the entry point of a kernel.
    Boot(Box<BootFiles>),
    /// Where a machine of the same configuration was saved.
    Snapshot(SnapshotFiles),
}

/// What a machine boots from.
pub struct BootFiles {
    /// The kernel, with its format identified.
    pub kernel: Kernel,
    /// The command line in the kernel's image.
    pub kernel_words: String,
    /// The initramfs: the one specified, or else the one in the kernel's image.
    pub initrd: Option<Part>,
}

/// What a machine is restored from.
pub struct SnapshotFiles {
    /// Its state, as the monitor that saved it has encoded it. Nothing in it has been checked.
    pub state: Vec<u8>,
    /// Its memory. The file must not change as long as the machine exists.
    pub memory: File,
    /// Which pages of it a machine of this snapshot has touched, if that was recorded (`memory/touched.rs`).
    pub touched: Option<Vec<u8>>,
    /// What its guest knows of each share.
    pub shares: Vec<File>,
    /// How many devices, the last ones, the machine gets that the saved one did not have.
    pub added_devices: usize,
}

impl SnapshotFiles {
    /// A copy for another machine.
    pub fn try_clone(&self) -> Result<SnapshotFiles> {
        let memory = self.memory.try_clone().context("duplicate a file descriptor")?;
        let shares = self.shares.iter().map(File::try_clone).collect::<std::io::Result<_>>();
        let shares = shares.context("duplicate a file descriptor")?;
        Ok(SnapshotFiles {
            state: self.state.clone(),
            memory,
            touched: self.touched.clone(),
            shares,
            added_devices: self.added_devices,
        })
    }
}

impl Source {
    fn fds(&self) -> Vec<RawFd> {
        match self {
            Source::Boot(files) => {
                let initrd = files.initrd.iter().map(|initrd| initrd.file().as_raw_fd());
                initrd.chain([files.kernel.as_raw_fd()]).collect()
            }
            Source::Snapshot(files) => vec![files.memory.as_raw_fd()],
        }
    }
}

/// What a machine has on the host besides open files, and what exists as long as this: it belongs to whoever supervises the
/// machine.
#[derive(Default)]
pub struct Outside {
    /// The cgroups that limit the CPU time and memory of this process and of copies of it.
    pub cgroup_limits: CgroupLimits,
    vsock: Option<vsock::VsockName>,
    passts: Vec<passt::Keeper>,
    /// Interfaces that get their frames back when this is dropped.
    taken: Vec<interface::TakenOver>,
    /// Those that serve folders.
    servers: Vec<Process>,
}

impl Outside {
    /// Those that start passt when the guest needs it.
    pub fn starters(&self) -> impl Iterator<Item = &passt::Starter> {
        self.passts.iter().map(passt::Keeper::starter)
    }

    /// The descriptors that both a machine's devices and its supervisor need.
    pub fn shared_fds(&self) -> Vec<RawFd> {
        self.starters().map(AsRawFd::as_raw_fd).collect()
    }

    /// The processes that serve folders, in the order of the shares.
    pub fn servers(&self) -> &[Process] {
        &self.servers
    }

    /// Clones of them.
    fn passts(&self) -> Vec<passt::Starter> {
        self.starters().cloned().collect()
    }

    fn vsock_path(&self) -> Option<vsock::VsockPath> {
        self.vsock.as_ref().map(|name| name.path().clone())
    }
}

impl Resources {
    /// All descriptors.
    pub fn fds(&self) -> Vec<RawFd> {
        let mut fds = vec![self.kvm.as_raw_fd()];
        fds.extend(self.source.fds());
        fds.extend(self.disks.iter().flat_map(disk::DiskFile::fds));
        fds.extend(self.vsock.iter().map(|vsock| vsock.listener.as_raw_fd()));
        fds.extend(self.networks.iter().flat_map(net::Network::fds));
        fds.extend(self.shares.iter().flat_map(share::SharedFolder::fds));
        fds
    }
}

/// Opens all resources that `config` refers to. Stops at the first failure, with the path and the reason.
pub fn open(config: &MachineConfig) -> Result<(Resources, Outside)> {
    let KernelImage { kernel, initrd, cmdline: kernel_words } = kernel::open(&config.kernel)?;
    let initrd = config.initrd.as_deref().map_or(Ok(initrd), |path| open_initrd(path).map(Some))?;
    open_for(config, Source::Boot(Box::new(BootFiles { kernel, kernel_words, initrd })))
}

/// The same for a machine that starts at `source`: no kernel is opened.
pub fn open_for(config: &MachineConfig, mut source: Source) -> Result<(Resources, Outside)> {
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
    let mut outside = Outside { cgroup_limits, ..Outside::default() };
    // Their servers are within these limits, and become ready in the meantime.
    let mut known = match &mut source {
        Source::Boot(_) => Vec::new(),
        Source::Snapshot(files) => std::mem::take(&mut files.shares),
    }
    .into_iter();
    let files_max = FILES_MAX / config.shares.len().max(1) as u64;
    let open = |share| share::open(share, known.next(), files_max, config.sandbox);
    let opening = config.shares.iter().map(open).collect::<Result<Vec<_>>>()?;
    let mut vsock = config.vsock.as_ref().map(vsock::open).transpose()?;
    outside.vsock = vsock.as_mut().and_then(vsock::VsockSocket::take_name);
    let mut networks = Vec::new();
    for network in &config.networks {
        let (network, keeper) = net::open(network, config)?;
        networks.push(network);
        match keeper {
            Some(net::Keeper::Passt(passt)) => outside.passts.push(passt),
            Some(net::Keeper::Interface(taken)) => outside.taken.push(taken),
            None => {}
        }
    }
    let mut shares = Vec::new();
    for share in opening {
        let (share, server) = share.finish()?;
        shares.push(share);
        outside.servers.push(server);
    }
    Ok((Resources { kvm, source, disks, vsock, networks, shares }, outside))
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
