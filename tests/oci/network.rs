//! The network of a container: the interfaces of the namespace that its engine names.

use std::process::Command;

use serde_json::json;

use crate::{finish, runtime};

fn ip(words: &str) {
    finish(Command::new("/opt/ip").args(words.split(' '))).expect(0);
}

#[test]
fn a_container_has_the_interfaces_of_its_network_namespace() {
    let runtime = runtime!();
    if !std::path::Path::new("/opt/ip").exists() {
        eprintln!("SKIPPED: no /opt/ip; `scripts/test guests` runs this in the lab");
        return;
    }
    for words in [
        "netns add box",
        "link add outer type veth peer name inner",
        "link set inner netns box",
        "address add 10.77.0.1/24 dev outer",
        "link set outer up",
        "-n box address add 10.77.0.2/24 dev inner",
        "-n box link set inner up",
        "-n box route add default via 10.77.0.1",
    ] {
        ip(words);
    }
    runtime.configure(
        "ip route | grep default; ip address | grep -e 10.77.0.2 -e ^[0-9]; ping -c 1 -W 30 10.77.0.1",
        |config| {
            for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
                if namespace["type"] == "network" {
                    namespace["path"] = "/run/netns/box".into();
                }
            }
            for set in ["bounding", "effective", "permitted"] {
                config["process"]["capabilities"][set] = json!(["CAP_NET_RAW"]);
            }
        },
    );
    let ended = runtime.run(&["run", "c"]);
    let printed = ended.expect(0);
    assert!(printed.contains("default via 10.77.0.1") && printed.contains("inet 10.77.0.2/24"), "{printed}");
    assert!(printed.contains("1 packets received"), "{printed}");
    // One of its own, and no other.
    assert_eq!(
        printed.lines().filter(|line| line.starts_with(|c: char| c.is_ascii_digit()) && line.contains(": <")).count(),
        2,
        "{printed}"
    );
    runtime.expect_nothing_left();
    let left = finish(Command::new("/opt/ip").args(["-n", "box", "-brief", "link"]));
    assert!(!left.expect(0).contains("tap"), "{}", left.output);
    ip("link delete outer");
    ip("netns delete box");
}
