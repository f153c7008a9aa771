//! Communication between guest and host through vsock and the network.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;

use crate::{TIMEOUT, boot, finish, guests, husk, is_lab, start_and_wait, uplink};

const PIECE_BYTES: usize = 64 << 10;
const MIB: usize = 1 << 20;

/// The amount of data per direction of a connection: less on an emulated processor, which would take a minute.
fn stream_mib() -> usize {
    if is_lab() { 16 } else { 64 }
}

/// The blocks sent through a socket, as in firmware/guests/linux/vsock.c: they differ in their first word.
struct Piece(Vec<u8>);

impl Piece {
    fn new() -> Piece {
        let word = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Piece((0..PIECE_BYTES as u64).step_by(8).flat_map(|at| word(at).to_le_bytes()).collect())
    }

    fn number(&mut self, index: usize) -> &[u8] {
        self.0[..8].copy_from_slice(&(index as u64).to_le_bytes());
        &self.0
    }
}

fn send_pieces(mut stream: UnixStream, len: usize) {
    let mut piece = Piece::new();
    for index in 0..len / PIECE_BYTES {
        stream.write_all(piece.number(index)).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// A host program that echoes data on any number of connections.
fn serve_echo(listener: UnixListener) {
    for stream in listener.incoming() {
        let mut stream = stream.unwrap();
        thread::spawn(move || {
            std::io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
        });
    }
}

/// Connects to `port` of the guest. `None` if the guest refuses.
fn call(socket: &Path, port: u32) -> Option<UnixStream> {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte).unwrap() == 1 {
        answer.extend(byte);
        if byte == *b"\n" {
            assert!(answer.starts_with(b"OK "), "{answer:?}");
            return Some(stream);
        }
    }
    None
}

/// The host's requests to a guest that serves port 1000 (echo) and 1001 (counts received bytes).
fn talk_to_guest(socket: &Path) {
    let mut echo = call(socket, 1000).unwrap();
    let sender = echo.try_clone().unwrap();
    let sending = thread::spawn(move || send_pieces(sender, stream_mib() * MIB));
    let (mut piece, mut got) = (Piece::new(), vec![0; PIECE_BYTES]);
    for index in 0..stream_mib() * MIB / PIECE_BYTES {
        echo.read_exact(&mut got).unwrap();
        assert!(got == piece.number(index), "piece {index} came back otherwise");
    }
    assert_eq!(echo.read(&mut got).unwrap(), 0);
    sending.join().unwrap();

    let mut half = call(socket, 1001).unwrap();
    send_pieces(half.try_clone().unwrap(), MIB);
    let mut total = String::new();
    half.read_to_string(&mut total).unwrap();
    assert_eq!(total.trim(), MIB.to_string());

    let mut many: Vec<_> = (0..50).map(|number| (call(socket, 1000).unwrap(), number)).collect();
    for (stream, number) in &mut many {
        stream.write_all(&[*number; 3000]).unwrap();
    }
    for (mut stream, number) in many.into_iter().rev() {
        let mut got = [0xff; 3000];
        stream.read_exact(&mut got).unwrap();
        assert_eq!(got, [number; 3000]);
    }
    assert!(call(socket, 9).is_none(), "nobody serves this port");
}

#[test]
fn guest_and_host_communicate_through_vsock() {
    let guests = guests!();
    for kernel in ["micro", "stock"] {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v.sock");
        let listener = UnixListener::bind(dir.path().join("v.sock_52")).unwrap();
        thread::spawn(move || serve_echo(listener));
        let flags = ["--vsock", socket.to_str().unwrap()];
        let job = format!("sockets {}", stream_mib());
        let (child, output) = start_and_wait(&mut husk(&guests.join(kernel), "vmlinux", &job, &flags), "serving=");
        talk_to_guest(&socket);
        drop(call(&socket, 1002));
        finish(child).expect(0, kernel);
        let output: Vec<String> = output.try_iter().collect();
        let printed =
            |line: &str| assert!(output.iter().any(|printed| printed.trim() == line), "{kernel}: {line}: {output:?}");
        printed(&format!("received={}", stream_mib() * MIB));
        printed("echoed=50");
        printed("refused=ECONNRESET");
        assert!(!socket.exists(), "{kernel}: the socket goes with its machine");
    }
}

#[test]
fn a_guest_gets_its_address_by_dhcp_and_reaches_the_host() {
    let guests = guests!();
    let Some(host) = uplink::host() else { return };
    let listener = TcpListener::bind((host, 0)).unwrap();
    let job = format!("network {host} {}", listener.local_addr().unwrap().port());
    thread::spawn(move || {
        for stream in listener.incoming() {
            let _ = stream.unwrap().write_all(b"the host\n");
        }
    });
    for kernel in ["stock", "micro"] {
        let ended = boot(&guests.join(kernel), "vmlinux", &job, &["--network", "user,mac=02:00:00:00:00:77"]);
        let values = ended.values();
        assert_eq!(values.get("dhcp"), Some(&"10.0.2.15/24 10.0.2.2 65520"), "{kernel}: {}", ended.output);
        assert_eq!(values.get("heard"), Some(&"the host"), "{kernel}: {}", ended.output);
    }
}
