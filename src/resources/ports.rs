//! Published ports: checks that they are available, and serializes concurrent starts that want the same ones.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind as bind_socket, socket_with};

use crate::config::{PortForward, Protocol, Publish};

/// Ports are locked by their remainder modulo this number: few enough for a lock each, while consecutive ports use
/// different locks.
const LOCKS: u16 = 64;
/// How long another start may take. Longer waits mean that the lock is not held by a start of husk, and it is ignored.
const BIND_TIMEOUT: Duration = Duration::from_secs(10);

/// The exclusive right of this process to check and open ports in this network namespace. passt itself does not detect
/// conflicts: if a port is taken in one address family, it silently serves only the other.
pub struct Turn {
    _locks: Vec<UnixListener>,
}

impl Turn {
    /// Waits for exclusive access to `ports`, until the returned value is dropped or the process exits.
    pub fn take(ports: &[PortForward]) -> Turn {
        let mut turns: Vec<u16> = ports.iter().flat_map(numbers).map(|number| number % LOCKS).collect();
        // All processes lock in the same order, so that they cannot deadlock.
        turns.sort_unstable();
        turns.dedup();
        let started = Instant::now();
        Turn { _locks: turns.into_iter().filter_map(|turn| lock(turn, started)).collect() }
    }
}

/// An abstract socket (unix(7)), which has the scope of the network namespace, like ports, and disappears with its
/// process.
fn lock(turn: u16, started: Instant) -> Option<UnixListener> {
    let name = UnixAddr::from_abstract_name(format!("husk-ports-{turn}")).ok()?;
    loop {
        match UnixListener::bind_addr(&name) {
            Ok(lock) => return Some(lock),
            Err(error) if error.kind() != ErrorKind::AddrInUse || started.elapsed() > BIND_TIMEOUT => return None,
            Err(_) => thread::sleep(Duration::from_millis(2)),
        }
    }
}

/// How often a port of the kernel's choice may already be published by the same machine.
const CHOICES_MAX: usize = 100;

/// Chooses the ports of the host that are not given. Another process may open one of them until the machine has; then its start
/// fails.
pub fn choose(wanted: &[Publish]) -> Result<Vec<PortForward>> {
    let mut ports: Vec<PortForward> = Vec::new();
    for publish in wanted {
        let (host_ip, from, first, count, protocol) = match publish {
            Publish::Given(port) => {
                ports.push(port.clone());
                continue;
            }
            Publish::Chosen { host_ip, from, guest_port, count, protocol } => {
                (*host_ip, *from, *guest_port, *count, *protocol)
            }
        };
        for step in 0..count {
            let guest_port = first.saturating_add(step);
            let unknown = PortForward { host_ip, host_port: 0, guest_port, count: 1, protocol };
            let host_port = match from {
                None => any_free(&unknown, &ports),
                Some((first, last)) => (first..=last).find(|number| is_free(&unknown, *number, &ports)),
            };
            let host_port =
                host_port.ok_or_else(|| anyhow!("no host port is free for port {guest_port}/{protocol}"))?;
            ports.push(PortForward { host_port, ..unknown });
        }
    }
    Ok(ports)
}

fn any_free(port: &PortForward, taken: &[PortForward]) -> Option<u16> {
    (0..CHOICES_MAX).find_map(|_| bind_all(port, 0).ok().filter(|number| !has(taken, port.protocol, *number)))
}

fn is_free(port: &PortForward, number: u16, taken: &[PortForward]) -> bool {
    !has(taken, port.protocol, number) && bind_all(port, number).is_ok()
}

fn has(ports: &[PortForward], protocol: Protocol, number: u16) -> bool {
    ports.iter().any(|port| port.protocol == protocol && numbers(port).any(|taken| taken == number))
}

/// Fails with the reason if `port` is not available.
pub fn check_free(port: &PortForward) -> Result<()> {
    for number in numbers(port) {
        let Err(error) = bind_all(port, number) else { continue };
        let at = port.host_ip.map(|ip| format!(" on {ip}")).unwrap_or_default();
        match error.kind() {
            ErrorKind::AddrInUse => bail!("host port {number} is already in use{at}: use -p with another port"),
            ErrorKind::AddrNotAvailable => {
                bail!("cannot publish a port{at}: no interface of this host has that address")
            }
            ErrorKind::PermissionDenied => bail!(
                "host port {number} is privileged: use -p with a port from 1024 on, or run \
                 `sudo sysctl net.ipv4.ip_unprivileged_port_start={number}`"
            ),
            _ => return Err(error).with_context(|| format!("open host port {number}{at}")),
        }
    }
    Ok(())
}

