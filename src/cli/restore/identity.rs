//! What a restored machine has of its own: names, addresses and ports, by the flags of `husk restore` or by default.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::Route;

use crate::cli::network::{NetworkArg, network_arg};
use crate::config::{Attachment, MachineConfig, NetworkConfig, Publish, UserNetwork};
use crate::guest;
use crate::guest::network::{InterfaceSetup, NetworkSetup, on_devices};
use crate::guest::session::Change;
use crate::resources::bridge::{self, Wish};
use crate::resources::{net, ports};
use crate::state_dir::identity::{IdentityRecord, InterfaceRecord};

// The names and the connections of the machine.
#[derive(Debug, Args)]
pub(super) struct IdentityFlags {
    /// Host name of the machine [default: the one that was set with --hostname, or the machine's own name or ID]
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,

    /// Connect the machine to another network than the saved one; repeat for each of its interfaces
    ///
    /// The network must be of the same kind, as the guest has its devices already: `user` stays `user`, and tap devices
    /// and networks can replace each other. The options are those of `husk run`. A tap device without ip= keeps the
    /// addresses and gateways of the saved machine.
    #[arg(long = "network", alias = "net", value_name = "user|NAME|tap=NAME[,OPTION]...", value_parser = network_arg)]
    networks: Vec<NetworkArg>,

    /// Publish a machine's port to the host instead of those that the saved machine published; can be repeated
    ///
    /// Without HOST, the port of the host is a free one, which `husk port` shows. `none` publishes none. By default, the machine publishes the same ports as the saved one, which fails while that
    /// is running.
    #[arg(short = 'p', long = "publish", value_name = "[[IP:]HOST:]GUEST[/udp]|none", value_parser = published)]
    ports: Vec<Published>,

    /// Path of the vsock socket of a machine of `husk boot` [default: that of the saved machine]
    #[arg(long, value_name = "PATH")]
    vsock: Option<PathBuf>,
}

/// One `-p`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Published {
    Port(Publish),
    None,
}

fn published(text: &str) -> Result<Published, String> {
    if text == "none" { Ok(Published::None) } else { text.parse().map(Published::Port) }
}

/// The identity of a machine with husk's init.
pub(super) struct Own {
    /// What the guest becomes.
    pub change: Change,
    /// The same for the machine's record.
    pub record: IdentityRecord,
    /// Its networks, as long as this exists.
    pub _network: NetworkSetup,
}

impl IdentityFlags {
    /// Sets the networks in `config`, which are those of the saved machine with husk's init, for the machine `id` with the name
    /// `name`. If that is the saved machine itself, it keeps all that is still free.
    pub fn apply(&self, config: &mut MachineConfig, saved: &IdentityRecord, id: String, name: &str) -> Result<Own> {
        ensure!(self.vsock.is_none(), "--vsock is for machines of `husk boot`: husk itself uses this machine's");
        let is_same = saved.machine == id;
        self.check_networks(&config.networks)?;
        let mut setups = Vec::new();
        for (index, device) in config.networks.iter().enumerate() {
            let known = saved.interfaces.get(index).cloned().unwrap_or_default();
            setups.push(self.interface(index, device, known, name, is_same)?);
        }
        self.publish(setups.iter_mut().map(|setup| &mut setup.config), is_same)?;
        for setup in &mut setups {
            if let Some(lease) = &mut setup.lease {
                lease.publish(setup.config.to.ports())?;
            }
        }
        let network = NetworkSetup::new(setups, &saved.dns).with_names(&saved.names)?;
        let keeps_hostname = is_same || saved.is_hostname_chosen;
        let kept = keeps_hostname.then(|| saved.hostname.clone());
        let hostname = self.hostname.clone().or(kept).unwrap_or_else(|| name.to_owned());
        guest::check_hostname(&hostname)?;
        let mut identity = network.identity(&hostname);
        identity.interfaces = on_devices(identity.interfaces, &config.networks)?;
        config.networks.clone_from(&network.configs);
        let is_chosen = self.hostname.is_some() || saved.is_hostname_chosen;
        let record = network.record(id, hostname, is_chosen);
        // Only passt forgets connections while its machine is saved.
        let cut = !is_same || record.interfaces != saved.interfaces || config.networks.iter().any(is_user);
        Ok(Own { change: Change { identity, is_same, cut }, record, _network: network })
    }

