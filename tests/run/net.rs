//! Networks: outgoing connections, published ports, and machines without a network.
//!
//! The peers are curl, iperf3, and small servers here.

mod passt;
mod pci;
mod tap;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use husk::config::MacAddress;
use husk::resources::net::mac_of;

use crate::image::{self, run};
use crate::uplink::{self, host};
use crate::{Ended, finish, guests, husk_networked, wait};

pub(crate) const SERVED: &str = "the host says so\n";

/// A root file system with iperf3 in addition to busybox.
fn root() -> &'static str {
    static ROOT: OnceLock<String> = OnceLock::new();
    ROOT.get_or_init(|| {
        let root = image::root().with_file_name("network-root");
        run(Command::new("cp").arg("-a").arg(image::root()).arg(&root));
        let iperf3 = Path::new("/usr/bin/iperf3");
        fs::copy(iperf3, root.join("bin/iperf3")).expect("scripts/deps test installs iperf3");
        // The same as ldd.
        let loader = "/lib64/ld-linux-x86-64.so.2";
        let list = run(Command::new(loader).arg("--list").arg(iperf3));
        let libraries = list.split_whitespace().filter(|word| word.starts_with('/'));
        for library in libraries.chain([loader]) {
            let to = root.join(library.trim_start_matches('/'));
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(library, to).unwrap();
        }
        root.to_str().unwrap().to_owned()
    })
}

/// A free port.
pub(crate) fn free_port() -> u16 {
    TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap().port()
}

/// Runs a shell command in a machine with a network.
fn networked(guests: &Path, kernel: &str, flags: &[&str], script: &str) -> Ended {
    let words = [flags, &["-e", "PATH=/bin", root(), "sh", "-c", script]].concat();
    finish(husk_networked(guests, kernel, &words), Vec::new())
}

/// Starts a machine that keeps running, and waits until it has printed `ready`. The thread returns its later output.
pub(crate) fn start(guests: &Path, flags: &[&str], script: &str) -> (Child, JoinHandle<String>) {
    start_under("micro", guests, flags, script)
}

fn start_under(kernel: &str, guests: &Path, flags: &[&str], script: &str) -> (Child, JoinHandle<String>) {
    ready(&mut shell_under(kernel, guests, flags, script))
}

/// A shell command in a machine with a network.
pub(crate) fn shell(guests: &Path, flags: &[&str], script: &str) -> Command {
    shell_under("micro", guests, flags, script)
}

fn shell_under(kernel: &str, guests: &Path, flags: &[&str], script: &str) -> Command {
    let words = [flags, &["-e", "PATH=/bin", root(), "sh", "-c", script]].concat();
    husk_networked(guests, kernel, &words)
}

/// Starts a machine whose command prints `ready`, and waits for that, like [`start`].
pub(crate) fn ready(command: &mut Command) -> (Child, JoinHandle<String>) {
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    if line != "ready\n" {
        let _ = child.kill();
        panic!("the command did not start: {line:?} {}", wait(child).errors);
    }
    let rest = thread::spawn(move || {
        let mut text = String::new();
        let _ = output.read_to_string(&mut text);
        text
    });
    (child, rest)
}

pub(crate) fn end(child: Child) {
    run(Command::new("kill").arg("-TERM").arg(child.id().to_string()));
    wait(child).expect(143);
}

/// Responds to every request with the same text for the duration of the test.
pub(crate) fn serve(host: IpAddr) -> SocketAddr {
    let listener = TcpListener::bind((host, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 4096]);
            let answer = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{SERVED}", SERVED.len());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    address
}

