//! Translates a machine's networks into the guest's network configuration: addresses, gateways and DNS servers.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use husk_protocol::{Identity, Interface, InterfaceAddress, Route};

use crate::config::{Attachment, MacAddress, NetworkConfig};
use crate::resources::bridge::{self, Lease};
use crate::resources::interface;
use crate::resources::passt;
use crate::resources::resolver::{self, Resolver};
use crate::state_dir::identity::{IdentityRecord, InterfaceRecord, Names};

/// An interface and its configuration in the guest.
#[derive(Debug)]
pub struct InterfaceSetup {
    /// The interface.
    pub config: NetworkConfig,
    /// Its MTU, if it is not that of every machine's device on such a network.
    pub mtu_bytes: Option<u32>,
    /// The addresses, unless the network assigns them.
    pub addresses: Vec<InterfaceAddress>,
    /// Its routes besides those that follow from the addresses.
    pub routes: Vec<Route>,
    /// Reserves the address for this machine.
    pub lease: Option<Lease>,
}

/// The network setup of a machine: all of its interfaces.
#[derive(Debug, Default)]
pub struct NetworkSetup {
    /// The devices that the machine is built with.
    pub configs: Vec<NetworkConfig>,
    /// The configuration passed to init.
    pub interfaces: Vec<Interface>,
    resolver: Resolver,
    dns: Vec<IpAddr>,
    names: Names,
    /// The names of hosts with their addresses.
    hosts: Vec<(String, IpAddr)>,
    records: Vec<InterfaceRecord>,
    leases: Vec<Lease>,
}

impl From<NetworkConfig> for InterfaceSetup {
    fn from(config: NetworkConfig) -> InterfaceSetup {
        InterfaceSetup { config, mtu_bytes: None, addresses: Vec::new(), routes: Vec::new(), lease: None }
    }
}

impl InterfaceSetup {
    /// An interface that the machine takes over, of the network namespace in which it will be opened.
    pub fn taken_over(interface: interface::Interface) -> InterfaceSetup {
        let to = Attachment::Interface { name: interface.name };
        InterfaceSetup {
            config: NetworkConfig { mac: Some(interface.mac), ..NetworkConfig::of(to) },
            mtu_bytes: interface.mtu_bytes,
            addresses: interface.addresses,
            routes: interface.routes,
            lease: None,
        }
    }

    /// An interface on a network that has assigned the machine an address.
    pub fn leased(lease: Lease, mac: MacAddress) -> InterfaceSetup {
        let to = Attachment::Bridge { name: lease.bridge.interface(), ports: Vec::new() };
        InterfaceSetup {
            config: NetworkConfig { mac: Some(mac), ..NetworkConfig::of(to) },
            mtu_bytes: None,
            addresses: vec![InterfaceAddress { ip: lease.address.into(), prefix: bridge::PREFIX }],
            routes: if lease.bridge.internal {
                Vec::new()
            } else {
                vec![Route::through(lease.bridge.gateway().into())]
            },
            lease: Some(lease),
        }
    }
}

/// Parses `ADDRESS/PREFIX`.
pub fn parse_address(text: &str) -> Result<InterfaceAddress, String> {
    let parse = || {
        let (ip, prefix) = text.split_once('/')?;
        let (ip, prefix) = (ip.parse::<IpAddr>().ok()?, prefix.parse().ok()?);
        let bits_max = if ip.is_ipv4() { 32 } else { 128 };
        (prefix <= bits_max).then_some(InterfaceAddress { ip, prefix })
    };
    parse().ok_or_else(|| format!("{text:?} is not an address: use ADDRESS/PREFIX, such as 192.0.2.2/24"))
}

