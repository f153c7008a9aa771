//! A machine's membership in a network: its address and names there, for as long as it exists.

use std::fs::{self, File};
use std::io::Write;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::{Bridge, DIR, MACHINES, interface_of, known_in, lock_alone, make_shown, names_server, publish};
use crate::config::{MacAddress, PortForward};
use crate::resources::lock::{self, Kind};
use crate::resources::published::{self, Reserved};

/// The directory with the addresses of machines that have published ports.
const PUBLISHED: &str = "published";
/// The maximum length of a machine's name: one DNS label (RFC 1035).
const MAX_MACHINE_BYTES: usize = 63;
/// How long a machine that has ended may take to leave its networks: it may be started again at once.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
const LEAVE_INTERVAL: Duration = Duration::from_millis(5);

/// What a machine wants to be in a network.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    /// Its address.
    pub address: Option<Ipv4Addr>,
    /// Whether it cannot have another one.
    pub is_required: bool,
    /// More names, which several machines may have.
    pub aliases: Vec<String>,
}

impl Wish {
    /// To have this address, if it is free, and these names.
    pub fn former(address: Option<Ipv4Addr>, aliases: Vec<String>) -> Wish {
        Wish { address, is_required: false, aliases }
    }
}

/// A machine's membership in a network. Dropping it releases the address.
#[derive(Debug)]
pub struct Lease {
    /// The network.
    pub bridge: Bridge,
    /// The machine's address.
    pub address: Ipv4Addr,
    /// Its other names.
    pub aliases: Vec<String>,
    /// Whether ports of the machine are published, and what keeps them from others.
    published: Option<Reserved>,
    dir: PathBuf,
    _lock: File,
}

/// Assigns the machine `machine` an address in network `name`, and publishes its names.
pub fn join(name: &str, machine: &str, mac: MacAddress, wish: Wish) -> Result<Lease> {
    join_in(Path::new(DIR), name, machine, mac, wish)
}

pub(super) fn join_in(base: &Path, name: &str, machine: &str, mac: MacAddress, wish: Wish) -> Result<Lease> {
    wish.aliases.iter().map(String::as_str).chain([machine]).try_for_each(check_machine_name)?;
    let bridge = known_in(base, name)?;
    let dir = bridge.dir(base);
    let _joining = lock_alone(&dir.join("lock"))?;
    let started = Instant::now();
    let taken = loop {
        remove_stale(&dir);
        let taken: Vec<(Ipv4Addr, String)> =
            leases(&dir).map(|(address, path)| (address, fs::read_to_string(path).unwrap_or_default())).collect();
        if taken.iter().all(|(_, name)| name != machine) {
            break taken;
        }
        ensure!(started.elapsed() < LEAVE_TIMEOUT, "network {name} already has a machine named {machine}");
        thread::sleep(LEAVE_INTERVAL);
    };
    // A machine gets the same address each time, if it is free.
    let size = MACHINES.len() as u64;
    let first = u64::from_le_bytes([mac.0[2], mac.0[3], mac.0[4], mac.0[5], 0, 0, 0, 0]) % size;
    let others = (0..size).map(|step| bridge.host(*MACHINES.start() + ((first + step) % size) as u8));
    let is_free = |address: &Ipv4Addr| taken.iter().all(|(other, _)| other != address);
    let wanted = wish.address.filter(|address| bridge.has_place(*address));
    if let Some(address) = wish.address.filter(|_| wish.is_required) {
        bridge.check_address(address)?;
        ensure!(is_free(&address), "{address} is in use by another machine of network {name}");
    }
    let address = wanted.into_iter().chain(others).find(is_free);
    let address = address.with_context(|| format!("network {name} has no free addresses"))?;
    let path = dir.join("leases").join(address.to_string());
    let write = || -> Result<File> {
        // A file created by another user could be locked by that user.
        let _ = fs::remove_file(&path);
        let mut lock = lock::file().create_new(true).open(&path)?;
        lock::wait(&lock, &path, Kind::Exclusive, lock::SHORT_TIMEOUT)?;
        lock.write_all(machine.as_bytes())?;
        // Written atomically, since dnsmasq reads the file as soon as it exists.
        let names: String = [machine]
            .into_iter()
            .chain(wish.aliases.iter().map(String::as_str))
            .map(|name| format!(" {name}"))
            .collect();
        publish(&dir.join("hosts").join(address.to_string()), &format!("{address}{names}\n"))?;
        publish(&dir.join("dhcp").join(address.to_string()), &format!("{mac},{address},{machine},infinite\n"))?;
        Ok(lock)
    };
    let lock = write().with_context(|| format!("write {}", path.display()))?;
    Ok(Lease { bridge, address, aliases: wish.aliases, published: None, dir, _lock: lock })
}

impl Lease {
    /// Publishes ports of the machine on the host, as long as it has the lease.
    pub fn publish(&mut self, ports: &[PortForward]) -> Result<()> {
        if ports.is_empty() {
            return Ok(());
        }
        // Noted first, so that they are closed even if this process is killed.
        let noted = self.dir.join(PUBLISHED).join(self.address.to_string());
        noted.parent().map_or(Ok(()), make_shown).and_then(|()| fs::write(&noted, "")).context("publish the ports")?;
        self.published = Some(published::open(&self.bridge, self.address, ports)?);
        Ok(())
    }
}

/// Checks a name, which is written to line-based files of dnsmasq.
fn check_machine_name(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    ensure!(
        (1..=MAX_MACHINE_BYTES).contains(&name.len()) && name.chars().all(good),
        "invalid machine name {name:?}: on a network, use 1 to {MAX_MACHINE_BYTES} letters, digits, `-`, `.` or `_`"
    );
    Ok(())
}

impl Drop for Lease {
    fn drop(&mut self) {
        forget(&self.dir, self.address);
        // dnsmasq detects new files, but not removed ones.
        if let Some(pid) = names_server(&self.dir) {
            let _ = Command::new("kill").args(["-HUP", &pid.to_string()]).output();
        }
    }
}

/// The addresses of a network's machines, and their files.
pub(super) fn leases(dir: &Path) -> impl Iterator<Item = (Ipv4Addr, PathBuf)> {
    let entries = fs::read_dir(dir.join("leases")).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())))
}

/// Removes machines that no longer exist.
pub(super) fn remove_stale(dir: &Path) {
    for (address, path) in leases(dir) {
        if lock::file().create(false).open(&path).is_ok_and(|file| file.try_lock().is_ok()) {
            forget(dir, address);
        }
    }
}

fn forget(dir: &Path, address: Ipv4Addr) {
    if fs::remove_file(dir.join(PUBLISHED).join(address.to_string())).is_ok()
        && let Some(name) = dir.file_name().and_then(|name| name.to_str())
    {
        published::close(&interface_of(name), address);
    }
    for part in ["hosts", "dhcp", "leases"] {
        let _ = fs::remove_file(dir.join(part).join(address.to_string()));
    }
}
