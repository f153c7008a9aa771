//! The host side of a guest that runs husk's init: what it boots with, and the session with its process.

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use husk_protocol::{Container, Overlay, Preload, Process, Root, Run, Spec, Start, Tmpfs, WindowSize};

use self::network::NetworkSetup;
use self::process::Overrides;
use self::shares::Share;
use crate::config::{
    DEFAULT_CID, DiskConfig, Format, HealthCheck, MachineConfig, NetworkConfig, ShareConfig, Transport, VsockConfig,
};
use crate::console::terminal;
use crate::image::ImageProcess;
use crate::image::scratch::Scratch;
use crate::layout::VirtioBus;
use crate::resources::guest_kernel::GuestKernel;
use crate::resources::modules::{self, Module};
use crate::state_dir::identity::IdentityRecord;

pub mod capability;
pub mod capture;
pub mod exec;
pub mod initramfs;
pub mod network;
mod output;
pub mod process;
pub mod seccomp;
pub mod session;
pub mod shares;
pub mod signal;
pub mod streams;

/// The guest's first process, a statically linked program (firmware/init).
pub const INIT: &[u8] = include_bytes!(env!("HUSK_INIT"));

/// The source of a machine's root file system.
#[derive(Debug)]
pub enum RootFs {
    /// A read-only root file system shared between machines, with a writable layer on top.
    Image {
        /// An EROFS image.
        root: PathBuf,
        /// What distinguishes it from others: a writable layer fits no other one.
        identity: [u8; 16],
        /// The image's process configuration.
        defaults: Box<ImageProcess>,
        /// The writable layer.
        writable: WritableLayer,
        /// Keeps the image store from removing the image.
        in_use: Option<File>,
    },
    /// A disk with its own operating system.
    Disk {
        /// A disk image or a block device.
        path: PathBuf,
        /// Whether the disk is read-only.
        readonly: bool,
    },
    /// A folder of the host with the root file systems of containers and what is mounted in them.
    Share {
        /// The folder.
        path: PathBuf,
        /// The first container.
        container: Box<Container>,
    },
}

/// Where changes to an image's root file system are stored.
#[derive(Debug)]
pub enum WritableLayer {
    /// The root file system is read-only.
    None,
    /// In guest memory; changes are lost when the machine exits.
    Memory,
    /// On a separate disk.
    Disk(Scratch),
}

/// The contents of a machine: its root file system and what it runs.
#[derive(Debug)]
pub struct GuestSpec {
    root_fs: RootFs,
    hostname: String,
    tmpfs: Vec<Tmpfs>,
    sysctls: Vec<(String, String)>,
    program: Program,
    network: NetworkSetup,
    shares: Vec<Share>,
    volumes: Vec<Vec<u8>>,
}

/// What a machine runs.
#[derive(Debug)]
enum Program {
    /// A process that husk's init starts.
    Process(Box<Process>),
    /// The root file system's own init with its arguments; if empty, the default one.
    Init(Vec<Vec<u8>>),
}

/// What the guest mounts to reach the files of containers.
const CONTAINERS_TAG: &str = "containers";
/// The driver of devices that are not on PCI.
const MMIO_DRIVER: &str = "virtio_mmio";
/// The guest's device with the root file system, the first disk of every machine.
const ROOT_DEVICE: &str = "/dev/vda";
/// The guest's device with the writable layer, the second disk.
const WRITABLE_DEVICE: &str = "/dev/vdb";

impl GuestSpec {
    /// A machine that runs one process: the image's, with the user's overrides.
    pub fn with_process(
        root_fs: RootFs,
        overrides: Overrides,
        terminal: bool,
        stdin: bool,
        hostname: String,
        tmpfs: Vec<Tmpfs>,
    ) -> Result<GuestSpec> {
        let RootFs::Image { defaults, .. } = &root_fs else { bail!("a disk image runs its own init") };
        let mut process = overrides.apply(defaults);
        ensure!(!process.args.is_empty(), "no command specified, and the image has none: add one after the image");
        // The conventional terminal size, used when the host's is unknown.
        let size = || terminal::window_size().unwrap_or(WindowSize { rows: 24, columns: 80 });
        process.terminal = terminal.then(size);
        process.stdin = stdin;
        check_hostname(&hostname)?;
        let program = Program::Process(Box::new(process));
        Ok(GuestSpec::new(root_fs, hostname, tmpfs, program))
    }