    /// The same for a guest with its own init, which keeps its addresses.
    pub fn apply_outside(&self, config: &mut MachineConfig) -> Result<()> {
        ensure!(self.hostname.is_none(), "--hostname needs husk's init: this guest sets its host name itself");
        self.check_networks(&config.networks)?;
        for ((index, device), arg) in config.networks.iter_mut().enumerate().zip(&self.networks) {
            arg.check_for_running_guest()?;
            let Some(setup) = arg.interface_setup(None, index)? else { continue };
            *device = in_place_of(device, NetworkConfig { mac: device.mac, ..setup.config });
        }
        self.publish(config.networks.iter_mut(), false)?;
        if let Some(socket) = &self.vsock {
            config.vsock.as_mut().context("--vsock: the machine has no vsock device")?.socket.clone_from(socket);
        }
        Ok(())
    }

    /// Fails unless the flags replace each network by one of its kind.
    fn check_networks(&self, devices: &[NetworkConfig]) -> Result<()> {
        let (given, expected) = (self.networks.len(), devices.len());
        ensure!(
            given == 0 || given == expected,
            "the machine has {expected} network interfaces: use --network once for each of them"
        );
        for (arg, device) in self.networks.iter().zip(devices) {
            let is_same_kind = arg.is_user().is_some_and(|is_user| is_user == self::is_user(device));
            if !is_same_kind {
                let kinds = if is_user(device) { "user" } else { "tap=NAME or the name of a network" };
                bail!("a restored machine keeps the kind of its network: use --network with {kinds}");
            }
        }
        Ok(())
    }

    /// The interface `index` of the machine `name` in place of `device`, for which `known` was recorded.
    fn interface(
        &self,
        index: usize,
        device: &NetworkConfig,
        known: InterfaceRecord,
        name: &str,
        is_same: bool,
    ) -> Result<InterfaceSetup> {
        let kept = device.mac.filter(|_| is_same);
        let mac = kept.unwrap_or_else(|| net::mac_of(name, index));
        let shared = match &device.to {
            Attachment::Bridge { name: interface, .. } => bridge::name_of(interface),
            Attachment::User(_) | Attachment::Tap { .. } | Attachment::Interface { .. } => None,
        };
        let mut setup = match (self.networks.get(index), shared) {
            (Some(arg), _) => {
                let setup = arg.interface_setup(Some(name), index)?.context("the machine needs a network")?;
                InterfaceSetup { config: in_place_of(device, setup.config), ..setup }
            }
            (None, Some(network)) => {
                let former = known.addresses.iter().find_map(|address| match address.ip {
                    IpAddr::V4(ip) => Some(ip),
                    IpAddr::V6(_) => None,
                });
                let wish = Wish::former(former.filter(|_| is_same), known.aliases);
                let lease = bridge::join(network, name, mac, wish)?;
                let config = NetworkConfig { mac: Some(mac), ..device.clone() };
                InterfaceSetup { config, ..InterfaceSetup::leased(lease, mac) }
            }
            (None, None) => InterfaceSetup::from(NetworkConfig { mac: Some(mac), ..device.clone() }),
        };
        setup.config.mac.get_or_insert(mac);
        if setup.lease.is_none() && setup.addresses.is_empty() && shared.is_none() {
            setup.addresses = known.addresses;
            setup.routes = known.gateways.into_iter().map(Route::through).collect();
        }
        Ok(setup)
    }

    /// Sets the ports that are published. Without flags they are those of the saved machine, which fails early if it is another
    /// one and may still run.
    fn publish<'a>(&self, networks: impl Iterator<Item = &'a mut NetworkConfig>, is_same: bool) -> Result<()> {
        // User-mode networking, or else a network of husk's.
        let mut all: Vec<_> = networks.collect();
        let first = all
            .iter()
            .position(|network| is_user(network))
            .or_else(|| all.iter().position(|network| matches!(network.to, Attachment::Bridge { .. })));
        let user = first.and_then(|first| all.get_mut(first)).and_then(|network| match &mut network.to {
            Attachment::User(UserNetwork { ports, .. }) | Attachment::Bridge { ports, .. } => Some(ports),
            Attachment::Tap { .. } | Attachment::Interface { .. } => None,
        });
        match user {
            Some(_) if self.ports.is_empty() && is_same => {}
            Some(ports) if self.ports.is_empty() => {
                ports.iter().try_for_each(|port| {
                    ports::check_free(port).with_context(|| {
                        format!("publish {port} like the saved machine (`-p` publishes others, `-p none` none)")
                    })
                })?;
            }
            Some(own) => {
                let ports = self.ports.iter().filter_map(|published| match published {
                    Published::Port(port) => Some(port.clone()),
                    Published::None => None,
                });
                *own = ports::choose(&ports.collect::<Vec<_>>())?;
            }
            None if !self.ports.is_empty() => {
                bail!(
                    "-p requires a network that publishes ports, which the machine does not have: connect to its own address"
                )
            }
            None => {}
        }
        Ok(())
    }
}