impl NetworkSetup {
    /// The setup of a machine with these interfaces and the DNS servers `dns`, or the host's servers if `dns` is empty.
    pub fn new(setups: Vec<InterfaceSetup>, dns: &[IpAddr]) -> NetworkSetup {
        // Without a network, only what the user asks for.
        let mut resolver = if setups.is_empty() { Resolver::default() } else { resolver::of_host() };
        let user = setups.iter().find_map(|setup| match &setup.config.to {
            Attachment::User(user) => Some(user),
            Attachment::Tap { .. } | Attachment::Bridge { .. } | Attachment::Interface { .. } => None,
        });
        let named: Vec<IpAddr> =
            setups.iter().filter_map(|setup| setup.lease.as_ref()).map(|lease| lease.bridge.gateway().into()).collect();
        if !dns.is_empty() {
            resolver.servers = dns.to_vec();
        } else if !named.is_empty() {
            // It resolves machine names and forwards other queries.
            resolver.servers = named;
        } else if let Some(user) = user {
            resolver.servers = passt::dns_servers(user, &resolver);
        }
        let interfaces = setups.iter().filter_map(in_guest).collect();
        let (mut configs, mut records, mut leases) = (Vec::new(), Vec::new(), Vec::new());
        for setup in setups {
            configs.push(setup.config);
            let aliases = setup.lease.as_ref().map_or(Vec::new(), |lease| lease.aliases.clone());
            let default = setup.routes.iter().filter(|route| route.destination.is_none());
            let gateways = default.filter_map(|route| route.gateway).collect();
            records.push(InterfaceRecord { addresses: setup.addresses, gateways, aliases });
            leases.extend(setup.lease);
        }
        NetworkSetup { configs, interfaces, resolver, dns: dns.to_vec(), records, leases, ..NetworkSetup::default() }
    }

    /// Adds the names that the user has given.
    pub fn with_names(mut self, names: &Names) -> Result<NetworkSetup> {
        let with_address =
            |(name, ip): &(String, Option<IpAddr>)| Ok((name.clone(), ip.map_or_else(|| self.host(), Ok)?));
        self.hosts = names.hosts.iter().map(with_address).collect::<Result<_>>()?;
        if !names.search.is_empty() {
            self.resolver.search = names.search.iter().filter(|domain| *domain != ".").cloned().collect();
        }
        if !names.options.is_empty() {
            self.resolver.options.clone_from(&names.options);
        }
        self.names = names.clone();
        Ok(self)
    }

    /// An address at which the machine reaches its host.
    fn host(&self) -> Result<IpAddr> {
        let gateway = self.leases.first().map(|lease| lease.bridge.gateway().into());
        let is_user = self.configs.iter().any(|config| matches!(config.to, Attachment::User(_)));
        let address = gateway.or_else(|| is_user.then(passt::host_address).flatten());
        address.context("host-gateway: the machine has no network on which it reaches the host: use an address")
    }

    /// What a guest with this network and host name is told.
    pub fn identity(&self, hostname: &str) -> Identity {
        let own_address = self.own_address().unwrap_or(IpAddr::from([127, 0, 1, 1]));
        let full_name = self.names.domain.iter().map(|domain| format!("{hostname}.{domain} ")).collect::<String>();
        let mut hosts = format!(
            "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n{own_address}\t{full_name}{hostname}\n"
        );
        hosts.extend(self.hosts.iter().map(|(name, ip)| format!("{ip}\t{name}\n")));
        Identity {
            hostname: hostname.to_owned(),
            hosts: Some(hosts.into_bytes()),
            resolv_conf: self.resolv_conf(),
            interfaces: self.interfaces.clone(),
        }
    }

    /// The same for the record of the machine `machine`.
    pub fn record(&self, machine: String, hostname: String, is_hostname_chosen: bool) -> IdentityRecord {
        let (dns, names, interfaces) = (self.dns.clone(), self.names.clone(), self.records.clone());
        IdentityRecord { machine, hostname, is_hostname_chosen, dns, names, interfaces }
    }

    /// Whether there are no interfaces.
    pub fn is_empty(&self) -> bool {
        self.configs.is_empty()
    }

    /// The content of the guest's /etc/resolv.conf, if it has a network or the user has asked for something in it.
    fn resolv_conf(&self) -> Option<Vec<u8>> {
        let content = self.resolver.resolv_conf();
        (!self.is_empty() || !content.is_empty()).then_some(content)
    }

    /// The guest's own address for /etc/hosts, if there is one.
    fn own_address(&self) -> Option<IpAddr> {
        self.interfaces.iter().flat_map(|interface| &interface.addresses).map(|address| address.ip).next()
    }
}

/// The interfaces in a machine whose network devices are `devices`, since they were those of another one: they are found by what
/// they were. Fails if their number differs.
pub fn on_devices(mut interfaces: Vec<Interface>, devices: &[NetworkConfig]) -> Result<Vec<Interface>> {
    let macs: Vec<[u8; 6]> = devices.iter().filter_map(|device| device.mac).map(|mac| mac.0).collect();
    let (found, expected) = (macs.len(), interfaces.len());
    ensure!(found == expected, "the machine has {found} network interfaces, not {expected}");
    interfaces.iter_mut().zip(macs).for_each(|(interface, mac)| interface.device_mac = mac);
    Ok(interfaces)
}