    /// A machine that runs the root file system's own init. `args` are the init program and its arguments; if empty,
    /// the default init is used.
    pub fn with_own_init(root_fs: RootFs, args: Vec<OsString>, hostname: String, tmpfs: Vec<Tmpfs>) -> GuestSpec {
        // A disk image sets its own host name.
        let hostname = if matches!(root_fs, RootFs::Disk { .. }) { String::new() } else { hostname };
        let args = args.into_iter().map(OsString::into_vec).collect();
        GuestSpec::new(root_fs, hostname, tmpfs, Program::Init(args))
    }

    /// A machine with the first process of `container`, whose files lie in the folder `share` of the host.
    pub fn with_container(share: PathBuf, container: Container, process: Process) -> GuestSpec {
        let hostname = container.hostname.clone();
        let root_fs = RootFs::Share { path: share, container: Box::new(container) };
        GuestSpec::new(root_fs, hostname, Vec::new(), Program::Process(Box::new(process)))
    }

    fn new(root_fs: RootFs, hostname: String, tmpfs: Vec<Tmpfs>, program: Program) -> GuestSpec {
        let (sysctls, network, shares, volumes) = Default::default();
        GuestSpec { root_fs, hostname, tmpfs, sysctls, program, network, shares, volumes }
    }

    /// Sets the machine's network interfaces. Without this call it has none.
    pub fn connect(&mut self, network: NetworkSetup) {
        self.network = network;
    }

    /// The machine's network interfaces.
    pub fn network(&self) -> &NetworkSetup {
        &self.network
    }

    /// Sets kernel parameters of the machine, by name, and their values.
    pub fn set_sysctls(&mut self, sysctls: Vec<(String, String)>) -> Result<()> {
        ensure!(
            sysctls.is_empty() || self.has_session(),
            "--sysctl and --domainname need husk's init: remove --os-init, or set them in the machine"
        );
        self.sysctls = sysctls;
        Ok(())
    }

    /// Sets what the machine shares with the host, and the paths of volumes that are its own. Without this call it is nothing.
    pub fn mount(&mut self, shares: Vec<Share>, volumes: Vec<Vec<u8>>) -> Result<()> {
        ensure!(
            (shares.is_empty() && volumes.is_empty()) || self.has_session(),
            "-v and --mount need husk's init: remove --os-init, or use `husk boot --share` and mount it in the machine"
        );
        (self.shares, self.volumes) = (shares, volumes);
        Ok(())
    }

    /// The process that husk's init starts, if there is one.
    pub fn process(&self) -> Option<&Process> {
        match &self.program {
            Program::Process(process) => Some(process),
            Program::Init(_) => None,
        }
    }

    /// The command line, for display.
    pub fn command(&self) -> Vec<String> {
        let args = match &self.program {
            Program::Process(process) => &process.args,
            Program::Init(args) => args,
        };
        args.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
    }

    /// The signal that stops the process, as configured by the image.
    pub fn stop_signal(&self) -> u8 {
        let named = match &self.root_fs {
            RootFs::Image { defaults, .. } => defaults.stop_signal.as_deref(),
            RootFs::Disk { .. } | RootFs::Share { .. } => None,
        };
        // An invalid value in the image is not the user's mistake.
        named.and_then(signal::number).unwrap_or(libc::SIGTERM as u8)
    }

    /// How the image says that the health of a machine is checked.
    pub fn health_check(&self) -> Option<&HealthCheck> {
        match &self.root_fs {
            RootFs::Image { defaults, .. } => defaults.healthcheck.as_ref(),
            RootFs::Disk { .. } | RootFs::Share { .. } => None,
        }
    }

    /// Whether there is a session with a process. If not, the machine's own init uses the console.
    pub fn has_session(&self) -> bool {
        self.process().is_some()
    }

    /// Whether the process reads this process's standard input.
    pub fn wants_stdin(&self) -> bool {
        self.process().is_some_and(|process| process.stdin)
    }

    /// Whether the process has a terminal.
    pub fn on_terminal(&self) -> bool {
        self.process().is_some_and(|process| process.terminal.is_some())
    }

    /// The transport for `kernel`: that of `wanted`, unless it is automatic and the kernel has no driver for MMIO.
    pub fn transport(wanted: Transport, kernel: &GuestKernel) -> Result<Transport> {
        match wanted {
            Transport::Auto if modules::lacks(&kernel.modules, MMIO_DRIVER)? => Ok(Transport::Pci),
            wanted => Ok(wanted),
        }
    }

    /// Builds the initramfs with the modules that `kernel` needs for this guest, whose devices are on `bus`.
    pub fn initramfs(&self, kernel: &GuestKernel, bus: VirtioBus) -> Result<File> {
        let start = match &self.program {
            Program::Process(process) => Start::Process(Box::new(self.run(process))),
            Program::Init(args) => Start::Init { args: args.clone(), hostname: self.hostname.clone() },
        };
        self.initramfs_for(start, kernel, bus)
    }