/// Resolves every name to 192.0.2.99. `None` if port 53 is unavailable.
fn serve_names(host: IpAddr) -> Option<()> {
    let socket = UdpSocket::bind((host, 53)).ok()?;
    thread::spawn(move || {
        let mut packet = [0; 512];
        while let Ok((count, from)) = socket.recv_from(&mut packet) {
            let Some(question) = packet.get(12..count) else { continue };
            let is_a = question.windows(4).any(|end| end == [0, 1, 0, 1]);
            // The question, and for an IPv4 address one answer that refers to the question's name.
            let mut answer = [&packet[..2], &[0x81, 0x80, 0, 1, 0, u8::from(is_a), 0, 0, 0, 0], question].concat();
            if is_a {
                answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 99]);
            }
            let _ = socket.send_to(&answer, from);
        }
    });
    Some(())
}

#[test]
fn a_guest_has_a_network_and_dns_by_default() {
    let guests = guests!();
    let Some(host) = host() else { return };
    let (server, names) = (serve(host), serve_names(host));
    let script = format!(
        "cat /sys/class/net/eth0/address; ip -4 -o addr show eth0 | tr -s ' ' | cut -d ' ' -f 4; cat /sys/class/net/eth0/mtu
         ip route | grep default; grep box /etc/hosts; wget -qO- http://{server}/
         grep -c 'nameserver {host}' /etc/resolv.conf; nslookup husk.example | grep -c 192.0.2.99"
    );
    let dns = host.to_string();
    // Without --network; the stock kernel has its driver as modules.
    let ended = networked(&guests, "stock", &["--rm", "--name", "box", "--dns", &dns], &script);
    let text = ended.text();
    let mut lines = text.lines();
    assert_eq!(lines.next().unwrap().parse::<MacAddress>(), Ok(mac_of("box", 0)), "{text}");
    let lines: Vec<&str> = lines.map(str::trim).collect();
    let wanted = ["10.0.2.15/24", "65520", "default via 10.0.2.2 dev eth0", "10.0.2.15\tbox", "the host says so", "1"];
    assert_eq!(lines[..6], wanted, "{}", ended.errors);
    if names.is_some() {
        assert_eq!(lines[6..], ["1"], "{text}{}", ended.errors);
    }
}

