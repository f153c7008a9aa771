//! User-mode networking: passt, a separate process for each machine, connected by a socket.
//!
//! It translates the guest's connections to its own, so that no privileges and no host interface are required. It is
//! started when the guest first needs its network, or before the machine if ports are published, and exits when the
//! socket is closed, however husk ends.

mod backend;
mod neighbors;
mod process;
mod routes;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::{env, fs};

use super::resolver;
use crate::config::{MacAddress, PortForward, Protocol, UserNetwork};

pub use backend::{Keeper, Passt, Starter, open};
pub use routes::Routes;

/// The program, on the search path.
const PROGRAM: &str = "passt";
/// The guest's address, configured by `husk run` or requested by DHCP.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
/// The prefix length of the network.
pub const PREFIX: u8 = 24;
/// The default gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 2);
/// Mapped to the host's own DNS server, if that is accessible only from the host.
pub const DNS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 3);
/// The guest's IPv6 address, in a unique local network.
pub const GUEST_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x6875, 0x736b, 0, 0, 0, 0, 0x15);
/// Its prefix length; passt supports no other.
pub const PREFIX_V6: u8 = 64;
/// The default gateway for IPv6.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Locally administered, and the same for all machines, since each has a separate network.
const GATEWAY_MAC: MacAddress = MacAddress([0x02, 0x68, 0x75, 0x73, 0x6b, 0x01]);
/// The maximum MTU supported by passt.
pub const MTU_BYTES: u16 = 65520;
/// The maximum number of DNS servers per address family in passt.
const DNS_MAX: usize = 3;

/// The socket buffer size in each direction: passt drops frames that do not fit.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// The maximum host memory used by one passt process, in bytes: the process (31 MiB, `ps -o rss`), and its socket
/// buffers, which the kernel counts twice, in each direction.
pub const BUDGET_BYTES: u64 = (32 << 20) + 2 * 2 * SOCKET_BUFFER_BYTES as u64;
/// Why user-mode networking is unavailable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// passt is not installed.
    #[error("user-mode networking needs passt: run `sudo apt-get install passt`, or use --network none")]
    Passt,
    /// The host has no default route, without which passt does not start.
    #[error("user-mode networking needs a network on this host, and there is no default route")]
    Route,
}

/// Checks whether user-mode networking is available.
pub fn check() -> Result<(), Missing> {
    if !is_installed() {
        return Err(Missing::Passt);
    }
    if !Routes::of_host().is_any() {
        return Err(Missing::Route);
    }
    Ok(())
}

fn is_installed() -> bool {
    let is_program = |path: std::path::PathBuf| {
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|dir| is_program(dir.join(PROGRAM)))
}

fn arguments(network: &UserNetwork, resolver: &resolver::Resolver) -> Vec<String> {
    let mut all: Vec<String> = ["--foreground", "--quiet", "--fd", "0", "--no-map-gw"].map(str::to_owned).into();
    let mut add = |flag: &str, value: String| all.extend([flag.to_owned(), value]);
    add("--mac-addr", GATEWAY_MAC.to_string());
    add("--mtu", MTU_BYTES.to_string());
    add("--address", GUEST.to_string());
    add("--netmask", PREFIX.to_string());
    add("--gateway", GATEWAY.to_string());
    if Routes::at_start().ipv6 {
        add("--address", GUEST_V6.to_string());
        add("--gateway", GATEWAY_V6.to_string());
    }
    let servers = if network.dns.is_empty() { &resolver.servers } else { &network.dns };
    for of_kind in [IpAddr::is_ipv4, IpAddr::is_ipv6] {
        servers.iter().filter(|server| of_kind(server)).take(DNS_MAX).for_each(|s| add("--dns", s.to_string()));
    }
    if servers.is_empty() {
        add("--dns-forward", DNS.to_string());
    }
    for port in &network.ports {
        let flag = match port.protocol {
            Protocol::Tcp => "--tcp-ports",
            Protocol::Udp => "--udp-ports",
        };
        add(flag, forwarded(port));
    }
    all
}

/// `[ADDRESS/]FIRST[-LAST]:FIRST[-LAST]`
fn forwarded(port: &PortForward) -> String {
    let range = |first: u16| match port.count {
        1 => first.to_string(),
        count => format!("{first}-{}", first.saturating_add(count - 1)),
    };
    let address = port.host_ip.map(|ip| format!("{ip}/")).unwrap_or_default();
    format!("{address}{}:{}", range(port.host_port), range(port.guest_port))
}

/// An address of the host that a guest can connect to: the one from which the host itself connects to others.
pub fn host_address() -> Option<IpAddr> {
    // Connecting a UDP socket selects the address and sends nothing. Any address behind the default route will do.
    const ELSEWHERE: (Ipv4Addr, u16) = (Ipv4Addr::new(192, 0, 2, 1), 9);
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect(ELSEWHERE).ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

/// The DNS servers for a guest that is configured without DHCP.
pub fn dns_servers(network: &UserNetwork, resolver: &resolver::Resolver) -> Vec<IpAddr> {
    let servers = if network.dns.is_empty() { &resolver.servers } else { &network.dns };
    let reached = |server: &&IpAddr| server.is_ipv4() || Routes::at_start().ipv6;
    let servers: Vec<IpAddr> = servers.iter().filter(reached).copied().take(DNS_MAX).collect();
    if servers.is_empty() { vec![DNS.into()] } else { servers }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_formatted_for_passt() {
        for (text, wanted) in [
            ("8080:80", "8080:80"),
            ("127.0.0.1:8080:80", "127.0.0.1/8080:80"),
            ("[::1]:8080:80", "::1/8080:80"),
            ("5000-5009:6000-6009", "5000-5009:6000-6009"),
            ("65535:65535", "65535:65535"),
        ] {
            assert_eq!(forwarded(&text.parse().unwrap()), wanted);
        }
    }

    #[test]
    fn dns_servers_are_reachable_from_the_guest() {
        let server = |text: &str| text.parse::<IpAddr>().unwrap();
        let none = resolver::Resolver::default();
        let some = resolver::Resolver { servers: vec![server("192.0.2.53")], ..none.clone() };
        let user = |dns: &[&str]| UserNetwork { dns: dns.iter().map(|s| server(s)).collect(), ..Default::default() };
        assert_eq!(dns_servers(&user(&[]), &none), [server("10.0.2.3")]);
        assert_eq!(dns_servers(&user(&[]), &some), some.servers);
        assert_eq!(dns_servers(&user(&["192.0.2.1"]), &some), [server("192.0.2.1")]);
        let has = |arguments: Vec<String>, words: [&str; 2]| arguments.windows(2).any(|pair| pair == words);
        assert!(has(arguments(&user(&[]), &none), ["--dns-forward", "10.0.2.3"]));
        assert!(has(arguments(&user(&[]), &some), ["--dns", "192.0.2.53"]));
    }
}
