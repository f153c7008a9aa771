//! A way out for machines' networks: this machine's own, or where the lab has none, an interface that leads nowhere, since
//! passt wants one.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::sync::OnceLock;

/// A test network (RFC 5737) for a machine that has none, and the router that it has not.
const UPLINK: [&str; 2] = ["198.51.100.2/24", "198.51.100.1"];

/// This machine's own address, as a guest can reach it; `None`, loudly, where there is no network and none can be made.
pub fn host() -> Option<IpAddr> {
    static HOST: OnceLock<Option<IpAddr>> = OnceLock::new();
    *HOST.get_or_init(|| {
        if own_address().is_none() && is_lab() {
            make_uplink();
        }
        let address = own_address();
        if address.is_none() {
            eprintln!("SKIPPED: this machine has no network");
        }
        address
    })
}

pub fn is_lab() -> bool {
    std::env::var_os("HUSK_TEST_EMULATED").is_some()
}

/// Nothing is sent for this.
fn own_address() -> Option<IpAddr> {
    let socket = UdpSocket::bind("0.0.0.0:0").ok()?;
    socket.connect("192.0.2.1:9").ok()?;
    socket.local_addr().ok().map(|address| address.ip())
}

fn make_uplink() {
    for words in [
        &["link", "add", "uplink", "type", "veth"][..],
        &["addr", "add", UPLINK[0], "dev", "uplink"],
        &["link", "set", "uplink", "up"],
        &["route", "add", "default", "via", UPLINK[1]],
    ] {
        let output = Command::new("ip").args(words).output().unwrap();
        assert!(output.status.success(), "ip {words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    make_nobody();
}

/// passt and dnsmasq run as this user, whom the lab does not know.
pub fn make_nobody() {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    if is_lab() && !passwd.contains("nobody:") {
        fs::write("/etc/passwd", passwd + "nobody:x:65534:65534:nobody:/:/bin/false\n").unwrap();
    }
}
