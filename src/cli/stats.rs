//! `husk stats`: shows the machines' current resource usage.

use std::collections::{BTreeMap, HashMap};
use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use indicatif::BinaryBytes;
use serde_json::json;

use super::exit::Exit;
use super::list::{Columns, FormatFlag, Row};
use super::reach;
use crate::foreign;
use crate::request::{Reply, Request, Stats, client};
use crate::state_dir::record::State;
use crate::state_dir::{self, MachineEntry, StateDir};

const EXAMPLES: &str = "\
Examples:
  husk stats                        (all running machines, updated every second)
  husk stats --no-stream web
  husk stats --no-stream --format '{{.Name}} {{.MemUsage}}'
  husk stats --json | jq '.[].guest_memory_bytes'

CPU is relative to one host CPU: 150% is one and a half. MEM USAGE is the host memory used by the guest, and LIMIT the most it
can use; OVERHEAD is the memory used by husk itself. BLOCK I/O is bytes read and written, NET I/O bytes received and sent
since the machine started. CPU includes the time of vhost-net on Linux 6.4 and later. A stopped machine is shown without
values.";

/// The interval between samples.
const INTERVAL: Duration = Duration::from_secs(1);
/// Moves the cursor to the top and clears the screen.
const CLEAR: &str = "\x1b[H\x1b[J";

const COLUMNS: Columns = Columns {
    all: &[
        ("ID", "ID"),
        ("Container", "ID"),
        ("Name", "NAME"),
        ("CPUPerc", "CPU"),
        ("MemUsage", "MEM USAGE / LIMIT"),
        ("MemPerc", "MEM"),
        ("Overhead", "OVERHEAD"),
        ("BlockIO", "BLOCK I/O"),
        ("NetIO", "NET I/O"),
    ],
    shown: &["ID", "Name", "CPUPerc", "MemUsage", "Overhead", "BlockIO", "NetIO"],
    key: "ID",
    filters: &[],
};

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct StatsArgs {
    /// Names or IDs of machines [default: all running machines]
    #[arg(value_name = "MACHINE")]
    machines: Vec<String>,

    /// Disable streaming stats and only display the first result
    #[arg(long)]
    no_stream: bool,

    /// Format the output as JSON with all numbers (implies --no-stream)
    #[arg(long, conflicts_with = "format")]
    json: bool,

    #[command(flatten)]
    format: FormatFlag,
}

/// A machine and its usage; `None` if it is not running.
type Sample = (MachineEntry, Option<Stats>);

impl StatsArgs {
    /// Prints a table, repeatedly on a terminal.
    pub fn run(self) -> Result<Exit> {
        let state_dir = StateDir::open()?;
        let mut before: HashMap<String, Stats> = HashMap::new();
        let once = self.no_stream || self.json;
        let in_place = !once && std::io::stdout().is_terminal();
        if once {
            // Current usage is the difference between two samples.
            before = by_id(&self.sample(&state_dir)?);
            std::thread::sleep(INTERVAL / 2);
        }
        loop {
            let samples = self.sample(&state_dir)?;
            let text = match self.json {
                true => as_json(&samples, &before)?,
                false => self.format.text(&COLUMNS, rows(&samples, &before))?,
            };
            let is_read = super::print_raw(&format!("{}{text}", if in_place { CLEAR } else { "" }))?;
            if once || !is_read {
                return Ok(Exit::Success);
            }
            before = by_id(&samples);
            std::thread::sleep(INTERVAL);
        }
    }

    fn sample(&self, state_dir: &StateDir) -> Result<Vec<Sample>> {
        if self.machines.is_empty() {
            // A machine that has just ended is no error.
            let running = reach::machines(state_dir)?.into_iter().filter(|entry| entry.alive);
            return Ok(running.filter_map(|entry| fetch(&entry).ok().map(|stats| (entry, Some(stats)))).collect());
        }
        let sample = |word: &String| {
            let entry = state_dir.find(word)?;
            match fetch(&entry) {
                Ok(stats) => Ok((entry, Some(stats))),
                // It may have just ended.
                Err(error) => match state_dir.find(word)? {
                    entry if !is_running(&entry) => Ok((entry, None)),
                    _ => Err(error.context(word.clone())),
                },
            }
        };
        self.machines.iter().map(sample).collect()
    }
}

