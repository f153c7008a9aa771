//! Connectivity of guests: IPv6, port ranges, unprivileged users, and external networks; and complete cleanup.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv6Addr, TcpListener, UdpSocket};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::image::{self, run};
use crate::net::{SERVED, end, free_port, husk, is_root, ready, serve, shell, start};
use crate::uplink::{host, is_lab, make_nobody};
use crate::{finish, guests, wait};

/// An unprivileged user.
const NOBODY: u32 = 65534;

/// This machine's own IPv6 address, reachable from a guest; `None` with a visible message if there is none and none can
/// be created.
pub(crate) fn host_v6() -> Option<IpAddr> {
    // Nothing is sent.
    let own = || {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok()?;
        socket.connect("[2001:db8:ffff::1]:9").ok()?;
        socket.local_addr().ok().map(|address| address.ip())
    };
    if own().is_none() && is_lab() {
        // There are no other hosts on the dummy interface, so duplicate address detection is unnecessary.
        for name in ["all", "uplink"] {
            fs::write(format!("/proc/sys/net/ipv6/conf/{name}/accept_dad"), "0").unwrap();
        }
        ip("link set veth0 up");
        ip("-f inet6 addr add 2001:db8::2/64 dev uplink");
        ip("-f inet6 route add default via 2001:db8::1 dev uplink");
    }
    let address = own();
    if address.is_none() {
        eprintln!("SKIPPED: this machine has no IPv6 network");
    }
    address
}

fn ip(words: &str) {
    run(Command::new("ip").args(words.split(' ')));
}

/// The response of the web server at `url`, which has a literal address.
fn get(url: &str) -> String {
    run(Command::new("curl").args(["-gsS", "--max-time", "60", url]))
}

/// The first of three consecutive free ports.
fn free_ports() -> u16 {
    let are_free = |first: &u16| (*first..first + 3).all(|port| TcpListener::bind(("::", port)).is_ok());
    (18080..28080).step_by(3).find(are_free).unwrap()
}

/// The passt process of the machine run by `husk`.
pub(crate) fn passt_of(husk: u32) -> Option<u32> {
    fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (front, back) = stat.rsplit_once(") ")?;
        let (pid, name) = front.split_once(" (")?;
        let parent = back.split(' ').nth(1)?;
        (name.starts_with("passt") && parent == husk.to_string()).then(|| pid.parse().unwrap())
    })
}