    /// The same for a machine that waits before its process starts, to be saved there. It contains nothing of the run:
    /// the root file system, the kernel, and whether there is a network must be those of the runs that begin in it. `programs` are
    /// those that these runs will probably need.
    pub fn waiting_initramfs(&self, programs: &[String], kernel: &GuestKernel, bus: VirtioBus) -> Result<File> {
        let process = self.process().context("only a machine that runs a command can wait for it")?;
        let programs = programs.iter().map(|name| name.clone().into_bytes()).collect();
        let preload = Preload { programs, env: process.env.clone() };
        self.initramfs_for(Start::Wait(preload), kernel, bus)
    }

    /// What a waiting machine, whose network devices are `devices`, needs to begin the run: everything that
    /// [`GuestSpec::waiting_initramfs`] leaves out.
    pub fn begin(&self, devices: &[NetworkConfig]) -> Result<(Overlay, Box<Run>)> {
        let Program::Process(process) = &self.program else { bail!("a waiting machine runs a command, not an init") };
        let mut run = self.run(process);
        run.identity.interfaces = network::on_devices(run.identity.interfaces, devices)?;
        Ok((self.overlay(), Box::new(run)))
    }

    /// What distinguishes the machine `machine`, if it has husk's init. `is_hostname_chosen` says whether the user chose the
    /// host name.
    pub fn identity_record(&self, machine: String, is_hostname_chosen: bool) -> Option<IdentityRecord> {
        self.process()?;
        Some(self.network.record(machine, self.hostname.clone(), is_hostname_chosen))
    }

    fn initramfs_for(&self, start: Start, kernel: &GuestKernel, bus: VirtioBus) -> Result<File> {
        let transport = match bus {
            VirtioBus::Mmio { .. } => MMIO_DRIVER,
            VirtioBus::Pci => "virtio_pci",
        };
        // A machine works without a balloon; the transport's driver is required by other devices anyway.
        let mut drivers = vec![transport, "virtio_blk", "virtio_balloon?"];
        let waits = matches!(start, Start::Wait(_));
        match &self.root_fs {
            // EROFS needs the checksum driver but does not declare the dependency.
            RootFs::Image { writable, .. } => {
                drivers.extend(["crc32c_generic?", "erofs", "overlay"]);
                match writable {
                    // The run may have such a layer.
                    _ if waits => drivers.push("ext4?"),
                    WritableLayer::Disk(_) => drivers.push("ext4"),
                    WritableLayer::None | WritableLayer::Memory => {}
                }
            }
            RootFs::Disk { .. } => drivers.extend(["crc32c_generic?", "ext4?", "xfs?", "btrfs?", "vfat?"]),
            RootFs::Share { .. } => drivers.push("virtiofs"),
        }
        if self.has_session() {
            drivers.push("vmw_vsock_virtio_transport");
        }
        if !self.network.is_empty() {
            drivers.push("virtio_net");
        }
        if waits {
            drivers.push("virtiofs?");
        } else if !self.shares.is_empty() {
            drivers.push("virtiofs");
        }
        let modules = modules::find(&kernel.modules, &drivers)?;
        initramfs::make(&self.spec(start, &modules), &modules)
    }

    fn spec(&self, start: Start, modules: &[Module]) -> Spec {
        let device = ROOT_DEVICE.to_owned();
        let root = match &self.root_fs {
            RootFs::Image { .. } => {
                // The run brings its own.
                let waits = matches!(start, Start::Wait(_));
                Root::Image { device, overlay: if waits { Overlay::Memory } else { self.overlay() } }
            }
            RootFs::Disk { readonly, .. } => Root::Disk { device, readonly: *readonly },
            RootFs::Share { .. } => Root::Share { tag: CONTAINERS_TAG.to_owned() },
        };
        Spec { modules: modules.iter().map(initramfs::module_path).collect(), root, start }
    }

    /// The writable layer of the root file system.
    fn overlay(&self) -> Overlay {
        match &self.root_fs {
            RootFs::Image { writable: WritableLayer::Disk(_), .. } => Overlay::Disk(WRITABLE_DEVICE.to_owned()),
            RootFs::Image { writable: WritableLayer::Memory, .. } | RootFs::Share { .. } => Overlay::Memory,
            RootFs::Image { writable: WritableLayer::None, .. } | RootFs::Disk { .. } => Overlay::ReadOnly,
        }
    }

