//! Network flags, shared by `husk boot` and `husk run`.

use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Result, anyhow, bail, ensure};
use clap::Args;
use husk_protocol::{InterfaceAddress, Route};

use super::size;
use crate::config::Rate;
use crate::config::{Attachment, MacAddress, NetworkConfig, PortForward, Publish, UserNetwork};
use crate::guest::network::{InterfaceSetup, NetworkSetup, parse_address};
use crate::resources::bridge::{self, Lease, Wish};
use crate::resources::{interface, net, passt, ports};

// `--network`, `-p` and `--dns`.
#[derive(Debug, Clone, Default, Args)]
pub(super) struct NetworkFlags {
    /// Connect the machine to a network; repeat for more interfaces
    ///
    /// `user` is user-mode networking through passt, which needs no privileges and is started when the guest first uses
    /// the network; the guest gets its address from DHCP or from husk's init. `tap=NAME` is a tap device on the host;
    /// husk's init configures it in the guest with `ip=ADDRESS/PREFIX` (can be repeated) and `gateway=ADDRESS`.
    /// `interface=NAME` is an Ethernet interface of the network namespace that husk is started in, such as one end of a veth pair:
    /// the machine takes it over, with its MAC address, its addresses and its routes, until it ends. Any
    /// other NAME is a network created with `husk network create`, on which machines resolve each other by name and get
    /// their addresses from DHCP. Tap devices and networks use vhost-net if /dev/vhost-net exists and no rate limit is
    /// set; `vhost=off` disables it, and `vhost=on` requires it. `mac=ADDRESS` sets the MAC address; `bps=10M` and
    /// `pps=1000` limit the bytes and packets per second in each direction. `none` disables networking. The default is
    /// `none` for `husk boot` and `user` for `husk run`. On a network of `husk network create`, `ip=ADDRESS` and `alias=NAME`
    /// do what --ip and --network-alias do.
    #[arg(long = "network", alias = "net", value_name = "user|NAME|tap=NAME|interface=NAME|none[,OPTION]...")]
    #[arg(value_parser = network_arg)]
    networks: Vec<NetworkArg>,

    /// Publish a machine's port to the host, with user-mode networking or on a network of husk's; can be repeated
    ///
    /// Both ports can be ranges of the same length: 5000-5009:6000-6009. Without an IP the port is published on all host
    /// addresses. Write an IPv6 address in brackets. Without HOST, a free port is chosen, which `husk port` shows.
    #[arg(short = 'p', long = "publish", value_name = "[[IP:]HOST:]GUEST[/udp]", value_parser = str::parse::<Publish>)]
    ports: Vec<Publish>,

    /// Limit the rate of each network interface (bytes per second, each direction); bps= overrides it
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    network_bps: Option<u64>,

    /// Limit the rate of each network interface (packets per second, each direction); pps= overrides it
    #[arg(long, value_name = "N")]
    network_pps: Option<u64>,

    /// Address of the machine on the (first) network of `husk network create`
    #[arg(long, value_name = "ADDRESS")]
    ip: Option<Ipv4Addr>,

    /// Another name for the machine on its networks of `husk network create`; can be repeated
    #[arg(long, value_name = "NAME")]
    network_alias: Vec<String>,

    /// MAC address of the (first) network interface
    #[arg(long, value_name = "ADDRESS", value_parser = str::parse::<MacAddress>)]
    mac_address: Option<MacAddress>,

    /// Set a custom DNS server instead of the host's; can be repeated
    #[arg(long, value_name = "ADDRESS")]
    dns: Vec<IpAddr>,
}

/// One `--network`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct NetworkArg {
    to: Target,
    mac: Option<MacAddress>,
    rate: Rate,
    vhost: Option<bool>,
    addresses: Vec<InterfaceAddress>,
    gateways: Vec<IpAddr>,
    /// Its address and its names on a shared network.
    wish: Wish,
}

/// What it connects to.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Target {
    Nothing,
    Attachment(Attachment),
    /// A network created by `husk network create`.
    Network(String),
}

