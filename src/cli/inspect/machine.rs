//! A machine as `husk inspect` and `husk ps --json` print it: Docker's names for what Docker has, and husk's own below `Husk`.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::Serialize;

use crate::cli::time::rfc3339;
use crate::config::{Attachment, DiskConfig, MachineConfig, NetworkConfig, ShareConfig};
use crate::image::{Store, volumes};
use crate::resources::bridge;
use crate::state_dir::health::Health;
use crate::state_dir::identity::InterfaceRecord;
use crate::state_dir::mounts::{MountRecord, MountSource};
use crate::state_dir::record::{Record, State, Text};
use crate::state_dir::{MachineEntry, STREAMS_LOG};
use crate::sys::disk::allocated_bytes;

/// The time that is none, in Go's words.
const NEVER: &str = "0001-01-01T00:00:00Z";

/// A machine.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspected {
    id: String,
    name: String,
    created: String,
    path: String,
    args: Vec<String>,
    state: Condition,
    image: String,
    /// As it was given.
    image_name: String,
    restart_count: u32,
    log_path: PathBuf,
    config: Process,
    host_config: HostConfig,
    network_settings: NetworkSettings,
    mounts: Vec<Mount>,
    /// The disk usage of the machine's own disks, and with that of its root file system.
    #[serde(skip_serializing_if = "Option::is_none")]
    size_rw: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    size_root_fs: Option<u64>,
    husk: Option<Own>,
}

impl Inspected {
    /// Adds what its disks take on the host.
    pub fn measure(&mut self) {
        let sizes = self.husk.as_ref().map(|own| disk_bytes(&own.config, self.state.pid)).unwrap_or_default();
        (self.size_rw, self.size_root_fs) = (Some(sizes.0), Some(sizes.1));
    }
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Condition {
    status: String,
    running: bool,
    paused: bool,
    restarting: bool,
    #[serde(rename = "OOMKilled")]
    oom_killed: bool,
    dead: bool,
    pid: u32,
    exit_code: u8,
    error: String,
    started_at: String,
    finished_at: String,
    health: Option<Health>,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Process {
    hostname: String,
    user: String,
    tty: bool,
    open_stdin: bool,
    env: Vec<String>,
    cmd: Vec<String>,
    image: String,
    working_dir: String,
    entrypoint: Option<Vec<String>>,
    labels: BTreeMap<String, String>,
    stop_signal: String,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct HostConfig {
    nano_cpus: u64,
    cpu_shares: u32,
    cpuset_cpus: String,
    memory: u64,
    auto_remove: bool,
    restart_policy: RestartPolicy,
    network_mode: String,
    port_bindings: Ports,
    binds: Vec<String>,
    log_config: LogConfig,
}

/// The log, which is like one of Docker's driver json-file.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct LogConfig {
    #[serde(rename = "Type")]
    driver: &'static str,
    config: BTreeMap<&'static str, String>,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct RestartPolicy {
    name: String,
    maximum_retry_count: u32,
}

/// The bindings of each port of the guest.
type Ports = BTreeMap<String, Vec<Binding>>;

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Binding {
    host_ip: String,
    host_port: String,
}

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct NetworkSettings {
    /// The first one again.
    #[serde(flatten)]
    first: Network,
    ports: Ports,
    networks: BTreeMap<String, Network>,
}

#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Network {
    #[serde(rename = "IPAddress")]
    ip_address: String,
    #[serde(rename = "IPPrefixLen")]
    ip_prefix_len: u8,
    gateway: String,
    mac_address: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Mount {
    #[serde(rename = "Type")]
    kind: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    name: Option<String>,
    source: PathBuf,
    destination: String,
    #[serde(rename = "RW")]
    writable: bool,
}

/// What Docker does not have.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Own {
    detached: bool,
    log_max_bytes: Option<u64>,
    snapshot: Option<PathBuf>,
    sandbox_lacks: Vec<String>,
    /// As in a file for `husk boot --config`.
    config: MachineConfig,
}

/// What the machine's own disks take on the host, and all of them. Its process has the ID `pid`.
pub fn disk_bytes(config: &MachineConfig, pid: u32) -> (u64, u64) {
    let disk = |disk: &DiskConfig| Some((disk.readonly, allocated_bytes(&fs::metadata(disk.path_in(pid)).ok()?)));
    let sizes: Vec<(bool, u64)> = config.disks.iter().filter_map(disk).collect();
    let own = sizes.iter().filter(|(readonly, _)| !readonly).map(|(_, bytes)| bytes).sum();
    (own, sizes.iter().map(|(_, bytes)| bytes).sum())
}

/// The health of a machine, in Docker's words.
pub fn health(record: &Record) -> &'static str {
    record.health.as_ref().map_or("none", |health| health.status.name())
}

