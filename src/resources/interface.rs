//! An interface of a network namespace that a machine takes over: its frames go through a tap device, and the guest has its
//! addresses and routes.
//!
//! ```text
//! frame to the interface ─ ingress ─ redirect ─> tap device ─> guest
//! frame of the guest ─> tap device ─ ingress ─ redirect ─> the interface's other end
//! ```
//!
//! The interface keeps its addresses, so that whoever has set it up finds it unchanged, but the namespace's own network stack
//! receives nothing from it any more.

use std::fs;
use std::io;
use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use husk_protocol::{InterfaceAddress, Route};
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteProtocol, RouteType};
use netlink_packet_route::tc::{
    TcAction, TcActionAttribute, TcActionMirror, TcActionMirrorOption, TcActionOption, TcActionType, TcAttribute,
    TcFilterU32, TcFilterU32Option, TcHandle, TcMessage, TcMirror, TcMirrorActionType, TcOption, TcU32Key,
    TcU32Selector,
};

use super::netlink::Netlink;
use crate::config::MacAddress;

/// All protocols (linux/if_ether.h), in network byte order as tc(8) passes it.
const ETH_P_ALL: u16 = 0x0003_u16.to_be();
/// The priority of husk's filters, by which they are told from those of others, which come first: `hu` in ASCII.
const PRIORITY: u32 = 0x6875;
/// The index of a filter's first action.
const FIRST_ACTION: u16 = 1;

/// An interface as its namespace has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// Its MAC address.
    pub mac: MacAddress,
    /// Its MTU.
    pub mtu_bytes: Option<u32>,
    /// Its addresses; none of link scope, which every system makes itself.
    pub addresses: Vec<InterfaceAddress>,
    /// The routes through it apart from those that follow from its addresses, in an order in which each gateway can be reached
    /// when it is named.
    pub routes: Vec<Route>,
}

/// The Ethernet interfaces of the calling thread's network namespace that are up, by their indices.
pub fn list() -> Result<Vec<Interface>> {
    let netlink = Netlink::open().context("open a netlink socket")?;
    let links = links(&netlink)?;
    let addresses =
        netlink.list(RouteNetlinkMessage::GetAddress(AddressMessage::default())).context("list addresses")?;
    let routes = netlink.list(RouteNetlinkMessage::GetRoute(RouteMessage::default())).context("list routes")?;
    let interface = |link: &LinkMessage| {
        let (name, mac) = ethernet(link)?;
        let index = link.header.index;
        let addresses = addresses.iter().filter_map(|message| address_of(message, index)).collect();
        let mut routes: Vec<Route> = routes.iter().filter_map(|message| route_of(message, index)).collect();
        routes.sort_by_key(|route| route.gateway.is_some());
        Some(Interface { name, mac, mtu_bytes: mtu_of(link), addresses, routes })
    };
    Ok(links.iter().filter_map(interface).collect())
}

fn links(netlink: &Netlink) -> Result<Vec<LinkMessage>> {
    let listed = netlink.list(RouteNetlinkMessage::GetLink(LinkMessage::default())).context("list interfaces")?;
    let link = |message| match message {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    };
    Ok(listed.into_iter().filter_map(link).collect())
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn mtu_of(link: &LinkMessage) -> Option<u32> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    })
}

/// The interface `name` of the calling thread's network namespace, which must be up. Fails if a machine cannot take it over.
pub fn find(name: &str) -> Result<Interface> {
    let found = list()?.into_iter().find(|interface| interface.name == name);
    found.with_context(|| {
        format!("network interface {name}: it does not exist, is down, or is not an Ethernet interface")
    })
}

/// The name and MAC address of an Ethernet interface that is up.
fn ethernet(link: &LinkMessage) -> Option<(String, MacAddress)> {
    let is_used = link.header.link_layer_type == LinkLayerType::Ether && link.header.flags.contains(LinkFlags::Up);
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    });
    name_of(link).map(str::to_owned).zip(mac.map(MacAddress)).filter(|_| is_used)
}

fn address_of(message: &RouteNetlinkMessage, index: u32) -> Option<InterfaceAddress> {
    let RouteNetlinkMessage::NewAddress(message) = message else { return None };
    let header = &message.header;
    if header.index != index || header.scope == AddressScope::Link {
        return None;
    }
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(ip) => Some(*ip),
        _ => None,
    });
    // IPv6 has no local address apart from the address.
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(ip) => Some(*ip),
        _ => None,
    });
    Some(InterfaceAddress { ip: local.or(address)?, prefix: header.prefix_len })
}

