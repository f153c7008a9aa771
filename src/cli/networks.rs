//! `husk network`: manages shared networks.

use std::net::Ipv4Addr;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::exit::Exit;
use crate::resources::bridge;

const EXAMPLES: &str = "\
Examples:
  Connect two machines that resolve each other by name:
    sudo husk network create web
    sudo husk run --network web --name db ./database.tar
    sudo husk run --network web --name app ./app.tar curl http://db/";

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
    },
    /// List networks and the machines connected to them
    Ls,
    /// Remove unused networks (as root)
    Rm {
        /// Names of networks
        #[arg(required = true)]
        names: Vec<String>,
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
            Command::Create { name, subnet, internal } => {
                let made = bridge::create(&name, subnet, internal)?;
                super::print(&format!("{} {}/{}\n", made.name, made.subnet, bridge::PREFIX))?;
            }
            Command::Ls => super::print(&list()?)?,
            Command::Rm { names } => {
                let mut exit = Exit::Success;
                for name in names {
                    match bridge::remove(&name) {
                        Ok(()) => super::print(&format!("{name}\n"))?,
                        Err(error) => exit = super::report(&error),
                    }
                }
                return Ok(exit);
            }
        }
        Ok(Exit::Success)
    }
}

fn list() -> Result<String> {
    let mut text = String::from("NAME        SUBNET              MACHINES\n");
    for network in bridge::list()? {
        let machines: Vec<String> =
            bridge::machines(&network).iter().map(|(address, name)| format!("{name} ({address})")).collect();
        let subnet = format!("{}/{}", network.subnet, bridge::PREFIX);
        text += format!("{:<11} {subnet:<19} {}", network.name, machines.join(", ")).trim_end();
        text.push('\n');
    }
    Ok(text)
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
