//! Configures network interfaces through netlink.

use std::fs;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use husk_protocol::{Interface, InterfaceAddress, Route};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use nix::unistd::{read, write};

use crate::errors::{Context, Failure};

/// How long to wait for a driver to probe its device.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(5);
/// The loopback interface is the first in every network namespace.
const LOOPBACK_INDEX: u32 = 1;

// linux/netlink.h
const NLM_F_REQUEST: u16 = 0x01;
const NLM_F_ACK: u16 = 0x04;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_CREATE: u16 = 0x400;
/// The size of `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
const ALIGNMENT: usize = 4;
// linux/rtnetlink.h, linux/if_link.h, linux/if_addr.h
const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const IFLA_ADDRESS: u16 = 1;
const IFLA_MTU: u16 = 4;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
/// The address is unique, and usable immediately.
const IFA_F_NODAD: u8 = 0x02;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_UNIVERSE: u8 = 0;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;
const IFF_UP: u32 = 1;

/// A netlink connection.
pub struct Network(OwnedFd);

impl Network {
    /// Opens the connection.
    pub fn open() -> Result<Network, Failure> {
        let kind = (AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::NetlinkRoute);
        socket(kind.0, kind.1, kind.2, kind.3).map(Network).context("open a netlink socket")
    }

    /// Brings the loopback interface up.
    pub fn bring_loopback_up(&self) -> Result<(), Failure> {
        self.bring_up(LOOPBACK_INDEX, None, None).context("bring up the loopback interface")
    }

    /// Configures an interface and brings it up.
    pub fn set_up(&self, interface: &Interface) -> Result<(), Failure> {
        let (name, index) = find(interface.device_mac, DEVICE_TIMEOUT)?;
        self.configure(&name, index, interface)
    }

    /// Configures an interface that was configured like `known`. If that differs, it is taken back first, with all routes through
    /// the interface.
    pub fn change(&self, known: &Interface, interface: &Interface) -> Result<(), Failure> {
        let settings = |of: &Interface| (of.mac, of.mtu_bytes, of.addresses.clone(), of.routes.clone());
        if settings(known) == settings(interface) {
            return Ok(());
        }
        let (name, index) = find(interface.device_mac, Duration::ZERO)?;
        self.take_down(index, known).context(format_args!("take {name} down"))?;
        self.configure(&name, index, interface)
    }

    fn configure(&self, name: &str, index: u32, interface: &Interface) -> Result<(), Failure> {
        if !interface.addresses.is_empty() {
            // Router advertisements are not needed. And duplicate address detection would delay the link-local address,
            // which is derived from our MAC, by a second: passt sends traffic of the host itself to that address, and
            // resets connections if the guest has not yet used it.
            for setting in ["accept_ra", "accept_dad"] {
                let _ = fs::write(format!("/proc/sys/net/ipv6/conf/{name}/{setting}"), "0");
            }
        }
        let mac = Some(interface.mac).filter(|mac| *mac != interface.device_mac);
        self.bring_up(index, mac, interface.mtu_bytes).context(format_args!("bring up {name}"))?;
        for InterfaceAddress { ip, prefix } in &interface.addresses {
            self.ask(&new_address(index, *ip, *prefix))
                .context(format_args!("give {name} the address {ip}/{prefix}"))?;
        }
        for route in &interface.routes {
            let Some(message) = new_route(index, route) else { continue };
            self.ask(&message).context(format_args!("add the route {route:?} on {name}"))?;
        }
        Ok(())
    }

