//! Machines on networks of `husk network create`: published ports, addresses and names.

use std::process::Command;

use crate::guests;
use crate::image::run;
use crate::net::{end, free_port, husk, is_root, start};
use crate::uplink::{host, make_nobody};

#[test]
fn a_machine_on_a_network_has_the_wanted_address_names_and_ports() {
    let guests = guests!();
    if !is_root() {
        return;
    }
    let Some(host) = host() else { return };
    make_nobody();
    husk(&["network", "create", "--subnet", "10.86.79.0/24", "shown"]);
    let port = free_port();
    let published = format!("{port}:80");
    let flags = [
        &["--rm", "--name", "web", "--network", "shown", "--ip", "10.86.79.77", "--network-alias", "alias"][..],
        &["--mac-address", "02:00:00:00:00:77", "-p", &published, "-p", "81", "--add-host", "outside:host-gateway"],
    ];
    let script = "mkdir /www; cat /sys/class/net/eth0/address >/www/x; grep outside$ /etc/hosts >>/www/x
        nslookup alias 10.86.79.1 | grep -c 10.86.79.77 >>/www/x; httpd -p 80 -h /www; echo ready; exec sleep 1000";
    let (machine, _output) = start(&guests, &flags.concat(), script);
    let listed = husk(&["port", "web", "80"]);
    assert!(listed.starts_with(&format!("0.0.0.0:{port}\n")), "{listed}");
    let chosen = husk(&["port", "web", "81/tcp"]);
    assert!(chosen.trim().starts_with("0.0.0.0:") && !chosen.contains(&format!(":{port}\n")), "{chosen}");
    for address in ["127.0.0.1".to_owned(), host.to_string(), "10.86.79.1".into()] {
        let url = format!("http://{address}:{port}/x");
        let told = run(Command::new("curl").args(["-gsS", "--max-time", "60", &url]));
        assert_eq!(told, "02:00:00:00:00:77\n10.86.79.1\toutside\n1\n", "{address}");
    }
    end(machine);
    assert!(!run(Command::new("nft").args(["list", "ruleset"])).contains("10.86.79.77"));
    husk(&["network", "rm", "shown"]);
}