fn route_of(message: &RouteNetlinkMessage, index: u32) -> Option<Route> {
    let RouteNetlinkMessage::NewRoute(RouteMessage { header, attributes, .. }) = message else { return None };
    let through = |attribute: &RouteAttribute| *attribute == RouteAttribute::Oif(index);
    let is_own = header.table == RouteHeader::RT_TABLE_MAIN
        && header.kind == RouteType::Unicast
        && header.protocol != RouteProtocol::Kernel
        && attributes.iter().any(through);
    if !is_own {
        return None;
    }
    let (mut destination, mut gateway) = (None, None);
    for attribute in attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address),
            RouteAttribute::Gateway(address) => gateway = ip(address),
            _ => {}
        }
    }
    let destination = destination.map(|ip| InterfaceAddress { ip, prefix: header.destination_prefix_length });
    // A default route without a gateway does not say whether it is one of IPv4.
    (destination.is_some() || gateway.is_some()).then_some(Route { destination, gateway })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some((*ip).into()),
        RouteAddress::Inet6(ip) => Some((*ip).into()),
        _ => None,
    }
}

/// An interface whose frames a tap device sends. It gets them back when this is dropped.
pub struct TakenOver {
    netlink: Netlink,
    index: u32,
}

impl Drop for TakenOver {
    fn drop(&mut self) {
        // The interface may be gone, and its namespace with it.
        let _ = give_back(&self.netlink, self.index);
    }
}

/// Connects the tap device `tap` with the interface `interface` of the calling thread's network namespace: the frames that
/// either receives are sent by the other, until the result is dropped. The tap device gets the interface's MTU. Fails if another
/// machine has the interface; what one that was killed has left there is replaced.
pub fn take_over(interface: &str, tap: &str) -> Result<TakenOver> {
    let netlink = Netlink::open().context("open a netlink socket")?;
    let links = links(&netlink)?;
    let find = |name: &str| {
        let found = links.iter().find(|link| name_of(link) == Some(name));
        found.with_context(|| format!("there is no interface {name}"))
    };
    let (taken, to) = (find(interface)?, find(tap)?.header.index);
    let (from, mtu) = (taken.header.index, mtu_of(taken).with_context(|| format!("{interface} has no MTU"))?);
    // It has no address of its own to announce to the guest. Without IPv6 there is nothing to disable.
    let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{tap}/disable_ipv6"), "1");
    let mut up = LinkMessage::default();
    (up.header.index, up.header.flags, up.header.change_mask) = (to, LinkFlags::Up, LinkFlags::Up);
    up.attributes.push(LinkAttribute::Mtu(mtu));
    netlink.change(RouteNetlinkMessage::SetLink(up), 0).with_context(|| format!("bring up {tap}"))?;
    let context =
        |name| format!("redirect the frames of {name} (needs the kernel modules sch_ingress, cls_u32 and act_mirred)");
    redirect(&netlink, to, from).with_context(|| context(tap))?;
    ensure!(!is_taken(&netlink, from, &links), "network interface {interface}: another machine has taken it over");
    // There may be nothing to give back.
    let _ = give_back(&netlink, from);
    let taken = TakenOver { netlink, index: from };
    redirect(&taken.netlink, from, to).with_context(|| context(interface))?;
    Ok(taken)
}

/// Whether the interface with this index has a filter of husk's that leads to one of `links`.
fn is_taken(netlink: &Netlink, index: u32, links: &[LinkMessage]) -> bool {
    let mut all = TcMessage::with_index(index.cast_signed());
    all.header.parent = INGRESS;
    // Without an ingress discipline there are none.
    let filters = netlink.list(RouteNetlinkMessage::GetTrafficFilter(all)).unwrap_or_default();
    let exists = |target: u32| links.iter().any(|link| link.header.index == target);
    filters.iter().filter_map(target_of).any(exists)
}

/// The index of the interface that a filter of husk's leads to.
fn target_of(filter: &RouteNetlinkMessage) -> Option<u32> {
    let RouteNetlinkMessage::NewTrafficFilter(filter) = filter else { return None };
    let options = filter.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Options(options) if filter.header.info >> 16 == PRIORITY => Some(options),
        _ => None,
    })?;
    let actions = options.iter().find_map(|option| match option {
        TcOption::U32(TcFilterU32Option::Action(actions)) => Some(actions),
        _ => None,
    })?;
    let options = actions.iter().flat_map(|action| &action.attributes).find_map(|attribute| match attribute {
        TcActionAttribute::Options(options) => Some(options),
        _ => None,
    })?;
    options.iter().find_map(|option| match option {
        TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror)) => Some(mirror.ifindex),
        _ => None,
    })
}

