//! A machine's configuration: plain data from flags or a file, validated by [`MachineConfig::validate`].

mod cmdline;
mod disk;
mod health;
mod memory;
mod network;
mod publish;
mod rate;
mod share;
mod transport;
mod vsock;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::layout;
use crate::sys::socket;

pub use cmdline::{default_cmdline, hides_devices};
pub use disk::{
    Aio, BackingConfig, Cache, DISK_BLOCK_BYTES, DiskConfig, Format, MAX_BACKING_FILES, MAX_DISK_ID_BYTES,
    MAX_DISK_QUEUES, OWN_FILES, disk_name,
};
pub use health::HealthCheck;
pub use memory::HugePages;
pub use network::{
    Attachment, MAX_INTERFACE_NAME_BYTES, MacAddress, NetworkConfig, PortForward, Protocol, UserNetwork,
};
pub use publish::Publish;
pub use rate::Rate;
pub use share::{MAX_TAG_BYTES, SHARED_FILE, ShareCache, ShareConfig};
pub use transport::Transport;
pub use vsock::VsockConfig;

/// The least memory in which a Linux kernel can unpack itself.
pub const MIN_MEMORY_MIB: u64 = 32;
/// The maximum guest memory, 4 TiB: one memory slot of KVM takes fewer than 2^31 pages (8 TiB).
pub const MAX_MEMORY_MIB: u64 = 4 << 20;
/// The maximum number of vCPUs.
pub const MAX_CPUS: u32 = 32;
/// The minimum CPU limit: CPU time is granted in milliseconds, ten times per second.
pub const MIN_CPU_LIMIT_MILLICPUS: u32 = 10;
/// Docker's range of CPU shares, which is that of cpu.shares.
pub const MIN_CPU_SHARES: u32 = 2;
/// The maximum CPU shares.
pub const MAX_CPU_SHARES: u32 = 262_144;
/// The default guest CID (virtio 1.2 §5.10.4: 0 to 2 are reserved).
pub const DEFAULT_CID: u32 = 3;
/// The maximum length of a vsock socket's path: `_` and a port are appended for guest connections.
pub const MAX_VSOCK_PATH_BYTES: usize = socket::PATH_BYTES_MAX - "_4294967295".len();
/// The maximum length of a command line, including husk's parameters but not the final NUL.
pub const MAX_CMDLINE_BYTES: usize = layout::CMDLINE_MAX_BYTES - 1;

/// A machine as configured by the user. Paths are not opened, and nothing is looked up on the host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MachineConfig {
    /// The guest kernel: an ELF `vmlinux`, a bzImage or a unified kernel image.
    pub kernel: PathBuf,
    /// The initramfs, passed to the kernel unchanged.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub initrd: Option<PathBuf>,
    /// The user's kernel parameters. They follow the default ones, so that they take precedence.
    pub cmdline: String,
    /// Whether husk's default parameters are included.
    pub default_cmdline: bool,
    /// The number of vCPUs.
    pub cpus: u32,
    /// The CPU time of the whole machine, in thousandths of a CPU; unlimited if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_limit_millicpus: Option<u32>,
    /// The host CPUs that the whole machine may run on; all of them if empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cpuset: Vec<u32>,
    /// The CPU weight of the machine relative to other processes, where 1024 is the default.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu_shares: Option<u32>,
    /// The host memory in MiB that the whole machine may use: the guest's, husk's own, and the page cache of its disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host_memory_mib: Option<u64>,
    /// The maximum guest memory in MiB.
    pub memory_mib: u64,
    /// The current guest memory in MiB; the maximum if not given. Requires the balloon.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_target_mib: Option<u64>,
    /// Whether there is a balloon: the guest returns unused memory, and its memory can be changed at run time.
    pub balloon: bool,
    /// Whether the guest may deflate the balloon when it runs out of memory, so that the target is not a hard limit.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub balloon_deflates_on_oom: bool,
    /// The size of the host's pages that back guest memory.
    #[serde(alias = "hugepages", skip_serializing_if = "HugePages::is_default")]
    pub huge_pages: HugePages,
    /// Whether all guest memory is allocated before the guest starts.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub prefault: bool,
    /// Whether the guest may run nested virtual machines.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub nested: bool,
    /// Whether the process that runs the guest is confined.
    #[serde(skip_serializing_if = "Clone::clone")]
    pub sandbox: bool,
    /// How the guest finds its virtio devices.
    #[serde(skip_serializing_if = "Transport::is_default")]
    pub transport: Transport,
    /// Whether a guest that boots is told of places for all devices that fit on its bus, so that more can be added when it is saved
    /// and restored. PCI has them anyway.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub spare_slots: bool,
    /// Disks in the order the guest sees them: the first is `/dev/vda`.
    pub disks: Vec<DiskConfig>,
    /// How many of them, from the end, are behind all other devices but shares, so that a machine without them can get them when it
    /// is restored.
    #[serde(skip_serializing_if = "is_zero")]
    pub late_disks: usize,
    /// The vsock device, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock: Option<VsockConfig>,
    /// Network interfaces in the order the guest sees them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub networks: Vec<NetworkConfig>,
    /// Folders of the host that the guest can mount.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<ShareConfig>,
}

