//! `husk update`: changes the limits of running machines.

use anyhow::{Result, ensure};
use clap::Args;

use super::cpus::{self, Cpus};
use super::exit::Exit;
use super::{machines, size};
use crate::request::{Limit, Request, Update};

const EXAMPLES: &str = "\
Examples:
  husk update --memory 1G --cpus 0.5 web
  husk update --disk-iops 500 db
  husk update --network-bps none db (remove a limit)
  husk update --link down web       (disconnect the network, until --link up)

Memory can be lowered to what the guest needs, and raised to what the machine was started with (--memory-max). The guest
releases and takes memory gradually: `husk stats` shows the current amount.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct UpdateArgs {
    /// Names or IDs of machines
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,

    /// Guest memory size
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory_mib, allow_negative_numbers = true)]
    memory: Option<u64>,

    /// Number of CPUs, up to the number the machine was started with
    #[arg(long, value_name = "N", value_parser = cpus::cpus)]
    cpus: Option<Cpus>,

    /// CPU shares (relative weight); the default weight is 1024
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=262_144))]
    cpu_shares: Option<u32>,

    /// Limit the read and write rate of each disk (bytes per second)
    #[arg(long, value_name = "SIZE|none", value_parser = bytes)]
    disk_bps: Option<Limit>,

    /// Limit the I/O rate of each disk (operations per second)
    #[arg(long, value_name = "N|none", value_parser = count)]
    disk_iops: Option<Limit>,

    /// Limit the rate of each network interface (bytes per second, each direction)
    #[arg(long, value_name = "SIZE|none", value_parser = bytes)]
    network_bps: Option<Limit>,

    /// Limit the rate of each network interface (packets per second, each direction)
    #[arg(long, value_name = "N|none", value_parser = count)]
    network_pps: Option<Limit>,

    /// Set the link state of all network interfaces
    #[arg(long, value_name = "up|down", value_parser = link)]
    link: Option<bool>,

    #[arg(long, hide = true, value_parser = no_restart)]
    restart: Option<String>,
}

/// The policy is part of the command line that a machine is started with again.
fn no_restart(_: &str) -> Result<String, String> {
    Err("a machine keeps its restart policy: use `husk rm` and `husk run --restart`, after `husk commit` if its changes matter".to_owned())
}

fn bytes(text: &str) -> Result<Limit, String> {
    if text == "none" { Ok(Limit::Lifted) } else { size::bytes(text).map(Limit::PerSecond) }
}

fn count(text: &str) -> Result<Limit, String> {
    match text.parse() {
        Ok(count) => Ok(Limit::PerSecond(count)),
        Err(_) if text == "none" => Ok(Limit::Lifted),
        Err(_) => Err(format!("{text:?} is not a limit: use a number or none")),
    }
}

fn link(text: &str) -> Result<bool, String> {
    match text {
        "up" => Ok(true),
        "down" => Ok(false),
        _ => Err(format!("{text:?} is not a link state: use up or down")),
    }
}

impl UpdateArgs {
    /// Updates each machine in turn.
    pub fn run(self) -> Result<Exit> {
        let whole = |Cpus { vcpus, limit_millicpus }| limit_millicpus.unwrap_or(vcpus.saturating_mul(1000));
        let update = Update {
            memory_mib: self.memory,
            millicpus: self.cpus.map(whole),
            cpu_shares: self.cpu_shares,
            disk_bytes_per_second: self.disk_bps,
            disk_ops_per_second: self.disk_iops,
            network_bytes_per_second: self.network_bps,
            network_packets_per_second: self.network_pps,
            link_up: self.link,
        };
        ensure!(update != Update::default(), "nothing to update: use --memory, --cpus or another limit");
        ensure!(update.millicpus != Some(0), "a machine needs CPUs: use --cpus 0.01 or more");
        machines::for_each(&self.machines, |_, entry| machines::request(entry, &Request::Update(update)))
    }
}