/// Parses `user|NAME|tap=NAME|interface=NAME|none[,mac=ADDRESS][,vhost=on|off][,ip=ADDRESS/PREFIX][,gateway=ADDRESS]...`.
pub(super) fn network_arg(text: &str) -> Result<NetworkArg, String> {
    let mut parts = text.split(',');
    let first = parts.next().unwrap_or_default();
    let to = match first.strip_prefix("name=").unwrap_or(first) {
        "none" => Target::Nothing,
        "user" => Target::Attachment(Attachment::User(UserNetwork::default())),
        other => match other.split_once('=') {
            Some(("tap", name)) => Target::Attachment(Attachment::Tap { name: name.to_owned() }),
            Some(("interface", name)) => Target::Attachment(Attachment::Interface { name: name.to_owned() }),
            None if bridge::is_name(other) => Target::Network(other.to_owned()),
            _ => {
                return Err(format!(
                    "{other:?} is not a network: use user, tap=NAME, interface=NAME, none or the name of a network"
                ));
            }
        },
    };
    let mut arg = NetworkArg {
        to,
        mac: None,
        rate: Rate::default(),
        vhost: None,
        addresses: Vec::new(),
        gateways: Vec::new(),
        wish: Wish::default(),
    };
    let on_tap = matches!(arg.to, Target::Attachment(Attachment::Tap { .. }));
    let is_shared = matches!(arg.to, Target::Network(_));
    for option in parts {
        match option.split_once('=') {
            Some((_, _)) if arg.to == Target::Nothing => return Err("--network none takes no options".into()),
            Some(("mac" | "mac-address", mac)) => arg.mac = Some(mac.parse()?),
            Some(("bps", bytes)) => arg.rate.bytes_per_second = Some(size::bytes(bytes)?),
            Some(("pps", packets)) => {
                let packets = packets.parse().map_err(|_| format!("{packets:?} is not a number of packets"))?;
                arg.rate.ops_per_second = Some(packets);
            }
            Some(("vhost", "on")) => arg.vhost = Some(true),
            Some(("vhost", "off")) => arg.vhost = Some(false),
            Some(("ip", address)) if on_tap => arg.addresses.push(parse_address(address)?),
            Some(("ip", address)) if is_shared => {
                let address = address.parse().map_err(|_| format!("{address:?} is not an IPv4 address"))?;
                arg.wish = Wish { address: Some(address), is_required: true, ..arg.wish };
            }
            Some(("alias", name)) if is_shared => arg.wish.aliases.push(name.to_owned()),
            Some(("gateway", address)) if on_tap => {
                let gateway = address.parse().map_err(|_| format!("{address:?} is not a gateway address"))?;
                arg.gateways.push(gateway);
            }
            _ => {
                return Err(format!(
                    "unknown option {option:?}: use mac=ADDRESS, bps=SIZE, pps=N, vhost=on, vhost=off, with tap=NAME ip= or gateway=, or on a network ip= or alias="
                ));
            }
        }
    }
    Ok(arg)
}

/// Whether this argument of --network is a network of `husk network create`.
pub(super) fn is_shared(text: &str) -> bool {
    network_arg(text).is_ok_and(|arg| matches!(arg.to, Target::Network(_)))
}

