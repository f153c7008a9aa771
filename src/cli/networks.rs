//! `husk network`: manages shared networks.

use std::net::Ipv4Addr;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::connect;
use super::events;
use super::exists::Exists;
use super::exit::Exit;
use super::filter::matches_name;
use super::inspect::FormatFlag;
use super::labels::LabelFlags;
use super::list::{Columns, ListFlags, Row};
use crate::resources::bridge::{self, Bridge};

const EXAMPLES: &str = "\
Examples:
  Connect two machines that resolve each other by name:
    sudo husk network create web
    sudo husk run --network web --name db ./database.tar
    sudo husk run --network web --name app ./app.tar curl http://db/";

/// Docker's name for networks like these.
const DRIVER: &str = "bridge";

const COLUMNS: Columns = Columns {
    all: &[
        ("ID", "NETWORK ID"),
        ("Name", "NAME"),
        ("Driver", "DRIVER"),
        ("Scope", "SCOPE"),
        ("Internal", "INTERNAL"),
        ("Subnet", "SUBNET"),
        ("Machines", "MACHINES"),
        ("Labels", "LABELS"),
        ("Label", "LABEL"),
    ],
    shown: &["Name", "Subnet", "Machines"],
    key: "Name",
    filters: &["name", "id", "driver", "label"],
};

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Networks {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create a network (as root): a bridge with NAT and DNS that lasts until the host reboots
    Create {
        /// Name of the network, for `--network NAME`
        name: String,
        /// Subnet of 256 addresses [default: a free one, starting at 10.86.0.0]
        #[arg(long, value_name = "ADDRESS[/24]", value_parser = subnet)]
        subnet: Option<Ipv4Addr>,
        /// Restrict external access: machines reach only each other and the host
        #[arg(long)]
        internal: bool,
        /// The driver, as in Docker: only bridge
        #[arg(short, long, hide = true, value_parser = [DRIVER])]
        driver: Option<String>,
        #[command(flatten)]
        labels: LabelFlags,
    },
    /// List networks and the machines connected to them
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListFlags,
    },
    /// Display detailed information about networks
    Inspect {
        /// Names of networks
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        format: FormatFlag,
    },
    /// Connect a stopped machine to a network, from its next start on
    Connect {
        /// Name of the network
        network: String,
        /// Name or ID of the machine
        machine: String,
        /// Address of the machine on the network
        #[arg(long, value_name = "ADDRESS")]
        ip: Option<Ipv4Addr>,
        /// Another name for the machine on the network; can be repeated
        #[arg(long, value_name = "NAME")]
        alias: Vec<String>,
    },
    /// Disconnect a stopped machine from a network, from its next start on
    Disconnect {
        /// Name of the network
        network: String,
        /// Name or ID of the machine
        machine: String,
        /// No effect: a running machine keeps its devices
        #[arg(short, long, hide = true)]
        force: bool,
    },
    /// Whether there is a network by this name, as the exit code: 0 or 1
    Exists(Exists),
    /// Remove unused networks (as root)
    #[command(visible_alias = "remove")]
    Rm {
        /// Names of networks
        #[arg(required = true)]
        names: Vec<String>,
        /// Do not fail if a network does not exist
        #[arg(short, long)]
        force: bool,
    },
    /// Remove all networks that no machine is connected to (as root)
    Prune {
        /// Do not ask
        #[arg(short, long, required = true)]
        force: bool,
    },
}

/// Parses `ADDRESS[/24]`, a network address.
fn subnet(text: &str) -> Result<Ipv4Addr, String> {
    let address = text.strip_suffix("/24").unwrap_or(text).parse::<Ipv4Addr>().ok();
    let first = address.filter(|address| address.octets()[3] == 0 && address.is_private());
    first.ok_or_else(|| format!("{text:?} is not a private /24 subnet: use one such as 10.86.0.0/24"))
}