/// What is known about a machine.
pub fn inspect(entry: &MachineEntry) -> Inspected {
    let Some(record) = &entry.record else {
        let state = Condition { status: entry.state().name(), ..Condition::default() };
        return Inspected { id: entry.id.clone(), name: entry.name().to_owned(), state, ..Inspected::default() };
    };
    let mut command = record.command.iter().cloned();
    Inspected {
        id: entry.id.clone(),
        name: entry.name().to_owned(),
        created: time(record.created_ms),
        path: command.next().unwrap_or_default(),
        args: command.collect(),
        state: condition(entry, record),
        image: image_id(record).unwrap_or_default(),
        image_name: record.image.clone(),
        restart_count: record.restarts,
        log_path: entry.file(STREAMS_LOG),
        config: process(record),
        host_config: host_config(record),
        network_settings: network_settings(record),
        mounts: mounts(record),
        size_rw: None,
        size_root_fs: None,
        husk: Some(Own {
            detached: record.detached,
            log_max_bytes: record.log_max_bytes,
            snapshot: record.snapshot.clone(),
            sandbox_lacks: record.sandbox_lacks.clone(),
            config: record.config.clone(),
        }),
    }
}

fn time(time_ms: u64) -> String {
    rfc3339(time_ms.saturating_mul(1_000_000))
}

fn condition(entry: &MachineEntry, record: &Record) -> Condition {
    let state = entry.state();
    let (code, error, finished_at) = match &state {
        State::Exited { code, at_ms, reason } => (*code, reason.clone().unwrap_or_default(), time(*at_ms)),
        State::Suspended { since_ms } => (0, String::new(), time(*since_ms)),
        State::Lost => (137, "husk was killed".to_owned(), NEVER.to_owned()),
        State::Created | State::Starting | State::Running { .. } | State::Paused { .. } | State::Restarting { .. } => {
            (0, String::new(), NEVER.to_owned())
        }
    };
    let started_at = match &state {
        State::Running { since_ms } => time(*since_ms),
        State::Created | State::Starting => NEVER.to_owned(),
        _ => time(record.created_ms),
    };
    let paused = matches!(state, State::Paused { .. });
    Condition {
        status: state.name(),
        // As in Docker, a paused machine runs.
        running: paused || matches!(state, State::Running { .. }),
        paused,
        restarting: matches!(state, State::Restarting { .. }),
        oom_killed: record.oom_killed,
        dead: matches!(state, State::Lost),
        pid: if entry.alive { record.pid } else { 0 },
        exit_code: code,
        error,
        started_at,
        finished_at,
        health: record.health.clone(),
    }
}

/// The ID of the image that the machine has its root file system from, if it is in the store.
fn image_id(record: &Record) -> Option<String> {
    let root = &record.config.disks.first()?.path;
    // Most machines of `husk boot` have none.
    root.extension().filter(|extension| *extension == "erofs")?;
    let store = Store::open_default().ok()?;
    store.list().ok()?.iter().find(|image| store.root_of(image) == *root).map(|image| image.id.to_string())
}

fn process(record: &Record) -> Process {
    let inherited = record.process.clone().unwrap_or_default();
    Process {
        hostname: record.identity.as_ref().map(|identity| identity.hostname.clone()).unwrap_or_default(),
        user: inherited.user,
        tty: inherited.terminal,
        open_stdin: inherited.stdin,
        env: inherited.env.iter().map(text).collect(),
        cmd: record.command.clone(),
        image: record.image.clone(),
        working_dir: text(&inherited.working_dir),
        entrypoint: None,
        labels: record.labels.clone(),
        stop_signal: record.stop_signal.to_string(),
    }
}

