//! `husk update`: other limits for machines that run.

use anyhow::{Result, ensure};
use clap::Args;

use super::cpus::{self, Cpus};
use super::exit::Exit;
use super::{ask, size};
use crate::request::{Limit, Request, Update};

const EXAMPLES: &str = "\
Examples:
  husk update --memory 1G --cpus 0.5 web
  husk update --disk-iops 500 db
  husk update --network-bps none db  (no limit any more)
  husk update --link down web       (the network is gone, until --link up)

Memory goes down to what the guest can do without, and up to what the machine was started with (--memory-max). The guest gives
it back, and takes it, in its own time: `husk stats` tells how far it is.";

/// The flags of `husk update`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct UpdateOf {
    /// Names or IDs
    #[arg(value_name = "MACHINE", required = true)]
    machines: Vec<String>,

    /// Memory that the guest is to have
    #[arg(short, long, value_name = "SIZE", value_parser = size::memory_mib, allow_negative_numbers = true)]
    memory: Option<u64>,

    /// Processor time, up to as many CPUs as the machine has
    #[arg(long, value_name = "N", value_parser = cpus::cpus)]
    cpus: Option<Cpus>,

    /// The machine's part of CPUs that others want too: 1024 is everybody's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=262_144))]
    cpu_shares: Option<u32>,

    /// Bytes that each disk reads and writes in a second
    #[arg(long, value_name = "SIZE|none", value_parser = bytes)]
    disk_bps: Option<Limit>,

    /// Requests that each disk serves in a second
    #[arg(long, value_name = "N|none", value_parser = count)]
    disk_iops: Option<Limit>,

    /// Bytes that each network interface sends in a second, and as many that it receives
    #[arg(long, value_name = "SIZE|none", value_parser = bytes)]
    network_bps: Option<Limit>,

    /// Packets that each network interface sends in a second, and as many that it receives
    #[arg(long, value_name = "N|none", value_parser = count)]
    network_pps: Option<Limit>,

    /// Pull the cables of its networks out, or put them back
    #[arg(long, value_name = "up|down", value_parser = link)]
    link: Option<bool>,
}

fn bytes(text: &str) -> Result<Limit, String> {
    if text == "none" { Ok(Limit::Lifted) } else { size::bytes(text).map(Limit::PerSecond) }
}

fn count(text: &str) -> Result<Limit, String> {
    match text.parse() {
        Ok(count) => Ok(Limit::PerSecond(count)),
        Err(_) if text == "none" => Ok(Limit::Lifted),
        Err(_) => Err(format!("{text:?} is no limit, type a number or none")),
    }
}

fn link(text: &str) -> Result<bool, String> {
    match text {
        "up" => Ok(true),
        "down" => Ok(false),
        _ => Err(format!("{text:?} is neither, type up or down")),
    }
}

impl UpdateOf {
    /// Changes one after the other.
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
        ensure!(update != Update::default(), "there is nothing to change: type --memory, --cpus or another limit");
        ensure!(update.millicpus != Some(0), "a machine without processors: type --cpus with 0.01 or more");
        ask::each(&self.machines, |_, entry| ask::done(entry, &Request::Update(update)))
    }
}