/// `config` for the device of `saved`: user-mode networking keeps its options.
fn in_place_of(saved: &NetworkConfig, config: NetworkConfig) -> NetworkConfig {
    if is_user(saved) { NetworkConfig { to: saved.to.clone(), ..config } } else { config }
}

fn is_user(network: &NetworkConfig) -> bool {
    matches!(network.to, Attachment::User(_))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use clap::Parser;

    use super::*;
    use crate::config::{MacAddress, VsockConfig};
    use crate::guest::network::parse_address;
    use crate::state_dir::identity::Names;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        identity: IdentityFlags,
    }

    fn flags(words: &[&str]) -> IdentityFlags {
        Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.identity).unwrap()
    }

    const SAVED_MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 7]);

    fn on(to: Attachment) -> MachineConfig {
        let network = NetworkConfig { mac: Some(SAVED_MAC), ..NetworkConfig::of(to) };
        MachineConfig { networks: vec![network], ..MachineConfig::default() }
    }

    fn on_tap() -> MachineConfig {
        on(Attachment::Tap { name: "tap0".into() })
    }

    fn publishing(ports: &[&str]) -> MachineConfig {
        let ports = ports.iter().map(|port| port.parse().unwrap()).collect();
        on(Attachment::User(UserNetwork { ports, dns: vec!["192.0.2.53".parse().unwrap()] }))
    }

    /// The record of the machine `first`.
    fn saved(is_hostname_chosen: bool) -> IdentityRecord {
        let (address, gateway) = (parse_address("198.18.0.2/24").unwrap(), "198.18.0.1".parse().unwrap());
        IdentityRecord {
            machine: "first".into(),
            hostname: "web".into(),
            is_hostname_chosen,
            names: Names::default(),
            dns: vec!["192.0.2.54".parse().unwrap()],
            interfaces: vec![InterfaceRecord {
                addresses: vec![address],
                gateways: vec![gateway],
                aliases: Vec::new(),
            }],
        }
    }

    fn apply(
        words: &[&str],
        mut config: MachineConfig,
        id: &str,
        chosen: bool,
    ) -> Result<(Own, MachineConfig), String> {
        let own = flags(words).apply(&mut config, &saved(chosen), id.to_owned(), "copy");
        own.map(|own| (own, config)).map_err(|error| format!("{error:#}"))
    }

    #[test]
    fn a_copy_has_a_mac_address_and_a_host_name_of_its_own() {
        let (own, config) = apply(&[], on_tap(), "second", false).unwrap();
        let Change { identity, is_same, cut } = own.change;
        assert_eq!((identity.hostname.as_str(), is_same, cut), ("copy", false, true));
        let interface = &identity.interfaces[0];
        assert_eq!((interface.device_mac, interface.mac), (SAVED_MAC.0, net::mac_of("copy", 0).0));
        assert_eq!(config.networks[0].mac, Some(net::mac_of("copy", 0)));
        // The addresses on a tap device were the user's choice, as are the DNS servers.
        assert_eq!(
            (&interface.addresses, own.record.interfaces),
            (&saved(false).interfaces[0].addresses, saved(false).interfaces)
        );
        assert!(identity.hosts.unwrap().ends_with(b"198.18.0.2\tcopy\n"));
        assert!(identity.resolv_conf.unwrap().ends_with(b"nameserver 192.0.2.54\n"));
        assert_eq!(own.record.machine, "second");
        for (words, chosen, wanted) in
            [(&[][..], true, "web"), (&["--hostname=box"], true, "box"), (&["--hostname=box"], false, "box")]
        {
            let (own, _) = apply(words, on_tap(), "second", chosen).unwrap();
            assert_eq!((own.record.hostname.as_str(), own.record.is_hostname_chosen), (wanted, true));
        }
        assert!(apply(&["--hostname=a b"], on_tap(), "second", false).err().unwrap().contains("invalid host name"));
    }

    #[test]
    fn the_saved_machine_itself_stays_as_it_is() {
        let (own, config) = apply(&[], on_tap(), "first", false).unwrap();
        assert_eq!((config, &own.record), (on_tap(), &saved(false)));
        assert_eq!((own.change.is_same, own.change.cut, own.change.identity.hostname.as_str()), (true, false, "web"));
        let (own, _) = apply(&[], publishing(&[]), "first", false).unwrap();
        assert!(own.change.is_same && own.change.cut, "passt is another one");
    }

    #[test]
    fn networks_are_replaced_by_others_of_their_kind() {
        let to = ["--network=tap=tap1,ip=198.18.1.3/24,mac=02:00:00:00:00:09"];
        let (own, config) = apply(&to, on_tap(), "second", false).unwrap();
        let wanted = NetworkConfig {
            mac: "02:00:00:00:00:09".parse().ok(),
            ..NetworkConfig::of(Attachment::Tap { name: "tap1".into() })
        };
        assert_eq!(config.networks, [wanted]);
        assert_eq!(own.change.identity.interfaces[0].addresses, [parse_address("198.18.1.3/24").unwrap()]);
        let (own, _) = apply(&["--network=tap=tap1"], on_tap(), "second", false).unwrap();
        assert_eq!(own.record.interfaces, saved(false).interfaces);
        let refusal = |words: &[&str], config| apply(words, config, "second", false).err().unwrap();
        assert!(refusal(&["--network=user"], on_tap()).contains("use --network with tap=NAME"));
        assert!(refusal(&["--network=none"], on_tap()).contains("use --network with tap=NAME"));
        assert!(refusal(&["--network=tap=t"], publishing(&[])).contains("use --network with user"));
        assert!(refusal(&["--network=user", "--network=user"], publishing(&[])).contains("has 1 network interfaces"));
        assert!(refusal(&["--vsock=v.sock"], on_tap()).contains("--vsock is for machines of `husk boot`"));
    }

    #[test]
    fn ports_are_those_of_the_saved_machine_others_or_none() {
        let taken = TcpListener::bind("0.0.0.0:0").unwrap();
        let port = format!("{}:80", taken.local_addr().unwrap().port());
        let ports = |words: &[&str], id: &str| -> Result<Vec<String>, String> {
            let (_, config) = apply(words, publishing(&[&port]), id, false)?;
            let Attachment::User(user) = &config.networks[0].to else { unreachable!() };
            assert_eq!(user.dns.len(), 1);
            Ok(user.ports.iter().map(ToString::to_string).collect())
        };
        let refusal = ports(&[], "second").unwrap_err();
        assert!(refusal.contains("is already in use") && refusal.contains("-p none"), "{refusal}");
        let kept = vec![port.replace(':', "->") + "/tcp"];
        assert_eq!(ports(&[], "first"), Ok(kept.clone()), "it is checked when they are opened");
        assert_eq!(ports(&["-p", "none"], "second"), Ok(Vec::new()));
        assert_eq!(ports(&["-p", "81:80", "--network=user"], "second"), Ok(vec!["81->80/tcp".into()]));
        let chosen = ports(&["-p", "80"], "second").unwrap();
        assert!(chosen.len() == 1 && chosen[0].ends_with("->80/tcp") && !chosen[0].starts_with("0->"), "{chosen:?}");
        drop(taken);
        assert_eq!(ports(&[], "second"), Ok(kept));
        assert!(
            apply(&["-p", "81:80"], on_tap(), "second", false)
                .err()
                .unwrap()
                .contains("-p requires a network that publishes")
        );
    }

    #[test]
    fn a_guest_with_its_own_init_keeps_what_it_knows() {
        let socket = |path: &str| Some(VsockConfig { socket: path.into(), cid: 9 });
        let apply = |words: &[&str], config: MachineConfig| {
            let mut config = MachineConfig { vsock: socket("/v.sock"), ..config };
            let applied = flags(words).apply_outside(&mut config);
            applied.map(|()| config).map_err(|error| format!("{error:#}"))
        };
        assert_eq!(apply(&[], on_tap()).unwrap().networks, on_tap().networks);
        let config = apply(&["--network=tap=tap1", "--vsock=/other.sock"], on_tap()).unwrap();
        let wanted =
            NetworkConfig { mac: Some(SAVED_MAC), ..NetworkConfig::of(Attachment::Tap { name: "tap1".into() }) };
        assert_eq!((config.networks, config.vsock), (vec![wanted], socket("/other.sock")));
        assert_eq!(apply(&["-p", "81:80"], publishing(&["80:80"])).unwrap().networks, publishing(&["81:80"]).networks);
        for words in
            [&["--hostname=box"][..], &["--network=tap=t,ip=198.18.0.3/24"], &["--network=tap=t,mac=02:00:00:00:00:09"]]
        {
            assert!(apply(words, on_tap()).is_err(), "{words:?}");
        }
        let mut config = on_tap();
        assert!(flags(&["--vsock=v"]).apply_outside(&mut config).unwrap_err().to_string().contains("no vsock device"));
    }
}
