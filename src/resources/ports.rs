//! Published ports: checks that they are available, and serializes concurrent starts that want the same ones.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::config::{PortForward, Protocol};

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

/// The first port number of `port` that is not open.
pub fn unopened(port: &PortForward) -> Option<u16> {
    let is_open = |number| bind_all(port, number).is_err_and(|error| error.kind() == ErrorKind::AddrInUse);
    numbers(port).find(|number| !is_open(*number))
}

fn numbers(port: &PortForward) -> impl Iterator<Item = u16> {
    (port.host_port..=u16::MAX).take(port.count.into())
}

/// Opens a port for a moment in the way that it will be published: without an address, on all addresses of both
/// families.
fn bind_all(port: &PortForward, number: u16) -> io::Result<()> {
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

fn bind(address: SocketAddr, protocol: Protocol) -> io::Result<()> {
    match protocol {
        Protocol::Tcp => TcpListener::bind(address).map(drop),
        Protocol::Udp => UdpSocket::bind(address).map(drop),
    }
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