pub(crate) fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_so() {
        assert!(Instant::now() < deadline, "not yet: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn port_ranges_and_udp_reach_a_guest_by_ipv4_and_ipv6() {
    let guests = guests!();
    let (Some(host), Some(host_v6)) = (host(), host_v6()) else { return };
    let (first, perf) = (free_ports(), free_port());
    let published = [format!("{first}-{}:8080-8082", first + 2), format!("{perf}:53"), format!("{perf}:53/udp")];
    let flags: Vec<&str> =
        published.iter().flat_map(|port| ["-p", port]).chain(["--rm", "--name", "reached"]).collect();
    let script = format!(
        "for port in 8080 8081 8082; do mkdir -p /www/$port; echo $port >/www/$port/number; httpd -p $port -h /www/$port; done
         iperf3 -s -p 53 -D
         {{ ip -f inet6 -o addr show dev eth0 scope global; wget -qO- http://{}/; }} >/seen 2>&1
         echo ready; cat /seen; exec sleep 1000",
        serve(host_v6)
    );
    let (machine, output) = start(&guests, &flags, &script);
    let passt = passt_of(machine.id()).expect("it has a passt");
    let listed = husk(&["ps"]);
    let ports =
        format!("0.0.0.0:{first}-{}->8080-8082/tcp, 0.0.0.0:{perf}->53/tcp, 0.0.0.0:{perf}->53/udp  ", first + 2);
    assert!(listed.contains(&ports), "{listed}");
    for address in [host.to_string(), format!("[{host_v6}]"), "127.0.0.1".into(), "[::1]".into()] {
        for index in 0..3 {
            assert_eq!(get(&format!("http://{address}:{}/number", first + index)), format!("{}\n", 8080 + index));
        }
    }
    for address in [host, host_v6] {
        let mut client = Command::new("iperf3");
        client.args([
            "-c",
            &address.to_string(),
            "-p",
            &perf.to_string(),
            "-J",
            "-u",
            "-b",
            "2M",
            "-n",
            "100K",
            "-l",
            "1200",
        ]);
        let report: serde_json::Value = serde_json::from_str(&run(&mut client)).unwrap();
        let sum = &report["end"]["sum"];
        assert!(sum["lost_packets"].as_u64().unwrap() <= 10 && sum["packets"].as_u64() > Some(50), "{address}: {sum}");
    }
    husk(&["stop", "reached"]);
    wait(machine);
    let seen = output.join().unwrap();
    assert!(seen.contains("fd00:6875:736b::15/64") && seen.ends_with(SERVED), "{seen}");
    assert!(!Path::new(&format!("/proc/{passt}")).exists());
    assert!(TcpListener::bind(("::", first)).is_ok(), "its ports are free");
}

#[test]
fn the_first_ipv6_connection_reaches_a_new_guest() {
    let guests = guests!();
    let (Some(_), Some(_)) = (host(), host_v6()) else { return };
    let port = free_port();
    let script = "mkdir /www; echo at once >/www/word; httpd -p 80 -h /www; echo ready; exec sleep 1000";
    let (machine, _output) = start(&guests, &["-p", &format!("{port}:80")], script);
    assert_eq!(get(&format!("http://[::1]:{port}/word")), "at once\n");
    end(machine);
}

/// A directory owned by `NOBODY`.
fn dir_of_nobody() -> PathBuf {
    let dir = image::store().with_file_name("nobodys");
    fs::create_dir_all(&dir).unwrap();
    // Makes it and the root file system next to it accessible.
    fs::set_permissions(dir.parent().unwrap(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(&dir, Some(NOBODY), Some(NOBODY)).unwrap();
    dir
}

#[test]
fn an_unprivileged_user_gets_a_network_and_a_preconfigured_tap() {
    let guests = guests!();
    let Some(_) = host() else { return };
    if !is_lab() {
        eprintln!("SKIPPED: only the lab's devices are opened to everybody");
        return;
    }
    for device in ["/dev/kvm", "/dev/net/tun"] {
        fs::set_permissions(device, fs::Permissions::from_mode(0o666)).unwrap();
    }
    // Busybox's version cannot set an owner.
    run(Command::new("/opt/ip").args(["tuntap", "add", "husk-own", "mode", "tap", "user", "65534", "vnet_hdr"]));
    ip("addr add 198.18.10.1/24 dev husk-own");
    ip("link set husk-own up");
    let (web, other) = (free_port(), free_port());
    let (published, others) = (format!("{web}:80"), format!("{other}:80"));
    let flags =
        ["--rm", "--name", "own", "-p", &published, "--network", "user", "--network", "tap=husk-own,ip=198.18.10.2/24"];
    let script = |word: &str| {
        format!(
            "mkdir /www; echo {word} >/www/word; httpd -p 80 -h /www; echo ready
             while [ $(cat /sys/class/net/eth0/carrier) = 1 ]; do sleep 0.2; done; echo cut off >/www/word; exec sleep 1000"
        )
    };
    let dir = dir_of_nobody();
    let mut command = shell(&guests, &flags, &script("own"));
    command.uid(NOBODY).gid(NOBODY).env("HUSK_DATA", &dir).env("HOME", &dir);
    let (machine, output) = ready(&mut command);
    // A second machine of the same user, concurrently.
    let (second, _output) = start(&guests, &["--rm", "--name", "other", "-p", &others], &script("other"));
    assert_eq!(get(&format!("http://127.0.0.1:{web}/word")), "own\n");
    assert_eq!(get(&format!("http://127.0.0.1:{other}/word")), "other\n");
    assert_eq!(get("http://198.18.10.2/word"), "own\n");
    let [passt, others_passt] = [&machine, &second].map(|machine| passt_of(machine.id()).expect("it has a passt"));
    // A machine survives its passt, and cleans up after it.
    run(Command::new("kill").args(["-KILL", &passt.to_string()]));
    wait_until("the port is free", || TcpListener::bind(("::", web)).is_ok());
    wait_until("the guest sees its link go", || get("http://198.18.10.2/word") == "cut off\n");
    wait_until("passt is waited for", || !Path::new(&format!("/proc/{passt}")).exists());
    // And passt does not survive its machine.
    for machine in [machine, second] {
        run(Command::new("kill").args(["-KILL", &machine.id().to_string()]));
        wait(machine);
    }
    wait_until("passt ends", || !Path::new(&format!("/proc/{others_passt}")).exists());
    assert_eq!(output.join().unwrap(), "");
    assert!(!husk(&["ps", "--all"]).contains(" other "), "nothing stays of one that was killed in the foreground");
    ip("link del husk-own");
}

/// A host beyond this one, in a separate network namespace, with a route only to us.
struct Beyond(Child);

impl Beyond {
    /// Its address.
    const ADDRESS: &str = "203.0.113.9";
    /// Our interface to it.
    const NEAR: &str = "husk-near";

    fn new() -> Beyond {
        let script = "read -r end; ip addr add 203.0.113.9/24 dev $end; ip link set $end up
            while :; do echo from beyond | busybox nc -l -p 80; done";
        let mut command = Command::new("unshare");
        command.args(["-n", "sh", "-c", script]).stdin(Stdio::piped()).process_group(0);
        let mut child = command.spawn().unwrap();
        let network = |process: &str| fs::read_link(format!("/proc/{process}/ns/net")).ok();
        wait_until("it has a network", || network(&child.id().to_string()) != network("self"));
        ip(&format!("link add {} type veth", Beyond::NEAR));
        let word = |path: PathBuf| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let interfaces = Path::new("/sys/class/net");
        let index = word(interfaces.join(Beyond::NEAR).join("iflink"));
        let mut entries = fs::read_dir(interfaces).unwrap().flatten();
        let far = entries.find(|entry| word(entry.path().join("ifindex")) == index).unwrap().file_name();
        let far = far.to_str().unwrap();
        ip(&format!("link set {far} netns {}", child.id()));
        ip(&format!("addr add 203.0.113.1/24 dev {}", Beyond::NEAR));
        ip(&format!("link set {} up", Beyond::NEAR));
        writeln!(child.stdin.as_mut().unwrap(), "{far}").unwrap();
        Beyond(child)
    }
}

impl Drop for Beyond {
    fn drop(&mut self) {
        let _ = Command::new("kill").args(["-KILL", &format!("-{}", self.0.id())]).status();
        let _ = self.0.wait();
        let _ = Command::new("ip").args(["link", "del", Beyond::NEAR]).status();
    }
}

#[test]
fn a_guest_of_a_network_uses_dhcp_and_nat() {
    let guests = guests!();
    if !is_root() {
        return;
    }
    make_nobody();
    let beyond = Beyond::new();
    husk(&["network", "create", "--subnet", "10.86.78.0/24", "outward"]);
    let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    let micro = guests.join("micro");
    command.arg("boot").arg("--kernel").arg(micro.join("vmlinux")).arg("--initrd").arg(micro.join("initrd"));
    command.args(["--network", "outward", "--cmdline", &format!("-- network {} 80", Beyond::ADDRESS)]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = finish(command, Vec::new());
    let text = ended.text();
    let told = text.lines().find_map(|line| line.trim().strip_prefix("dhcp=")).unwrap_or_default();
    assert!(told.starts_with("10.86.78.") && told.contains("/24 10.86.78.1"), "{text}{}", ended.errors);
    // There would be no route back to the guest's own address.
    assert!(text.contains("heard=from beyond"), "{text}{}", ended.errors);
    husk(&["network", "rm", "outward"]);
    drop(beyond);
}
