//! The configuration of init, which husk stores in the initramfs.

use core::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{Container, Malformed, Process, VERSION};

/// The path of the [`Spec`].
pub const SPEC_PATH: &str = "/spec";
/// The default PATH.
pub const FIXED_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The configuration of a machine for init.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// The paths of kernel modules in the initramfs, in load order.
    pub modules: Vec<String>,
    /// The root file system.
    pub root: Root,
    /// What to run.
    pub start: Start,
}

/// A run: the machine's main process, and what it finds in the machine. Everything else can be prepared before the run is
/// known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// What the machine is called and how it is connected.
    pub identity: Identity,
    /// tmpfs mounts, in order.
    pub tmpfs: Vec<Tmpfs>,
    /// Folders and files of the host.
    pub shares: Vec<Share>,
    /// Kernel parameters, as sysctl(8) names them, and their values.
    pub sysctls: Vec<(String, String)>,
    /// Directories that are writable even if the root is not, and that stay what they are when something is mounted above them.
    pub volumes: Vec<Vec<u8>>,
    /// The process.
    pub process: Process,
    /// The container that the process is the first of. It is created, and then waits until it is told [to go](crate::ToGuest::Go).
    pub container: Option<Box<Container>>,
}

/// What distinguishes a machine from others that run the same: what it is called and how it is connected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The host name.
    pub hostname: String,
    /// The content of /etc/hosts, unless the root file system's own is kept.
    pub hosts: Option<Vec<u8>>,
    /// The content of /etc/resolv.conf, unless the root file system's own is kept.
    pub resolv_conf: Option<Vec<u8>>,
    /// Network interfaces to configure; others are left alone.
    pub interfaces: Vec<Interface>,
}

/// The source of the root file system.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Root {
    /// A read-only image on this block device, with a writable layer.
    Image {
        /// `/dev/vda`
        device: String,
        /// The writable layer.
        overlay: Overlay,
    },
    /// A disk with its own operating system: a file system on the whole device, or on one of its partitions.
    Disk {
        /// `/dev/vda`
        device: String,
        /// Whether it is mounted read-only.
        readonly: bool,
    },
    /// A folder of the host (virtio-fs) with the root file systems of containers and what is mounted in them. The machine's own
    /// root is in its memory.
    Share {
        /// What is mounted.
        tag: String,
    },
}

/// The writable layer of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Overlay {
    /// None.
    ReadOnly,
    /// In guest memory; lost when the machine ends.
    Memory,
    /// On an ext4 file system on this block device.
    Disk(String),
}

/// A network interface.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// The MAC address that it has, by which it is found: the one of its device or, in a machine that was restored, of the
    /// machine that was saved.
    pub device_mac: [u8; 6],
    /// The MAC address that it gets.
    pub mac: [u8; 6],
    /// The largest packet it sends, unless that is what its device says: the device may be that of another machine.
    pub mtu_bytes: Option<u32>,
    /// Its addresses. Without any, the interface is only brought up.
    pub addresses: Vec<InterfaceAddress>,
    /// Its routes besides those that follow from its addresses, in the order they are added.
    pub routes: Vec<Route>,
}

/// A route through an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where it leads; `None` is everywhere.
    pub destination: Option<InterfaceAddress>,
    /// Through whom; `None` is a destination on the link.
    pub gateway: Option<IpAddr>,
}

impl Route {
    /// The default route through `gateway`.
    pub fn through(gateway: IpAddr) -> Route {
        Route { destination: None, gateway: Some(gateway) }
    }
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceAddress {
    /// The address.
    pub ip: IpAddr,
    /// The prefix length.
    pub prefix: u8,
}

/// A tmpfs mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// The mount point, created if it does not exist.
    pub path: Vec<u8>,
    /// The flags of mount(2).
    pub flags: u64,
    /// Options of tmpfs, such as `size=64m,mode=1777`.
    pub options: String,
}