impl NetworkFlags {
    /// Applies the default rate limits to interfaces without their own. Fails if there are none.
    pub fn limit<'a>(&self, rates: impl IntoIterator<Item = &'a mut Rate>) -> Result<()> {
        let (bytes, packets) = (self.network_bps, self.network_pps);
        let mut limited = bytes.or(packets).is_none();
        for rate in rates {
            // Interfaces from a file have no flags, and flags override the file.
            let wins = self.networks.is_empty();
            if let Some(bytes) = bytes.filter(|_| wins || rate.bytes_per_second.is_none()) {
                (rate.bytes_per_second, rate.burst_bytes) = (Some(bytes), None);
            }
            if let Some(packets) = packets.filter(|_| wins || rate.ops_per_second.is_none()) {
                (rate.ops_per_second, rate.burst_ops) = (Some(packets), None);
            }
            limited = true;
        }
        ensure!(limited, "--network-bps and --network-pps need a network, and the machine has none: add --network");
        Ok(())
    }

    /// Disables networking, unless there are flags.
    pub fn default_to_none(&mut self) {
        if self.is_empty() {
            self.networks.extend(network_arg("none"));
        }
    }

    /// Whether there are no network flags.
    pub fn is_empty(&self) -> bool {
        let has_ports = !self.ports.is_empty() || !self.dns.is_empty();
        self.networks.is_empty() && !has_ports && self.mac_address.is_none()
    }

    /// The interfaces requested by the flags, for a guest that configures them itself.
    pub fn configs(&self) -> Result<Vec<NetworkConfig>> {
        let is_configured =
            |arg: &NetworkArg| !arg.addresses.is_empty() || !arg.gateways.is_empty() || arg.wish != Wish::default();
        ensure!(
            self.ip.is_none() && self.network_alias.is_empty() && !self.networks.iter().any(is_configured),
            "--ip, --network-alias, ip=, alias= and gateway= are only supported by `husk run`: a guest of `husk boot` configures its network itself"
        );
        Ok(self.interfaces(None)?.into_iter().map(|interfaces| interfaces.config).collect())
    }

    /// The interfaces of the machine `name`, to be configured by husk's init: those requested by the flags, or the
    /// default, which may be none.
    pub fn setup(&self, name: &str) -> Result<NetworkSetup> {
        let mut interfaces = self.interfaces(Some(name))?;
        if self.is_empty() {
            match passt::check() {
                Ok(()) => interfaces.push(InterfaceSetup::from(user())),
                Err(error) => log::warn!("the machine has no network: {error}"),
            }
        }
        self.limit(interfaces.iter_mut().map(|interfaces| &mut interfaces.config.rate))?;
        for (index, interfaces) in interfaces.iter_mut().enumerate() {
            interfaces.config.mac.get_or_insert_with(|| net::mac_of(name, index));
        }
        Ok(NetworkSetup::new(interfaces, &self.dns))
    }

    /// The requested interfaces, with an address for `machine`, if given, in each network that assigns addresses.
    fn interfaces(&self, machine: Option<&str>) -> Result<Vec<InterfaceSetup>> {
        let none = self.networks.iter().any(|arg| arg.to == Target::Nothing);
        ensure!(!none || self.networks.len() == 1, "--network none cannot be combined with other networks");
        let mut interfaces = Vec::new();
        for (index, arg) in self.with_wishes()?.iter().enumerate() {
            interfaces.extend(arg.interface_setup(machine, index)?);
        }
        // Publishing a port implies a network.
        if self.networks.is_empty() && !self.is_empty() {
            interfaces.push(InterfaceSetup::from(NetworkConfig { mac: self.mac_address, ..user() }));
        }
        let first_user = interfaces.iter_mut().find_map(|interfaces| match &mut interfaces.config.to {
            Attachment::User(user) => Some(user),
            Attachment::Tap { .. } | Attachment::Bridge { .. } | Attachment::Interface { .. } => None,
        });
        match first_user {
            Some(user) => {
                user.ports = ports::choose(&self.ports)?;
                user.dns.clone_from(&self.dns);
            }
            None if !self.ports.is_empty() => publish(&mut interfaces, ports::choose(&self.ports)?)?,
            None => {}
        }
        Ok(interfaces)
    }
}

/// Publishes the ports on the first shared network.
fn publish(interfaces: &mut [InterfaceSetup], forwards: Vec<PortForward>) -> Result<()> {
    for setup in interfaces {
        if let Attachment::Bridge { ports, .. } = &mut setup.config.to {
            if let Some(lease) = &mut setup.lease {
                lease.publish(&forwards)?;
            }
            *ports = forwards;
            return Ok(());
        }
    }
    bail!(
        "-p requires --network user or a network of `husk network create`: otherwise connect to the machine's own address"
    )
}

