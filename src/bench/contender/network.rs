//! How the host reaches ports of instances.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{Fixture, Job, Unsupported, is_root, program, work_dir};
use crate::resources::net::TUN_PATH;
use crate::resources::programs;

/// The prefix length of a point-to-point network: four addresses, two of them usable.
const PREFIX: u8 = 30;

/// The address of a port that is on the host or forwarded from it.
pub fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// The addresses of the host and the instance. Every instance has its own /30 from the range reserved for benchmarks
/// (RFC 2544).
type Addresses = (Ipv4Addr, Ipv4Addr);

fn addresses(instance: u32) -> Addresses {
    let first = u32::from(Ipv4Addr::new(198, 18, 0, 0)) | (instance & 0x7fff) << 2;
    (Ipv4Addr::from(first | 1), Ipv4Addr::from(first | 2))
}

/// The name prefix of a run's interfaces on the host.
fn interface_prefix(bench_id: &str) -> String {
    format!("hb{}-", bench_id.rsplit('-').next().unwrap_or_default())
}

/// The name of the interface on the host.
fn interface(bench_id: &str, instance: u32) -> String {
    // Interface names have at most 15 bytes.
    format!("{}{:x}", interface_prefix(bench_id), instance & 0xfffff)
}

/// Checks that interfaces can be created. `only_root` is the error message for other users.
fn check_privileges(only_root: &str) -> Result<(), Unsupported> {
    if !is_root() {
        return Err(Unsupported(only_root.to_owned()));
    }
    if !program::which("ip") {
        return Err(Unsupported("ip is not installed: type `sudo apt-get install iproute2`".into()));
    }
    Ok(())
}

fn remove_interface(name: &str) -> Result<()> {
    programs::run("ip", &["link", "delete", name])
}

/// A network namespace for one instance, and a veth pair that connects it to the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VethPair {
    /// The namespace.
    name: String,
    /// The interface on the host.
    interface: String,
    addresses: Addresses,
}

impl VethPair {
    fn of(bench_id: &str, instance: u32) -> VethPair {
        VethPair {
            name: format!("{bench_id}-{instance}"),
            interface: interface(bench_id, instance),
            addresses: addresses(instance),
        }
    }

    /// Creates a veth pair for a job with a port. Requires root.
    pub fn create(fixture: &Fixture, job: &Job) -> Result<Option<VethPair>> {
        if job.port.is_none() {
            return Ok(None);
        }
        check_privileges("only root can connect a container's network to the host")?;
        let veth = VethPair::of(&fixture.id(), job.instance);
        veth.set_up().inspect_err(|_| drop(veth.remove())).context("connect a container's network to the host")?;
        Ok(Some(veth))
    }

    fn set_up(&self) -> Result<()> {
        let VethPair { name, interface, addresses: (ours, its) } = self;
        let (ours, its) = (format!("{ours}/{PREFIX}"), format!("{its}/{PREFIX}"));
        for line in [
            &["netns", "add", name] as &[&str],
            &["link", "add", interface, "type", "veth", "peer", "name", "eth0", "netns", name],
            &["addr", "add", &ours, "dev", interface],
            &["link", "set", interface, "up"],
            &["-n", name, "addr", "add", &its, "dev", "eth0"],
            &["-n", name, "link", "set", "eth0", "up"],
            &["-n", name, "link", "set", "lo", "up"],
        ] {
            programs::run("ip", line)?;
        }
        Ok(())
    }

    /// The path of the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.name)
    }

    /// The address of the instance's port.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.addresses.1, port))
    }

    /// Removes the namespace and the veth pair.
    pub fn remove(&self) -> Result<()> {
        // The namespace stays while it has processes, but deleting one end of the veth pair deletes both.
        let _ = remove_interface(&self.interface);
        programs::run("ip", &["netns", "delete", &self.name])
    }
}

/// A tap device on the host, connected to a machine's network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tap {
    interface: String,
    addresses: Addresses,
}

impl Tap {
    /// The tap device of an instance, not yet created.
    pub fn of(bench_id: &str, instance: u32) -> Tap {
        Tap { interface: interface(bench_id, instance), addresses: addresses(instance) }
    }