#[test]
fn published_ports_reach_the_guest_and_close_with_it() {
    let guests = guests!();
    let Some(host) = host() else { return };
    let (web, perf) = (free_port(), free_port());
    let published = [format!("{web}:80"), format!("{perf}:5201"), format!("{perf}:5201/udp")];
    let flags: Vec<&str> = published.iter().flat_map(|port| ["-p", port]).collect();
    let script = "mkdir /www; head -c 3000000 /dev/zero | tr '\\0' h >/www/big; httpd -p 80 -h /www
        iperf3 -s -D; echo ready; exec sleep 1000";
    let (machine, _output) = start(&guests, &flags, script);
    let fetched =
        run(Command::new("curl").args(["-sS", "--max-time", "60"]).arg(format!("http://127.0.0.1:{web}/big")));
    assert!(fetched.len() == 3_000_000 && fetched.bytes().all(|byte| byte == b'h'), "{} bytes", fetched.len());
    // To the guest, from it, and UDP.
    for flags in [&["-n", "4M"][..], &["-n", "4M", "-R"], &["-u", "-b", "2M", "-n", "200K", "-l", "1200"]] {
        let mut client = Command::new("iperf3");
        // Using the host's own address: passt loses UDP replies to 127.0.0.1.
        client.args(["-c", &host.to_string(), "-p", &perf.to_string(), "-J"]).args(flags);
        let report: serde_json::Value = serde_json::from_str(&run(&mut client)).unwrap();
        let end = &report["end"];
        let sum = if flags[0] == "-u" { &end["sum"] } else { &end["sum_received"] };
        let received = sum["bytes"].as_u64().unwrap_or_else(|| panic!("{flags:?}: {report}"));
        assert!(received >= 200_000, "{flags:?}: {sum}");
        if flags[0] == "-u" {
            assert!(sum["lost_packets"].as_u64().unwrap() <= 20, "{sum}");
        }
    }
    // A second machine is rejected immediately, without side effects.
    let second = networked(&guests, "micro", &["-p", &published[0]], "true");
    assert!(second.expect(125).errors.contains(&format!("host port {web} is already in use")), "{}", second.errors);
    end(machine);
    let closed = Instant::now() + Duration::from_secs(20);
    while TcpListener::bind(("0.0.0.0", web)).is_err() {
        assert!(Instant::now() < closed, "the port is still open");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_machine_that_floods_its_network_can_be_stopped() {
    let guests = guests!();
    let Some(host) = host() else { return };
    let (port, host) = (free_port().to_string(), host.to_string());
    let mut server =
        Command::new("iperf3").args(["-s", "-B", &host, "-p", &port]).stdout(Stdio::null()).spawn().unwrap();
    // Small UDP packets at the maximum rate.
    let script = format!(
        "sent() {{ cat /sys/class/net/eth0/statistics/tx_packets; }}; trap 'sent; exit 7' TERM
         iperf3 -c {host} -p {port} -u -b 0 -l 64 -t 1000 >/dev/null &
         until [ $(sent) -gt 1000 ]; do sleep 0.1; done; echo ready
         wait; echo the flood ended"
    );
    let (machine, output) = start(&guests, &["--network", "user"], &script);
    thread::sleep(Duration::from_secs(2));
    let started = Instant::now();
    run(Command::new("kill").arg("-TERM").arg(machine.id().to_string()));
    wait(machine).expect(7);
    let took = started.elapsed();
    let packets = output.join().unwrap();
    assert!(packets.trim().parse::<u64>().unwrap() > 1000, "{packets}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    server.kill().unwrap();
    server.wait().unwrap();
}

#[test]
fn network_none_has_no_network() {
    let guests = guests!();
    let ended =
        networked(&guests, "micro", &["--network", "none"], "ls /sys/class/net | grep -v dummy; ls /etc/resolv.conf");
    assert_eq!(ended.expect(1).text(), "lo\n");
}

/// Whether this is root, which is required to create interfaces; prints a visible message if not.
pub(crate) fn is_root() -> bool {
    let root = fs::read_to_string("/proc/self/status").unwrap().contains("\nUid:\t0\t");
    if !root {
        eprintln!("SKIPPED: only root makes interfaces");
    }
    root
}

pub(crate) fn husk(words: &[&str]) -> String {
    run(Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into())).args(words))
}

#[test]
fn machines_of_a_network_reach_each_other_by_name() {
    let guests = guests!();
    if !is_root() {
        return;
    }
    uplink::make_nobody();
    let made = husk(&["network", "create", "--internal", "--subnet", "10.86.77.0/24", "test"]);
    assert_eq!(made, "test 10.86.77.0/24\n");
    let script = "mkdir /www; echo from db >/www/index.html; httpd -p 80 -h /www; echo ready; exec sleep 1000";
    let (db, _output) = start(&guests, &["--network", "test", "--rm", "--name", "db"], script);
    let listed = husk(&["network", "ls"]);
    assert!(listed.contains("test  10.86.77.0/24") && listed.contains("db (10.86.77."), "{listed}");
    let script = "cat /etc/resolv.conf; wget -qO- http://db/; ping -c 1 db >/dev/null && echo pinged; ip route | grep -c default";
    let ended = networked(&guests, "micro", &["--network", "test", "--rm", "--name", "app"], script);
    assert_eq!(ended.text(), "nameserver 10.86.77.1\nfrom db\npinged\n0\n", "{}", ended.errors);
    let refused = networked(&guests, "micro", &["--network", "test", "--rm", "--name", "db"], "true");
    assert!(refused.expect(125).errors.contains("the name db is in use"), "{}", refused.errors);
    let mut rm = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    let refused = rm.args(["network", "rm", "test"]).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("in use by db"));
    // Its address is freed however it ends.
    run(Command::new("kill").arg("-KILL").arg(db.id().to_string()));
    wait(db);
    husk(&["network", "rm", "test"]);
    assert!(!Path::new("/sys/class/net/husk-test").exists());
    assert_eq!(husk(&["network", "ls"]).lines().count(), 1);
}
