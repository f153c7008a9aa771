//! Opens the host side of network interfaces: a tap device, or passt with a socket.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, ensure};
use sha2::{Digest, Sha256};

use super::interface::TakenOver;
use super::{bridge, interface, passt};
use crate::backend::net::{HEADER_BYTES, NetBackend, TapCounts, TapNet};
use crate::config::Rate;
use crate::config::{Attachment, MacAddress, MachineConfig, NetworkConfig};
use crate::sys;

/// The device from which tap devices are created (Documentation/networking/tuntap.rst).
pub const TUN_PATH: &str = "/dev/net/tun";
/// The kernel's direct path between a tap device and a guest's queues.
pub const VHOST_PATH: &str = "/dev/vhost-net";
/// The Linux version since which vhost's thread belongs to the process and follows its CPU affinity.
const OWN_THREAD_SINCE: (u32, u32) = (6, 4);
/// The kernel's counters of each interface in this network namespace.
const COUNTS_PATH: &str = "/proc/thread-self/net/dev";
/// The interfaces in this network namespace, by name.
const INTERFACES: &str = "/sys/class/net";
/// The name pattern of tap devices on bridges; the kernel assigns the number.
const TAP_NAMES: &str = "husktap%d";
/// The maximum number of queue pairs of an interface.
const PAIRS_MAX: u32 = 8;
/// The maximum MTU of a tap device and of virtio.
const MTU_BYTES_MAX: u32 = 65535;

/// The open host side of an interface.
pub struct Network {
    /// One back end per queue pair, which transmits and receives the frames.
    pub backends: Vec<Box<dyn NetBackend>>,
    /// The name for log messages.
    pub name: String,
    /// The guest's MAC address.
    pub mac: [u8; 6],
    /// The MTU, if the host side specifies it.
    pub mtu_bytes: Option<u16>,
    /// Rate limits per direction.
    pub rate: Rate,
    /// Counters of frames that are not handled in this process.
    pub counts: Option<TapCounts>,
}

/// What keeps an interface connected.
pub enum Keeper {
    /// It starts passt when the guest needs it, and ends it.
    Passt(passt::Keeper),
    /// An interface of the host's that the machine has taken over.
    Interface(TakenOver),
}

impl Network {
    /// All descriptors.
    pub(super) fn fds(&self) -> impl Iterator<Item = RawFd> {
        let backends = self.backends.iter().flat_map(|backend| backend.fds());
        backends.chain(self.counts.iter().map(AsRawFd::as_raw_fd))
    }
}

/// The number of queue pairs of a tap device in a machine with this many vCPUs.
pub fn pairs(cpus: u32) -> u32 {
    cpus.min(PAIRS_MAX)
}

/// Opens the interface `network` of `machine`. For user-mode networking this starts passt if ports are published; what is
/// returned starts it otherwise, and ends it.
pub fn open(network: &NetworkConfig, machine: &MachineConfig) -> Result<(Network, Option<Keeper>)> {
    let pairs = pairs(machine.cpus) as usize;
    let vhost = Vhost { wish: network.vhost, keeps_to_cpus: !machine.cpuset.is_empty() };
    open_any(network, pairs, vhost).map(|(opened, keeper)| (Network { rate: network.rate, ..opened }, keeper))
}

/// The requirements for vhost-net.
#[derive(Clone, Copy)]
struct Vhost {
    wish: Option<bool>,
    /// Whether its thread must be pinned to some of the host's CPUs.
    keeps_to_cpus: bool,
}

