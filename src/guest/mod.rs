//! The host's side of a guest with husk's own init: what it is booted with, and the session about its process.

use std::ffi::OsString;
use std::fs::File;
use std::net::IpAddr;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail, ensure};
use husk_protocol::{Overlay, Process, Root, Spec, Start, Tmpfs, WindowSize};

use self::network::Wiring;
use self::process::{Defaults, Overrides};
use crate::config::Rate;
use crate::config::{DEFAULT_CID, DiskConfig, Format, MachineConfig, VsockConfig};
use crate::console::terminal;
use crate::image::scratch::Scratch;
use crate::resources::guest_kernel::GuestKernel;
use crate::resources::modules::{self, Module};

pub mod exec;
pub mod initramfs;
pub mod network;
pub mod process;
pub mod session;
pub mod signal;
pub mod streams;

/// The guest's first process, a static program (firmware/init).
pub const INIT: &[u8] = include_bytes!(env!("HUSK_INIT"));

/// What a machine's root is made of.
#[derive(Debug)]
pub enum Base {
    /// A read-only root that machines share, and what lies over it.
    Image {
        /// An EROFS image.
        root: PathBuf,
        /// What it says of its process.
        defaults: Defaults,
        /// Where changes go.
        changes: Changes,
        /// What keeps the image store from removing it.
        in_use: Option<File>,
    },
    /// A disk with an operating system of its own.
    Disk {
        /// A disk image or a block device.
        path: PathBuf,
        /// Whether nothing may be changed.
        readonly: bool,
    },
}

/// Where changes to an image's root go.
#[derive(Debug)]
pub enum Changes {
    /// There are none.
    Forbidden,
    /// Into the guest's memory, and away with it.
    Memory,
    /// To a disk of their own.
    Disk(Scratch),
}

/// What is in the machine: the root, and what runs.
#[derive(Debug)]
pub struct GuestSpec {
    base: Base,
    hostname: String,
    tmpfs: Vec<Tmpfs>,
    start: Start,
    wiring: Wiring,
}

/// Where the guest finds its root; the first disk of every machine.
const ROOT_DEVICE: &str = "/dev/vda";
/// Where it finds the disk for changes; the second.
const CHANGES_DEVICE: &str = "/dev/vdb";

impl GuestSpec {
    /// A machine for one process: the image's, unless the user overrides otherwise.
    pub fn with_process(
        base: Base,
        overrides: Overrides,
        terminal: bool,
        stdin: bool,
        hostname: String,
        tmpfs: Vec<Tmpfs>,
    ) -> Result<GuestSpec> {
        let Base::Image { defaults, .. } = &base else { bail!("a disk image runs its own init") };
        let mut process = overrides.apply(defaults);
        ensure!(!process.args.is_empty(), "no command specified, and the image has none: add one after the image");
        // The size that terminals have where nobody says one.
        let size = || terminal::window_size().unwrap_or(WindowSize { rows: 24, columns: 80 });
        process.terminal = terminal.then(size);
        process.stdin = stdin;
        check_hostname(&hostname)?;
        Ok(GuestSpec { base, hostname, tmpfs, start: Start::Process(process), wiring: Wiring::default() })
    }

    /// A machine whose root has an init of its own, `args`, or where there are none the one that it has.
    pub fn with_own_init(base: Base, args: Vec<OsString>, hostname: String, tmpfs: Vec<Tmpfs>) -> GuestSpec {
        // A disk has a name of its own.
        let hostname = if matches!(base, Base::Disk { .. }) { String::new() } else { hostname };
        let args = args.into_iter().map(OsString::into_vec).collect();
        GuestSpec { base, hostname, tmpfs, start: Start::Init(args), wiring: Wiring::default() }
    }

    /// Gives the machine network interfaces; without this it has none.
    pub fn connect(&mut self, wiring: Wiring) {
        self.wiring = wiring;
    }

    /// The process that runs, where husk's init runs one.
    pub fn process(&self) -> Option<&Process> {
        match &self.start {
            Start::Process(process) => Some(process),
            Start::Init(_) => None,
        }
    }

    /// What runs, to be read.
    pub fn command(&self) -> Vec<String> {
        let (Start::Process(Process { args, .. }) | Start::Init(args)) = &self.start;
        args.iter().map(|arg| String::from_utf8_lossy(arg).into_owned()).collect()
    }

    /// The signal that the image wants its process to be asked for its end by.
    pub fn stop_signal(&self) -> u8 {
        let named = match &self.base {
            Base::Image { defaults, .. } => defaults.stop_signal.as_deref(),
            Base::Disk { .. } => None,
        };
        // What an image has wrong is not its user's mistake.
        named.and_then(signal::number).unwrap_or(libc::SIGTERM as u8)
    }