    fn run(&self, process: &Process) -> Run {
        Run {
            identity: self.network.identity(&self.hostname),
            tmpfs: self.tmpfs.clone(),
            shares: self.shares.iter().map(|share| share.mount.clone()).collect(),
            sysctls: self.sysctls.clone(),
            volumes: self.volumes.clone(),
            process: process.clone(),
            container: match &self.root_fs {
                RootFs::Share { container, .. } => Some(container.clone()),
                RootFs::Image { .. } | RootFs::Disk { .. } => None,
            },
        }
    }

    /// The configuration of the machine for this guest. `socket` is the vsock socket for its sessions; with `verbose`
    /// the kernel logs more than warnings.
    pub fn machine_config(
        &self,
        kernel: &GuestKernel,
        cpus: u32,
        memory_mib: u64,
        socket: &Path,
        verbose: bool,
    ) -> MachineConfig {
        let disk = |path: &Path, readonly, format| DiskConfig { readonly, format, ..DiskConfig::of(path.to_owned()) };
        // Disks created by husk are raw, whatever a guest has written to them.
        let raw = Some(Format::Raw);
        let disks = match &self.root_fs {
            RootFs::Image { root, writable: WritableLayer::Disk(scratch), .. } => {
                vec![disk(root, true, raw), disk(&scratch.path, false, raw)]
            }
            RootFs::Image { root, .. } => vec![disk(root, true, raw)],
            RootFs::Disk { path, readonly } => vec![disk(path, *readonly, None)],
            RootFs::Share { .. } => Vec::new(),
        };
        let of_containers = match &self.root_fs {
            // More containers may follow.
            RootFs::Share { path, .. } => {
                let share = ShareConfig::of(path.clone(), CONTAINERS_TAG.to_owned());
                Some(ShareConfig { follows_mounts: true, ..share })
            }
            RootFs::Image { .. } | RootFs::Disk { .. } => None,
        };
        // A driver that is built in makes an interface that nobody has asked for.
        let cmdline = ["dummy.numdummies=0"].into_iter().chain(verbose.then_some("loglevel=7"));
        // A waiting machine has no others.
        let late_disks = if self.has_session() { disks.len().saturating_sub(1) } else { 0 };
        let vsock = VsockConfig { socket: socket.to_owned(), cid: DEFAULT_CID };
        MachineConfig {
            kernel: kernel.path.clone(),
            cmdline: cmdline.collect::<Vec<_>>().join(" "),
            cpus,
            memory_mib,
            disks,
            vsock: self.has_session().then_some(vsock),
            networks: self.network.configs.clone(),
            late_disks,
            shares: self.shares.iter().map(|share| share.config.clone()).chain(of_containers).collect(),
            ..MachineConfig::default()
        }
    }
}

/// Checks a host name: Linux's length limit and the characters of DNS names.
pub fn check_hostname(name: &str) -> Result<()> {
    const MAX_BYTES: usize = 63;
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    ensure!(
        !name.is_empty() && name.len() <= MAX_BYTES && name.chars().all(good),
        "invalid host name {name:?}: use 1 to {MAX_BYTES} letters, digits, `-`, `.` or `_`"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Attachment, MacAddress};

    #[test]
    fn a_waiting_machine_knows_nothing_of_the_run_that_begins_in_it() {
        let defaults = Box::new(ImageProcess { cmd: vec!["sh".into()], ..ImageProcess::default() });
        let root_fs = RootFs::Image {
            root: "/root.erofs".into(),
            identity: [1; 16],
            defaults,
            writable: WritableLayer::Memory,
            in_use: None,
        };
        let mut spec =
            GuestSpec::with_process(root_fs, Overrides::default(), false, false, "box".into(), Vec::new()).unwrap();
        let device = |last| NetworkConfig {
            mac: Some(MacAddress([2, 0, 0, 0, 0, last])),
            ..NetworkConfig::of(Attachment::Tap { name: "t".into() })
        };
        spec.connect(NetworkSetup::new(vec![device(1).into()], &[]));
        let Program::Process(process) = &spec.program else { unreachable!() };
        let mut run = spec.run(process);
        assert_eq!(spec.begin(&[device(1)]).unwrap(), (Overlay::Memory, Box::new(run.clone())));
        run.identity.interfaces[0].device_mac = [2, 0, 0, 0, 0, 9];
        assert_eq!(*spec.begin(&[device(9)]).unwrap().1, run);
        assert!(spec.begin(&[]).unwrap_err().to_string().contains("0 network interfaces, not 1"));
    }

    #[test]
    fn init_is_statically_linked() {
        assert!(INIT.starts_with(b"\x7fELF"));
        // ET_EXEC: it is loaded at its link address. A dynamic executable would name an interpreter.
        assert_eq!(INIT[16..18], [2, 0]);
        assert!(!INIT.windows(8).any(|bytes| bytes == b"/ld-linu"));
    }
}
