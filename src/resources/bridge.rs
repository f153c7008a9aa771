//! Networks shared by machines: a bridge on the host with a subnet, NAT, and DNS and DHCP by dnsmasq.
//!
//! A network has a directory under /run/husk/networks, which disappears when the host restarts, as does the bridge. A
//! machine's membership is a [`Lease`]: a file named after its address, locked for as long as the machine exists, so
//! that the address of a killed machine can be reused.

mod lease;

use std::collections::BTreeMap;
use std::fs::{self, File, Permissions, TryLockError};
use std::io::{self, ErrorKind};
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};

use super::firewall;
use super::lock;
use super::programs::{is_missing, run};
use crate::config::MacAddress;
pub use lease::{Lease, Wish, join};
use lease::{leases, remove_stale};

const DIR: &str = "/run/husk/networks";
/// The prefix of bridge names. It leaves ten of the fifteen bytes of an interface name.
const BRIDGE_PREFIX: &str = "husk-";
/// The maximum length of a network's name.
pub const MAX_NAME_BYTES: usize = 10;
/// Names with another meaning for `--network`.
const TAKEN_NAMES: [&str; 2] = ["user", "none"];
/// Every network is a /24: the gateway has the first address, machines the others.
pub const PREFIX: u8 = 24;
/// Where the search for a free subnet starts: 10.86.0.0/24, which no other software uses by default (podman starts at
/// 10.88.0.0/16, Kubernetes distributions use 10.42, 10.96 and 10.244).
const SUBNETS_FROM: [u8; 2] = [10, 86];
/// The last byte of a machine's address.
const MACHINES: std::ops::RangeInclusive<u8> = 2..=254;

/// A network, as stored on disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bridge {
    /// The name.
    pub name: String,
    /// The network address.
    pub subnet: Ipv4Addr,
    /// Whether it has no external access.
    pub internal: bool,
    /// The user's labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

impl Bridge {
    /// The name of the bridge interface.
    pub fn interface(&self) -> String {
        interface_of(&self.name)
    }

    /// The host's address in the network, which is also the DNS server.
    pub fn gateway(&self) -> Ipv4Addr {
        self.host(1)
    }

    fn host(&self, last: u8) -> Ipv4Addr {
        let [a, b, c, _] = self.subnet.octets();
        Ipv4Addr::new(a, b, c, last)
    }

    /// Fails if no machine of the network can have this address.
    pub fn check_address(&self, address: Ipv4Addr) -> Result<()> {
        let (name, subnet) = (&self.name, self.subnet);
        ensure!(
            self.has_place(address),
            "{address} is not an address for a machine of network {name}, {subnet}/{PREFIX}"
        );
        Ok(())
    }

    fn has_place(&self, address: Ipv4Addr) -> bool {
        let last = address.octets()[3];
        MACHINES.contains(&last) && self.host(last) == address
    }

    fn dir(&self, base: &Path) -> PathBuf {
        base.join(&self.name)
    }
}

/// Whether this is a valid network name.
pub fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    (1..=MAX_NAME_BYTES).contains(&name.len())
        && name.chars().all(good)
        && !name.starts_with('-')
        && !TAKEN_NAMES.contains(&name)
}

/// The bridge interface of the network `name`.
pub fn interface_of(name: &str) -> String {
    format!("{BRIDGE_PREFIX}{name}")
}

/// The network that the interface `interface` belongs to, if the name matches.
pub fn name_of(interface: &str) -> Option<&str> {
    interface.strip_prefix(BRIDGE_PREFIX).filter(|name| is_name(name))
}

/// Creates a network with its bridge, DNS server and, unless it is `internal`, NAT. Everything is removed if a step
/// fails.
pub fn create(
    name: &str,
    subnet: Option<Ipv4Addr>,
    internal: bool,
    labels: BTreeMap<String, String>,
) -> Result<Bridge> {
    create_in(Path::new(DIR), name, subnet, internal, labels)
}

