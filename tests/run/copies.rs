//! Machines that are restored from a snapshot next to the one that was saved: each has names, addresses and ports of its own, and
//! connections to others are reset, not shared.

use std::io::{BufRead, BufReader, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use husk::config::MacAddress;
use husk::resources::net::mac_of;
use tempfile::TempDir;

use crate::image::{self, run};
use crate::net::{free_port, is_root};
use crate::uplink::{self, host, is_lab};
use crate::{Ended, TIMEOUT, finish, guests, husk_as_is, memory_for};

/// Waits for what an emulated machine may take long for; a connection that nobody resets takes a quarter of an hour to end.
#[track_caller]
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < TIMEOUT, "not yet: {what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// Machines in a state directory of their own.
struct Machines {
    runtime: TempDir,
}

impl Machines {
    fn new() -> Machines {
        Machines { runtime: tempfile::tempdir().unwrap() }
    }

    fn finish(&self, mut command: Command) -> Ended {
        command.env("XDG_RUNTIME_DIR", self.runtime.path());
        finish(command, Vec::new())
    }

    fn try_husk(&self, words: &[&str]) -> Ended {
        let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
        command.args(words).env("HUSK_DATA", image::store()).stdin(std::process::Stdio::null());
        command.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
        self.finish(command)
    }

    #[track_caller]
    fn husk(&self, words: &[&str]) -> String {
        let ended = self.try_husk(words);
        assert_eq!(ended.code, Some(0), "{words:?}: {}", ended.errors);
        ended.text()
    }

    /// Starts a machine that runs a shell command, and waits until that has printed `ready`.
    #[track_caller]
    fn start(&self, guests: &Path, kernel: &str, flags: &[&str], script: &str) {
        let words = [&["-d", "--name", "first"], flags, &[image::archive(), "sh", "-c", script]].concat();
        self.finish(husk_as_is(guests, kernel, memory_for(kernel), &words)).expect(0);
        wait_until("the command is ready", || self.husk(&["logs", "first"]).contains("ready"));
    }

    /// Saves it, and returns the name of the snapshot.
    fn save(&self) -> String {
        let path = self.runtime.path().join("first.snap").to_str().unwrap().to_owned();
        self.husk(&["snapshot", "first", &path]);
        path
    }

    #[track_caller]
    fn inside(&self, name: &str, script: &str) -> String {
        self.husk(&["exec", name, "sh", "-c", script])
    }

    /// Host name, /etc/hostname, the MAC address, the address, and the lines of /etc/hosts that name the machine or `extra`.
    #[track_caller]
    fn identity(&self, name: &str) -> Vec<String> {
        let script = "hostname; cat /etc/hostname /sys/class/net/eth0/address
            ip -4 -o addr show eth0 | tr -s ' ' | cut -d ' ' -f 4; ip -6 -o addr show eth0 scope link | wc -l
            ip route | grep -c default; tail -n 2 /etc/hosts; echo $HOSTNAME";
        self.inside(name, script).lines().map(|line| line.trim().to_owned()).collect()
    }
}

impl Drop for Machines {
    fn drop(&mut self) {
        let _ = self.try_husk(&["rm", "-f", "first", "second", "third"]);
    }
}

/// The identity of the machine `name` with the address `ip`, and a line of its own in /etc/hosts.
fn identity_of(name: &str, ip: &str) -> Vec<String> {
    let mac = mac_of(name, 0).to_string();
    [name, name, &mac, &format!("{ip}/24"), "1", "1", &format!("{ip}\t{name}"), "192.0.2.1 extra", name]
        .map(str::to_owned)
        .to_vec()
}

/// Accepts connections and keeps them.
fn keep_connections(host: IpAddr) -> (SocketAddr, std::sync::mpsc::Receiver<TcpStream>) {
    let listener = TcpListener::bind((host, 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    thread::spawn(move || listener.incoming().try_for_each(|stream| sender.send(stream.unwrap())));
    (address, receiver)
}

/// Connects to a server, prints what that sends, and says when the connection has ended. Its input never ends.
fn client(server: SocketAddr) -> String {
    format!("mkfifo /tmp/never; {{ nc {} {} <>/tmp/never; echo cut; }} &", server.ip(), server.port())
}

#[test]
fn copies_are_reached_by_name_next_to_the_machine_that_was_saved() {
    let guests = guests!();
    if !is_root() {
        return;
    }
    uplink::make_nobody();
    let machines = Machines::new();
    machines.husk(&["network", "create", "--subnet", "10.86.78.0/24", "copies"]);
    let (server, connections) = keep_connections("10.86.78.1".parse().unwrap());
    let script = format!(
        "mkdir /www; httpd -p 80 -h /www; echo 192.0.2.1 extra >>/etc/hosts; {}
         until netstat -tn | grep -q ESTABLISHED; do sleep 0.1; done; echo ready; exec sleep 1000",
        client(server)
    );
    machines.start(&guests, "micro", &["--network", "copies"], &script);
    let mut connection = connections.recv_timeout(TIMEOUT).unwrap();
    let path = machines.save();
    for name in ["second", "third"] {
        machines.husk(&["restore", "-d", "--name", name, &path]);
        wait_until("the copy's connection is reset", || machines.husk(&["logs", name]).contains("cut"));
    }
    // That of the first machine is still the same.
    writeln!(connection, "still here").unwrap();
    wait_until("the first machine hears", || machines.husk(&["logs", "first"]).contains("still here"));
    assert!(!machines.husk(&["logs", "first"]).contains("cut"));
    let listed = machines.husk(&["network", "ls"]);
    let address = |name: &str| {
        let (_, rest) = listed.split_once(&format!("{name} (")).unwrap_or_else(|| panic!("{listed}"));
        rest.split_once(')').unwrap().0.to_owned()
    };
    for name in ["first", "second", "third"] {
        assert_eq!(machines.identity(name), identity_of(name, &address(name)));
        machines.inside(name, "hostname >/www/index.html");
    }
    for (from, to) in [("first", "second"), ("second", "third"), ("third", "first"), ("second", "first")] {
        assert_eq!(machines.inside(from, &format!("wget -qO- http://{to}/")), format!("{to}\n"), "from {from}");
        assert_eq!(machines.inside(from, &format!("wget -qO- http://{}/", address(to))), format!("{to}\n"));
    }
    // The same machine again keeps all of this.
    let before = machines.identity("third");
    machines.husk(&["suspend", "third"]);
    machines.husk(&["start", "third"]);
    assert_eq!(machines.identity("third"), before);
    assert_eq!(machines.inside("second", "wget -qO- http://third/"), "third\n");
    // A copy of a copy, under a host name that is chosen.
    machines.husk(&["rm", "-f", "third"]);
    let again = format!("{path}.again");
    machines.husk(&["snapshot", "second", &again]);
    machines.husk(&["restore", "-d", "--name", "third", "--hostname", "chosen", &again]);
    let mut wanted = identity_of("third", &address("third"));
    (wanted[0], wanted[1], wanted[8]) = ("chosen".into(), "chosen".into(), "chosen".into());
    wanted[6] = format!("{}\tchosen", address("third"));
    assert_eq!(machines.identity("third"), wanted);
    let refused = machines.try_husk(&["restore", "--network", "user", &again]);
    assert!(refused.errors.contains("keeps the kind of its network"), "{}", refused.errors);
    refused.expect(1);
    drop(machines);
    wait_until("the network is unused", || {
        let mut remove = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
        remove.args(["network", "rm", "copies"]).output().unwrap().status.success()
    });
}

#[test]
fn a_copy_publishes_ports_of_its_own_and_knows_the_time() {
    let guests = guests!();
    let Some(host) = host() else { return };
    let machines = Machines::new();
    let (server, connections) = keep_connections(host);
    let (first, second) = (format!("{}:80", free_port()), format!("{}:80", free_port()));
    let script = format!(
        "mkdir /tmp/www; echo hello >/tmp/www/index.html; httpd -p 80 -h /tmp/www; {}
         until netstat -tn | grep -q ESTABLISHED; do sleep 0.1; done; echo ready; exec sleep 1000",
        client(server)
    );
    // The files that husk writes are on a file system that nobody else can write to.
    machines.start(&guests, "micro", &["--read-only", "--tmpfs", "/tmp", "-p", &first], &script);
    let mut connection = connections.recv_timeout(TIMEOUT).unwrap();
    let path = machines.save();
    let page = |port: &str| {
        let url = format!("http://127.0.0.1:{}/", port.split(':').next().unwrap());
        run(Command::new("curl").args(["-sS", "--max-time", "60", &url]))
    };
    let refused = machines.try_husk(&["restore", "-d", "--name", "second", &path]);
    let words = ["is already in use", "`-p none` none"];
    assert!(words.iter().all(|word| refused.errors.contains(word)), "{}", refused.errors);
    refused.expect(1);
    machines.husk(&["restore", "-d", "--name", "second", "-p", &second, &path]);
    assert_eq!(page(&second), "hello\n");
    // Idle, so that only the guest itself can tell that the connection is lost.
    wait_until("the copy's connection is reset", || machines.husk(&["logs", "second"]).contains("cut"));
    writeln!(connection, "still here").unwrap();
    wait_until("the first machine hears", || machines.husk(&["logs", "first"]).contains("still here"));
    assert_eq!(page(&first), "hello\n");
    assert_eq!(machines.inside("second", "cat /sys/class/net/eth0/address").trim().parse(), Ok(mac_of("second", 0)));
    machines.husk(&["restore", "-d", "--name", "third", "-p", "none", "--hostname", "box", &path]);
    let seen = machines.inside("third", "hostname; cat /etc/hostname; tail -n 1 /etc/hosts; touch /x 2>&1 || true");
    assert_eq!(seen, "box\nbox\n10.0.2.15\tbox\ntouch: /x: Read-only file system\n");
    let mac: MacAddress = machines.inside("third", "cat /sys/class/net/eth0/address").trim().parse().unwrap();
    assert_eq!(mac, mac_of("third", 0));
    for name in ["second", "third"] {
        assert_on_time(&machines, name);
    }
}

/// Fails if the machine's wall clock is more than 10 ms away from ours, as far as that can be told from a question's time. An
/// emulated guest takes longer than that to hear what time it is.
#[track_caller]
fn assert_on_time(machines: &Machines, name: &str) {
    let tolerance = Duration::from_millis(if is_lab() { 100 } else { 10 });
    let now = || SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let before = now();
    let told = machines.inside(name, "adjtimex");
    let after = now();
    let value = |key: &str| -> u64 {
        let line = told.lines().find_map(|line| line.trim().strip_prefix(key)).unwrap_or_else(|| panic!("{told}"));
        line.trim().parse().unwrap()
    };
    let time = Duration::from_secs(value("time.tv_sec:")) + Duration::from_micros(value("time.tv_usec:"));
    assert!(time + tolerance >= before && time <= after + tolerance, "{before:?} <= {time:?} <= {after:?}");
}

#[test]
fn a_suspended_machine_learns_that_its_connections_are_gone() {
    let guests = guests!();
    let Some(host) = host() else { return };
    for kernel in ["micro", "stock"] {
        let machines = Machines::new();
        let (server, connections) = keep_connections(host);
        let script = format!(
            "{} until netstat -tn | grep -q ESTABLISHED; do sleep 0.1; done; echo ready; exec sleep 1000",
            client(server)
        );
        machines.start(&guests, kernel, &["--network", "user", "--hostname", "box"], &script);
        let connection = connections.recv_timeout(TIMEOUT).unwrap();
        let look = "hostname; cat /etc/hosts /sys/class/net/eth0/address";
        let before = machines.inside("first", look);
        machines.husk(&["suspend", "first"]);
        let mut rest = String::new();
        let ended = BufReader::new(connection).read_line(&mut rest);
        assert!(ended.is_err() || rest.is_empty(), "passt has ended it: {rest}");
        machines.husk(&["start", "first"]);
        // It does nothing but wait.
        wait_until("its connection is reset", || machines.husk(&["logs", "first"]).contains("cut"));
        assert_eq!(machines.inside("first", look), before);
        assert_on_time(&machines, "first");
    }
}
