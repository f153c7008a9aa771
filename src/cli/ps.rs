//! `husk ps`: lists this user's machines.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use indicatif::HumanBytes;

use super::exit::Exit;
use super::filter::matches_name;
use super::inspect::machine::{self, Inspected};
use super::list::{Columns, Filters, ListFlags, Row};
use super::time::{self, ago};
use super::{reach, size};
use crate::config::{Attachment, PortForward};
use crate::image::reference::same_name;
use crate::image::{Store, volumes};
use crate::resources::bridge;
use crate::state_dir::health::HealthStatus;
use crate::state_dir::record::{Record, State, now_ms};
use crate::state_dir::{MachineEntry, StateDir};

const EXAMPLES: &str = "\
Examples:
  husk ps
  husk ps -a                        (include stopped machines)
  husk ps -q | xargs husk stop
  husk ps -a --filter status=exited --filter label=team=web
  husk ps --format 'table {{.ID}}\\t{{.Names}}\\t{{.Ports}}'
  husk ps --json | jq -r '.[].Name'

Filters: id, name, label, status, exited, ancestor, before, since, network, volume, publish, expose, health";

/// The maximum width of a command.
const COMMAND_CHARS: usize = 30;

const COLUMNS: Columns = Columns {
    all: &[
        ("ID", "MACHINE ID"),
        ("Image", "IMAGE"),
        ("Command", "COMMAND"),
        ("CreatedAt", "CREATED AT"),
        ("RunningFor", "CREATED"),
        ("Status", "STATUS"),
        ("State", "STATE"),
        ("Ports", "PORTS"),
        ("Cpus", "CPUS"),
        ("Memory", "MEMORY"),
        ("Networks", "NETWORKS"),
        ("Mounts", "MOUNTS"),
        ("Pid", "PID"),
        ("Size", "SIZE"),
        ("Labels", "LABELS"),
        ("Label", "LABEL"),
        ("Names", "NAMES"),
    ],
    shown: &["ID", "Image", "Command", "RunningFor", "Status", "Ports", "Cpus", "Memory", "Names"],
    key: "ID",
    filters: &[
        "id", "name", "label", "status", "exited", "ancestor", "before", "since", "network", "volume", "publish",
        "expose", "health",
    ],
};

/// The states that machines have, and those that only containers have.
const STATES: [&str; 10] =
    ["created", "starting", "running", "paused", "restarting", "suspended", "exited", "lost", "dead", "removing"];

/// The fields that are shown with `--size`.
const WITH_SIZE: [&str; 10] =
    ["ID", "Image", "Command", "RunningFor", "Status", "Ports", "Cpus", "Memory", "Names", "Size"];

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Ps {
    /// Show all machines (default shows just running)
    #[arg(short, long)]
    all: bool,

    /// Show the N machines that were created last, stopped ones included
    #[arg(short = 'n', long, value_name = "N")]
    last: Option<usize>,

    /// Show the machine that was created last, even if it is stopped
    #[arg(short, long, conflicts_with = "last")]
    latest: bool,

    /// Show what the disks of each machine take on the host, and with that of its image
    #[arg(short, long)]
    size: bool,

    /// Machines of others: always off, for compatibility with `podman ps`
    #[arg(long, hide = true)]
    external: bool,

    #[command(flatten)]
    list: ListFlags,

    /// Print what `husk inspect` prints, as a JSON array
    #[arg(long, conflicts_with_all = ["format", "quiet"])]
    json: bool,
}

impl Ps {
    /// Prints the list, most recent first.
    pub fn run(self) -> Result<Exit> {
        let state_dir = StateDir::open()?;
        state_dir.remove_stale()?;
        let filters = self.list.filters(&COLUMNS)?;
        check_states(filters.values("status"))?;
        let chosen = Chosen::of(&filters, &state_dir)?;
        let mut entries = reach::machines(&state_dir)?;
        let shows_all = self.all || filters.values("status").chain(filters.values("exited")).next().is_some();
        match self.last.or(self.latest.then_some(1)) {
            Some(count) => entries.truncate(count),
            None => entries.retain(|entry| shows_all || entry.alive),
        }
        entries.retain(|entry| chosen.has(entry));
        if self.json {
            let list: Vec<Inspected> = entries.iter().map(machine::inspect).collect();
            super::print_json(&list, "the machines")?;
        } else {
            let max_chars = if self.list.no_trunc { usize::MAX } else { COMMAND_CHARS };
            let shown = if self.size { &WITH_SIZE } else { COLUMNS.shown };
            // Each disk is looked at, which is not worth it unless it is shown.
            let with_size = self.size || !self.list.is_table();
            let rows = entries.iter().map(|entry| row(entry, max_chars, with_size)).collect();
            self.list.print(&Columns { shown, ..COLUMNS }, rows)?;
        }
        Ok(Exit::Success)
    }
}

