//! A console that is flooded, and whose reader has stopped.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use crate::arena::{Neighbour, own_memory_kib};
use crate::husk::monitor_of;
use crate::husk::{boot, end_of, send_signal};
use husk_guests as guests;

/// The console's buffer (64 KiB), and some.
const GROWTH_MAX_KIB: u64 = 2 << 10;

#[test]
fn a_flood_that_nobody_reads_takes_no_memory() {
    needs_kvm!();
    let mut neighbour = Neighbour::start();
    let mut command = boot(guests::SERIAL, "do=flood bytes=1000000000").command();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut written = 0;
    // Until the buffers are full and it waits.
    loop {
        thread::sleep(Duration::from_millis(300));
        let io = std::fs::read_to_string(format!("/proc/{}/io", child.id())).unwrap();
        let now = io.lines().find_map(|line| line.strip_prefix("wchar: ")).unwrap().parse::<u64>().unwrap();
        neighbour.answers();
        if now > 0 && std::mem::replace(&mut written, now) == now {
            break;
        }
    }
    let before = own_memory_kib(monitor_of(child.id()));
    for _ in 0..20 {
        neighbour.answers();
        thread::sleep(Duration::from_millis(20));
    }
    assert!(own_memory_kib(monitor_of(child.id())) <= before + GROWTH_MAX_KIB);
    // The first signal presses the power button, which this guest ignores.
    send_signal(child.id(), "TERM");
    send_signal(child.id(), "INT");
    let code = end_of(&mut child).and_then(|status| status.code());
    assert!(matches!(code, Some(130 | 143)), "{code:?}");
    neighbour.answers();
}