impl NetworkFlags {
    /// The networks with the flags that are for one of them.
    fn with_wishes(&self) -> Result<Vec<NetworkArg>> {
        let mut networks = self.networks.clone();
        if let (Some(first), Some(mac)) = (networks.first_mut(), self.mac_address) {
            ensure!(first.to != Target::Nothing, "--mac-address needs a network: remove --network none");
            first.mac.get_or_insert(mac);
        }
        let mut shared: Vec<_> = networks.iter_mut().filter(|arg| matches!(arg.to, Target::Network(_))).collect();
        ensure!(
            !shared.is_empty() || self.ip.is_none() && self.network_alias.is_empty(),
            "--ip and --network-alias need --network NAME, with a network of `husk network create`"
        );
        shared.iter_mut().for_each(|arg| arg.wish.aliases.extend_from_slice(&self.network_alias));
        if let (Some(first), Some(address)) = (shared.first_mut(), self.ip) {
            (first.wish.address, first.wish.is_required) = (Some(address), true);
        }
        Ok(networks)
    }

    /// Fails early if a network does not exist, or what a flag is for is missing.
    pub fn check(&self) -> Result<()> {
        self.with_wishes()?;
        self.networks.iter().try_for_each(|arg| match &arg.to {
            Target::Network(name) => bridge::check_exists(name),
            Target::Nothing | Target::Attachment(_) => Ok(()),
        })
    }

    /// Publishes the ports, `PORT[-LAST][/udp]` each, at free ports of the host, unless they are published already.
    pub fn publish_all<'a>(&mut self, exposed: impl IntoIterator<Item = &'a String>) -> Result<()> {
        for port in exposed {
            let publish: Publish = port.parse().map_err(|error: String| anyhow!("publish port {port}: {error}"))?;
            if !self.ports.contains(&publish) {
                self.ports.push(publish);
            }
        }
        Ok(())
    }
}

/// Assigns the machine `name` an address in each shared network among `networks`. DHCP announces it as long as the
/// leases are held.
pub fn join_shared(networks: &mut [NetworkConfig], name: &str) -> Result<Vec<Lease>> {
    let mut leases = Vec::new();
    for (index, network) in networks.iter_mut().enumerate() {
        let Attachment::Bridge { name: interface, .. } = &network.to else { continue };
        let Some(shared) = bridge::name_of(interface) else { continue };
        let mac = *network.mac.get_or_insert_with(|| net::mac_of(name, index));
        let mut lease = bridge::join(shared, name, mac, Wish::default())?;
        lease.publish(network.to.ports())?;
        leases.push(lease);
    }
    Ok(leases)
}

fn user() -> NetworkConfig {
    NetworkConfig::of(Attachment::User(UserNetwork::default()))
}

impl NetworkArg {
    /// Fails if a part of it only matters to a guest that has not set up its network yet.
    pub fn check_for_running_guest(&self) -> Result<()> {
        let is_plain =
            self.addresses.is_empty() && self.gateways.is_empty() && self.mac.is_none() && !self.wish.is_required;
        ensure!(is_plain, "the guest has its addresses already: remove ip=, gateway= and mac=");
        Ok(())
    }

    /// Whether it is user-mode networking; `None` for `--network none`.
    pub fn is_user(&self) -> Option<bool> {
        match &self.to {
            Target::Nothing => None,
            Target::Attachment(to) => Some(matches!(to, Attachment::User(_))),
            Target::Network(_) => Some(false),
        }
    }