/// Which machines the filters choose.
struct Chosen<'a> {
    filters: &'a Filters<'a>,
    /// Those created before, and after these times.
    before_ms: Vec<u64>,
    since_ms: Vec<u64>,
    /// The root file systems of images that machines may be made from.
    roots: Vec<PathBuf>,
}

impl<'a> Chosen<'a> {
    fn of(filters: &'a Filters<'a>, state_dir: &StateDir) -> Result<Chosen<'a>> {
        let created = |key| -> Result<Vec<u64>> {
            filters.values(key).map(|name| Ok(state_dir.find(name)?.record()?.created_ms)).collect()
        };
        let mut roots = Vec::new();
        for image in filters.values("ancestor") {
            let found = Store::open_default().and_then(|store| Ok((store.find(&image.parse()?)?, store)));
            roots.extend(found.ok().map(|(image, store)| store.root_of(&image)));
        }
        Ok(Chosen { filters, before_ms: created("before")?, since_ms: created("since")?, roots })
    }

    fn has(&self, entry: &MachineEntry) -> bool {
        let (filters, state) = (self.filters, entry.state());
        // A machine that is only just being created has no record.
        let any = |key: &str, is_met: &dyn Fn(&Record, &str) -> bool| {
            filters.any(key, |value| entry.record.as_ref().is_some_and(|record| is_met(record, value)))
        };
        let created_ms = entry.record.as_ref().map_or(u64::MAX, |record| record.created_ms);
        filters.any("id", |id| entry.id.starts_with(id))
            && filters.any("name", |name| matches_name(entry.name(), name))
            && filters.labels(entry.record.as_ref().map_or(&BTreeMap::new(), |record| &record.labels))
            && filters.any("status", |status| state.name() == status)
            && filters.any("exited", |code| matches!(state, State::Exited { code: own, .. } if own.to_string() == code))
            && any("ancestor", &|record, image| self.is_from(record, image))
            && self.before_ms.iter().all(|&other| created_ms < other)
            && self.since_ms.iter().all(|&other| created_ms > other)
            && any("network", &|record, network| networks(record).iter().any(|own| own == network))
            && any("volume", &|record, volume| mounts(record).iter().any(|own| own == volume))
            && any("publish", &|record, wanted| ports_of(record).any(|port| has_port(port, wanted, false)))
            && any("expose", &|record, wanted| ports_of(record).any(|port| has_port(port, wanted, true)))
            && any("health", &|record, health| machine::health(record) == health)
    }

    fn is_from(&self, record: &Record, image: &str) -> bool {
        let root = record.config.disks.first().map(|disk| &disk.path);
        same_name(&record.image, image) || root.is_some_and(|root| self.roots.contains(root))
    }
}

fn row(entry: &MachineEntry, command_chars: usize, with_size: bool) -> Row {
    let of = |what: &dyn Fn(&Record) -> String| entry.record.as_ref().map_or_else(String::new, what);
    Row::new(
        [
            ("ID", entry.id.clone()),
            ("Image", of(&|record| record.image.clone())),
            ("Command", of(&|record| format!("\"{}\"", shortened(&record.command.join(" "), command_chars)))),
            ("CreatedAt", of(&|record| time::date(record.created_ms))),
            ("RunningFor", of(&|record| format!("{} ago", ago(now_ms(), record.created_ms)))),
            ("Status", status(entry)),
            ("State", entry.state().name()),
            ("Ports", of(&|record| ports_of(record).map(published).collect::<Vec<_>>().join(", "))),
            ("Cpus", of(&cpus)),
            ("Memory", of(&|record| size::mib(record.config.memory_target_mib.unwrap_or(record.config.memory_mib)))),
            ("Networks", of(&|record| networks(record).join(","))),
            ("Mounts", of(&|record| mounts(record).join(","))),
            ("Pid", of(&|record| record.pid.to_string())),
            ("Size", if with_size { of(&disk_usage) } else { String::new() }),
            ("Names", entry.name().to_owned()),
        ],
        entry.record.as_ref().map_or(&BTreeMap::new(), |record| &record.labels),
    )
}

fn cpus(record: &Record) -> String {
    match record.config.cpu_limit_millicpus {
        Some(limit) => (f64::from(limit) / 1000.0).to_string(),
        None => record.config.cpus.to_string(),
    }
}

/// What the machine's disks take on the host.
fn disk_usage(record: &Record) -> String {
    let (own, all) = machine::disk_bytes(&record.config, record.pid);
    format!("{} (virtual {})", HumanBytes(own), HumanBytes(all))
}

/// The published ports.
fn ports_of(record: &Record) -> impl Iterator<Item = &PortForward> {
    record.config.networks.iter().flat_map(|network| network.to.ports())
}

