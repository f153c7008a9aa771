//! A default route for machines' networks: this machine's own, or a dummy interface in the lab, since passt requires
//! one.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::process::Command;
use std::sync::OnceLock;

/// A documentation network (RFC 5737) with a nonexistent router.
const UPLINK: [&str; 2] = ["198.51.100.2/24", "198.51.100.1"];

/// This machine's own address, reachable from a guest; `None` with a visible message if there is no network and none
/// can be created.
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

/// Nothing is sent.
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

/// Creates the user of passt and dnsmasq, which does not exist in the lab.
pub fn make_nobody() {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    if is_lab() && !passwd.contains("nobody:") {
        fs::write("/etc/passwd", passwd + "nobody:x:65534:65534:nobody:/:/bin/false\n").unwrap();
    }
}
