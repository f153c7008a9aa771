//! `husk ps`: lists this user's machines.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::exit::Exit;
use super::time::ago;
use crate::config::{Attachment, PortForward};
use crate::state_dir::record::{Record, State, now_ms};
use crate::state_dir::{MachineEntry, StateDir};

const EXAMPLES: &str = "\
Examples:
  husk ps
  husk ps -a                        (include stopped machines)
  husk ps -q | xargs husk stop
  husk ps --json | jq -r '.[].name'";

/// The maximum width of a command.
const COMMAND_CHARS: usize = 30;

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

    /// Do not truncate commands
    #[arg(long)]
    no_trunc: bool,

    /// Only display IDs
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,

    /// Format the output as JSON
    #[arg(long)]
    json: bool,
}

impl Ps {
    /// Prints the list, most recent first.
    pub fn run(self) -> Result<Exit> {
        let state_dir = StateDir::open()?;
        state_dir.remove_stale()?;
        let mut entries = state_dir.list()?;
        match self.last.or(self.latest.then_some(1)) {
            Some(count) => entries.truncate(count),
            None => entries.retain(|entry| self.all || entry.alive),
        }
        if self.json {
            let list: Vec<_> = entries.iter().map(to_json).collect();
            super::print_json(&list, "the machines")?;
        } else if self.quiet {
            super::print(&entries.iter().map(|entry| format!("{}\n", entry.id)).collect::<String>())?;
        } else {
            let mut rows =
                vec![["ID", "NAME", "IMAGE", "COMMAND", "CPUS", "MEMORY", "PORTS", "STATUS"].map(str::to_owned)];
            rows.extend(entries.iter().map(|entry| row(entry, if self.no_trunc { usize::MAX } else { COMMAND_CHARS })));
            super::print(&super::images::table(&rows))?;
        }
        Ok(Exit::Success)
    }
}

/// A machine's record with its current state.
pub fn to_json(entry: &MachineEntry) -> serde_json::Value {
    let mut value = match &entry.record {
        Some(record) => json!(record),
        None => json!({ "id": entry.id }),
    };
    value["state"] = json!(entry.state());
    value["name"] = json!(entry.name());
    value
}

fn row(entry: &MachineEntry, command_chars: usize) -> [String; 8] {
    let unknown = || "-".to_owned();
    let of = |what: &dyn Fn(&Record) -> String| entry.record.as_ref().map_or_else(unknown, what);
    [
        entry.id.clone(),
        entry.record.as_ref().and_then(|record| record.name.clone()).unwrap_or_else(unknown),
        of(&|record| record.image.clone()),
        of(&|record| shortened(&record.command.join(" "), command_chars)),
        of(&|record| match record.config.cpu_limit_millicpus {
            Some(limit) => (f64::from(limit) / 1000.0).to_string(),
            None => record.config.cpus.to_string(),
        }),
        of(&|record| super::size::mib(record.config.memory_target_mib.unwrap_or(record.config.memory_mib))),
        of(&ports),
        status(entry),
    ]
}

/// The published ports.
fn ports(record: &Record) -> String {
    let forwarded = record.config.networks.iter().filter_map(|network| match &network.to {
        Attachment::User(network) => Some(&network.ports),
        _ => None,
    });
    let ports: Vec<String> = forwarded.flatten().map(PortForward::to_string).collect();
    if ports.is_empty() { "-".to_owned() } else { ports.join(", ") }
}

fn shortened(text: &str, max_chars: usize) -> String {
    if text.chars().count() <= max_chars {
        return text.to_owned();
    }
    text.chars().take(max_chars.saturating_sub(1)).chain(['…']).collect()
}

/// A description of a machine's state and its duration.
fn status(entry: &MachineEntry) -> String {
    let restarts = entry.record.as_ref().map_or(0, |record| record.restarts);
    let now = now_ms();
    let words = match entry.state() {
        State::Starting => "starting".to_owned(),
        State::Running { since_ms } => format!("up {}", ago(now, since_ms)),
        State::Paused { since_ms } => format!("paused for {}", ago(now, since_ms)),
        State::Suspended { since_ms } => format!("suspended {} ago", ago(now, since_ms)),
        State::Restarting { since_ms } => format!("restarting, failed {} ago", ago(now, since_ms)),
        State::Exited { code, at_ms, .. } => format!("exited ({code}) {} ago", ago(now, at_ms)),
        State::Lost => "lost (husk was killed)".to_owned(),
    };
    if restarts == 0 { words } else { format!("{words}, restarts: {restarts}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_command_is_shortened() {
        assert_eq!(shortened("sh -c true", COMMAND_CHARS), "sh -c true");
        let short = shortened(&"x".repeat(100), COMMAND_CHARS);
        assert_eq!(short.chars().count(), COMMAND_CHARS);
    }
}
