use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::PathBuf;
use std::sync::Barrier;

use vm_memory::{Bytes, GuestAddress};

use super::super::neighbors::arp_request as framed_arp_request;
use super::super::{GATEWAY, GUEST, check};
use super::*;
use crate::memory;

const MAC: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);

/// Whether passt can be started; prints a visible message if not.
fn has_passt() -> bool {
    check().inspect_err(|error| eprintln!("SKIPPED: {error:#}")).is_ok()
}

/// A passt that waits to be needed, without published ports.
fn idle() -> (Passt, Starter) {
    let passt = open(&UserNetwork::default(), MAC).unwrap();
    assert!(process(&passt).is_none(), "it is started when it is needed");
    let starter = Starter(passt.shared.clone());
    (passt, starter)
}

/// A started passt without published ports.
fn started() -> Passt {
    let mut passt = Passt::new(&UserNetwork::default(), MAC).unwrap();
    passt.start().unwrap();
    passt
}

fn published(port: &str) -> Result<Passt> {
    let network = UserNetwork { ports: vec![port.parse().unwrap()], ..Default::default() };
    open(&network, MAC).inspect(|passt| assert!(process(passt).is_some(), "it is started already"))
}

/// The directory of the process in /proc.
fn process(passt: &Passt) -> Option<PathBuf> {
    passt.shared.process().id().map(|id| format!("/proc/{id}").into())
}

/// An ARP request for the gateway (RFC 826).
fn arp_request() -> Vec<u8> {
    let mut request = [&[0xff; 6][..], &MAC.0, &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1], &MAC.0].concat();
    request.extend([&GUEST.octets()[..], &[0; 6], &GATEWAY.octets()].concat());
    request
}

/// Waits for the gateway's answer to an ARP request for `address`.
fn await_answer(passt: &mut Passt, address: Ipv4Addr) {
    wait_for("an answer", || {
        let answered = passt.receive().unwrap() && passt.frame().unwrap().1[12..14] == [8, 6];
        let answer = passt.frame().map(|(_, frame)| frame.to_vec());
        passt.consume();
        let answer = answer.filter(|answer| answered && answer[28..32] == address.octets())?;
        assert_eq!(answer[6..12], [2, 0x68, 0x75, 0x73, 0x6b, 1]);
        Some(())
    });
}

/// A frame in guest memory.
fn guest_frame(frame: &[u8]) -> GuestBuffers {
    let memory = Arc::new(memory::reserve(1).unwrap());
    memory.write_slice(frame, GuestAddress(0)).unwrap();
    let mut buffers = GuestBuffers::new(memory);
    buffers.push(GuestAddress(0), frame.len() as u32).unwrap();
    buffers
}