fn open_any(config: &NetworkConfig, pairs: usize, vhost: Vhost) -> Result<(Network, Option<Keeper>)> {
    let mac = match config.mac {
        Some(mac) => mac,
        None => random_mac()?,
    };
    match &config.to {
        Attachment::User(user) => {
            let mut backend = passt::open(user, mac)?;
            let keeper = backend.take_keeper();
            let rate = Rate::default();
            let network = Network {
                backends: vec![Box::new(backend)],
                name: "passt".into(),
                mac: mac.0,
                mtu_bytes: Some(passt::MTU_BYTES),
                rate,
                counts: None,
            };
            Ok((network, keeper.map(Keeper::Passt)))
        }
        Attachment::Tap { name } => {
            let (taps, _) = open_tap(name, pairs).with_context(|| format!("open tap device {name}"))?;
            Ok((on_tap(taps, name, mac, vhost)?, None))
        }
        Attachment::Bridge { name, .. } => {
            let (taps, own_name) =
                open_tap(TAP_NAMES, pairs).with_context(|| format!("create a tap device for {name}"))?;
            bridge::attach(&own_name, name)?;
            Ok((on_tap(taps, &own_name, mac, vhost)?, None))
        }
        Attachment::Interface { name } => {
            let (taps, own_name) =
                open_tap(TAP_NAMES, pairs).with_context(|| format!("create a tap device for {name}"))?;
            let taken = interface::take_over(name, &own_name)?;
            Ok((on_tap(taps, &own_name, mac, vhost)?, Some(Keeper::Interface(taken))))
        }
    }
}

fn on_tap(taps: Vec<File>, name: &str, mac: MacAddress, vhost: Vhost) -> Result<Network> {
    let mtu = sys::net::interface_mtu(name).with_context(|| format!("query tap device {name}"))?;
    let mtu_bytes = u16::try_from(mtu.min(MTU_BYTES_MAX)).ok();
    let mut vhosts = vhost.open(taps.len())?.into_iter();
    let counts = match vhosts.len() {
        0 => None,
        _ => Some(TapCounts::new(File::open(COUNTS_PATH).with_context(|| format!("open {COUNTS_PATH}"))?, name)),
    };
    let backend = |tap| -> Box<dyn NetBackend> { Box::new(TapNet::new(tap, vhosts.next())) };
    let backends = taps.into_iter().map(backend).collect();
    Ok(Network { backends, name: name.to_owned(), mac: mac.0, mtu_bytes, rate: Rate::default(), counts })
}

impl Vhost {
    /// Opens it once per queue pair. Returns none if it is unavailable and not explicitly requested.
    fn open(self, pairs: usize) -> Result<Vec<File>> {
        if self.wish == Some(false) {
            return Ok(Vec::new());
        }
        let opened = self.try_open(pairs);
        match opened {
            Err(error) if self.wish.is_none() => {
                log::info!("vhost-net is not used for the tap device: {error:#}");
                Ok(Vec::new())
            }
            opened => opened,
        }
    }

    fn try_open(self, pairs: usize) -> Result<Vec<File>> {
        ensure!(
            !self.keeps_to_cpus || kernel_version() >= Some(OWN_THREAD_SINCE),
            "vhost-net does not respect --cpuset before Linux 6.4: remove one of them"
        );
        let open = |_| File::options().read(true).write(true).open(VHOST_PATH);
        (0..pairs).map(open).collect::<io::Result<_>>().map_err(|error| {
            let advice = match error.kind() {
                ErrorKind::PermissionDenied => "see `husk doctor`",
                // The device node may exist without the module.
                _ => "load it with `sudo modprobe vhost_net`",
            };
            anyhow!(error).context(format!("open {VHOST_PATH} ({advice})"))
        })
    }
}

/// The host's Linux version: major and minor number.
fn kernel_version() -> Option<(u32, u32)> {
    let uname = rustix::system::uname();
    let mut numbers = uname.release().to_str().ok()?.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// Opens `queues` queues of the device, or as many as it has. Returns them and the device's name.
fn open_tap(name: &str, queues: usize) -> Result<(Vec<File>, String)> {
    let tun = open_tun()?;
    let mut multiqueue = queues > 1;
    let mut attached = sys::net::attach_tap(&tun, name, HEADER_BYTES, multiqueue);
    // An existing device is either single- or multiqueue.
    if matches!(&attached, Err(error) if error.raw_os_error() == Some(libc::EINVAL)) {
        multiqueue = !multiqueue;
        attached = sys::net::attach_tap(&tun, name, HEADER_BYTES, multiqueue);
    }
    let name = attached.map_err(|error| with_advice(error, name, queues))?;
    let mut taps = vec![tun];
    if !multiqueue {
        if queues > 1 {
            log::info!("{name} has one queue for {queues} vCPUs: it was created without multi_queue");
        }
        return Ok((taps, name));
    }
    while taps.len() < queues {
        let tun = open_tun()?;
        sys::net::attach_tap(&tun, &name, HEADER_BYTES, true).map_err(|error| with_advice(error, &name, queues))?;
        taps.push(tun);
    }
    // The kernel would distribute the frames between the two machines.
    if attached_queues(&name) > taps.len() {
        return Err(with_advice(io::Error::from_raw_os_error(libc::EBUSY), &name, queues));
    }
    Ok((taps, name))
}

fn open_tun() -> Result<File> {
    let tun = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(TUN_PATH);
    tun.map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::NotFound => "load it with `sudo modprobe tun`",
            _ => "see `husk doctor`",
        };
        anyhow!(error).context(format!("open {TUN_PATH} ({advice})"))
    })
}