/// A folder or a file of the host that is mounted (virtio-fs).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// What is mounted.
    pub tag: String,
    /// The name of a single file in the folder that is mounted, if it is to be one.
    pub file: Option<String>,
    /// The mount point, created if it does not exist.
    pub path: Vec<u8>,
    /// Whether it is mounted read-only.
    pub readonly: bool,
    /// Whether it is an empty folder, and begins with what the image has at the mount point.
    pub copies: bool,
    /// Whether it and all in it become the process's user's.
    pub owned: bool,
}

/// A resource limit, see setrlimit(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// RLIMIT_…
    pub resource: u32,
    /// The soft limit.
    pub soft: u64,
    /// The hard limit.
    pub hard: u64,
}

/// What runs in the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Start {
    /// A process next to init, controlled by the main session.
    Process(Box<Run>),
    /// The same, but the process is not known yet. Init prepares all that does not depend on it,
    /// [waits](crate::ToHost::Waiting), and starts it when it is [told to](crate::ToGuest::Begin). Meanwhile the machine may
    /// be saved, and restored any number of times.
    Wait(Preload),
    /// The root file system's own init in place of husk's. There are no sessions.
    Init {
        /// This program with these arguments, or if empty, the default one.
        args: Vec<Vec<u8>>,
        /// The host name, unless it is empty.
        hostname: String,
    },
}

/// Programs that init reads into memory before it waits, so that processes of restored machines find them there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preload {
    /// Their names or paths.
    pub programs: Vec<Vec<u8>>,
    /// The environment in which they are found and linked, `NAME=VALUE` each.
    pub env: Vec<Vec<u8>>,
}

impl Spec {
    /// Serializes the spec: the version, followed by the rest.
    pub fn to_bytes(&self) -> Result<Vec<u8>, Malformed> {
        postcard::to_allocvec(&(VERSION, self)).map_err(|_| Malformed::Content)
    }

    /// Parses the file's content.
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
    fn a_spec_survives_a_round_trip() {
        let process = Process {
            args: vec![b"sh".to_vec(), b"\xff".to_vec()],
            terminal: Some(WindowSize { rows: 1, columns: 2 }),
            ..Process::default()
        };
        let identity = Identity {
            hostname: "name".into(),
            hosts: Some(b"127.0.0.1 localhost\n".to_vec()),
            resolv_conf: None,
            interfaces: vec![Interface {
                device_mac: [2, 0, 0, 0, 0, 2],
                mac: [2, 0, 0, 0, 0, 1],
                mtu_bytes: Some(1400),
                addresses: vec![InterfaceAddress { ip: IpAddr::from([10, 0, 2, 15]), prefix: 24 }],
                routes: vec![Route::through(IpAddr::from([0xfe80, 0, 0, 0, 0, 0, 0, 1]))],
            }],
        };
        let tmpfs = vec![Tmpfs { path: b"/run".to_vec(), flags: 6, options: "size=1m".into() }];
        let path = b"/srv".to_vec();
        let share = Share { tag: "t".into(), file: Some("f".into()), path, readonly: true, copies: false, owned: true };
        let sysctls = vec![("kernel.domainname".into(), "example".into())];
        let run = Run {
            identity,
            tmpfs,
            shares: vec![share],
            sysctls,
            volumes: vec![b"/data".to_vec()],
            process,
            container: None,
        };
        let spec = Spec {
            modules: vec!["/modules/a.ko".into()],
            root: Root::Image { device: "/dev/vda".into(), overlay: Overlay::Disk("/dev/vdb".into()) },
            start: Start::Process(Box::new(run)),
        };
        let bytes = spec.to_bytes().unwrap();
        assert_eq!(Spec::from_bytes(&bytes), Ok(spec));
        assert_eq!(Spec::from_bytes(&bytes[..bytes.len() - 1]), Err(Malformed::Content));
        assert_eq!(Spec::from_bytes(&[&bytes[..], &[0]].concat()), Err(Malformed::Content));
        assert_eq!(Spec::from_bytes(&[99]), Err(Malformed::Version(99)));
    }
}