    /// Whether there is a process that a session is about; else the root's init has the console.
    pub fn has_session(&self) -> bool {
        matches!(self.start, Start::Process(_))
    }

    /// Whether the process reads our standard input.
    pub fn wants_stdin(&self) -> bool {
        matches!(&self.start, Start::Process(process) if process.stdin)
    }

    /// Whether the process has a terminal.
    pub fn on_terminal(&self) -> bool {
        matches!(&self.start, Start::Process(process) if process.terminal.is_some())
    }

    /// The initial RAM disk, with the modules that `kernel` needs for this.
    pub fn initramfs(&self, kernel: &GuestKernel) -> Result<File> {
        // A machine does without a balloon; what takes it in is needed by others at any rate.
        let mut drivers = vec!["virtio_mmio", "virtio_blk", "virtio_balloon?"];
        match &self.base {
            // EROFS wants the checksum, and says so in no way that is found.
            Base::Image { changes, .. } => {
                drivers.extend(["crc32c_generic?", "erofs", "overlay"]);
                if matches!(changes, Changes::Disk(_)) {
                    drivers.push("ext4");
                }
            }
            Base::Disk { .. } => drivers.extend(["crc32c_generic?", "ext4?", "xfs?", "btrfs?", "vfat?"]),
        }
        if self.has_session() {
            drivers.push("vmw_vsock_virtio_transport");
        }
        if !self.wiring.is_empty() {
            drivers.push("virtio_net");
        }
        let modules = modules::find(&kernel.modules, &drivers)?;
        initramfs::make(&self.spec(&modules), &modules)
    }

    fn spec(&self, modules: &[Module]) -> Spec {
        let device = ROOT_DEVICE.to_owned();
        let root = match &self.base {
            Base::Image { changes, .. } => Root::Image { device, overlay: overlay(changes) },
            Base::Disk { readonly, .. } => Root::Disk { device, readonly: *readonly },
        };
        let own_address = self.wiring.own_address().unwrap_or(IpAddr::from([127, 0, 1, 1]));
        let hosts = format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own_address}\t{}\n",
            self.hostname
        );
        Spec {
            modules: modules.iter().map(initramfs::module_path).collect(),
            root,
            hostname: self.hostname.clone(),
            hosts: Some(hosts.into_bytes()),
            resolv_conf: self.wiring.resolv_conf(),
            interfaces: self.wiring.interfaces.clone(),
            tmpfs: self.tmpfs.clone(),
            start: self.start.clone(),
        }
    }

    /// The machine around it. `socket` is where its sessions are; `verbose` has its kernel say more than its troubles.
    pub fn machine_config(
        &self,
        kernel: &GuestKernel,
        cpus: u32,
        memory_mib: u64,
        socket: &Path,
        verbose: bool,
    ) -> MachineConfig {
        let disk = |path: &Path, readonly, format| DiskConfig {
            path: path.to_owned(),
            readonly,
            id: None,
            format,
            block_bytes: None,
            rate: Rate::default(),
        };
        // What husk made is raw, whatever a guest has written to it.
        let raw = Some(Format::Raw);
        let disks = match &self.base {
            Base::Image { root, changes: Changes::Disk(scratch), .. } => {
                vec![disk(root, true, raw), disk(&scratch.path, false, raw)]
            }
            Base::Image { root, .. } => vec![disk(root, true, raw)],
            Base::Disk { path, readonly } => vec![disk(path, *readonly, None)],
        };
        let vsock = VsockConfig { socket: socket.to_owned(), cid: DEFAULT_CID };
        MachineConfig {
            kernel: kernel.path.clone(),
            cmdline: if verbose { "loglevel=7".into() } else { String::new() },
            cpus,
            memory_mib,
            disks,
            vsock: self.has_session().then_some(vsock),
            networks: self.wiring.configs.clone(),
            ..MachineConfig::default()
        }
    }
}

fn overlay(changes: &Changes) -> Overlay {
    match changes {
        Changes::Forbidden => Overlay::ReadOnly,
        Changes::Memory => Overlay::Memory,
        Changes::Disk(_) => Overlay::Disk(CHANGES_DEVICE.to_owned()),
    }
}

/// What Linux takes as a host name, of the characters that a name in a network has.
fn check_hostname(name: &str) -> Result<()> {
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

    #[test]
    fn the_init_inside_needs_no_linker_of_the_guests() {
        assert!(INIT.starts_with(b"\x7fELF"));
        // ET_EXEC, since it is loaded where it was linked; a dynamic one would name its linker.
        assert_eq!(INIT[16..18], [2, 0]);
        assert!(!INIT.windows(8).any(|bytes| bytes == b"/ld-linu"));
    }
}