impl Default for MachineConfig {
    fn default() -> Self {
        MachineConfig {
            kernel: PathBuf::new(),
            initrd: None,
            cmdline: String::new(),
            default_cmdline: true,
            cpus: 1,
            cpu_limit_millicpus: None,
            cpuset: Vec::new(),
            cpu_shares: None,
            host_memory_mib: None,
            memory_mib: 512,
            memory_target_mib: None,
            balloon: true,
            balloon_deflates_on_oom: false,
            huge_pages: HugePages::default(),
            prefault: false,
            nested: false,
            sandbox: true,
            transport: Transport::default(),
            spare_slots: false,
            disks: Vec::new(),
            late_disks: 0,
            vsock: None,
            networks: Vec::new(),
            shares: Vec::new(),
        }
    }
}

fn is_zero(number: &usize) -> bool {
    *number == 0
}

/// An invalid configuration. The message says what is wrong and how to correct it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    /// No kernel was specified.
    #[error("no kernel given: use --kernel PATH (an ELF vmlinux, a bzImage or a unified kernel image)")]
    NoKernel,
    /// The initramfs path is empty.
    #[error("the initrd path is empty: use --initrd PATH, or omit it")]
    NoInitrd,
    /// Too few or too many vCPUs.
    #[error("{0} vCPUs: a machine can have 1 to {MAX_CPUS}, use --cpus N")]
    Cpus(u32),
    /// The limit is too small to be useful, or larger than the vCPUs can use.
    #[error(
        "a limit of {0} thousandths of a CPU: the range is {MIN_CPU_LIMIT_MILLICPUS} to 1000 per vCPU, use --cpus N such as 1.5"
    )]
    CpuLimit(u32),
    /// CPU shares out of range.
    #[error("{0} CPU shares: use --cpu-shares with {MIN_CPU_SHARES} to {MAX_CPU_SHARES}, the default weight is 1024")]
    CpuShares(u32),
    /// The host memory is too small for the guest's memory.
    #[error("{0} MiB of host memory: this machine needs {1} MiB, use --host-memory auto, or less --memory")]
    HostMemory(u64, u64),
    /// Less memory than any kernel needs to boot.
    #[error("{0} MiB of memory: a guest needs at least {MIN_MEMORY_MIB} MiB, use --memory {MIN_MEMORY_MIB}M or more")]
    TooLittleMemory(u64),
    /// More memory than a machine supports.
    #[error("{0} MiB of memory: a guest can have at most {MAX_MEMORY_MIB} MiB, use --memory 4T or less")]
    TooMuchMemory(u64),
    /// A target that is too small or larger than the guest's memory.
    #[error("{0} MiB of memory, with a maximum of {1} MiB: use --memory between {MIN_MEMORY_MIB}M and --memory-max")]
    MemoryTarget(u64, u64),
    /// A target without a balloon to enforce it.
    #[error("--memory-max needs the memory balloon: remove --no-balloon, or --memory-max")]
    NoBalloon,
    /// More devices than the PCI bus has places for.
    #[error(
        "{0} disks, {1} networks and shares: a machine can have at most {n} virtio devices, including vsock, the balloon and the \
         entropy device",
        n = layout::PCI_FUNCTIONS_MAX
    )]
    TooManyDevices(usize, usize),
    /// More devices than there are interrupt lines.
    #[error(
        "{0} disks, {1} networks and shares: with --transport mmio a machine can have at most {n} virtio devices, including \
         vsock, the balloon and the entropy device; use --transport pci",
        n = layout::VIRTIO_MMIO_MAX
    )]
    TooManyMmioDevices(usize, usize),
    /// A disk without a path.
    #[error("disk {0} has no path: use --disk PATH[,ro][,id=NAME][,format=raw|qcow2]")]
    NoDiskPath(usize),
    /// A limit of zero, or a burst without a limit.
    #[error(
        "disk {0}: limits and bursts must be 1 or more, and a burst needs its limit: bps, bps-burst, iops, iops-burst"
    )]
    DiskRate(usize),
    /// An unsupported block size.
    #[error("disk {0} has an invalid block size of {1} bytes: use block_size=512, 1024, 2048 or 4096")]
    DiskBlocks(usize, u32),
    /// A backing file of a raw disk.
    #[error("disk {0} is raw, and only a qcow2 image has a backing file: add format=qcow2, or remove backing=")]
    BackingOfRaw(usize),
    /// Too long a chain.
    #[error(
        "disk {0} has too many backing files: use at most {MAX_BACKING_FILES}, or merge some with `qemu-img convert -O qcow2`"
    )]
    TooManyBackingFiles(usize),
    /// A backing file without a path.
    #[error("disk {0} has a backing file without a path: use backing=PATH")]
    NoBackingPath(usize),
    /// No queues, or too many.
    #[error("disk {0} with {1} queues: use num_queues=1 to {MAX_DISK_QUEUES}")]
    DiskQueues(usize, u16),
    /// A serial number that is too long or would not be read back unchanged.
    #[error("invalid disk id {0:?}: use 1 to {MAX_DISK_ID_BYTES} letters, digits or punctuation marks, without spaces")]
    DiskId(String),
    /// Two disks with the same serial number.
    #[error("disk id {0:?} is used twice: every disk needs its own")]
    SameDiskId(String),
    /// A character that would end or corrupt the command line.
    #[error("the kernel command line contains {0:?}: use only printable ASCII characters and spaces")]
    CmdlineCharacter(char),
    /// Longer than the kernel supports.
    #[error(
        "the kernel command line is {0} bytes long, including husk's parameters: Linux reads at most {MAX_CMDLINE_BYTES}"
    )]
    CmdlineTooLong(usize),
    /// A reserved CID.
    #[error("vsock CID {0}: a guest's CID is 3 to 4294967294, use --vsock PATH,cid=N or omit it")]
    VsockCid(u32),
    /// No path, or one that is too long for a socket.
    #[error("vsock path of {0} bytes: use --vsock with a path of 1 to {MAX_VSOCK_PATH_BYTES} bytes")]
    VsockPath(usize),
    /// A share without a path.
    #[error("a share has no path: use --share PATH:TAG[,ro]")]
    NoSharePath,
    /// A tag that is too long or would not be passed on unchanged.
    #[error("invalid share tag {0:?}: use 1 to {MAX_TAG_BYTES} letters, digits or punctuation marks, without commas")]
    ShareTag(String),
    /// Two shares with the same tag.
    #[error("share tag {0:?} is used twice: every share needs its own")]
    SameShareTag(String),
    /// A limit of zero, or a burst without a limit.
    #[error("network limits must be 1 or more, and a burst needs its limit: use --network user,bps=10M,pps=1000")]
    NetworkRate,
    /// A limit on frames that husk does not process.
    #[error("vhost=on cannot be combined with rate limits: remove vhost=on, or bps= and pps=")]
    LimitedVhost,
    /// vhost-net without a tap device.
    #[error("vhost= needs a tap device: use --network tap=NAME,vhost=on, or a network of `husk network create`")]
    UserVhost,
    /// An invalid interface name.
    #[error(
        "invalid interface name {0:?}: use --network tap=NAME with 1 to {MAX_INTERFACE_NAME_BYTES} letters or digits"
    )]
    InterfaceName(String),
    /// Invalid ports.
    #[error("{1} ports starting at {0}: ports are 1 to 65535")]
    Ports(u16, u16),
    /// A configuration file with invalid content.
    #[error("{0}")]
    File(String),
}

