//! User-mode networking: passt, a separate process for each machine, connected by a socket.
//!
//! It translates the guest's connections to its own, so that no privileges and no host interface are required. It exits
//! when the socket is closed, however husk ends.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context, Result, bail, ensure};

use super::ports::{self, Turn};
use super::resolver;
use crate::backend::net::{Header, NetBackend, StreamNet, is_end};
use crate::config::{MacAddress, PortForward, Protocol, UserNetwork};
use crate::memory::GuestBuffers;
use crate::sys;

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
const GATEWAY_MAC: &str = "02:68:75:73:6b:01";
/// The maximum MTU supported by passt.
pub const MTU_BYTES: u16 = 65520;
/// The maximum number of DNS servers per address family in passt.
const DNS_MAX: usize = 3;

/// The socket buffer size in each direction: passt drops frames that do not fit.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;
/// The maximum host memory used by one passt process, in bytes: the process (31 MiB, `ps -o rss`), and its socket
/// buffers, which the kernel counts twice, in each direction.
pub const BUDGET_BYTES: u64 = (32 << 20) + 2 * 2 * SOCKET_BUFFER_BYTES as u64;
/// How long passt may take to open its ports, on a busy host.
const SERVICE_TIMEOUT: Duration = Duration::from_secs(10);
/// The EtherType of ARP frames.
const ETHERTYPE_ARP: [u8; 2] = [8, 6];
/// How long to wait for the error of a passt process that is likely to fail.
const STARTUP_ERROR_TIMEOUT: Duration = Duration::from_millis(500);
/// How long a passt that has closed its socket has to exit.
const REAP_TIMEOUT: Duration = Duration::from_millis(100);
/// The maximum length of passt's error output.
const WORDS_MAX_BYTES: u64 = 16 << 10;

/// A passt process and the machine's end of the socket. Dropping it terminates passt.
pub struct Passt {
    net: StreamNet,
    child: Child,
    /// passt's standard error.
    words: UnixStream,
}

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
    if !has_default_route("/proc/net/route") && !has_ipv6() {
        return Err(Missing::Route);
    }
    Ok(())
}

