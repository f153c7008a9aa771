//! What init finds beside itself in the initial RAM disk: the machine's inside, as husk wants it.

use core::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{Malformed, Process, VERSION};

/// Where init finds its [`Spec`].
pub const SPEC_PATH: &str = "/spec";
/// The path of programs where neither image nor user says another.
pub const FIXED_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// All that init is told before it can talk to anybody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Kernel modules by their paths in the initial RAM disk, each behind those it needs.
    pub modules: Vec<String>,
    /// The root file system.
    pub root: Root,
    /// The machine's name.
    pub hostname: String,
    /// The content of /etc/hosts, where it is not the root's own.
    pub hosts: Option<Vec<u8>>,
    /// The content of /etc/resolv.conf, where it is not the root's own.
    pub resolv_conf: Option<Vec<u8>>,
    /// Network interfaces that are to be set up; the others are the root's own affair.
    pub interfaces: Vec<Interface>,
    /// File systems in memory, in the order in which they are mounted.
    pub tmpfs: Vec<Tmpfs>,
    /// What runs.
    pub start: Start,
}

/// Where the root file system is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// A read-only image on this block device, and what lies over it.
    Image {
        /// `/dev/vda`
        device: String,
        /// Where changes go.
        overlay: Overlay,
    },
    /// A disk with an operating system of its own: the whole device is a file system, or one of its partitions.
    Disk {
        /// `/dev/vda`
        device: String,
        /// Whether nothing may be changed.
        readonly: bool,
    },
}

/// Where changes to an image go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Overlay {
    /// There are none.
    ReadOnly,
    /// Into the guest's memory; they end with the machine.
    Memory,
    /// To an ext4 file system on this block device.
    Disk(String),
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its Ethernet address, by which it is found.
    pub mac: [u8; 6],
    /// Its addresses. Without any it is put in service and left to find its own.
    pub addresses: Vec<InterfaceAddress>,
    /// Where everything else is reached through.
    pub gateways: Vec<IpAddr>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceAddress {
    /// The address.
    pub ip: IpAddr,
    /// How many of its bits are the network's.
    pub prefix: u8,
}

/// A file system in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Where it is mounted; made where it is missing.
    pub path: Vec<u8>,
    /// The flags of mount(2).
    pub flags: u64,
    /// tmpfs's own options: `size=64m,mode=1777`.
    pub options: String,
}

/// A limit of setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// RLIMIT_…
    pub resource: u32,
    /// What counts.
    pub soft: u64,
    /// How far the process may raise it.
    pub hard: u64,
}

/// What runs in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// A process beside init, which stays; the main session is about it.
    Process(Process),
    /// The root's own init, in init's place: this program with these arguments, or where there is none, what a
    /// distribution calls it. There are no sessions.
    Init(Vec<Vec<u8>>),
}

impl Spec {
    /// The content of the file: the version, then the rest.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Malformed> {
        postcard::to_allocvec(&(VERSION, self)).map_err(|_| Malformed::Content)
    }

    /// The spec that the file's content is.
    pub fn from_bytes(bytes: &[u8]) -> Result<Spec, Malformed> {
        let (version, rest): (u16, _) = postcard::take_from_bytes(bytes).map_err(|_| Malformed::Content)?;
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        match postcard::take_from_bytes(rest) {
            Ok((spec, [])) => Ok(spec),
            _ => Err(Malformed::Content),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::WindowSize;

    #[test]
    fn init_reads_what_husk_wrote() {
        let process = Process {
            args: vec![b"sh".to_vec(), b"\xff".to_vec()],
            terminal: Some(WindowSize { rows: 1, columns: 2 }),
            ..Process::default()
        };
        let spec = Spec {
            modules: vec!["/modules/a.ko".into()],
            root: Root::Image { device: "/dev/vda".into(), overlay: Overlay::Disk("/dev/vdb".into()) },
            hostname: "name".into(),
            hosts: Some(b"127.0.0.1 localhost\n".to_vec()),
            resolv_conf: None,
            interfaces: vec![Interface {
                mac: [2, 0, 0, 0, 0, 1],
                addresses: vec![InterfaceAddress { ip: IpAddr::from([10, 0, 2, 15]), prefix: 24 }],
                gateways: vec![IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 1])],
            }],
            tmpfs: vec![Tmpfs { path: b"/run".to_vec(), flags: 6, options: "size=1m".into() }],
            start: Start::Process(process),
        };
        let bytes = spec.to_bytes().unwrap();
        assert_eq!(Spec::from_bytes(&bytes), Ok(spec));
        assert_eq!(Spec::from_bytes(&bytes[..bytes.len() - 1]), Err(Malformed::Content));
        assert_eq!(Spec::from_bytes(&[&bytes[..], &[0]].concat()), Err(Malformed::Content));
        assert_eq!(Spec::from_bytes(&[9]), Err(Malformed::Version(9)));
    }
}