impl Networks {
    /// Executes the subcommand.
    pub fn run(self) -> Result<Exit> {
        match self.command {
            Command::Create { name, subnet, internal, labels, driver: _ } => {
                let made = bridge::create(&name, subnet, internal, labels.labels()?)?;
                note("create", &name);
                super::print(&format!("{} {}/{}\n", made.name, made.subnet, bridge::PREFIX))?;
            }
            Command::Ls { list } => {
                let filters = list.filters(&COLUMNS)?;
                let mut networks = bridge::list()?;
                networks.retain(|network| {
                    filters.any("name", |name| matches_name(&network.name, name))
                        && filters.any("id", |id| network.name.starts_with(id))
                        && filters.any("driver", |driver| driver == DRIVER)
                        && filters.labels(&network.labels)
                });
                list.print(&COLUMNS, networks.iter().map(row).collect())?;
            }
            Command::Inspect { names, format } => {
                let all = bridge::list()?;
                let find = |name: &String| {
                    let found = all.iter().find(|network| network.name == *name).map(to_json);
                    found.with_context(|| format!("network {name} not found (see `husk network ls`)"))
                };
                return format.print(&names.iter().map(find).collect::<Result<Vec<_>>>()?);
            }
            Command::Connect { network, machine, ip, alias } => {
                connect::connect(&network, &machine, ip, &alias)?;
                note("connect", &network);
            }
            Command::Disconnect { network, machine, .. } => {
                connect::disconnect(&network, &machine)?;
                note("disconnect", &network);
            }
            Command::Exists(exists) => return exists.network(),
            Command::Rm { mut names, force } => {
                if force {
                    let found = bridge::list()?;
                    names.retain(|name| found.iter().any(|network| network.name == *name));
                }
                return remove(names);
            }
            Command::Prune { .. } => {
                let unused = bridge::list()?.into_iter().filter(|network| bridge::machines(network).is_empty());
                return remove(unused.map(|network| network.name).collect());
            }
        }
        Ok(Exit::Success)
    }
}

/// Removes networks, and prints the names of those that were.
fn remove(names: Vec<String>) -> Result<Exit> {
    let mut exit = Exit::Success;
    for name in names {
        match bridge::remove(&name) {
            Ok(()) => {
                note("destroy", &name);
                super::print(&format!("{name}\n"))?;
            }
            Err(error) => exit = super::report(&error),
        }
    }
    Ok(exit)
}

fn note(action: &str, name: &str) {
    events::note("network", action, name, name);
}

fn row(network: &Bridge) -> Row {
    let machines: Vec<String> =
        bridge::machines(network).iter().map(|(address, name)| format!("{name} ({address})")).collect();
    let fields = [
        ("ID", network.name.clone()),
        ("Name", network.name.clone()),
        ("Driver", DRIVER.to_owned()),
        ("Scope", "local".to_owned()),
        ("Internal", network.internal.to_string()),
        ("Subnet", format!("{}/{}", network.subnet, bridge::PREFIX)),
        ("Machines", machines.join(", ")),
    ];
    Row::new(fields, &network.labels)
}

/// What is known about a network, in Docker's words.
pub fn to_json(network: &Bridge) -> Value {
    let machines: Map<String, Value> = bridge::machines(network)
        .into_iter()
        .map(|(address, name)| {
            (name.clone(), json!({ "Name": name, "IPv4Address": format!("{address}/{}", bridge::PREFIX) }))
        })
        .collect();
    json!({
        "Name": network.name, "Id": network.name, "Driver": DRIVER, "Scope": "local", "Internal": network.internal,
        "IPAM": { "Driver": "default", "Config": [
            { "Subnet": format!("{}/{}", network.subnet, bridge::PREFIX), "Gateway": network.gateway() }
        ] },
        "Containers": machines, "Labels": network.labels, "Options": {},
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subnet_is_private_with_256_addresses() {
        assert_eq!(subnet("10.86.7.0/24"), Ok(Ipv4Addr::new(10, 86, 7, 0)));
        assert_eq!(subnet("192.168.1.0"), Ok(Ipv4Addr::new(192, 168, 1, 0)));
        for wrong in ["10.86.7.1", "8.8.8.0/24", "10.86.0.0/16", "x", "127.0.0.0"] {
            assert!(subnet(wrong).is_err(), "{wrong}");
        }
    }
}