pub(super) fn create_in(
    base: &Path,
    name: &str,
    subnet: Option<Ipv4Addr>,
    internal: bool,
    labels: BTreeMap<String, String>,
) -> Result<Bridge> {
    ensure!(is_name(name), "invalid network name {name:?}: use 1 to {MAX_NAME_BYTES} lowercase letters, digits or `-`");
    make_shown(base).with_context(|| format!("create {} (as root)", base.display()))?;
    let _lock = lock_alone(&base.join(".lock"))?;
    let others = list_in(base)?;
    ensure!(others.iter().all(|other| other.name != name), "network {name} already exists");
    let taken = |subnet: Ipv4Addr| others.iter().any(|other| other.subnet == subnet) || is_routed(subnet);
    let subnet = match subnet {
        Some(subnet) if taken(subnet) => {
            bail!("{subnet}/{PREFIX} is in use on this host: use --subnet with another one")
        }
        Some(subnet) => subnet,
        None => {
            let all = (0..=255).map(|third| Ipv4Addr::new(SUBNETS_FROM[0], SUBNETS_FROM[1], third, 0));
            all.into_iter().find(|subnet| !taken(*subnet)).context("no subnet is free: use --subnet")?
        }
    };
    let bridge = Bridge { name: name.to_owned(), subnet, internal, labels };
    let dir = bridge.dir(base);
    let set_up = || -> Result<()> {
        for part in ["leases", "hosts", "dhcp"] {
            let part = dir.join(part);
            make_shown(&part).with_context(|| format!("create {}", part.display()))?;
        }
        raise(&bridge)?;
        firewall::open(&bridge)?;
        serve_names(&bridge, &dir)?;
        let json = serde_json::to_vec_pretty(&bridge)?;
        let record = dir.join("network.json");
        fs::write(&record, json).and_then(|()| show(&record)).with_context(|| format!("write {}", record.display()))
    };
    set_up().inspect_err(|_| take_down(&bridge, &dir))?;
    Ok(bridge)
}

/// All networks, sorted by name.
pub fn list() -> Result<Vec<Bridge>> {
    list_in(Path::new(DIR))
}

fn list_in(base: &Path) -> Result<Vec<Bridge>> {
    let entries = match fs::read_dir(base) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("read {}", base.display()))?,
    };
    let record = |entry: fs::DirEntry| fs::read(entry.path().join("network.json")).ok();
    let mut all: Vec<Bridge> =
        entries.flatten().filter_map(record).filter_map(|bytes| serde_json::from_slice(&bytes).ok()).collect();
    all.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(all)
}

/// The machines currently on a network, with their addresses.
pub fn machines(bridge: &Bridge) -> Vec<(Ipv4Addr, String)> {
    machines_in(&bridge.dir(Path::new(DIR)))
}

fn machines_in(dir: &Path) -> Vec<(Ipv4Addr, String)> {
    let mut found = Vec::new();
    for (address, path) in leases(dir) {
        match File::open(&path) {
            Ok(file) if matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)) => {
                found.push((address, fs::read_to_string(&path).unwrap_or_default()));
            }
            // Only root can open the lock: other users cannot see whether the machine still exists, but they can read
            // its name.
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let hosts = fs::read_to_string(dir.join("hosts").join(address.to_string())).unwrap_or_default();
                found.push((address, hosts.split_whitespace().nth(1).unwrap_or_default().to_owned()));
            }
            _ => {}
        }
    }
    found.sort();
    found
}

/// Removes a network and everything created for it. Fails while machines are connected.
pub fn remove(name: &str) -> Result<()> {
    remove_in(Path::new(DIR), name)
}

pub(super) fn remove_in(base: &Path, name: &str) -> Result<()> {
    let bridge = find_in(base, name)?;
    let _lock = lock_alone(&base.join(".lock"))?;
    let dir = bridge.dir(base);
    let _joining = lock_alone(&dir.join("lock"))?;
    remove_stale(&dir);
    let users: Vec<String> = leases(&dir).map(|(_, path)| fs::read_to_string(path).unwrap_or_default()).collect();
    ensure!(users.is_empty(), "network {name} is in use by {}", users.join(", "));
    take_down(&bridge, &dir);
    Ok(())
}

fn find_in(base: &Path, name: &str) -> Result<Bridge> {
    let found = list_in(base)?.into_iter().find(|bridge| bridge.name == name);
    found.with_context(|| format!("network {name} not found (see `husk network ls`)"))
}

fn known_in(base: &Path, name: &str) -> Result<Bridge> {
    find_in(base, name).map_err(|error| anyhow!("{error}: {}", hint(name)))
}

/// Fails if there is no network `name`, with what to type.
pub fn check_exists(name: &str) -> Result<()> {
    known_in(Path::new(DIR), name).map(drop)
}

/// The alternative to a network that does not exist, such as Docker's predefined networks.
fn hint(name: &str) -> String {
    match name {
        "host" | "bridge" | "default" => "use --network user, the default, which shares the host's connections".into(),
        name => format!("run `sudo husk network create {name}`, or use user, tap=NAME or none"),
    }
}

