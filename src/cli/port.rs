//! `husk port`: lists the published ports of a machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::exit::Exit;
use crate::config::{MachineConfig, PortForward, Protocol};
use crate::state_dir::StateDir;

const EXAMPLES: &str = "\
Examples:
  husk port web
  husk port web 80                  (the host's addresses that lead to TCP port 80)";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Port {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Only this port of the machine
    #[arg(value_name = "PORT[/tcp|/udp]", value_parser = port)]
    port: Option<(u16, Protocol)>,
}

impl Port {
    /// Prints one line for each published port and address.
    pub fn run(self) -> Result<Exit> {
        let entry = StateDir::open()?.find(&self.machine)?;
        let published = if entry.alive { published(&entry.record()?.config) } else { Vec::new() };
        let mut text = String::new();
        for (guest, protocol, address) in &published {
            match self.port {
                None => text += &format!("{guest}/{protocol} -> {address}\n"),
                Some(wanted) if wanted == (*guest, *protocol) => text += &format!("{address}\n"),
                Some(_) => {}
            }
        }
        if let Some((port, protocol)) = self.port {
            ensure!(!text.is_empty(), "{} has not published port {port}/{protocol}", entry.name());
        }
        super::print(&text).context("list the ports")?;
        Ok(Exit::Success)
    }
}

fn port(text: &str) -> Result<(u16, Protocol), String> {
    let parsed = Protocol::of(text).and_then(|(port, protocol)| Some((port.parse().ok()?, protocol)));
    parsed.ok_or_else(|| format!("{text:?} is not a port: use a number such as 80 or 53/udp"))
}

/// Each port of a machine with an address of the host that leads to it.
fn published(config: &MachineConfig) -> Vec<(u16, Protocol, String)> {
    let ports = config.networks.iter().flat_map(|network| network.to.ports());
    let mut all = Vec::new();
    for PortForward { host_ip, host_port, guest_port, count, protocol } in ports {
        for step in 0..*count {
            // Checked when the machine was configured.
            let (guest, host) = (guest_port.saturating_add(step), host_port.saturating_add(step));
            let unspecified: [IpAddr; 2] = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
            let ips = host_ip.as_ref().map_or(&unspecified[..], std::slice::from_ref);
            all.extend(ips.iter().map(|ip| (guest, *protocol, std::net::SocketAddr::new(*ip, host).to_string())));
        }
    }
    all.sort();
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Attachment, NetworkConfig, UserNetwork};

    #[test]
    fn each_port_has_a_line_for_each_address() {
        let ports = ["127.0.0.1:8080-8081:80-81", "53:53/udp"].map(|text| text.parse().unwrap()).to_vec();
        let user = Attachment::User(UserNetwork { ports, ..UserNetwork::default() });
        let config = MachineConfig { networks: vec![NetworkConfig::of(user)], ..MachineConfig::default() };
        let lines: Vec<String> =
            published(&config).iter().map(|(port, protocol, at)| format!("{port}/{protocol} {at}")).collect();
        assert_eq!(lines, ["53/udp 0.0.0.0:53", "53/udp [::]:53", "80/tcp 127.0.0.1:8080", "81/tcp 127.0.0.1:8081"]);
    }

    #[test]
    fn a_port_is_tcp_by_default() {
        assert_eq!((port("80"), port("53/udp")), (Ok((80, Protocol::Tcp)), Ok((53, Protocol::Udp))));
        assert!(port("http").is_err() && port("80/sctp").is_err());
    }
}