/// Takes a port of the host without listening, until the result is dropped.
pub fn reserve(port: &PortForward) -> Result<Vec<OwnedFd>> {
    let take = |number| -> Result<OwnedFd> {
        let kind = match port.protocol {
            Protocol::Tcp => SocketType::STREAM,
            Protocol::Udp => SocketType::DGRAM,
        };
        let bind_to = |ip: IpAddr| -> rustix::io::Result<OwnedFd> {
            let family = if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
            let socket = socket_with(family, kind, SocketFlags::CLOEXEC, None)?;
            bind_socket(&socket, &SocketAddr::new(ip, number))?;
            Ok(socket)
        };
        let taken = match port.host_ip {
            Some(ip) => bind_to(ip),
            None => match bind_to(Ipv6Addr::UNSPECIFIED.into()) {
                Err(rustix::io::Errno::AFNOSUPPORT) => bind_to(Ipv4Addr::UNSPECIFIED.into()),
                taken => taken,
            },
        };
        taken.with_context(|| format!("take host port {number}"))
    };
    numbers(port).map(take).collect()
}

/// The first port number of `port` that is not open.
pub fn unopened(port: &PortForward) -> Option<u16> {
    let is_open = |number| bind_all(port, number).is_err_and(|error| error.kind() == ErrorKind::AddrInUse);
    numbers(port).find(|number| !is_open(*number))
}

fn numbers(port: &PortForward) -> impl Iterator<Item = u16> {
    (port.host_port..=u16::MAX).take(port.count.into())
}

/// Opens a port for a moment in the way that it will be published: without an address, on all addresses of both
/// families. Number 0 is any that is free. Returns the number.
fn bind_all(port: &PortForward, number: u16) -> io::Result<u16> {
    if let Some(ip) = port.host_ip {
        return bind(SocketAddr::new(ip, number), port.protocol);
    }
    let unspecified = |ip: IpAddr| bind(SocketAddr::new(ip, number), port.protocol);
    match unspecified(Ipv6Addr::UNSPECIFIED.into()) {
        // The host does not support IPv6.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => unspecified(Ipv4Addr::UNSPECIFIED.into()),
        bound => bound,
    }
}

fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<u16> {
    let bound = match protocol {
        Protocol::Tcp => TcpListener::bind(address)?.local_addr()?,
        Protocol::Udp => UdpSocket::bind(address)?.local_addr()?,
    };
    Ok(bound.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_is_reported_before_the_start() {
        for (protocol, suffix) in [(Protocol::Tcp, ""), (Protocol::Udp, "/udp")] {
            let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
            let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
            let taken = if protocol == Protocol::Tcp { tcp.local_addr() } else { udp.local_addr() }.unwrap().port();
            for text in [format!("{taken}:80{suffix}"), format!("127.0.0.1:{taken}:80{suffix}")] {
                let port = text.parse().unwrap();
                let error = check_free(&port).unwrap_err().to_string();
                assert!(error.starts_with(&format!("host port {taken} is already in use")), "{error}");
                assert_eq!(unopened(&port), None);
            }
            drop((tcp, udp));
            let port = format!("{taken}:80{suffix}").parse().unwrap();
            check_free(&port).unwrap();
            assert_eq!(unopened(&port), Some(taken));
        }
        let error = check_free(&"192.0.2.77:0080:80".parse().unwrap()).unwrap_err().to_string();
        assert!(error.contains("no interface of this host"), "{error}");
    }

    #[test]
    fn chosen_ports_are_free_and_differ() {
        let taken = TcpListener::bind("[::]:0").unwrap();
        let number = taken.local_addr().unwrap().port().min(65000);
        let words = ["80", "81", "127.0.0.1::82", "83/udp", "90-92", &format!("{number}-{}:84", number + 50)];
        let ports = choose(&words.map(|word| word.parse().unwrap())).unwrap();
        assert_eq!(ports.iter().map(|port| port.guest_port).collect::<Vec<_>>(), [80, 81, 82, 83, 90, 91, 92, 84]);
        for (at, port) in ports.iter().enumerate() {
            assert!(port.host_port != number && !has(&ports[..at], port.protocol, port.host_port), "{ports:?}");
            check_free(port).unwrap();
        }
        let two: Publish = format!("{number}-{}:84", number + 1).parse().unwrap();
        assert!(choose(&vec![two; 3]).unwrap_err().to_string().contains("no host port is free"));
    }

    #[test]
    fn starts_for_the_same_port_are_serialized() {
        let ports = |text: &str| vec![text.parse::<PortForward>().unwrap()];
        let turn = Turn::take(&ports("28101-28105:80-84"));
        let started = Instant::now();
        let second = thread::spawn(move || drop(Turn::take(&ports("28105:80"))));
        // There is no need to wait for a different port.
        drop(Turn::take(&[("28106:80").parse().unwrap()]));
        thread::sleep(Duration::from_millis(50));
        assert!(!second.is_finished());
        drop(turn);
        second.join().unwrap();
        assert!(started.elapsed() < BIND_TIMEOUT);
    }
}