/// Locks a file that only root can open, even if an earlier version created it with wider permissions.
fn lock_alone(path: &Path) -> Result<File> {
    let open = || -> Result<File> {
        let file = lock::alone(path)?;
        file.set_permissions(Permissions::from_mode(0o600))?;
        Ok(file)
    };
    open().context("change networks (as root)")
}

/// Creates a directory and missing parents, readable by everyone. Existing directories are not changed.
fn make_shown(dir: &Path) -> io::Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    dir.parent().map_or(Ok(()), make_shown)?;
    match fs::create_dir(dir) {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made.and_then(|()| show(dir)),
    }
}

/// Makes a directory or a file readable by everyone, in particular dnsmasq, regardless of the umask.
fn show(path: &Path) -> io::Result<()> {
    let mode = if path.is_dir() { 0o755 } else { 0o644 };
    fs::set_permissions(path, Permissions::from_mode(mode))
}

fn publish(path: &Path, content: &str) -> Result<()> {
    let dir = path.parent().and_then(Path::parent).context("no directory")?;
    let unfinished = dir.join("unfinished");
    fs::write(&unfinished, content)?;
    show(&unfinished)?;
    Ok(fs::rename(&unfinished, path)?)
}

/// Whether the host has a route, other than the default route, to the subnet or one that contains it.
fn is_routed(subnet: Ipv4Addr) -> bool {
    let routes = fs::read_to_string("/proc/net/route").unwrap_or_default();
    routes.lines().skip(1).any(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| words.get(at).and_then(|word| u32::from_str_radix(word, 16).ok()).map(u32::swap_bytes);
        let (Some(to), Some(mask)) = (number(1), number(7)) else { return false };
        let both = mask & (u32::MAX << (32 - PREFIX));
        mask != 0 && u32::from(subnet) & both == to & both
    })
}

fn raise(bridge: &Bridge) -> Result<()> {
    let interface = bridge.interface();
    let address = format!("{}/{PREFIX}", bridge.gateway());
    // A bridge would otherwise take the lowest address of its members, and machines lose it for seconds when that changes.
    let [a, b, c, _] = bridge.subnet.octets();
    let mac = MacAddress([0x02, 0x68, a, b, c, 1]).to_string();
    run("ip", &["link", "add", &interface, "address", &mac, "type", "bridge"])?;
    run("ip", &["addr", "add", &address, "dev", &interface])?;
    run("ip", &["link", "set", &interface, "up"])
}

/// Starts dnsmasq, which keeps running after husk exits: it resolves machine names, forwards other queries, and serves
/// DHCP.
fn serve_names(bridge: &Bridge, dir: &Path) -> Result<()> {
    let at = |name: &str| dir.join(name).display().to_string();
    let mut arguments = vec![
        "--conf-file=/dev/null".to_owned(),
        // Exists on every host, unlike a dedicated user for dnsmasq.
        "--user=nobody".to_owned(),
        "--bind-interfaces".to_owned(),
        "--except-interface=lo".to_owned(),
        format!("--interface={}", bridge.interface()),
        "--no-hosts".to_owned(),
        format!("--hostsdir={}", at("hosts")),
        format!("--dhcp-hostsdir={}", at("dhcp")),
        format!("--dhcp-range={},static,255.255.255.0", bridge.subnet),
        format!("--dhcp-leasefile={}", at("dhcp-leases")),
        format!("--pid-file={}", at("dnsmasq.pid")),
    ];
    if bridge.internal {
        // It would announce itself as the default router.
        arguments.push("--dhcp-option=option:router".to_owned());
    }
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    run("dnsmasq", &arguments).map_err(|error| match is_missing(&error) {
        true => error.context("networks need dnsmasq: run `sudo apt-get install dnsmasq-base`"),
        false => error,
    })
}

/// The PID of the network's dnsmasq, if it is running.
fn names_server(dir: &Path) -> Option<u32> {
    let pid = fs::read_to_string(dir.join("dnsmasq.pid")).ok()?.trim().parse().ok()?;
    let comm = fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
    (comm.trim() == "dnsmasq").then_some(pid)
}

/// Removes all parts of a network; missing parts are ignored.
fn take_down(bridge: &Bridge, dir: &Path) {
    if let Some(pid) = names_server(dir) {
        let _ = run("kill", &[&pid.to_string()]);
    }
    firewall::close(bridge);
    let _ = run("ip", &["link", "del", &bridge.interface()]);
    let _ = fs::remove_dir_all(dir);
}