    /// Takes an interface down, with its routes and its IPv6 addresses, of which one is derived from the MAC address. Takes back
    /// its IPv4 addresses.
    fn take_down(&self, index: u32, known: &Interface) -> nix::Result<()> {
        self.ask(&link(index, None, None, false))?;
        for InterfaceAddress { ip, prefix } in known.addresses.iter().filter(|address| address.ip.is_ipv4()) {
            match self.ask(&old_address(index, *ip, *prefix)) {
                // Somebody else has removed it.
                Ok(()) | Err(Errno::EADDRNOTAVAIL) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Brings an interface up, after giving it the MAC address `mac` and the MTU `mtu_bytes`, as far as there are any.
    fn bring_up(&self, index: u32, mac: Option<[u8; 6]>, mtu_bytes: Option<u32>) -> nix::Result<()> {
        self.ask(&link(index, mac, mtu_bytes, true))
    }

    /// Sends a request and receives the kernel's response, which is available immediately.
    fn ask(&self, message: &Message) -> nix::Result<()> {
        write(&self.0, &message.finish())?;
        let mut answer = [0; 4096];
        let count = read(&self.0, &mut answer)?;
        // struct nlmsgerr: a negative error, or 0.
        let code = answer.get(..count).and_then(|answer| answer.get(HEADER_BYTES..)?.first_chunk::<4>());
        match code.map(|code| i32::from_ne_bytes(*code)) {
            Some(0) => Ok(()),
            Some(code) => Err(Errno::from_raw(code.wrapping_neg())),
            None => Err(Errno::EPROTO),
        }
    }
}

/// A request under construction: a header and its payload.
struct Message {
    kind: u16,
    flags: u16,
    body: Vec<u8>,
}

impl Message {
    fn new(kind: u16, flags: u16) -> Message {
        Message { kind, flags: flags | NLM_F_REQUEST | NLM_F_ACK, body: Vec::new() }
    }

    fn put(&mut self, bytes: &[u8]) {
        self.body.extend_from_slice(bytes);
    }

    /// Appends an attribute: length, type and value, padded.
    fn attribute(&mut self, kind: u16, value: &[u8]) {
        self.put(&(value.len() as u16 + 4).to_ne_bytes());
        self.put(&kind.to_ne_bytes());
        self.put(value);
        self.body.resize(self.body.len().next_multiple_of(ALIGNMENT), 0);
    }

    fn finish(&self) -> Vec<u8> {
        let len = (HEADER_BYTES + self.body.len()) as u32;
        let mut bytes = len.to_ne_bytes().to_vec();
        bytes.extend(self.kind.to_ne_bytes());
        bytes.extend(self.flags.to_ne_bytes());
        // No sequence number or port is needed: there is one request at a time.
        bytes.extend([0; 8]);
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

/// The interface is up or down, and has the MAC address `mac` and the MTU `mtu_bytes` if there are any.
fn link(index: u32, mac: Option<[u8; 6]>, mtu_bytes: Option<u32>, is_up: bool) -> Message {
    let mut message = Message::new(RTM_NEWLINK, 0);
    // struct ifinfomsg: family, padding, type, index, flags and which of them change. The kernel changes them last.
    message.put(&[0; 4]);
    message.put(&index.to_ne_bytes());
    message.put(&(if is_up { IFF_UP } else { 0 }).to_ne_bytes());
    message.put(&IFF_UP.to_ne_bytes());
    if let Some(mac) = mac {
        message.attribute(IFLA_ADDRESS, &mac);
    }
    if let Some(mtu_bytes) = mtu_bytes {
        message.attribute(IFLA_MTU, &mtu_bytes.to_ne_bytes());
    }
    message
}

fn new_address(index: u32, ip: IpAddr, prefix: u8) -> Message {
    address(Message::new(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE), index, ip, prefix)
}

fn old_address(index: u32, ip: IpAddr, prefix: u8) -> Message {
    address(Message::new(RTM_DELADDR, 0), index, ip, prefix)
}

fn address(mut message: Message, index: u32, ip: IpAddr, prefix: u8) -> Message {
    let (family, bytes) = family(ip);
    message.put(&[family, prefix, IFA_F_NODAD, RT_SCOPE_UNIVERSE]);
    message.put(&index.to_ne_bytes());
    message.attribute(IFA_LOCAL, &bytes);
    message.attribute(IFA_ADDRESS, &bytes);
    message
}

/// A route, unless it says nothing.
fn new_route(index: u32, route: &Route) -> Option<Message> {
    let mut message = Message::new(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE);
    let destination = route.destination.filter(|destination| destination.prefix > 0);
    let (family_number, _) = family(route.gateway.or(destination.map(|destination| destination.ip))?);
    let prefix = destination.map_or(0, |destination| destination.prefix);
    let scope = if route.gateway.is_some() { RT_SCOPE_UNIVERSE } else { RT_SCOPE_LINK };
    // struct rtmsg: family, lengths of destination and source, type of service, table, protocol, scope, type, flags.
    message.put(&[family_number, prefix, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST, 0, 0, 0, 0]);
    if let Some(destination) = destination {
        message.attribute(RTA_DST, &family(destination.ip).1);
    }
    if let Some(gateway) = route.gateway {
        message.attribute(RTA_GATEWAY, &family(gateway).1);
    }
    message.attribute(RTA_OIF, &index.to_ne_bytes());
    Some(message)
}

fn family(ip: IpAddr) -> (u8, Vec<u8>) {
    match ip {
        IpAddr::V4(ip) => (libc::AF_INET as u8, ip.octets().to_vec()),
        IpAddr::V6(ip) => (libc::AF_INET6 as u8, ip.octets().to_vec()),
    }
}

/// Waits for the interface with this MAC address, and returns its name and index.
fn find(mac: [u8; 6], timeout: Duration) -> Result<(String, u32), Failure> {
    let wanted = mac.map(|byte| format!("{byte:02x}")).join(":");
    let started = Instant::now();
    loop {
        for entry in fs::read_dir("/sys/class/net").context("list network interfaces")?.flatten() {
            let read = |file: &str| fs::read_to_string(entry.path().join(file)).unwrap_or_default();
            if read("address").trim() == wanted
                && let Ok(index) = read("ifindex").trim().parse()
            {
                return Ok((entry.file_name().to_string_lossy().into_owned(), index));
            }
        }
        if started.elapsed() > timeout {
            return Err(Failure::new(format_args!(
                "no network interface {wanted}: does the kernel have a virtio-net driver?"
            )));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_have_their_stated_length() {
        let v6: IpAddr = "fd00::15".parse().unwrap();
        let up = link(2, Some([2, 0, 0, 0, 0, 1]), None, true);
        assert_eq!(up.finish()[24..], [1, 0, 0, 0, 1, 0, 0, 0, 10, 0, 1, 0, 2, 0, 0, 0, 0, 1, 0, 0]);
        assert_eq!(link(2, None, None, false).finish()[24..], [0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(link(2, None, Some(1400), true).finish()[32..], [8, 0, 4, 0, 120, 5, 0, 0]);
        for message in [
            up,
            old_address(2, v6, 64),
            new_address(2, "10.0.2.15".parse().unwrap(), 24),
            new_route(2, &Route::through(v6)).unwrap(),
        ] {
            let bytes = message.finish();
            assert_eq!(u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize, bytes.len());
            assert_eq!(bytes.len() % ALIGNMENT, 0);
        }
        let bytes = new_address(2, "10.0.2.15".parse().unwrap(), 24).finish();
        assert_eq!(bytes[16..24], [2, 24, 2, 0, 2, 0, 0, 0]);
        assert_eq!(bytes[24..32], [8, 0, 2, 0, 10, 0, 2, 15]);
    }

    #[test]
    fn the_kernel_responds_to_requests() {
        let network = Network::open().unwrap();
        // For root the interface does not exist; other users lack permission.
        let answer = network.bring_up(0x7fff_fff0, None, None);
        assert!(matches!(answer, Err(Errno::ENODEV | Errno::EPERM)), "{answer:?}");
        let refusal = find([2, 0xff, 0xff, 0xff, 0xff, 0xff], Duration::ZERO).unwrap_err();
        assert!(refusal.message.contains("02:ff:ff:ff:ff:ff"), "{}", refusal.message);
    }
}
