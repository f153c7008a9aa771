//! Network configuration.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{Invalid, Rate};

/// The maximum length of a host interface's name (IFNAMSIZ, linux/if.h, minus the NUL).
pub const MAX_INTERFACE_NAME_BYTES: usize = 15;

/// A network interface of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// What it is connected to.
    pub to: Attachment,
    /// The guest's MAC address; random if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddress>,
    /// Rate limits per direction; a packet counts as an operation.
    #[serde(default, skip_serializing_if = "Rate::is_unlimited")]
    pub rate: Rate,
    /// Whether the host's kernel processes the frames of a tap device (vhost-net); if not given, where possible.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vhost: Option<bool>,
}

/// What an interface is connected to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Attachment {
    /// User-mode networking through passt: no privileges, and no interface on the host.
    User(UserNetwork),
    /// A tap device of the host.
    Tap {
        /// The interface's name. It is created and removed with the machine if it does not exist and husk has the
        /// privileges.
        name: String,
    },
    /// A bridge of the host, to which a new tap device is added.
    Bridge {
        /// The bridge's interface.
        name: String,
        /// Published ports, if it is that of a network of husk's.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        ports: Vec<PortForward>,
    },
    /// An interface of the network namespace that the machine is started in, which the machine takes over: a new tap device sends
    /// what the interface receives, and the other way round.
    Interface {
        /// The interface's name.
        name: String,
    },
}

impl Attachment {
    /// The ports that are published there.
    pub fn ports(&self) -> &[PortForward] {
        match self {
            Attachment::User(user) => &user.ports,
            Attachment::Bridge { ports, .. } => ports,
            Attachment::Tap { .. } | Attachment::Interface { .. } => &[],
        }
    }
}

/// Options of user-mode networking.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UserNetwork {
    /// Published ports.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PortForward>,
    /// DNS servers for the guest in place of the host's.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<IpAddr>,
}

/// A range of host ports forwarded to the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortForward {
    /// The host address to listen on; all addresses if not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
    /// The first port on the host.
    pub host_port: u16,
    /// The first port in the guest.
    pub guest_port: u16,
    /// The number of consecutive ports.
    #[serde(default = "one")]
    pub count: u16,
    /// The protocol.
    #[serde(default)]
    pub protocol: Protocol,
}

fn one() -> u16 {
    1
}

/// A transport protocol.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Its name, `tcp` or `udp`.
    pub fn name(self) -> &'static str {
        match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
        }
    }

    /// Splits `PORTS[/tcp|/udp]` into the ports and the protocol.
    pub fn of(text: &str) -> Option<(&str, Protocol)> {
        match text.rsplit_once('/') {
            None => Some((text, Protocol::Tcp)),
            Some((ports, "tcp")) => Some((ports, Protocol::Tcp)),
            Some((ports, "udp")) => Some((ports, Protocol::Udp)),
            Some(_) => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// Makes an address of six bytes by marking it as unicast and locally administered.
    pub fn local(mut bytes: [u8; 6]) -> MacAddress {
        bytes[0] = bytes[0] & 0xfc | 0x02;
        MacAddress(bytes)
    }
}

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<MacAddress, String> {
        let wrong =
            || format!("{text:?} is not a MAC address: use six pairs of hexadecimal digits, such as 02:00:00:00:00:01");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = part.and_then(|part| u8::from_str_radix(part, 16).ok()).ok_or_else(wrong)?;
        }
        let for_many = bytes[0] & 1 != 0 || bytes == [0; 6];
        if for_many {
            return Err(format!(
                "{text} is not a unicast MAC address: the first byte must be even, and not all bytes can be 0"
            ));
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(MacAddress(bytes)) }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = String;

    fn try_from(text: String) -> Result<MacAddress, String> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Formats ports like `docker ps`: `8080->80/tcp`, preceded by the host's address if there is one.
impl fmt::Display for PortForward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PortForward { host_ip, host_port, guest_port, count, protocol } = self;
        let range = |first: u16| match count {
            1 => first.to_string(),
            _ => format!("{first}-{}", u32::from(first) + u32::from(*count) - 1),
        };
        match host_ip {
            Some(ip @ IpAddr::V4(_)) => write!(f, "{ip}:")?,
            Some(ip @ IpAddr::V6(_)) => write!(f, "[{ip}]:")?,
            None => {}
        }
        write!(f, "{}->{}/{protocol}", range(*host_port), range(*guest_port))
    }
}

/// Parses Docker's port syntax: `[IP:]HOST:GUEST[/tcp|/udp]`, each side a port or a range `FIRST-LAST`.
impl FromStr for PortForward {
    type Err = String;