/// Sends a frame as the guest; the socket accepts it as a whole.
fn send(passt: &mut Passt, frame: &[u8]) {
    passt.send(&Header::default(), &mut guest_frame(frame)).unwrap();
    passt.kick().unwrap();
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
    if !has_passt() {
        return;
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut passt = published(&format!("127.0.0.1:{port}:80")).unwrap();
    send(&mut passt, &arp_request());
    await_answer(&mut passt, GATEWAY);
    // A local connection is forwarded to the guest, whose first packet arrives now.
    let _stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    wait_for("a connection", || {
        let found = passt.receive().unwrap();
        let frame = passt.frame().map(|(_, frame)| frame.to_vec());
        passt.consume();
        let frame = frame.filter(|_| found)?;
        (frame[12..14] == [8, 0] && frame[23] == 6 && frame[36..38] == [0, 80]).then_some(())
    });
    let process = process(&passt).unwrap();
    let stat = std::fs::read_to_string(process.join("stat")).unwrap();
    let group = stat.rsplit(") ").next().unwrap().split(' ').nth(2).unwrap().to_owned();
    assert!(process.ends_with(group), "Ctrl-C is not for it");
    drop(passt);
    assert!(!process.exists());
    TcpListener::bind(("127.0.0.1", port)).unwrap();
}

fn free_port() -> u16 {
    TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
}

#[test]
fn concurrent_starts_for_a_port_have_one_winner() {
    if !has_passt() {
        return;
    }
    for kind in ["", "/udp"] {
        let port = free_port();
        let barrier = Barrier::new(4);
        let started: Vec<Result<Passt>> = thread::scope(|scope| {
            let one = || {
                barrier.wait();
                published(&format!("{port}:80{kind}"))
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
    if !has_passt() {
        return;
    }
    let first = free_port();
    let asked: PortForward = format!("127.0.0.1:{first}:80").parse().unwrap();
    // It has no ports to open.
    let mut passt = started();
    passt.net = {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        // Simulates a reply.
        theirs.write_all(&framed_arp_request(MAC)).unwrap();
        StreamNet::new(ours).unwrap()
    };
    let error = passt.await_service(std::slice::from_ref(&asked)).unwrap_err().to_string();
    assert!(error.contains(&format!("cannot publish port {first}")), "{error}");
    let mut passt = started();
    passt.shared.process().end();
    let error = passt.await_service(&[asked]).unwrap_err().to_string();
    assert!(error.starts_with("passt did not start"), "{error}");
}

#[test]
fn a_killed_passt_ends_the_network() {
    if !has_passt() {
        return;
    }
    let mut passt = started();
    let process = process(&passt).unwrap();
    passt.shared.process().end();
    let error = wait_for("an end", || passt.receive().err());
    assert!(is_end(&error) && error.to_string() == "passt was terminated by signal 9", "{error}");
    // It is not even left as a zombie, although its machine is still running.
    assert!(!process.exists());
}

#[test]
fn the_first_request_starts_passt_and_is_answered() {
    if !has_passt() {
        return;
    }
    let (mut passt, starter) = idle();
    // A gratuitous ARP request: the sender looks for itself.
    let mut announcement = arp_request();
    announcement[38..42].copy_from_slice(&GUEST.octets());
    let mut dropped = guest_frame(&announcement);
    for _ in 0..100_000 {
        // More than fit the socket.
        passt.send(&Header::default(), &mut dropped).unwrap();
    }
    starter.start_if_needed();
    assert_eq!(process(&passt), None, "nobody needs it");
    // husk itself answers for the gateway, but not for this address.
    let other = Ipv4Addr::new(10, 0, 2, 9);
    let mut request = arp_request();
    request[38..42].copy_from_slice(&other.octets());
    send(&mut passt, &request);
    send(&mut passt, &announcement);
    starter.start_if_needed();
    let running = process(&passt).expect("it was started");
    starter.start_if_needed();
    await_answer(&mut passt, GATEWAY);
    await_answer(&mut passt, other);
    assert!(running.exists() && process(&passt).as_ref() == Some(&running), "it is started once");
    drop((passt, starter));
    assert!(!running.exists());
}

#[test]
fn a_repeated_syn_does_not_reset_a_connection() {
    if !has_passt() {
        return;
    }
    // Nothing is sent.
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    let (Ok(()), Ok(SocketAddr::V4(host))) = (socket.connect("192.0.2.1:9"), socket.local_addr()) else { return };
    let server = TcpListener::bind((*host.ip(), 0)).unwrap();
    let port = server.local_addr().unwrap().port().to_be_bytes();
    let mut passt = started();
    send(&mut passt, &arp_request());
    await_answer(&mut passt, GATEWAY);
    let header = [0x45, 0, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0];
    let segment = [0, 0, 0, 1, 0, 0, 0, 0, 0x60, 2, 0xff, 0xff, 0, 0, 0, 0, 2, 4, 5, 0xb4];
    let gateway = [2, 0x68, 0x75, 0x73, 0x6b, 1];
    let packet = [&header[..], &GUEST.octets(), &host.ip().octets(), &[0xc0, 0], &port, &segment].concat();
    let syn = [&gateway[..], &MAC.0, &[8, 0], &packet].concat();
    for _ in 0..3 {
        send(&mut passt, &syn);
    }
    let (mut flags, started) = (Vec::new(), Instant::now());
    while started.elapsed() < Duration::from_millis(500) || flags.is_empty() {
        let found = passt.receive().unwrap();
        let frame = passt.frame().map(|(_, frame)| frame.to_vec()).filter(|_| found).unwrap_or_default();
        passt.consume();
        if frame.get(12..14) == Some(&[8, 0]) && frame[23] == 6 {
            flags.push(frame[47]);
        }
        assert!(started.elapsed() < Duration::from_secs(20), "it is not answered");
        thread::sleep(Duration::from_millis(1));
    }
    const RST: u8 = 4;
    assert!(flags[0] == 0x12 && flags.iter().all(|flags| flags & RST == 0), "{flags:x?}");
}

#[test]
fn a_passt_that_is_needed_but_cannot_be_started_ends_the_network_with_a_reason() {
    for (program, reason) in [
        ("/dev/null/passt", "passt did not start: Not a directory (os error 20)"),
        ("false", "passt exited: it printed no error"),
    ] {
        let mut passt = Passt::new(&UserNetwork::default(), MAC).unwrap();
        let (ours, theirs) = UnixStream::pair().unwrap();
        passt.net = StreamNet::new(ours).unwrap();
        *passt.shared.process() = Process::new(program, Vec::new(), theirs);
        let starter = Starter(passt.shared.clone());
        send(&mut passt, &arp_request());
        starter.start_if_needed();
        let error = wait_for("an end", || passt.receive().map(|_| passt.consume()).err());
        assert!(is_end(&error) && error.to_string() == reason, "{error}");
    }
}

#[test]
fn a_host_without_a_route_delays_passt_until_it_has_one() {
    const NONE: Routes = Routes { ipv4: false, ipv6: false };
    let mut passt = Passt::new(&UserNetwork::default(), MAC).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    passt.net = StreamNet::new(ours).unwrap();
    // It neither reads nor writes its socket.
    *passt.shared.process() = Process::new("sleep", vec!["60".into()], theirs);
    let starter = Starter(passt.shared.clone());
    let later = Instant::now() - RETRY_INTERVAL;
    send(&mut passt, &arp_request());
    starter.start_if_needed_with(|| NONE);
    // More than fit the socket, and none of them makes us look for routes so soon.
    let mut frame = guest_frame(&arp_request());
    for _ in 0..100_000 {
        passt.send(&Header::default(), &mut frame).unwrap();
    }
    starter.start_if_needed_with(|| unreachable!("it was asked a moment ago"));
    for (routes, is_started) in [(NONE, false), (Routes { ipv6: true, ..NONE }, true)] {
        assert_eq!(process(&passt), None);
        passt.asked = Some(later);
        send(&mut passt, &arp_request());
        starter.start_if_needed_with(|| routes);
        assert_eq!(process(&passt).is_some(), is_started, "{routes:?}");
    }
    assert!(!passt.is_waiting());
}