    /// The interface `index` of the machine `machine` or, without its name, of one that keeps its addresses; `None` for
    /// `--network none`.
    pub fn interface_setup(&self, machine: Option<&str>, index: usize) -> Result<Option<InterfaceSetup>> {
        let (to, mac) = match &self.to {
            Target::Nothing => return Ok(None),
            Target::Attachment(Attachment::Interface { name }) => {
                let mut setup = InterfaceSetup::taken_over(interface::find(name)?);
                setup.config = self.config(setup.config.to, self.mac.or(setup.config.mac));
                return Ok(Some(setup));
            }
            Target::Attachment(to) => (to.clone(), self.mac),
            Target::Network(name) => {
                let Some(machine) = machine else {
                    let to = Attachment::Bridge { name: bridge::interface_of(name), ports: Vec::new() };
                    return Ok(Some(InterfaceSetup::from(self.config(to, self.mac))));
                };
                let mac = self.mac.unwrap_or_else(|| net::mac_of(machine, index));
                let lease = bridge::join(name, machine, mac, self.wish.clone())?;
                let mut leased = InterfaceSetup::leased(lease, mac);
                leased.config = self.config(leased.config.to, leased.config.mac);
                return Ok(Some(leased));
            }
        };
        let config = self.config(to, mac);
        let routes = self.gateways.iter().copied().map(Route::through).collect();
        Ok(Some(InterfaceSetup { addresses: self.addresses.clone(), routes, ..InterfaceSetup::from(config) }))
    }

    fn config(&self, to: Attachment, mac: Option<MacAddress>) -> NetworkConfig {
        NetworkConfig { to, mac, rate: self.rate, vhost: self.vhost }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        network: NetworkFlags,
    }