/// Removes husk's filter from an interface, and its ingress discipline if that has no other filter.
fn give_back(netlink: &Netlink, index: u32) -> io::Result<()> {
    let mut filter = TcMessage::with_index(index.cast_signed());
    (filter.header.parent, filter.header.info) = (INGRESS, PRIORITY << 16);
    netlink.change(RouteNetlinkMessage::DelTrafficFilter(filter.clone()), 0)?;
    filter.header.info = 0;
    if netlink.list(RouteNetlinkMessage::GetTrafficFilter(filter))?.is_empty() {
        let mut qdisc = TcMessage::with_index(index.cast_signed());
        (qdisc.header.handle, qdisc.header.parent) = (INGRESS, TcHandle::INGRESS);
        netlink.change(RouteNetlinkMessage::DelQueueDiscipline(qdisc), 0)?;
    }
    Ok(())
}

/// Makes the interface `to` send every frame that the interface `from` receives (tc-mirred(8)). Both are indices.
fn redirect(netlink: &Netlink, from: u32, to: u32) -> io::Result<()> {
    let mut qdisc = TcMessage::with_index(from.cast_signed());
    (qdisc.header.handle, qdisc.header.parent) = (INGRESS, TcHandle::INGRESS);
    qdisc.attributes = vec![TcAttribute::Kind("ingress".into())];
    match netlink.change(RouteNetlinkMessage::NewQueueDiscipline(qdisc), NLM_F_CREATE | NLM_F_EXCL) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let mut filter = TcMessage::with_index(from.cast_signed());
    filter.header.parent = INGRESS;
    filter.header.info = PRIORITY << 16 | u32::from(ETH_P_ALL);
    filter.attributes = vec![
        TcAttribute::Kind(TcFilterU32::KIND.into()),
        TcAttribute::Options(vec![
            TcOption::U32(TcFilterU32Option::Selector(anything())),
            TcOption::U32(TcFilterU32Option::Action(vec![redirection(to)])),
        ]),
    ];
    netlink.change(RouteNetlinkMessage::NewTrafficFilter(filter), NLM_F_CREATE | NLM_F_EXCL)
}

/// The handle of the ingress discipline, `ffff:`.
const INGRESS: TcHandle = TcHandle { major: u16::MAX, minor: 0 };

/// Selects every frame: a comparison of no bits.
fn anything() -> TcU32Selector {
    let mut selector = TcU32Selector::default();
    selector.flags = netlink_packet_route::tc::TcU32SelectorFlags::Terminal;
    selector.nkeys = 1;
    selector.keys = vec![TcU32Key::default()];
    selector
}

