//! passt is started when a guest needs its network, and not before.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use super::{SERVED, end, husk, serve, shell, start, start_under};
use crate::image::{self, run};
use crate::reach::{host_v6, passt_of, wait_until};
use crate::uplink::host;
use crate::{finish, guests, wait};

/// Longer than Linux waits with its reports and solicitations after an interface came up.
const SETTLED: Duration = Duration::from_secs(5);

/// Runs a shell command in the machine `name`.
fn exec(name: &str, script: &str) -> String {
    husk(&["exec", name, "/bin/sh", "-c", script])
}

/// The number of packets that the guest has sent so far.
fn sent(name: &str) -> u32 {
    exec(name, "cat /sys/class/net/eth0/statistics/tx_packets").trim().parse().unwrap()
}

#[test]
fn a_machine_that_sends_no_requests_has_no_passt_until_its_first_connection() {
    let guests = guests!();
    let (Some(host), Some(_)) = (host(), host_v6()) else { return };
    let server = serve(host);
    for kernel in ["micro", "stock"] {
        let (machine, _output) =
            start_under(kernel, &guests, &["--rm", "--name", "silent"], "echo ready; exec sleep 1000");
        thread::sleep(SETTLED);
        assert!(sent("silent") > 0, "{kernel}: it reports its IPv6 groups");
        assert_eq!(passt_of(machine.id()), None, "{kernel}");
        husk(&["pause", "silent"]);
        husk(&["unpause", "silent"]);
        assert_eq!(passt_of(machine.id()), None, "{kernel}");
        assert_eq!(exec("silent", &format!("wget -qO- http://{server}/")), SERVED);
        let passt = passt_of(machine.id()).expect("it was needed");
        assert_eq!(exec("silent", &format!("wget -qO- http://{server}/")), SERVED);
        assert_eq!(passt_of(machine.id()), Some(passt), "there is one");
        end(machine);
        assert!(!Path::new(&format!("/proc/{passt}")).exists());
    }
}

#[test]
fn a_router_solicitation_starts_passt() {
    let guests = guests!();
    let (Some(_), Some(_)) = (host(), host_v6()) else { return };
    let (machine, _output) = start_under("micro", &guests, &["--rm", "--name", "slaac"], "echo ready; exec sleep 1000");
    thread::sleep(SETTLED);
    assert_eq!(passt_of(machine.id()), None);
    // The kernel configures itself, like that of a guest with another init.
    let configure = "ip -f inet6 route del default; echo 1 >/proc/sys/net/ipv6/conf/eth0/accept_ra
        ip link set eth0 down; ip link set eth0 up; until ip -f inet6 route | grep -q ^default; do sleep 0.1; done";
    exec("slaac", configure);
    assert!(passt_of(machine.id()).is_some(), "it has answered");
    end(machine);
}

#[test]
fn a_passt_that_fails_when_it_is_needed_is_a_warning_and_a_dead_link() {
    let guests = guests!();
    let Some(host) = host() else { return };
    let dir = image::store().with_file_name("failing");
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("passt"), "#!/bin/sh\necho it has no luck >&2; exit 1\n").unwrap();
    fs::set_permissions(dir.join("passt"), fs::Permissions::from_mode(0o755)).unwrap();
    let script = format!(
        "cat /sys/class/net/eth0/carrier; ping -c 1 -W 1 {host} >/dev/null || echo no answer
         until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done; echo cut off"
    );
    let mut command = shell(&guests, &[], &script);
    command.env("PATH", format!("{}:{}", dir.display(), std::env::var("PATH").unwrap()));
    let ended = finish(command, Vec::new());
    assert_eq!(ended.expect(0).text(), "1\nno answer\ncut off\n", "{}", ended.errors);
    assert!(ended.errors.contains("passt: the network is gone: passt exited: it has no luck\n"), "{}", ended.errors);
}

/// The passt processes for guests with this DNS server.
fn passts_with(dns: &str) -> usize {
    let arguments =
        fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| fs::read(entry.path().join("cmdline")).ok());
    let is_one = |arguments: &Vec<u8>| {
        let words: Vec<&[u8]> = arguments.split(|byte| *byte == 0).collect();
        words.contains(&&b"--fd"[..]) && words.contains(&dns.as_bytes())
    };
    arguments.filter(is_one).count()
}

#[test]
fn a_machine_that_is_killed_while_passt_starts_leaves_none() {
    const DNS: &str = "192.0.2.77";
    let guests = guests!();
    let Some(host) = host() else { return };
    let script = format!("echo ready; ping -c 1 {host} >/dev/null; exec sleep 1000");
    for delay_ms in [0, 5, 20, 50, u64::MAX] {
        let (machine, _output) = start(&guests, &["--dns", DNS], &script);
        match delay_ms {
            u64::MAX => wait_until("passt is started", || passts_with(DNS) > 0),
            _ => thread::sleep(Duration::from_millis(delay_ms)),
        }
        run(Command::new("kill").args(["-KILL", &machine.id().to_string()]));
        wait(machine);
        wait_until("passt ends", || passts_with(DNS) == 0);
    }
}