    fn flags(words: &[&str]) -> NetworkFlags {
        Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.network).unwrap()
    }

    fn configs(words: &[&str]) -> Result<Vec<NetworkConfig>, String> {
        flags(words).configs().map_err(|error| error.to_string())
    }

    #[test]
    fn network_flags_are_parsed() {
        assert_eq!(configs(&[]), Ok(Vec::new()));
        assert_eq!(configs(&["--network", "none"]), Ok(Vec::new()));
        let to_tap = NetworkConfig::of(Attachment::Tap { name: "tap0".into() });
        let tap = NetworkConfig { mac: "02:00:00:00:00:07".parse().ok(), ..to_tap.clone() };
        let user = |ports: &[&str]| {
            let ports = ports.iter().map(|port| port.parse().unwrap()).collect();
            NetworkConfig::of(Attachment::User(UserNetwork { ports, dns: Vec::new() }))
        };
        let both = ["--network=tap=tap0,mac=02:00:00:00:00:07", "--network=user", "-p80:80", "-p", "53:53/udp"];
        assert_eq!(configs(&both), Ok(vec![tap, user(&["80:80", "53:53/udp"])]));
        let shared = NetworkConfig::of(Attachment::Bridge { name: "husk-web".into(), ports: Vec::new() });
        assert_eq!(configs(&["--network=web"]), Ok(vec![shared.clone()]));
        let by_kernel = |config, on| NetworkConfig { vhost: Some(on), ..config };
        assert_eq!(configs(&["--network=web,vhost=on"]), Ok(vec![by_kernel(shared, true)]));
        assert_eq!(configs(&["--network=tap=tap0,vhost=off"]), Ok(vec![by_kernel(to_tap, false)]));
        assert_eq!(configs(&["-p", "8080:80"]), Ok(vec![user(&["8080:80"])]));
        let rate = Rate { bytes_per_second: Some(10 << 20), ops_per_second: Some(1000), ..Rate::default() };
        let limited = configs(&["--network=user,bps=10M,pps=1000"]).unwrap();
        assert_eq!(limited, [NetworkConfig { rate, ..user(&[]) }]);
    }

    #[test]
    fn an_interfaces_own_limits_override_the_default() {
        let rates = |words: &[&str]| -> Result<Vec<_>, String> {
            let interfaces = flags(words).setup("web").map_err(|error| error.to_string())?;
            Ok(interfaces
                .configs
                .iter()
                .map(|config| (config.rate.bytes_per_second, config.rate.ops_per_second))
                .collect())
        };
        let both = ["--network=tap=a,bps=1k", "--network=user", "--network-bps=2M", "--network-pps=7"];
        assert_eq!(rates(&both), Ok(vec![(Some(1024), Some(7)), (Some(2 << 20), Some(7))]));
        assert!(rates(&["--network=none", "--network-bps=1M"]).unwrap_err().contains("the machine has none"));
        // From a file.
        let mut rate = Rate { bytes_per_second: Some(1), burst_bytes: Some(9), ..Rate::default() };
        flags(&["--network-bps=1M"]).limit([&mut rate]).unwrap();
        assert_eq!(rate, Rate { bytes_per_second: Some(1 << 20), ..Rate::default() });
        assert!(flags(&["--network-pps=1"]).limit([]).is_err());
    }

    #[test]
    fn invalid_combinations_of_networks_are_rejected() {
        for (words, wanted) in [
            (&["--network=none", "--network=user"][..], "cannot be combined"),
            (&["--network=none", "-p80:80"], "-p requires --network user"),
            (&["--network=tap=t", "-p80:80"], "-p requires --network user"),
            (&["--network=tap=t,ip=10.0.0.2/24"], "only supported by `husk run`"),
            (&["--network=web,ip=10.86.0.2"], "only supported by `husk run`"),
        ] {
            let refusal = configs(words).unwrap_err();
            assert!(refusal.contains(wanted), "{words:?}: {refusal}");
        }
        for text in [
            "",
            "Bridge",
            "tap=t,x",
            "tap=t,vhost",
            "tap=t,vhost=yes",
            "user,ip=10.0.0.2/24",
            "none,mac=02:00:00:00:00:01",
            "tap=t,ip=10.0.0.2",
            "user,",
        ] {
            assert!(network_arg(text).is_err(), "{text}");
        }
    }

    #[test]
    fn flags_for_one_network_apply_to_the_first() {
        let wishes = |words: &[&str]| flags(words).with_wishes().map_err(|error| error.to_string());
        let networks = wishes(&[
            "--network=user",
            "--network=name=web,alias=a",
            "--network=db",
            "--ip=10.86.0.9",
            "--network-alias=b",
            "--mac-address=02:00:00:00:00:07",
        ])
        .unwrap();
        let wish = |address: Option<&str>, aliases: &[&str]| Wish {
            address: address.map(|address| address.parse().unwrap()),
            is_required: address.is_some(),
            aliases: aliases.iter().map(ToString::to_string).collect(),
        };
        let wished: Vec<Wish> = networks.iter().map(|arg| arg.wish.clone()).collect();
        assert_eq!(wished, [Wish::default(), wish(Some("10.86.0.9"), &["a", "b"]), wish(None, &["b"])]);
        assert!(networks[0].mac.is_some() && networks[1].mac.is_none());
        for words in [&["--ip=10.86.0.9"][..], &["--network=user", "--network-alias=b"]] {
            assert!(wishes(words).unwrap_err().contains("need --network NAME"), "{words:?}");
        }
        assert!(wishes(&["--network=none", "--mac-address=02:00:00:00:00:07"]).is_err());
    }

    #[test]
    fn exposed_ports_are_published_once() {
        let mut network = flags(&["-p", "80"]);
        network.publish_all(&["80/tcp".to_owned(), "53/udp".to_owned()]).unwrap();
        assert_eq!(network.ports, ["80", "53/udp"].map(|port| port.parse().unwrap()));
        assert!(network.publish_all(&["http".to_owned()]).is_err());
    }

    #[test]
    fn addresses_on_a_tap_device_are_for_the_guest() {
        let arg = network_arg("tap=t,ip=10.0.0.2/24,ip=fd00::2/64,gateway=10.0.0.1").unwrap();
        assert_eq!(arg.addresses, [parse_address("10.0.0.2/24").unwrap(), parse_address("fd00::2/64").unwrap()]);
        assert_eq!(arg.gateways, ["10.0.0.1".parse::<IpAddr>().unwrap()]);
    }
}