/// Adds the tap device `tap` to the bridge `bridge` and brings it up.
pub fn attach(tap: &str, bridge: &str) -> Result<()> {
    run("ip", &["link", "set", tap, "master", bridge, "up"])
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::UdpSocket;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;
    use std::time::{Duration, Instant};

    use rustix::fs::Mode;

    use super::lease::join_in;
    use super::*;
    use crate::sys;

    const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 9]);

    /// Runs `test` in a new network namespace with a separate directory for networks. Skips it with a visible message
    /// if that is not permitted.
    pub(crate) fn alone(test: impl FnOnce(&Path) + Send) {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                if let Err(error) = sys::net::leave_network() {
                    eprintln!("SKIPPED: only root makes networks: {error}");
                    return;
                }
                // Must be readable by the user that dnsmasq switches to.
                let base = tempfile::Builder::new().permissions(PermissionsExt::from_mode(0o755)).tempdir().unwrap();
                run("ip", &["link", "set", "lo", "up"]).unwrap();
                test(base.path());
            });
            thread.join().unwrap();
        });
    }

    /// Queries a server for a name's address.
    fn ask(server: Ipv4Addr, name: &str) -> Option<Ipv4Addr> {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut question = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, name.len() as u8];
        question.extend(name.bytes());
        question.extend([0, 0, 1, 0, 1]);
        socket.send_to(&question, (server, 53)).unwrap();
        let mut answer = [0; 512];
        let count = socket.recv(&mut answer).ok()?;
        // A single answer, which ends with the address.
        let address: [u8; 4] = answer[..count].last_chunk().copied()?;
        (answer[7] > 0).then(|| address.into())
    }

    fn eventually(what: &str, happened: impl Fn() -> bool) {
        let started = Instant::now();
        while !happened() {
            assert!(started.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn exists(interface: &str) -> bool {
        run("ip", &["link", "show", interface]).is_ok()
    }

    #[test]
    fn connected_machines_are_resolved_by_name() {
        alone(|base| {
            let bridge = create_in(base, "web", None, false, BTreeMap::new()).unwrap();
            assert!(exists("husk-web"));
            assert!(create_in(base, "web", None, false, BTreeMap::new()).unwrap_err().to_string().contains("already"));
            assert!(
                create_in(base, "other", Some(bridge.subnet), false, BTreeMap::new())
                    .unwrap_err()
                    .to_string()
                    .contains("in use")
            );
            let db = join_in(base, "web", "db", MAC, Wish::default()).unwrap();
            let app = join_in(base, "web", "app", MAC, Wish::default()).unwrap();
            assert_ne!(db.address, app.address);
            let gateway = bridge.gateway();
            eventually("a name comes", || ask(gateway, "db") == Some(db.address));
            eventually("another comes", || ask(gateway, "app") == Some(app.address));
            assert!(join_in(base, "web", "db", MAC, Wish::default()).unwrap_err().to_string().contains("already"));
            let odd = join_in(base, "web", "a b\n10.0.0.1 c", MAC, Wish::default()).unwrap_err().to_string();
            assert!(odd.contains("letters, digits"), "{odd}");
            assert!(remove_in(base, "web").unwrap_err().to_string().contains("in use by"));
            let address = db.address;
            drop(db);
            eventually("a name goes", || ask(gateway, "db").is_none());
            assert_eq!(
                join_in(base, "web", "db", MAC, Wish::default()).unwrap().address,
                address,
                "a machine keeps its address"
            );
            let wanted = bridge.host(if app.address == bridge.host(200) { 201 } else { 200 });
            let join = |wanted| {
                let wish = Wish::former(Some(wanted), vec!["alias".into()]);
                let lease = join_in(base, "web", "more", MAC, wish).unwrap();
                eventually("an alias comes", || ask(gateway, "alias") == Some(lease.address));
                lease.address
            };
            assert_eq!(join(wanted), wanted);
            assert!([app.address, gateway, Ipv4Addr::from([192, 0, 2, 9])].iter().all(|other| join(*other) != *other));
            let strict = |address: Ipv4Addr| {
                let wish = Wish { address: Some(address), is_required: true, aliases: Vec::new() };
                join_in(base, "web", "more", MAC, wish).map(|lease| lease.address).map_err(|error| error.to_string())
            };
            assert_eq!(strict(wanted), Ok(wanted));
            assert!(strict(app.address).unwrap_err().contains("in use by another machine"));
            assert!(strict(Ipv4Addr::new(192, 0, 2, 9)).unwrap_err().contains("not an address for a machine"));
            drop(app);
            let dir = bridge.dir(base);
            let server = names_server(&dir).unwrap();
            remove_in(base, "web").unwrap();
            assert!(!exists("husk-web") && !dir.exists());
            let ended =
                || fs::read_to_string(format!("/proc/{server}/stat")).map_or(true, |stat| stat.contains(") Z "));
            eventually("dnsmasq ends", ended);
            assert!(run("nft", &["list", "table", "ip", "husk-web"]).is_err());
            assert_eq!(list_in(base).unwrap(), []);
        });
    }

    #[test]
    fn a_bridge_keeps_its_address_whoever_joins() {
        alone(|base| {
            create_in(base, "web", Some(Ipv4Addr::new(10, 86, 7, 0)), true, BTreeMap::new()).unwrap();
            run("ip", &["link", "add", "low", "address", "02:00:00:00:00:01", "type", "veth"]).unwrap();
            attach("low", "husk-web").unwrap();
            let shown = Command::new("ip").args(["link", "show", "husk-web"]).output().unwrap();
            let shown = String::from_utf8(shown.stdout).unwrap();
            assert!(shown.contains("link/ether 02:68:0a:56:07:01 "), "{shown}");
            remove_in(base, "web").unwrap();
        });
    }

    #[test]
    fn file_permissions_do_not_depend_on_the_umask() {
        alone(|base| {
            rustix::process::umask(Mode::from_raw_mode(0o077));
            let above = fs::metadata(base).unwrap().mode();
            let base = &base.join("run/networks");
            let bridge = create_in(base, "m", None, true, BTreeMap::new()).unwrap();
            let lease = join_in(base, "m", "db", MAC, Wish::default()).unwrap();
            let dir = bridge.dir(base);
            let mode = |path: PathBuf| fs::metadata(path).unwrap().mode() & 0o777;
            let address = lease.address.to_string();
            for lock in [base.join(".lock"), dir.join("lock"), dir.join("leases").join(&address)] {
                assert_eq!(mode(lock.clone()), 0o600, "{}", lock.display());
            }
            for shown in ["hosts", "dhcp"] {
                assert_eq!((mode(dir.join(shown)), mode(dir.join(shown).join(&address))), (0o755, 0o644), "{shown}");
            }
            assert_eq!((mode(dir.clone()), mode(dir.join("network.json"))), (0o755, 0o644));
            assert_eq!(fs::metadata(base.ancestors().nth(2).unwrap()).unwrap().mode(), above, "what was there stays");
            eventually("a name comes", || ask(bridge.gateway(), "db") == Some(lease.address));
            assert_eq!(machines_in(&dir), [(lease.address, "db".to_owned())]);
            drop(lease);
            remove_in(base, "m").unwrap();
        });
    }

    #[test]
    fn leases_of_killed_machines_are_removed() {
        alone(|base| {
            let bridge = create_in(base, "a", None, true, BTreeMap::new()).unwrap();
            let dir = bridge.dir(base);
            for part in ["leases", "hosts", "dhcp"] {
                fs::write(dir.join(part).join("10.86.0.7"), "db").unwrap();
            }
            let lease = join_in(base, "a", "db", MAC, Wish::default()).unwrap();
            assert!(!dir.join("hosts/10.86.0.7").exists() || lease.address == Ipv4Addr::new(10, 86, 0, 7));
            drop(lease);
            remove_in(base, "a").unwrap();
        });
    }

    #[test]
    fn names_are_short_and_plain() {
        for (name, good) in [
            ("web", true),
            ("a-1", true),
            ("", false),
            ("-a", false),
            ("Web", false),
            ("eleven-long", false),
            ("none", false),
        ] {
            assert_eq!(is_name(name), good, "{name}");
        }
    }

    #[test]
    fn a_missing_network_is_reported_with_the_command_to_type() {
        let nowhere = Path::new("/nonexistent");
        let join =
            |name| join_in(nowhere, name, "machine", MacAddress([2; 6]), Wish::default()).unwrap_err().to_string();
        assert!(join("web").contains("sudo husk network create web"), "{}", join("web"));
        for name in ["host", "bridge", "default"] {
            assert!(join(name).contains("use --network user") && !join(name).contains("create"), "{}", join(name));
        }
        let missing = remove_in(nowhere, "web").unwrap_err().to_string();
        assert!(missing.contains("husk network ls") && !missing.contains("create"), "{missing}");
    }
}