fn in_guest(setup: &InterfaceSetup) -> Option<Interface> {
    // Without a MAC address the guest could not identify the interface.
    let mac = setup.config.mac?.0;
    let address = |ip: IpAddr, prefix| InterfaceAddress { ip, prefix };
    Some(match &setup.config.to {
        Attachment::Tap { .. } | Attachment::Bridge { .. } | Attachment::Interface { .. } => {
            let (addresses, routes) = (setup.addresses.clone(), setup.routes.clone());
            Interface { device_mac: mac, mac, mtu_bytes: setup.mtu_bytes, addresses, routes }
        }
        Attachment::User(_) => {
            let mut addresses = vec![address(passt::GUEST.into(), passt::PREFIX)];
            let mut routes = vec![Route::through(passt::GATEWAY.into())];
            if passt::Routes::at_start().ipv6 {
                addresses.push(address(passt::GUEST_V6.into(), passt::PREFIX_V6));
                routes.push(Route::through(passt::GATEWAY_V6.into()));
            }
            Interface { device_mac: mac, mac, mtu_bytes: setup.mtu_bytes, addresses, routes }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{MacAddress, UserNetwork};

    fn setup(to: Attachment) -> InterfaceSetup {
        let config = NetworkConfig { mac: Some(MacAddress([2, 0, 0, 0, 0, 1])), ..NetworkConfig::of(to) };
        InterfaceSetup {
            config,
            mtu_bytes: None,
            lease: None,
            addresses: vec![parse_address("192.0.2.2/24").unwrap()],
            routes: Vec::new(),
        }
    }

    #[test]
    fn an_address_has_a_valid_prefix() {
        assert!(parse_address("10.0.0.1/32").is_ok() && parse_address("fd00::1/128").is_ok());
        for wrong in ["", "10.0.0.1", "10.0.0.1/33", "fd00::1/129", "10.0.0.1/-1", "a/24"] {
            assert!(parse_address(wrong).unwrap_err().contains("ADDRESS/PREFIX"), "{wrong}");
        }
    }

    #[test]
    fn the_guests_configuration_matches_its_network() {
        let user = NetworkSetup::new(vec![setup(Attachment::User(UserNetwork::default()))], &[]);
        assert_eq!(user.own_address(), Some(passt::GUEST.into()));
        assert_eq!(user.interfaces[0].routes[0], Route::through(passt::GATEWAY.into()));
        assert!(String::from_utf8(user.resolv_conf().unwrap()).unwrap().contains("nameserver "));
        let dns = ["192.0.2.53".parse().unwrap()];
        let tap = NetworkSetup::new(vec![setup(Attachment::Tap { name: "t".into() })], &dns);
        assert_eq!(tap.own_address(), Some("192.0.2.2".parse().unwrap()));
        assert!(tap.resolv_conf().unwrap().ends_with(b"nameserver 192.0.2.53\n"));
        let names = Names {
            hosts: vec![("db".into(), "192.0.2.7".parse().ok())],
            search: vec![".".into()],
            options: vec!["ndots:3".into()],
            domain: Some("example".into()),
        };
        let identity = tap.with_names(&names).unwrap().identity("box");
        let text = |content: Option<Vec<u8>>| String::from_utf8(content.unwrap()).unwrap();
        assert!(text(identity.hosts).ends_with("192.0.2.2\tbox.example box\n192.0.2.7\tdb\n"));
        assert_eq!(text(identity.resolv_conf), "options ndots:3\nnameserver 192.0.2.53\n");
        let hosts = vec![("host".into(), None)];
        let unreachable = NetworkSetup::default().with_names(&Names { hosts, ..Names::default() });
        assert!(unreachable.unwrap_err().to_string().starts_with("host-gateway: "));
    }

    #[test]
    fn without_a_network_the_resolver_has_what_the_user_asks_for() {
        let none = NetworkSetup::new(Vec::new(), &[]);
        assert_eq!((none.is_empty(), none.own_address(), none.resolv_conf()), (true, None, None));
        let dns = ["192.0.2.53".parse().unwrap()];
        let names = Names { search: vec!["example".into()], ..Names::default() };
        let asked = NetworkSetup::new(Vec::new(), &dns).with_names(&names).unwrap();
        assert_eq!(asked.resolv_conf().unwrap(), b"search example\nnameserver 192.0.2.53\n");
    }
}
