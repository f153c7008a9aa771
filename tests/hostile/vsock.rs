//! Packets that a driver must not send, to a program of the host that never reads.

use std::os::unix::net::UnixListener;
use std::thread;

use crate::arena::{DISK_BYTES, machine, rounds, survives};
use crate::husk::disk_image;
use husk_guests as guests;

/// Where the guest connects to.
const PORT: u32 = 5000;

#[track_caller]
fn packets(words: &str) -> String {
    let (dir, _) = disk_image(DISK_BYTES);
    let listener = UnixListener::bind(dir.path().join(format!("vsock_{PORT}"))).unwrap();
    // Keeps all connections, until the test's end.
    thread::spawn(move || listener.incoming().flatten().collect::<Vec<_>>());
    survives(machine(guests::PACKETS, words, "mmio", dir.path())).text()
}

#[test]
fn impossible_packets_end_their_connection() {
    needs_kvm!();
    packets(&format!("do=garbage {}", rounds(2000)));
}

#[test]
fn lies_about_credit_end_the_connection() {
    needs_kvm!();
    packets(&format!("do=credit {}", rounds(500)));
}

#[test]
fn a_flood_of_connections_is_refused_beyond_a_limit() {
    needs_kvm!();
    // More than there can be, however slow the processor.
    let text = packets("do=flood rounds=1000");
    let line = text.lines().find(|line| line.starts_with("connections ")).unwrap();
    let numbers: Vec<u64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    assert_eq!(numbers.iter().sum::<u64>(), 1000, "each is answered once: {line}");
}
