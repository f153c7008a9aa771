//! Network frames that a driver must not send, to passt and to a tap device that husk or vhost-net serves; and the rings that
//! vhost-net must refuse.

use std::net::UdpSocket;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use husk_guests as guests;

use crate::arena::{DISK_BYTES, machine, rounds, survives};
use crate::husk::{Ran, disk_image, is_emulated};
use crate::own_network::{GUEST, GUEST_MAC, HOST, has_vhost, with_tap};
use crate::uplink;

/// The number of lines that husk logs when vhost-net refuses a ring.
fn refusals(ran: &Ran) -> usize {
    ran.stderr.matches("(vhost) found a ring or a descriptor that makes no sense").count()
}

#[track_caller]
fn refuses_nothing(ran: &Ran) {
    assert_eq!(refusals(ran), 0, "{}", ran.stderr);
}

/// Runs the guest on both buses, on a tap device in a network namespace of its own; skips the test with a visible message if
/// that is not permitted. All the time, the host sends the guest what it did not ask for.
#[track_caller]
fn on_tap(guest: &str, words: &str) {
    on_tap_served(guest, words, "vhost=off", refuses_nothing);
}

/// The same with vhost-net; `check` is passed each result. Skips the test with a visible message if the host does not have it.
#[track_caller]
fn on_vhost(guest: &str, words: &str, check: impl Fn(&Ran) + Sync) {
    if has_vhost() {
        on_tap_served(guest, words, "vhost=on", check);
    }
}

#[track_caller]
fn on_tap_served(guest: &str, words: &str, vhost: &str, check: impl Fn(&Ran) + Sync) {
    let over = AtomicBool::new(false);
    with_tap(|| {
        thread::scope(|scope| {
            scope.spawn(|| flood(&over));
            let _over = SetAtEnd(&over);
            for transport in ["mmio", "pci"] {
                let (dir, _) = disk_image(DISK_BYTES);
                let network = format!("tap=tap0,{vhost},mac={GUEST_MAC}");
                let hostile = machine(guest, words, transport, dir.path()).flag("--cpus", "2");
                check(&survives(hostile.flag("--network", network)));
            }
        });
    });
}

/// Ends the flood, also if a test fails.
struct SetAtEnd<'a>(&'a AtomicBool);

impl Drop for SetAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Sends datagrams of all sizes, up to the largest.
fn flood(over: &AtomicBool) {
    let socket = UdpSocket::bind((HOST, 0)).unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    while !over.load(Ordering::Relaxed) {
        let most = 65_000 >> random.u32(..12);
        let len = random.usize(..=most);
        // Fails while there is no machine.
        let _ = socket.send_to(&vec![0x55; len], (GUEST, 9));
        // An emulated processor must have time for the guest, too.
        thread::sleep(Duration::from_millis(if is_emulated() { 50 } else { 1 }));
    }
}

/// Runs a guest on both buses with passt; skips that with a visible message if this machine has no network.
#[track_caller]
fn on_passt(words: &str) {
    if uplink::host().is_none() {
        return;
    }
    for transport in ["mmio", "pci"] {
        let (dir, _) = disk_image(DISK_BYTES);
        survives(machine(guests::FRAMES, words, transport, dir.path()).flag("--network", "user"));
    }
}

#[test]
fn headers_that_lie_cost_their_frames() {
    needs_kvm!();
    on_tap(guests::FRAMES, &format!("do=headers {}", rounds(2000)));
    on_passt(&format!("do=headers {}", rounds(2000)));
}

#[test]
fn frames_of_impossible_lengths_are_dropped() {
    needs_kvm!();
    on_tap(guests::FRAMES, &format!("do=lengths {}", rounds(300)));
    on_passt(&format!("do=lengths {}", rounds(300)));
}

#[test]
fn buffers_for_frames_may_have_any_size_and_place() {
    needs_kvm!();
    on_tap(guests::FRAMES, &format!("do=receive {}", rounds(60)));
    on_passt(&format!("do=receive {}", rounds(60)));
}

#[test]
fn commands_that_make_no_sense_fail() {
    needs_kvm!();
    on_tap(guests::FRAMES, &format!("do=commands {}", rounds(1000)));
}

#[test]
fn queues_of_a_network_device_may_be_impossible() {
    needs_kvm!();
    let all = ["chains", "chaos", "features", "places", "doorbells", "race"];
    // Each takes a minute on an emulated processor, where the other devices have them all.
    for what in &all[..if is_emulated() { 2 } else { all.len() }] {
        on_tap(guests::STORM, &format!("do={what} {}", rounds(100)));
    }
}

#[test]
fn frames_that_vhost_net_does_not_take_harm_nothing() {
    needs_kvm!();
    on_vhost(guests::VHOST, &format!("do=headers {}", rounds(2000)), refuses_nothing);
    on_vhost(guests::FRAMES, &format!("do=receive {}", rounds(60)), |_| ());
}

#[test]
fn rings_that_vhost_net_refuses_need_a_reset() {
    needs_kvm!();
    let refused = |ran: &Ran| assert!(refusals(ran) > 0, "the kernel has refused nothing: {}", ran.stderr);
    on_vhost(guests::VHOST, "do=chains", refused);
    on_vhost(guests::VHOST, "do=jumps", refused);
    on_vhost(guests::VHOST, &format!("do=race {}", rounds(300)), refused);
}

#[test]
fn a_reset_ends_what_vhost_net_has_under_way() {
    needs_kvm!();
    on_vhost(guests::VHOST, &format!("do=resets {}", rounds(100)), refuses_nothing);
}

#[test]
fn storms_of_doorbells_reach_vhost_net_only() {
    needs_kvm!();
    on_vhost(guests::VHOST, &format!("do=doorbells {}", rounds(5000)), refuses_nothing);
}