fn host_config(record: &Record) -> HostConfig {
    let config = &record.config;
    let millicpus = config.cpu_limit_millicpus.unwrap_or(config.cpus * 1000);
    let cpus: Vec<String> = config.cpuset.iter().map(u32::to_string).collect();
    let name = match (record.restarts_always, record.max_retries) {
        (true, _) => "always",
        (false, 0) => "no",
        (false, _) => "on-failure",
    };
    HostConfig {
        nano_cpus: u64::from(millicpus) * 1_000_000,
        cpu_shares: config.cpu_shares.unwrap_or_default(),
        cpuset_cpus: cpus.join(","),
        memory: config.memory_target_mib.unwrap_or(config.memory_mib) << 20,
        auto_remove: !record.keep,
        restart_policy: RestartPolicy { name: name.to_owned(), maximum_retry_count: record.max_retries },
        network_mode: config.networks.first().map_or_else(|| "none".to_owned(), network_name),
        port_bindings: ports(record),
        binds: config.shares.iter().map(|share| share.path.display().to_string()).collect(),
        log_config: LogConfig {
            driver: "json-file",
            config: record.log_max_bytes.iter().map(|bytes| ("max-size", bytes.to_string())).collect(),
        },
    }
}

fn network_name(network: &NetworkConfig) -> String {
    match &network.to {
        Attachment::User(_) => "user".to_owned(),
        Attachment::Tap { name } | Attachment::Interface { name } => name.clone(),
        Attachment::Bridge { name, .. } => bridge::name_of(name).unwrap_or(name).to_owned(),
    }
}

fn ports(record: &Record) -> Ports {
    let mut ports = Ports::new();
    for network in &record.config.networks {
        let Attachment::User(user) = &network.to else { continue };
        for forward in &user.ports {
            let host_ip = forward.host_ip.map_or_else(|| "0.0.0.0".to_owned(), |ip| ip.to_string());
            for offset in 0..forward.count {
                let guest = format!("{}/{}", forward.guest_port.saturating_add(offset), forward.protocol.name());
                let host_port = forward.host_port.saturating_add(offset).to_string();
                ports.entry(guest).or_default().push(Binding { host_ip: host_ip.clone(), host_port });
            }
        }
    }
    ports
}

fn network_settings(record: &Record) -> NetworkSettings {
    let none = InterfaceRecord::default();
    let interfaces = record.identity.as_ref().map(|identity| identity.interfaces.as_slice()).unwrap_or_default();
    let networks: Vec<(String, Network)> = record
        .config
        .networks
        .iter()
        .enumerate()
        .map(|(at, config)| {
            let interface = interfaces.get(at).unwrap_or(&none);
            let address = interface.addresses.first();
            let network = Network {
                ip_address: address.map(|address| address.ip.to_string()).unwrap_or_default(),
                ip_prefix_len: address.map_or(0, |address| address.prefix),
                gateway: interface.gateways.first().map(ToString::to_string).unwrap_or_default(),
                mac_address: config.mac.map(|mac| mac.to_string()).unwrap_or_default(),
            };
            (network_name(config), network)
        })
        .collect();
    NetworkSettings {
        first: networks.first().map(|(_, network)| network.clone()).unwrap_or_default(),
        ports: ports(record),
        networks: networks.into_iter().collect(),
    }
}

fn mounts(record: &Record) -> Vec<Mount> {
    let shares = &record.config.shares;
    if record.mounts.is_empty() {
        // A guest of `husk boot` mounts them where it wants to.
        let mount = |share: &ShareConfig| {
            let destination = share.tag.clone();
            Mount { kind: "bind", name: None, source: share.path.clone(), destination, writable: !share.readonly }
        };
        return shares.iter().map(mount).collect();
    }
    let of_volume = |name: &str| shares.iter().find(|share| volumes::name_of(&share.path) == Some(name));
    let mount = |mount: &MountRecord| {
        let (kind, name, source) = match &mount.source {
            MountSource::Bind(path) => ("bind", None, path.clone()),
            MountSource::Volume(name) => {
                let path = of_volume(name).map(|share| share.path.clone());
                ("volume", Some(name.clone()), path.unwrap_or_default())
            }
            MountSource::Layer => ("volume", None, PathBuf::new()),
        };
        Mount { kind, name, source, destination: text(&mount.target), writable: !mount.readonly }
    };
    record.mounts.iter().map(mount).collect()
}

fn text(text: &Text) -> String {
    match text {
        Text::Text(text) => text.clone(),
        Text::Bytes(bytes) => String::from_utf8_lossy(bytes).into_owned(),
    }
}
