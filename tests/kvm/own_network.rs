//! A network namespace of a test's own, with a tap device.
#![allow(unsafe_code)]

use std::io;
use std::path::Path;
use std::process::Command;
use std::thread;

/// The host's address in it.
pub const HOST: &str = "10.9.0.1";
/// The guest's, which needs no ARP.
pub const GUEST: &str = "10.9.0.2";
/// The guest's MAC address.
pub const GUEST_MAC: &str = "02:00:00:00:00:02";

/// More than Ethernet's, so that frames are as large as possible.
const SETUP: &[&str] = &[
    "tuntap add tap0 mode tap vnet_hdr multi_queue",
    "addr add 10.9.0.1/24 dev tap0",
    "link set tap0 mtu 65521 up",
    "neigh add 10.9.0.2 lladdr 02:00:00:00:00:02 dev tap0",
];

/// Runs `test` on a thread in a network namespace of its own, in which there is `tap0`. Skips it with a visible message if that is not
/// permitted.
#[track_caller]
pub fn with_tap(test: impl FnOnce() + Send) {
    let set_up = || {
        if let Err(error) = leave_network() {
            eprintln!("SKIPPED: only root makes networks: {error}");
            return;
        }
        SETUP.iter().for_each(|words| ip(words));
        test();
    };
    thread::scope(|scope| scope.spawn(set_up).join()).unwrap();
}

/// Whether this host has vhost-net; without it, says so, or fails with HUSK_TEST_REQUIRE_VHOST.
#[track_caller]
pub fn has_vhost() -> bool {
    let has = Path::new("/dev/vhost-net").exists();
    if !has {
        assert!(std::env::var_os("HUSK_TEST_REQUIRE_VHOST").is_none(), "this host must have vhost-net");
        eprintln!("SKIPPED: this host has no vhost-net");
    }
    has
}

/// Moves this thread, and what it starts, to a network namespace of its own.
fn leave_network() -> io::Result<()> {
    // SAFETY: the call has no pointers, and affects only the calling thread.
    match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn ip(words: &str) {
    let output = Command::new("ip").args(words.split(' ')).output().expect("scripts/deps test installs iproute2");
    assert!(output.status.success(), "{words}: {}", String::from_utf8_lossy(&output.stderr));
}