    /// Creates a tap device for a job with a port. Requires root.
    pub fn create(fixture: &Fixture, job: &Job) -> Result<Option<Tap>> {
        if job.port.is_none() {
            return Ok(None);
        }
        check_privileges("it supports only tap devices, which require root")?;
        if !Path::new(TUN_PATH).exists() {
            return Err(Unsupported(format!("{TUN_PATH} does not exist: type `sudo modprobe tun`")).into());
        }
        let tap = Tap::of(&fixture.id(), job.instance);
        tap.set_up().inspect_err(|_| drop(tap.remove())).context("create a tap device")?;
        Ok(Some(tap))
    }

    fn set_up(&self) -> Result<()> {
        let Tap { interface, addresses: (ours, _) } = self;
        let ours = format!("{ours}/{PREFIX}");
        for line in [
            &["tuntap", "add", "dev", interface, "mode", "tap"] as &[&str],
            &["addr", "add", &ours, "dev", interface],
            &["link", "set", interface, "up"],
        ] {
            programs::run("ip", line)?;
        }
        Ok(())
    }

    /// The name of the interface.
    pub fn interface(&self) -> &str {
        &self.interface
    }

    /// The instance's address and gateway, in the format of
    /// [`GuestOptions::network`](super::guest::GuestOptions::network).
    pub fn network(&self) -> String {
        let (ours, its) = self.addresses;
        format!("{its}/{PREFIX},{ours}")
    }

    /// The address of the instance's port.
    pub fn address(&self, port: u16) -> SocketAddr {
        SocketAddr::from((self.addresses.1, port))
    }

    /// Removes the device.
    pub fn remove(&self) -> Result<()> {
        remove_interface(&self.interface)
    }
}

/// Removes the interfaces of a run that was killed, or that failed before it started the instance.
pub fn remove_leftovers(dir: &Path) {
    let id = work_dir::id_of(dir);
    for name in names("/run/netns") {
        let instance = name.strip_prefix(&id).and_then(|rest| rest.strip_prefix('-')?.parse().ok());
        if let Some(instance) = instance
            && let Err(error) = VethPair::of(&id, instance).remove()
        {
            log::warn!("{error:#}");
        }
    }
    for name in names("/sys/class/net").iter().filter(|name| name.starts_with(&interface_prefix(&id))) {
        if let Err(error) = remove_interface(name) {
            log::warn!("{error:#}");
        }
    }
}

/// Lists the entries of a directory, or nothing if it does not exist.
fn names(dir: &str) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_of_instances_do_not_overlap() {
        let veth = |instance| VethPair::of("husk-bench-0a1b2c", instance);
        assert_eq!(veth(0).addresses, (Ipv4Addr::new(198, 18, 0, 1), Ipv4Addr::new(198, 18, 0, 2)));
        assert_eq!(veth(64).addresses, (Ipv4Addr::new(198, 18, 1, 1), Ipv4Addr::new(198, 18, 1, 2)));
        assert_eq!(veth(0x7fff).addresses.1, Ipv4Addr::new(198, 19, 255, 254));
        assert_eq!(veth(7).path(), Path::new("/run/netns/husk-bench-0a1b2c-7"));
        assert!(veth(u32::MAX).interface.len() <= 15);
        assert_ne!(veth(1).interface, veth(2).interface);
    }

    #[test]
    fn a_tap_device_has_a_links_addresses() {
        let tap = Tap::of("husk-bench-0a1b2c", 64);
        assert_eq!(tap.interface(), "hb0a1b2c-40");
        assert_eq!(tap.network(), "198.18.1.2/30,198.18.1.1");
        assert_eq!(tap.address(7777), SocketAddr::from(([198, 18, 1, 2], 7777)));
    }

    #[test]
    fn only_tap_devices_of_a_killed_bench_are_removed() {
        if !is_root() || !Path::new(TUN_PATH).exists() || !program::which("ip") {
            eprintln!("SKIPPED: tap devices are made by root, with {TUN_PATH} and ip");
            return;
        }
        // No real run has such a name: run IDs are hexadecimal.
        let [dead, alive] = ["x", "y"].map(|kind| format!("husk-bench-{kind}{:05}", std::process::id() % 100_000));
        let taps = [Tap::of(&dead, 1), Tap::of(&dead, u32::MAX), Tap::of(&alive, 2)];
        for tap in &taps {
            tap.set_up().unwrap();
        }
        remove_leftovers(&Path::new("/bench").join(dead));
        let is_there = |tap: &Tap| Path::new("/sys/class/net").join(tap.interface()).exists();
        let left = taps.each_ref().map(is_there);
        taps.iter().filter(|tap| is_there(tap)).for_each(|tap| tap.remove().unwrap());
        assert_eq!(left, [false, false, true]);
    }
}