    fn from_str(text: &str) -> Result<PortForward, String> {
        let wrong = |why: &str| {
            format!(
                "{text:?}: {why}: use [IP:]HOST:GUEST[/tcp|/udp], such as 8080:80 or 127.0.0.1:5000-5009:5000-5009/udp"
            )
        };
        let (ports, protocol) = Protocol::of(text).ok_or_else(|| wrong("the protocol is neither tcp nor udp"))?;
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(|| wrong("the host port is missing"))?;
        let (host_ip, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((ip, host)) => {
                let bare = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
                (Some(bare.parse().map_err(|_| wrong("the IP address is invalid"))?), host)
            }
        };
        let host = range(host).ok_or_else(|| wrong("host ports are 1 to 65535"))?;
        let guest = range(guest).ok_or_else(|| wrong("guest ports are 1 to 65535"))?;
        if host.1 - host.0 != guest.1 - guest.0 {
            return Err(wrong("the port ranges have different lengths"));
        }
        // At most 65535, since port 0 is invalid.
        Ok(PortForward { host_ip, host_port: host.0, guest_port: guest.0, count: host.1 - host.0 + 1, protocol })
    }
}

/// Parses a port or a range.
pub(super) fn range(text: &str) -> Option<(u16, u16)> {
    let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0 && !text.starts_with('+'));
    match text.split_once('-') {
        None => port(text).map(|port| (port, port)),
        Some((first, last)) => port(first).zip(port(last)).filter(|(first, last)| first <= last),
    }
}

impl NetworkConfig {
    /// An interface connected to `to`, with default options.
    pub fn of(to: Attachment) -> NetworkConfig {
        NetworkConfig { to, mac: None, rate: Rate::default(), vhost: None }
    }

