//! What `-p` asks for: ports of the host that are given, or that are to be chosen.

use std::net::IpAddr;
use std::str::FromStr;

use super::{PortForward, Protocol};

/// One `-p`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Publish {
    /// These ports.
    Given(PortForward),
    /// Free ports of the host.
    Chosen {
        /// The host address to listen on; all addresses if not given.
        host_ip: Option<IpAddr>,
        /// The first and the last port to choose from; any if not given.
        from: Option<(u16, u16)>,
        /// The first port in the guest.
        guest_port: u16,
        /// The number of consecutive ports in the guest, each of which gets one of its own.
        count: u16,
        /// The protocol.
        protocol: Protocol,
    },
}

/// Parses Docker's syntax: in addition to that of a [`PortForward`], `[[IP:]:]GUEST`, and a range of the host for a single port.
impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Publish, String> {
        let given = text.parse().map(Publish::Given);
        given.or_else(|error: String| chosen(text).ok_or(error))
    }
}

fn chosen(text: &str) -> Option<Publish> {
    let (ports, protocol) = Protocol::of(text)?;
    let (host, guest) = ports.rsplit_once(':').unwrap_or(("", ports));
    let (ip, from) = host.rsplit_once(':').unwrap_or(("", host));
    let bare = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
    let host_ip = if bare.is_empty() { None } else { Some(bare.parse().ok()?) };
    let from = if from.is_empty() { None } else { Some(super::network::range(from)?) };
    let (first, last) = super::network::range(guest)?;
    // Ranges of the same length are given ports; of two others, nobody knows which belong together.
    let count = last - first + 1;
    (from.is_none() || count == 1).then_some(Publish::Chosen { host_ip, from, guest_port: first, count, protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_port_that_is_not_given_is_chosen() {
        let chosen = |host_ip: Option<&str>, from, guest_port, count, protocol| {
            let host_ip = host_ip.map(|ip| ip.parse().unwrap());
            Ok(Publish::Chosen { host_ip, from, guest_port, count, protocol })
        };
        for (text, wanted) in [
            ("80", chosen(None, None, 80, 1, Protocol::Tcp)),
            ("53/udp", chosen(None, None, 53, 1, Protocol::Udp)),
            ("8000-8009", chosen(None, None, 8000, 10, Protocol::Tcp)),
            ("127.0.0.1::80", chosen(Some("127.0.0.1"), None, 80, 1, Protocol::Tcp)),
            ("[::1]::80", chosen(Some("::1"), None, 80, 1, Protocol::Tcp)),
            ("8000-8009:80", chosen(None, Some((8000, 8009)), 80, 1, Protocol::Tcp)),
            ("8080:80", Ok(Publish::Given("8080:80".parse().unwrap()))),
        ] {
            assert_eq!(text.parse(), wanted, "{text}");
        }
        for text in ["", ":", "x", "0", "80:", "1-2:3-5", "1.2.3:80:80", "80/sctp", "5-4"] {
            assert!(text.parse::<Publish>().unwrap_err().contains("[IP:]HOST:GUEST"), "{text}");
        }
    }
}