fn is_installed() -> bool {
    let is_program = |path: std::path::PathBuf| {
        fs::metadata(path).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    env::split_paths(&env::var_os("PATH").unwrap_or_default()).any(|dir| is_program(dir.join("passt")))
}

/// Whether the host has IPv6 connectivity, which passt then provides to the guest as well.
pub fn has_ipv6() -> bool {
    // Destination, prefix length, …, interface; an unreachable default route is on `lo`.
    let routes = fs::read_to_string("/proc/net/ipv6_route").unwrap_or_default();
    routes.lines().any(|line| {
        let mut words = line.split_whitespace();
        let to_all = words.next().is_some_and(|to| to.bytes().all(|digit| digit == b'0')) && words.next() == Some("00");
        to_all && words.next_back().is_some_and(|interface| interface != "lo")
    })
}

fn has_default_route(table: &str) -> bool {
    // Interface, destination, gateway, flags, …, and the mask in the eighth column.
    let routes = fs::read_to_string(table).unwrap_or_default();
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    routes.lines().map(words).any(|words| {
        words.get(1).is_some_and(|to| to == "00000000") && words.get(7).is_some_and(|mask| mask == "00000000")
    })
}

/// Starts passt for one machine with the address `mac`. It takes a few milliseconds to start, during which frames wait
/// in the socket. If ports are published, this waits until they are open.
pub fn start(network: &UserNetwork, mac: MacAddress) -> Result<Passt> {
    ensure!(is_installed(), Missing::Passt);
    let _turn = Turn::take(&network.ports);
    network.ports.iter().try_for_each(ports::check_free)?;
    let is_local =
        |port: &&PortForward| port.protocol == Protocol::Udp && port.host_ip.is_some_and(|ip| ip.is_loopback());
    if let Some(port) = network.ports.iter().find(is_local) {
        // passt maps the source address to the gateway, which is not mapped back because that would expose all of the
        // host's local services.
        log::warn!("replies from UDP port {} may not arrive: passt loses those to loopback addresses", port.host_port);
    }
    let (mut ours, theirs) = UnixStream::pair().context("create a socket for passt")?;
    for end in [&ours, &theirs] {
        // If the host's limit is lower, that is sufficient.
        let _ = sys::net::set_send_buffer(end, SOCKET_BUFFER_BYTES);
    }
    let (words, says) = UnixStream::pair().context("create a socket for passt")?;
    for end in [&words, &says] {
        // Unread output is lost; passt does not block on it.
        end.set_nonblocking(true).context("create a socket for passt")?;
    }
    let mut command = Command::new("passt");
    command.args(arguments(network, &resolver::of_host()));
    command.stdin(OwnedFd::from(theirs)).stdout(Stdio::null()).stderr(OwnedFd::from(says));
    // The terminal's signals are meant for the machine.
    command.process_group(0);
    let child = command.spawn().context("start passt")?;
    // Closes our copies of passt's ends, so that its exit is noticed.
    drop(command);
    if !network.ports.is_empty() {
        // If this fails, passt has already exited, which is noticed below.
        let _ = ours.write_all(&question(mac));
    }
    let mut passt = Passt { net: StreamNet::new(ours).context("set up passt's socket")?, child, words };
    if !network.ports.is_empty() {
        passt.await_service(&network.ports)?;
    } else if check().is_err() {
        passt.await_verdict()?;
    }
    Ok(passt)
}

/// An ARP request for the gateway's address (RFC 826), in the socket's framing. passt replies after it has opened all
/// ports that it can.
fn question(mac: MacAddress) -> Vec<u8> {
    const BROADCAST: [u8; 6] = [0xff; 6];
    // Ethernet and IPv4, with addresses of 6 and 4 bytes; a request.
    const REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
    let frame = [&BROADCAST[..], &mac.0, &ETHERTYPE_ARP, &REQUEST, &mac.0, &GUEST.octets(), &[0; 6], &GATEWAY.octets()];
    let frame = frame.concat();
    [&(frame.len() as u32).to_be_bytes()[..], &frame].concat()
}

fn arguments(network: &UserNetwork, resolver: &resolver::Resolver) -> Vec<String> {
    let mut all: Vec<String> = ["--foreground", "--quiet", "--fd", "0", "--no-map-gw"].map(str::to_owned).into();
    let mut add = |flag: &str, value: String| all.extend([flag.to_owned(), value]);
    add("--mac-addr", GATEWAY_MAC.into());
    add("--mtu", MTU_BYTES.to_string());
    add("--address", GUEST.to_string());
    add("--netmask", PREFIX.to_string());
    add("--gateway", GATEWAY.to_string());
    if has_ipv6() {
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

/// The DNS servers for a guest that is configured without DHCP.
pub fn dns_servers(network: &UserNetwork, resolver: &resolver::Resolver) -> Vec<IpAddr> {
    let servers = if network.dns.is_empty() { &resolver.servers } else { &network.dns };
    let reached = |server: &&IpAddr| server.is_ipv4() || has_ipv6();
    let servers: Vec<IpAddr> = servers.iter().filter(reached).copied().take(DNS_MAX).collect();
    if servers.is_empty() { vec![DNS.into()] } else { servers }
}

impl Passt {
    /// Waits until passt has opened `ports`. Fails if it exits first or cannot open one of them.
    fn await_service(&mut self, ports: &[PortForward]) -> Result<()> {
        let started = Instant::now();
        let is_served = loop {
            match self.net.receive() {
                Err(_) => bail!("passt did not start: {}", self.ending_words()),
                Ok(true) => break true,
                Ok(false) if started.elapsed() > SERVICE_TIMEOUT => break false,
                Ok(false) => thread::sleep(Duration::from_millis(1)),
            }
            // Without IPv4 on the host it does not reply.
            if started.elapsed() > STARTUP_ERROR_TIMEOUT && ports.iter().all(|port| ports::unopened(port).is_none()) {
                break true;
            }
        };
        if self.net.frame().is_some_and(|(_, frame)| frame.get(12..14) == Some(&ETHERTYPE_ARP)) {
            // The guest did not send this request.
            self.net.consume();
        }
        let unopened = ports.iter().find_map(ports::unopened);
        match unopened {
            None if is_served => Ok(()),
            None => bail!("passt does not respond"),
            Some(number) => bail!("passt cannot publish port {number}: use -p with another port"),
        }
    }

    /// The error output of a passt process that has closed its socket.
    fn ending_words(&mut self) -> String {
        self.end();
        self.last_words()
    }

    /// Waits a while for passt to fail, and returns its error if it does.
    fn await_verdict(&mut self) -> Result<()> {
        let started = Instant::now();
        while started.elapsed() < STARTUP_ERROR_TIMEOUT {
            if self.child.try_wait().context("wait for passt")?.is_some() {
                bail!("passt did not start: {}", self.last_words());
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The last non-empty line of the error output.
    fn last_words(&mut self) -> String {
        let mut bytes = Vec::new();
        // Ends with an error if passt is still running.
        let _ = (&mut self.words).take(WORDS_MAX_BYTES).read_to_end(&mut bytes);
        let text = String::from_utf8_lossy(&bytes);
        let line = text.lines().rfind(|line| !line.trim().is_empty() && !line.contains("syslog"));
        line.unwrap_or("it printed no error").trim().to_owned()
    }

    /// Terminates and reaps the process, if it is still running.
    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// The signal that terminated passt, if one did. Its socket is closed slightly earlier than it can be reaped.
    fn await_signal(&mut self) -> Option<i32> {
        let started = Instant::now();
        while started.elapsed() < REAP_TIMEOUT {
            match self.child.try_wait() {
                Ok(None) => thread::sleep(Duration::from_millis(1)),
                Ok(Some(status)) => return status.signal(),
                Err(_) => return None,
            }
        }
        None
    }

    /// Adds passt's error output if the error means that it has exited.
    fn explain(&mut self, error: io::Error) -> io::Error {
        if !is_end(&error) {
            return error;
        }
        let signal = self.await_signal();
        self.end();
        let reason = match signal {
            Some(signal) => format!("passt was terminated by signal {signal}"),
            None => format!("passt exited: {}", self.last_words()),
        };
        io::Error::new(error.kind(), reason)
    }
}

impl NetBackend for Passt {
    fn features(&self) -> u64 {
        self.net.features()
    }

    fn accept(&mut self, features: u64) -> io::Result<()> {
        self.net.accept(features)
    }

    fn send(&mut self, header: &Header, frame: &mut GuestBuffers) -> io::Result<()> {
        self.net.send(header, frame).map_err(|error| self.explain(error))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.net.flush().map_err(|error| self.explain(error))
    }

    fn receive(&mut self) -> io::Result<bool> {
        self.net.receive().map_err(|error| self.explain(error))
    }

    fn frame(&self) -> Option<(Header, &[u8])> {
        self.net.frame()
    }

    fn consume(&mut self) {
        self.net.consume();
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.net.fd()
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It would exit by itself, but would not be reaped.
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::sync::{Arc, Barrier};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory;

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

    const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);

    /// Sends a frame as the guest; the socket accepts it as a whole.
    fn send(passt: &mut Passt, frame: &[u8]) {
        let memory = Arc::new(memory::reserve(1).unwrap());
        memory.write_slice(frame, GuestAddress(0)).unwrap();
        let mut buffers = GuestBuffers::new(memory);
        buffers.push(GuestAddress(0), frame.len() as u32).unwrap();
        passt.send(&Header::default(), &mut buffers).unwrap();
    }

    fn wait_for<T>(what: &str, mut found: impl FnMut() -> Option<T>) -> T {
        let started = Instant::now();
        loop {
            assert!(started.elapsed() < Duration::from_secs(20), "{what} did not come");
            match found() {
                Some(found) => return found,
                None => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    #[test]
    fn passt_forwards_a_port_and_exits_with_its_machine() {
        if let Err(error) = check() {
            eprintln!("SKIPPED: {error:#}");
            return;
        }
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let ports = vec![format!("127.0.0.1:{port}:80").parse().unwrap()];
        let mut passt = start(&UserNetwork { ports, ..Default::default() }, MAC).unwrap();
        // An ARP request for the gateway (RFC 826).
        let guest_mac = [2, 0, 0, 0, 0, 2];
        let mut question = [&[0xff; 6][..], &guest_mac, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &guest_mac].concat();
        question.extend([&GUEST.octets()[..], &[0; 6], &GATEWAY.octets()].concat());
        send(&mut passt, &question);
        wait_for("an answer", || {
            let answered = passt.receive().unwrap() && passt.frame().unwrap().1[12..14] == [8, 6];
            let answer = passt.frame().map(|(_, frame)| frame.to_vec());
            passt.consume();
            let answer = answer.filter(|_| answered)?;
            assert_eq!((&answer[28..32], &answer[6..12]), (&GATEWAY.octets()[..], &[2, 0x68, 0x75, 0x73, 0x6b, 1][..]));
            Some(())
        });
        // A local connection is forwarded to the guest, whose first packet arrives now.
        let _stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        wait_for("a connection", || {
            let found = passt.receive().unwrap();
            let frame = passt.frame().map(|(_, frame)| frame.to_vec());
            passt.consume();
            let frame = frame.filter(|_| found)?;
            (frame[12..14] == [8, 0] && frame[23] == 6 && frame[36..38] == [0, 80]).then_some(())
        });
        let process = std::path::PathBuf::from(format!("/proc/{}", passt.child.id()));
        let stat = fs::read_to_string(process.join("stat")).unwrap();
        let group = stat.rsplit(") ").next().unwrap().split(' ').nth(2).unwrap().to_owned();
        assert_eq!(group, passt.child.id().to_string(), "Ctrl-C is not for it");
        drop(passt);
        assert!(!process.exists());
        TcpListener::bind(("127.0.0.1", port)).unwrap();
    }

    fn free_port() -> u16 {
        TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
    }

    #[test]
    fn concurrent_starts_for_a_port_have_one_winner() {
        if let Err(error) = check() {
            eprintln!("SKIPPED: {error:#}");
            return;
        }
        for kind in ["", "/udp"] {
            let port = free_port();
            let barrier = Barrier::new(4);
            let started: Vec<Result<Passt>> = thread::scope(|scope| {
                let one = || {
                    let ports = vec![format!("{port}:80{kind}").parse().unwrap()];
                    barrier.wait();
                    start(&UserNetwork { ports, ..Default::default() }, MAC)
                };
                let all: Vec<_> = (0..4).map(|_| scope.spawn(one)).collect();
                all.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let refused: Vec<String> =
                started.iter().filter_map(|one| one.as_ref().err()).map(ToString::to_string).collect();
            assert_eq!(refused.len(), 3, "{refused:?}");
            assert!(refused.iter().all(|error| error.contains("already in use")), "{refused:?}");
            if kind.is_empty() {
                TcpStream::connect_timeout(&SocketAddr::from(([127, 0, 0, 1], port)), Duration::from_secs(5)).unwrap();
            }
        }
    }

    #[test]
    fn a_passt_that_exits_or_cannot_open_a_port_is_an_error() {
        if let Err(error) = check() {
            eprintln!("SKIPPED: {error:#}");
            return;
        }
        let first = free_port();
        let asked: PortForward = format!("127.0.0.1:{first}:80").parse().unwrap();
        // It has no ports to open.
        let mut passt = start(&UserNetwork::default(), MAC).unwrap();
        passt.net = {
            let (ours, mut theirs) = UnixStream::pair().unwrap();
            // Simulates a reply.
            theirs.write_all(&question(MAC)).unwrap();
            StreamNet::new(ours).unwrap()
        };
        let error = passt.await_service(std::slice::from_ref(&asked)).unwrap_err().to_string();
        assert!(error.contains(&format!("cannot publish port {first}")), "{error}");
        let mut passt = start(&UserNetwork::default(), MAC).unwrap();
        passt.child.kill().unwrap();
        let error = passt.await_service(&[asked]).unwrap_err().to_string();
        assert!(error.starts_with("passt did not start"), "{error}");
    }

    #[test]
    fn a_killed_passt_ends_the_network() {
        if let Err(error) = check() {
            eprintln!("SKIPPED: {error:#}");
            return;
        }
        let mut passt = start(&UserNetwork::default(), MAC).unwrap();
        passt.child.kill().unwrap();
        let error = wait_for("an end", || passt.receive().err());
        assert!(is_end(&error) && error.to_string() == "passt was terminated by signal 9", "{error}");
        // It is not even left as a zombie, although its machine is still running.
        assert!(!std::path::PathBuf::from(format!("/proc/{}", passt.child.id())).exists());
    }
}