/// A published port, as Docker shows it.
fn published(port: &PortForward) -> String {
    if port.host_ip.is_some() { port.to_string() } else { format!("0.0.0.0:{port}") }
}

/// Whether `wanted`, `PORT[-PORT][/PROTOCOL]`, overlaps with the host's ports, or the guest's.
fn has_port(port: &PortForward, wanted: &str, guest: bool) -> bool {
    let (range, protocol) = wanted.split_once('/').unwrap_or((wanted, "tcp"));
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) else { return false };
    let own = u32::from(if guest { port.guest_port } else { port.host_port });
    port.protocol.name() == protocol && first < own + u32::from(port.count) && last >= own
}

/// The names of the networks that it is on.
pub fn networks(record: &Record) -> Vec<String> {
    let name = |to: &Attachment| match to {
        Attachment::User(_) => "user".to_owned(),
        Attachment::Tap { name } => format!("tap={name}"),
        Attachment::Interface { name } => format!("interface={name}"),
        Attachment::Bridge { name, .. } => bridge::name_of(name).unwrap_or(name).to_owned(),
    };
    record.config.networks.iter().map(|network| name(&network.to)).collect()
}

/// The volumes by name, and the shared folders of the host by path.
fn mounts(record: &Record) -> Vec<String> {
    let paths = record.config.shares.iter().map(|share| &share.path);
    paths.map(|path| volumes::name_of(path).map_or_else(|| path.display().to_string(), str::to_owned)).collect()
}

/// The start of a text, at most so many characters long.
pub fn shortened(text: &str, max_chars: usize) -> String {
    if text.chars().count() <= max_chars {
        return text.to_owned();
    }
    text.chars().take(max_chars.saturating_sub(1)).chain(['…']).collect()
}

/// The health of a running machine behind its state, if it is checked.
fn health(entry: &MachineEntry) -> String {
    match entry.record.as_ref().and_then(|record| record.health.as_ref()).map(|health| health.status) {
        Some(HealthStatus::Starting) => " (health: starting)".to_owned(),
        Some(status) => format!(" ({})", status.name()),
        None => String::new(),
    }
}

/// A description of a machine's state and its duration.
fn status(entry: &MachineEntry) -> String {
    let restarts = entry.record.as_ref().map_or(0, |record| record.restarts);
    let now = now_ms();
    let words = match entry.state() {
        State::Created => "Created".to_owned(),
        State::Starting => "Starting".to_owned(),
        State::Running { since_ms } => format!("Up {}{}", ago(now, since_ms), health(entry)),
        State::Paused { since_ms } => format!("Up {} (Paused)", ago(now, since_ms)),
        State::Suspended { since_ms } => format!("Suspended {} ago", ago(now, since_ms)),
        State::Restarting { since_ms } => format!("Restarting, failed {} ago", ago(now, since_ms)),
        State::Exited { code, at_ms, .. } => format!("Exited ({code}) {} ago", ago(now, at_ms)),
        State::Lost => "Lost (husk was killed)".to_owned(),
    };
    if restarts == 0 { words } else { format!("{words}, restarts: {restarts}") }
}

/// Fails if a machine cannot have one of these states.
fn check_states<'a>(mut wanted: impl Iterator<Item = &'a str>) -> Result<()> {
    match wanted.find(|state| !STATES.contains(state)) {
        Some(state) => bail!("machines have no status {state:?}: use {}", STATES[..8].join(", ")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_that_no_machine_has_is_an_error() {
        assert!(check_states(["exited", "running", "dead"].into_iter()).is_ok());
        assert!(check_states(["running", "stopped"].into_iter()).unwrap_err().to_string().contains("use created"));
    }

    #[test]
    fn a_long_command_is_shortened() {
        assert_eq!(shortened("sh -c true", COMMAND_CHARS), "sh -c true");
        let short = shortened(&"x".repeat(100), COMMAND_CHARS);
        assert_eq!(short.chars().count(), COMMAND_CHARS);
    }

    #[test]
    fn a_published_port_is_shown_and_found_by_its_number() {
        let port: PortForward = "5000-5009:80-89/udp".parse().unwrap();
        assert_eq!(published(&port), "0.0.0.0:5000-5009->80-89/udp");
        assert!(has_port(&port, "5009/udp", false) && has_port(&port, "80-200/udp", true));
        assert!(
            !has_port(&port, "5010/udp", false) && !has_port(&port, "5000", false) && !has_port(&port, "x/udp", false)
        );
    }

    #[test]
    fn every_shown_column_has_a_header() {
        for field in COLUMNS.shown.iter().chain([&COLUMNS.key]) {
            assert!(COLUMNS.all.iter().any(|(name, _)| name == field), "{field}");
        }
    }
}
