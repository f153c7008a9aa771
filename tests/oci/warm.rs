//! Containers that start from warm machines.

use std::fs;
use std::process::Command;

use serde_json::Value;

use crate::{Ended, Runtime, finish, runtime};

/// What a container sees, as far as it does not tell how long its machine has been running.
const SCRIPT: &str = "mount; ip -o address; ip route; stat -c '%n %F %t %T %a' /dev/*; ls /proc/self/fd /sys/class /sys/class/[mnt]*; ps; id; env; \
                      hostname; grep -E 'Cap|Seccomp|NoNew' /proc/self/status; cat /proc/filesystems /proc/cmdline; nproc; \
                      ls /proc/sys/net/ipv4/conf; echo end";

/// A network namespace with an interface.
struct Network;

impl Network {
    fn new() -> Option<Network> {
        std::path::Path::new("/opt/ip").exists().then_some(())?;
        for words in [
            "netns add warm",
            "link add outer type veth peer name inner mtu 1400 address 02:00:00:00:00:07",
            "link set inner netns warm",
            "link set outer up",
            "-n warm address add 10.78.0.2/24 dev inner",
            "-n warm link set inner up",
        ] {
            finish(Command::new("/opt/ip").args(words.split(' '))).expect(0);
        }
        Some(Network)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for words in ["link delete outer", "netns delete warm"] {
            finish(Command::new("/opt/ip").args(words.split(' ')));
        }
    }
}

fn run(runtime: &Runtime, words: &[&str]) -> Ended {
    finish(runtime.command(words).env("HUSK_DATA", runtime.path("data")))
}

/// Runs a container, and returns what it has printed.
fn printed(runtime: &Runtime, script: &str, network: bool, edit: impl FnOnce(&mut Value)) -> String {
    runtime.configure(script, |config| {
        config["annotations"]["io.husk.memory"] = "96".into();
        for namespace in config["linux"]["namespaces"].as_array_mut().unwrap() {
            if network && namespace["type"] == "network" {
                namespace["path"] = "/run/netns/warm".into();
            }
        }
        edit(config);
    });
    let ended = run(runtime, &["run", "c"]);
    assert!(ended.expect(0).ends_with("end\n"), "{}\n{}", ended.output, ended.errors);
    ended.output
}

/// Whether a machine has the memory of a warm one.
fn is_warm(runtime: &Runtime) -> bool {
    let warm = runtime.path("data/warm/containers");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let maps = processes.filter_map(|entry| fs::read_to_string(entry.path().join("maps")).ok());
    maps.into_iter().any(|maps| maps.contains(warm.to_str().unwrap()))
}

#[test]
fn a_container_sees_the_same_in_a_warm_machine_as_in_a_booted_one() {
    let runtime = runtime!();
    let kernel = runtime.kernel.to_str().unwrap();
    let network = Network::new();
    let networks: &[bool] = if network.is_some() { &[false, true] } else { &[false] };
    let booted = networks.iter().map(|network| printed(&runtime, SCRIPT, *network, |_| {})).collect::<Vec<_>>();
    let made = run(&runtime, &["warm", "--memory", "96M", "--kernel", kernel]);
    assert_eq!(made.expect(0).lines().count(), 2);
    assert_eq!(run(&runtime, &["warm", "--memory", "96M", "--kernel", kernel]).expect(0), made.output);
    for (network, booted) in networks.iter().zip(booted) {
        assert_eq!(printed(&runtime, SCRIPT, *network, |_| {}), booted);
        assert!(!network || booted.contains("10.78.0.2/24"), "{booted}");
        assert!(!network || printed(&runtime, "ip link; echo end", true, |_| {}).contains("mtu 1400"));
    }
    runtime.expect_nothing_left();
}

#[test]
fn containers_start_from_warm_machines_that_fit_and_from_no_others() {
    let runtime = runtime!();
    let kernel = runtime.kernel.to_str().unwrap();
    let made = run(&runtime, &["warm", "--memory", "96M", "--kernel", kernel, "--interfaces", "0"]);
    let place = made.expect(0).trim().to_owned();
    let started = |edit: &dyn Fn(&mut Value)| {
        runtime.configure("echo ready; sleep 1000", |config| {
            config["annotations"]["io.husk.memory"] = "96".into();
            edit(config);
        });
        let output = fs::File::create(runtime.path("output")).unwrap();
        let mut command = runtime.command(&["create", "c"]);
        command.env("HUSK_DATA", runtime.path("data")).stdout(output.try_clone().unwrap()).stderr(output);
        assert!(command.status().unwrap().success(), "{}", runtime.output());
        assert_eq!(runtime.status("c"), "created");
        run(&runtime, &["start", "c"]).expect(0);
        runtime.await_output("ready");
        assert_eq!(run(&runtime, &["exec", "c", "echo", "more"]).expect(0), "more\n");
        let is_warm = is_warm(&runtime);
        run(&runtime, &["kill", "c", "KILL"]).expect(0);
        runtime.await_status("c", "stopped");
        run(&runtime, &["delete", "c"]).expect(0);
        is_warm
    };
    assert!(started(&|_| {}));
    assert!(!started(&|config| config["annotations"]["io.husk.warm"] = "false".into()));
    assert!(!started(&|config| config["annotations"]["io.husk.memory"] = "97".into()));
    assert!(!started(&|config| config["annotations"]["io.husk.cmdline"] = "quiet".into()));
    // One that is damaged is not used, and made again.
    let state = fs::File::options().write(true).open(format!("{place}/state")).unwrap();
    state.set_len(1000).unwrap();
    assert!(!started(&|_| {}));
    run(&runtime, &["warm", "--memory", "96M", "--kernel", kernel, "--interfaces", "0"]).expect(0);
    assert!(started(&|_| {}));
    runtime.expect_nothing_left();
}