/// The frame is sent by the interface `to`, and by nobody else.
fn redirection(to: u32) -> TcAction {
    let mut mirror = TcMirror::default();
    (mirror.eaction, mirror.ifindex) = (TcMirrorActionType::EgressRedir, to);
    mirror.generic.action = TcActionType::Stolen;
    let mut action = TcAction::default();
    action.tab = FIRST_ACTION;
    action.attributes = vec![
        TcActionAttribute::Kind(TcActionMirror::KIND.into()),
        TcActionAttribute::Options(vec![TcActionOption::Mirror(TcActionMirrorOption::Parms(mirror))]),
    ];
    action
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::UdpSocket;
    use std::os::unix::fs::OpenOptionsExt;
    use std::thread;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::backend::net::HEADER_BYTES;
    use crate::resources::bridge::tests::alone;
    use crate::resources::programs::run;
    use crate::sys;

    const TIMEOUT: Duration = Duration::from_secs(10);

    /// A pair of connected interfaces, `own` and `other`, the first as an engine for containers leaves it.
    fn make_pair() {
        let ip = |words: &str| run("ip", &words.split(' ').collect::<Vec<_>>()).unwrap();
        ip("link add own address 02:00:00:00:00:07 mtu 1400 type veth peer name other");
        ip("link set own up");
        ip("link set other up");
        ip("address add 198.51.100.2/24 dev own");
        ip("address add 203.0.113.9/32 dev own");
        ip("address add 192.0.2.1/24 dev other");
        // In this order the first could not be reached yet.
        ip("route add default via 169.254.1.1 dev own onlink");
        ip("route add 169.254.1.1 dev own scope link");
        ip("route add 10.9.0.0/16 via 198.51.100.1");
    }

    #[test]
    fn an_interface_has_what_its_namespace_has_given_it() {
        alone(|_| {
            make_pair();
            let interfaces = list().unwrap();
            let own = interfaces.iter().find(|interface| interface.name == "own").unwrap();
            assert_eq!(own.mac, MacAddress([2, 0, 0, 0, 0, 7]));
            let address = |ip: &str, prefix| InterfaceAddress { ip: ip.parse().unwrap(), prefix };
            assert_eq!(own.addresses, [address("198.51.100.2", 24), address("203.0.113.9", 32)]);
            let (link, routes) = own.routes.split_first().unwrap();
            assert_eq!(*link, Route { destination: Some(address("169.254.1.1", 32)), gateway: None });
            let far = Route { destination: Some(address("10.9.0.0", 16)), gateway: "198.51.100.1".parse().ok() };
            assert!(routes.contains(&Route::through("169.254.1.1".parse().unwrap())) && routes.contains(&far));
            assert_eq!(routes.len(), 2);
            // Loopback is no Ethernet interface.
            assert_eq!(interfaces.len(), 2);
            assert_eq!(find("own").unwrap(), *own);
            assert!(find("lo").unwrap_err().to_string().starts_with("network interface lo: "));
        });
    }

    #[test]
    fn a_tap_device_sends_what_the_interface_receives() {
        alone(|_| {
            make_pair();
            let tun = File::options().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun");
            let mut tap = tun.unwrap();
            let name = sys::net::attach_tap(&tap, "husktap%d", HEADER_BYTES, false).unwrap();
            let taken = take_over("own", &name).unwrap();
            assert!(take_over("own", "lo").is_err_and(|error| error.to_string().contains("another machine")));
            assert_eq!(sys::net::interface_mtu(&name).unwrap(), 1400);
            // A frame that the interface receives.
            let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
            socket.set_broadcast(true).unwrap();
            socket.send_to(b"to the guest", "192.0.2.255:9").unwrap();
            let started = Instant::now();
            let mut buffer = [0; 2048];
            loop {
                let count = tap.read(&mut buffer).unwrap_or_default();
                if buffer[..count].ends_with(b"to the guest") {
                    break;
                }
                assert!(started.elapsed() < TIMEOUT, "no frame");
                thread::sleep(Duration::from_millis(1));
            }
            // And one that it sends, of a protocol for experiments.
            let before = received("other");
            let mut frame = vec![0; HEADER_BYTES];
            frame.extend([0xff; 6]);
            frame.extend([2, 0, 0, 0, 0, 7, 0x88, 0xb5]);
            frame.resize(HEADER_BYTES + 60, 0);
            tap.write_all(&frame).unwrap();
            while received("other") == before {
                assert!(started.elapsed() < TIMEOUT, "no frame from the tap device");
                thread::sleep(Duration::from_millis(1));
            }
            let disciplines = || run_for_output(&["qdisc", "show", "dev", "own"]);
            assert!(disciplines().contains("ingress"));
            drop(taken);
            assert!(!disciplines().contains("ingress"), "{}", disciplines());
            // One that is not given back leads nowhere when its tap device is gone, and is replaced.
            std::mem::forget(take_over("own", &name).unwrap());
            drop(tap);
            // A process that another test has started may have it for a moment longer.
            while fs::read_to_string("/proc/thread-self/net/dev").unwrap().contains(&format!("{name}:")) {
                assert!(started.elapsed() < 2 * TIMEOUT, "the tap device stays");
                thread::sleep(Duration::from_millis(1));
            }
            let tap = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
            let name = sys::net::attach_tap(&tap, "husktap%d", HEADER_BYTES, false).unwrap();
            drop(take_over("own", &name).unwrap());
            assert!(!disciplines().contains("ingress"), "{}", disciplines());
        });
    }

    fn run_for_output(words: &[&str]) -> String {
        let output = std::process::Command::new("tc").args(words).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    /// How many frames an interface has received (proc(5), /proc/net/dev).
    fn received(interface: &str) -> u64 {
        let devices = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let line = devices.lines().find_map(|line| line.trim().strip_prefix(interface)?.strip_prefix(':')).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}