fn is_running(entry: &MachineEntry) -> bool {
    entry.alive && matches!(entry.state(), State::Running { .. } | State::Paused { .. })
}

fn fetch(entry: &MachineEntry) -> Result<Stats> {
    match client::send(&entry.file(state_dir::CONTROL), &Request::Stats)? {
        Reply::Stats(stats) => Ok(stats),
        Reply::Refused(why) => bail!(why),
        other => bail!("unexpected response from the machine: {other:?}"),
    }
}

fn by_id(samples: &[Sample]) -> HashMap<String, Stats> {
    samples.iter().filter_map(|(entry, stats)| stats.map(|stats| (entry.id.clone(), stats))).collect()
}

/// CPU usage in percent since `before`, or else since the machine's start.
fn cpu_percent(stats: &Stats, before: Option<&Stats>) -> f64 {
    let zero = Stats::default();
    let before = before.unwrap_or(&zero);
    let elapsed_us = stats.elapsed_us.saturating_sub(before.elapsed_us).max(1);
    100.0 * stats.cpu_us.saturating_sub(before.cpu_us) as f64 / elapsed_us as f64
}

fn as_json(samples: &[Sample], before: &HashMap<String, Stats>) -> Result<String> {
    let one = |(entry, stats): &Sample| {
        let mut value = stats.map_or_else(|| json!({}), |stats| json!(stats));
        value["id"] = json!(entry.id);
        value["name"] = json!(entry.name());
        value["running"] = json!(stats.is_some());
        if let Some(stats) = stats {
            value["cpu_percent"] = json!(cpu_percent(stats, before.get(&entry.id)));
        }
        value
    };
    let list: Vec<_> = samples.iter().map(one).collect();
    Ok(foreign::json(&list).context("print the statistics")? + "\n")
}

fn rows(samples: &[Sample], before: &HashMap<String, Stats>) -> Vec<Row> {
    let pair = |a, b| format!("{} / {}", BinaryBytes(a), BinaryBytes(b));
    let row = |(entry, stats): &Sample| {
        let [cpu, memory, share, own, disk, net] = match stats {
            None => ["-"; 6].map(str::to_owned),
            Some(stats) => [
                format!("{:.1}%", cpu_percent(stats, before.get(&entry.id))),
                pair(stats.guest_memory_bytes, stats.memory_limit_bytes),
                format!("{:.1}%", 100.0 * stats.guest_memory_bytes as f64 / stats.memory_limit_bytes.max(1) as f64),
                BinaryBytes(stats.own_memory_bytes).to_string(),
                pair(stats.block_read_bytes, stats.block_written_bytes),
                pair(stats.net_received_bytes, stats.net_sent_bytes),
            ],
        };
        let fields = [
            ("ID", entry.id.clone()),
            ("Container", entry.id.clone()),
            ("Name", entry.name().to_owned()),
            ("CPUPerc", cpu),
            ("MemUsage", memory),
            ("MemPerc", share),
            ("Overhead", own),
            ("BlockIO", disk),
            ("NetIO", net),
        ];
        Row::new(fields, &BTreeMap::new())
    };
    samples.iter().map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_usage_is_relative_to_the_sampling_interval() {
        let at = |cpu_us, elapsed_us| Stats { cpu_us, elapsed_us, ..Stats::default() };
        assert_eq!(cpu_percent(&at(1_500_000, 2_000_000), Some(&at(0, 1_000_000))), 150.0);
        assert_eq!(cpu_percent(&at(1_000_000, 4_000_000), None), 25.0);
        assert_eq!(cpu_percent(&at(0, 0), None), 0.0);
    }
}