    /// Validates everything that does not depend on the host.
    pub fn validate(&self) -> Result<(), Invalid> {
        if !self.rate.makes_sense() {
            return Err(Invalid::NetworkRate);
        }
        if self.vhost == Some(true) && !self.rate.is_unlimited() {
            return Err(Invalid::LimitedVhost);
        }
        if self.vhost.is_some() && matches!(self.to, Attachment::User(_)) {
            return Err(Invalid::UserVhost);
        }
        match &self.to {
            Attachment::Tap { name } | Attachment::Bridge { name, .. } | Attachment::Interface { name } => {
                let good = |c: char| c.is_ascii_graphic() && !matches!(c, '/' | ':' | '%');
                let named = !matches!(name.as_str(), "" | "." | "..") && name.chars().all(good);
                if !named || name.len() > MAX_INTERFACE_NAME_BYTES {
                    return Err(Invalid::InterfaceName(name.clone()));
                }
            }
            Attachment::User(_) => {}
        }
        for PortForward { host_port, guest_port, count, .. } in self.to.ports() {
            for first in [host_port, guest_port] {
                if *first == 0 || *count == 0 || first.checked_add(count - 1).is_none() {
                    return Err(Invalid::Ports(*first, *count));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(host_ip: Option<&str>, host_port: u16, guest_port: u16, count: u16, protocol: Protocol) -> PortForward {
        PortForward { host_ip: host_ip.map(|ip| ip.parse().unwrap()), host_port, guest_port, count, protocol }
    }

    #[test]
    fn ports_have_dockers_syntax() {
        use Protocol::{Tcp, Udp};
        for (text, wanted) in [
            ("8080:80", ports(None, 8080, 80, 1, Tcp)),
            ("53:53/udp", ports(None, 53, 53, 1, Udp)),
            ("127.0.0.1:8080:80/tcp", ports(Some("127.0.0.1"), 8080, 80, 1, Tcp)),
            ("[::1]:8080:80", ports(Some("::1"), 8080, 80, 1, Tcp)),
            ("5000-5009:6000-6009", ports(None, 5000, 6000, 10, Tcp)),
            ("1-65535:1-65535", ports(None, 1, 1, 65535, Tcp)),
        ] {
            assert_eq!(text.parse(), Ok(wanted), "{text}");
        }
        for (ports, text) in [
            (ports(None, 8080, 80, 1, Tcp), "8080->80/tcp"),
            (ports(Some("127.0.0.1"), 53, 53, 1, Udp), "127.0.0.1:53->53/udp"),
            (ports(Some("::1"), 5000, 6000, 10, Tcp), "[::1]:5000-5009->6000-6009/tcp"),
        ] {
            assert_eq!(ports.to_string(), text);
        }
        for text in [
            "",
            "80",
            ":80",
            "80:",
            "0:80",
            "80:65536",
            "1-2:3",
            "5-4:5-4",
            "x:80:80",
            "80:80/sctp",
            "+80:80",
            "80:80/",
        ] {
            let error = text.parse::<PortForward>().unwrap_err();
            assert!(error.contains("[IP:]HOST:GUEST"), "{text}: {error}");
        }
    }

    #[test]
    fn a_mac_address_is_unicast() {
        assert_eq!("02:00:5e:Aa:00:ff".parse::<MacAddress>().unwrap().to_string(), "02:00:5e:aa:00:ff");
        for wrong in
            ["", "02:00:00:00:00", "02:00:00:00:00:01:02", "2:0:0:0:0:1", "01:00:00:00:00:01", "00:00:00:00:00:00"]
        {
            assert!(wrong.parse::<MacAddress>().is_err(), "{wrong}");
        }
        assert_eq!(MacAddress::local([0xff; 6]).to_string(), "fe:ff:ff:ff:ff:ff");
        assert_eq!(MacAddress::local([0; 6]).to_string(), "02:00:00:00:00:00");
    }

    #[test]
    fn a_network_survives_a_json_round_trip() {
        let user = UserNetwork {
            ports: vec![ports(None, 8080, 80, 1, Protocol::Udp)],
            dns: vec!["192.0.2.53".parse().unwrap()],
        };
        for to in [Attachment::User(user), Attachment::Tap { name: "tap0".into() }] {
            let network = NetworkConfig { mac: Some(MacAddress([2, 0, 0, 0, 0, 1])), ..NetworkConfig::of(to) };
            assert_eq!(network.validate(), Ok(()));
            let json = serde_json::to_string(&network).unwrap();
            assert_eq!(serde_json::from_str::<NetworkConfig>(&json).unwrap(), network, "{json}");
        }
        let short = serde_json::from_str::<NetworkConfig>(
            r#"{"to": {"user": {"ports": [{"host_port": 1, "guest_port": 2}]}}}"#,
        );
        let Attachment::User(user) = short.unwrap().to else { panic!() };
        assert_eq!(user.ports, [ports(None, 1, 2, 1, Protocol::Tcp)]);
        assert!(serde_json::from_str::<NetworkConfig>(r#"{"to": {"user": {}}, "mac": "01:00:00:00:00:01"}"#).is_err());
    }

    #[test]
    fn a_network_limit_is_not_zero() {
        let with = |bytes_per_second, burst_bytes| {
            let rate = Rate { bytes_per_second, burst_bytes, ..Rate::default() };
            NetworkConfig { rate, ..NetworkConfig::of(Attachment::User(UserNetwork::default())) }.validate()
        };
        assert_eq!((with(None, None), with(Some(1), Some(1))), (Ok(()), Ok(())));
        assert_eq!((with(Some(0), None), with(None, Some(1))), (Err(Invalid::NetworkRate), Err(Invalid::NetworkRate)));
    }

    #[test]
    fn vhost_requires_a_tap_device_without_limits() {
        let tap = || NetworkConfig::of(Attachment::Tap { name: "tap0".into() });
        let user = || NetworkConfig::of(Attachment::User(UserNetwork::default()));
        let rate = Rate { ops_per_second: Some(1), ..Rate::default() };
        assert_eq!(NetworkConfig { vhost: Some(true), ..tap() }.validate(), Ok(()));
        assert_eq!(NetworkConfig { vhost: Some(false), rate, ..tap() }.validate(), Ok(()));
        assert_eq!(NetworkConfig { vhost: Some(true), rate, ..tap() }.validate(), Err(Invalid::LimitedVhost));
        for vhost in [true, false] {
            assert_eq!(NetworkConfig { vhost: Some(vhost), ..user() }.validate(), Err(Invalid::UserVhost));
        }
    }

    #[test]
    fn invalid_names_and_ports_are_rejected() {
        for name in ["", "..", "a/b", "a b", "tap:1", "sixteen-letters-", "naïve"] {
            let network = NetworkConfig::of(Attachment::Tap { name: name.into() });
            assert_eq!(network.validate(), Err(Invalid::InterfaceName(name.into())));
        }
        for (host, guest, count) in [(0, 1, 1), (1, 0, 1), (1, 1, 0), (65535, 1, 2), (1, 65535, 2)] {
            let user =
                UserNetwork { ports: vec![ports(None, host, guest, count, Protocol::Tcp)], ..Default::default() };
            let network = NetworkConfig::of(Attachment::User(user));
            assert!(matches!(network.validate(), Err(Invalid::Ports(..))), "{host} {guest} {count}");
        }
    }
}