fn with_advice(error: io::Error, name: &str, queues: usize) -> anyhow::Error {
    let kind = if queues > 1 { " multi_queue" } else { "" };
    let make = format!("create it with `sudo ip tuntap add {name} mode tap user $USER vnet_hdr{kind}`");
    let advice = match error.raw_os_error() {
        Some(libc::EPERM) if Path::new(INTERFACES).join(name).exists() => format!("it belongs to another user: {make}"),
        Some(libc::EPERM) => make,
        Some(libc::EBUSY) => "another machine is using it".into(),
        Some(libc::EINVAL) => format!("it is not a tap device with virtio headers: {make}"),
        _ => return anyhow!(error),
    };
    anyhow!(error).context(advice)
}

/// The number of attached queues of the multiqueue device `name`, including those of other processes.
fn attached_queues(name: &str) -> usize {
    let queues = fs::read_dir(Path::new(INTERFACES).join(name).join("queues"));
    queues.into_iter().flatten().flatten().filter(|queue| queue.file_name().as_bytes().starts_with(b"tx-")).count()
}

/// The MAC address of interface `index` of the machine `name`: stable on this host, and different for other hosts and
/// names, to the extent that 46 bits allow.
pub fn mac_of(name: &str, index: usize) -> MacAddress {
    // Hosts without a machine ID share their addresses with other such hosts.
    let host = fs::read("/etc/machine-id").unwrap_or_default();
    let digest = Sha256::new().chain_update(b"husk mac\0").chain_update(&host).chain_update([0]).chain_update(name);
    let digest: [u8; 32] = digest.chain_update([0]).chain_update(index.to_le_bytes()).finalize().into();
    MacAddress::local([digest[0], digest[1], digest[2], digest[3], digest[4], digest[5]])
}

fn random_mac() -> Result<MacAddress> {
    let mut bytes = [0; 6];
    sys::getrandom(&mut bytes).context("generate a MAC address")?;
    Ok(MacAddress::local(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_vhost_is_an_error_with_a_remedy_if_required() {
        let open = |wish, keeps_to_cpus| Vhost { wish, keeps_to_cpus }.open(2);
        assert_eq!(open(Some(false), false).unwrap().len(), 0);
        let is_there = File::options().read(true).write(true).open(VHOST_PATH).is_ok();
        assert_eq!(open(None, false).unwrap().len(), if is_there { 2 } else { 0 });
        match open(Some(true), false) {
            Ok(files) => assert!(is_there && files.len() == 2),
            Err(error) => {
                assert!(!is_there && format!("{error:#}").contains("(load it with `sudo modprobe vhost_net`)"))
            }
        }
        if kernel_version().unwrap() < OWN_THREAD_SINCE {
            assert!(format!("{:#}", open(Some(true), true).unwrap_err()).contains("--cpuset"));
            assert_eq!(open(None, true).unwrap().len(), 0);
        }
    }

    #[test]
    fn a_mac_address_depends_on_the_machines_name() {
        let web = mac_of("web", 0);
        assert_eq!(web, mac_of("web", 0));
        assert!(web != mac_of("db", 0) && web != mac_of("web", 1));
        assert_eq!(web.to_string().parse(), Ok(web));
        assert_ne!(random_mac().unwrap(), random_mac().unwrap());
    }
}