impl MachineConfig {
    /// Parses a configuration from JSON. Missing keys keep their defaults, unknown keys are rejected by name.
    pub fn from_json(text: &str) -> Result<MachineConfig, Invalid> {
        serde_json::from_str(text).map_err(|error| Invalid::File(error.to_string()))
    }

    /// Validates everything that does not depend on the host, and stops at the first error.
    pub fn validate(&self) -> Result<(), Invalid> {
        if self.kernel.as_os_str().is_empty() {
            return Err(Invalid::NoKernel);
        }
        if self.initrd.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
            return Err(Invalid::NoInitrd);
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(Invalid::Cpus(self.cpus));
        }
        let limits = MIN_CPU_LIMIT_MILLICPUS..=1000 * self.cpus;
        if let Some(limit) = self.cpu_limit_millicpus.filter(|limit| !limits.contains(limit)) {
            return Err(Invalid::CpuLimit(limit));
        }
        match self.memory_mib {
            ..MIN_MEMORY_MIB => return Err(Invalid::TooLittleMemory(self.memory_mib)),
            MIN_MEMORY_MIB..=MAX_MEMORY_MIB => {}
            _ => return Err(Invalid::TooMuchMemory(self.memory_mib)),
        }
        if let Some(shares) = self.cpu_shares.filter(|shares| !(MIN_CPU_SHARES..=MAX_CPU_SHARES).contains(shares)) {
            return Err(Invalid::CpuShares(shares));
        }
        if let Some(host_mib) = self.host_memory_mib.filter(|host_mib| *host_mib < self.host_memory_needed_mib()) {
            return Err(Invalid::HostMemory(host_mib, self.host_memory_needed_mib()));
        }
        self.validate_memory_target()?;
        self.validate_cmdline()?;
        self.validate_device_count()?;
        self.validate_disks()?;
        self.validate_vsock()?;
        self.validate_networks()?;
        self.shares
            .iter()
            .enumerate()
            .try_for_each(|(at, share)| share.validate(self.shares.get(..at).unwrap_or_default()))
    }

    /// The complete kernel command line: husk's parameters, if included, then those in the kernel's image, then the
    /// user's, so that later ones take precedence. `has_initrd` includes an initramfs in the image.
    pub fn full_cmdline(&self, kernel_words: &str, has_initrd: bool) -> String {
        let own = || default_cmdline(has_initrd, self.disks.first().map(|disk| disk.readonly));
        let own = if self.default_cmdline { own() } else { String::new() };
        let parts = [&own, kernel_words, &self.cmdline];
        parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ")
    }

    fn validate_memory_target(&self) -> Result<(), Invalid> {
        let Some(target_mib) = self.memory_target_mib else { return Ok(()) };
        if !(MIN_MEMORY_MIB..=self.memory_mib).contains(&target_mib) {
            return Err(Invalid::MemoryTarget(target_mib, self.memory_mib));
        }
        if self.balloon { Ok(()) } else { Err(Invalid::NoBalloon) }
    }

    fn validate_cmdline(&self) -> Result<(), Invalid> {
        if let Some(character) = self.cmdline.chars().find(|c| !(c.is_ascii_graphic() || *c == ' ')) {
            return Err(Invalid::CmdlineCharacter(character));
        }
        let len_bytes = self.full_cmdline("", self.initrd.is_some()).len();
        if len_bytes > MAX_CMDLINE_BYTES {
            return Err(Invalid::CmdlineTooLong(len_bytes));
        }
        Ok(())
    }

    fn validate_device_count(&self) -> Result<(), Invalid> {
        let (disks, networks) = (self.disks.len(), self.networks.len() + self.shares.len());
        match self.transport {
            _ if self.devices_fit() => Ok(()),
            Transport::Mmio => Err(Invalid::TooManyMmioDevices(disks, networks)),
            Transport::Auto | Transport::Pci => Err(Invalid::TooManyDevices(disks, networks)),
        }
    }

    fn validate_disks(&self) -> Result<(), Invalid> {
        for (index, disk) in self.disks.iter().enumerate() {
            disk.validate(index + 1)?;
            if let Some(id) = &disk.id
                && self.disks[..index].iter().any(|earlier| earlier.id.as_ref() == Some(id))
            {
                return Err(Invalid::SameDiskId(id.clone()));
            }
        }
        Ok(())
    }

    fn validate_networks(&self) -> Result<(), Invalid> {
        self.networks.iter().try_for_each(NetworkConfig::validate)
    }

    fn validate_vsock(&self) -> Result<(), Invalid> {
        let Some(VsockConfig { socket, cid }) = &self.vsock else { return Ok(()) };
        if !(DEFAULT_CID..u32::MAX).contains(cid) {
            return Err(Invalid::VsockCid(*cid));
        }
        match socket.as_os_str().len() {
            1..=MAX_VSOCK_PATH_BYTES => Ok(()),
            len_bytes => Err(Invalid::VsockPath(len_bytes)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> MachineConfig {
        MachineConfig { kernel: "vmlinux".into(), ..MachineConfig::default() }
    }

    fn disk(id: Option<&str>) -> DiskConfig {
        DiskConfig { id: id.map(str::to_owned), ..DiskConfig::of("disk.img".into()) }
    }

    #[test]
    fn defaults_and_a_kernel_are_a_valid_machine() {
        assert_eq!(config().validate(), Ok(()));
        assert_eq!(MachineConfig::from_json(r#"{"kernel": "vmlinux"}"#), Ok(config()));
    }

    #[test]
    fn limits_are_inclusive() {
        let with = |change: fn(&mut MachineConfig)| {
            let mut config = config();
            change(&mut config);
            config.validate()
        };
        assert_eq!(with(|c| c.cpus = 32), Ok(()));
        assert_eq!(with(|c| c.cpus = 0), Err(Invalid::Cpus(0)));
        assert_eq!(with(|c| c.cpus = 33), Err(Invalid::Cpus(33)));
        let limited = |cpus, limit| {
            let config = MachineConfig { cpus, cpu_limit_millicpus: Some(limit), ..config() };
            config.validate()
        };
        assert_eq!((limited(1, 10), limited(2, 2000)), (Ok(()), Ok(())));
        assert_eq!((limited(1, 9), limited(2, 2001)), (Err(Invalid::CpuLimit(9)), Err(Invalid::CpuLimit(2001))));
        assert_eq!((with(|c| c.cpu_shares = Some(2)), with(|c| c.cpu_shares = Some(262_144))), (Ok(()), Ok(())));
        assert_eq!(with(|c| c.cpu_shares = Some(1)), Err(Invalid::CpuShares(1)));
        assert_eq!(with(|c| c.cpu_shares = Some(262_145)), Err(Invalid::CpuShares(262_145)));
        assert_eq!(with(|c| c.host_memory_mib = Some(548)), Ok(()));
        assert_eq!(with(|c| c.host_memory_mib = Some(547)), Err(Invalid::HostMemory(547, 548)));
        assert_eq!(with(|c| c.memory_mib = 32), Ok(()));
        assert_eq!(with(|c| c.memory_mib = 31), Err(Invalid::TooLittleMemory(31)));
        assert_eq!(with(|c| c.memory_mib = 4 << 20), Ok(()));
        assert_eq!(with(|c| c.memory_mib = u64::MAX), Err(Invalid::TooMuchMemory(u64::MAX)));
        assert_eq!(with(|c| c.kernel = PathBuf::new()), Err(Invalid::NoKernel));
        assert_eq!(with(|c| c.initrd = Some(PathBuf::new())), Err(Invalid::NoInitrd));
    }

    #[test]
    fn a_memory_target_is_within_memory_and_needs_a_balloon() {
        let with = |target, balloon| MachineConfig { memory_target_mib: Some(target), balloon, ..config() }.validate();
        assert_eq!((with(32, true), with(512, true)), (Ok(()), Ok(())));
        assert_eq!(with(31, true), Err(Invalid::MemoryTarget(31, 512)));
        assert_eq!(with(513, true), Err(Invalid::MemoryTarget(513, 512)));
        assert_eq!(with(256, false), Err(Invalid::NoBalloon));
        assert_eq!(MachineConfig { balloon: false, ..config() }.validate(), Ok(()));
    }

    #[test]
    fn the_command_line_limit_includes_the_default_parameters() {
        let own_bytes = config().full_cmdline("", false).len();
        let with = |cmdline: String, default_cmdline| MachineConfig { cmdline, default_cmdline, ..config() }.validate();
        assert_eq!(with("x".repeat(2047), false), Ok(()));
        assert_eq!(with("x".repeat(2048), false), Err(Invalid::CmdlineTooLong(2048)));
        assert_eq!(with("x".repeat(2046 - own_bytes), true), Ok(()));
        assert_eq!(with("x".repeat(2047 - own_bytes), true), Err(Invalid::CmdlineTooLong(2048)));
        for character in ['\0', '\n', '\t', 'ï'] {
            assert_eq!(with(format!("a{character}b"), true), Err(Invalid::CmdlineCharacter(character)));
        }
    }

    #[test]
    fn the_users_parameters_follow_the_default_ones() {
        let disk = DiskConfig { readonly: true, ..disk(None) };
        let config = MachineConfig { cmdline: "root=/dev/vdb".into(), disks: vec![disk], ..config() };
        assert!(config.full_cmdline("", false).ends_with("root=/dev/vda ro root=/dev/vdb"));
        assert!(config.full_cmdline("root=UUID=1", true).ends_with("swiotlb=noforce root=UUID=1 root=/dev/vdb"));
        let bare = MachineConfig { default_cmdline: false, ..config };
        assert_eq!(bare.full_cmdline("", false), "root=/dev/vdb");
        assert_eq!(bare.full_cmdline("rw", true), "rw root=/dev/vdb");
    }

    #[test]
    fn disk_ids_fit_their_field_and_are_unique() {
        let with = |ids: &[&str]| {
            let disks = ids.iter().map(|id| disk(Some(id))).collect();
            MachineConfig { disks, ..config() }.validate()
        };
        assert_eq!(with(&["root", "12345678901234567890"]), Ok(()));
        for id in ["", "123456789012345678901", "two words", "naïve", "tab\t"] {
            assert_eq!(with(&[id]), Err(Invalid::DiskId(id.into())));
        }
        assert_eq!(with(&["a", "b", "a"]), Err(Invalid::SameDiskId("a".into())));
    }

    #[test]
    fn a_vsock_path_has_room_for_a_port_and_the_cid_is_valid() {
        let with = |path: &str, cid| {
            let vsock = Some(VsockConfig { socket: path.into(), cid });
            MachineConfig { vsock, ..config() }.validate()
        };
        let longest = "x".repeat(96);
        assert_eq!((with("v.sock", 3), with(&longest, u32::MAX - 1)), (Ok(()), Ok(())));
        for cid in [0, 1, 2, u32::MAX] {
            assert_eq!(with("v.sock", cid), Err(Invalid::VsockCid(cid)));
        }
        assert_eq!(with("", 3), Err(Invalid::VsockPath(0)));
        assert_eq!(with(&"x".repeat(97), 3), Err(Invalid::VsockPath(97)));
        let vsock = Some(VsockConfig { socket: "v.sock".into(), cid: 3 });
        let json = r#"{"kernel": "vmlinux", "vsock": {"socket": "v.sock"}}"#;
        assert_eq!(MachineConfig::from_json(json).unwrap().vsock, vsock);
    }

    #[test]
    fn a_machine_survives_a_json_round_trip() {
        let rate = Rate { bytes_per_second: Some(1 << 20), burst_bytes: Some(1), ..Rate::default() };
        let full = MachineConfig {
            initrd: Some("initrd.cpio".into()),
            cmdline: "quiet \"a b\"".into(),
            default_cmdline: false,
            cpus: 4,
            cpu_limit_millicpus: Some(3500),
            cpuset: vec![0, 3],
            cpu_shares: Some(512),
            host_memory_mib: Some(8192),
            memory_mib: 6144,
            memory_target_mib: Some(1024),
            balloon: false,
            disks: vec![
                disk(Some("root")),
                DiskConfig { readonly: true, format: Some(Format::Qcow2), rate, ..disk(None) },
            ],
            vsock: Some(VsockConfig { socket: "v.sock".into(), cid: 7 }),
            ..config()
        };
        for config in [config(), full] {
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(MachineConfig::from_json(&text), Ok(config));
        }
    }

    #[test]
    fn an_unknown_key_is_rejected_by_name() {
        for text in [r#"{"kernal": "x"}"#, r#"{"disks": [{"path": "x", "read_only": true}]}"#] {
            let Err(Invalid::File(line)) = MachineConfig::from_json(text) else { panic!("{text} was taken") };
            assert!(line.contains("kernal") || line.contains("read_only"), "{line}");
            assert!(!line.contains('\n'), "{line}");
        }
    }
}
