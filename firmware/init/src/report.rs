//! Reports to the host outside of sessions: I/O ports for boot progress and exit, and the console for messages.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use nix::sys::reboot::{RebootMode, reboot};

use crate::sys;

/// The port for the marker that the first process is running.
const MARKER_PORT: u16 = 0x603;
/// The port that ends the machine with an exit code.
const EXIT_PORT: u16 = 0x604;
const RUNNING: u8 = 1;

/// Marks that the first process is running.
pub fn running() {
    if sys::allow_ports(MARKER_PORT, 2).is_ok() {
        sys::write_port(MARKER_PORT, RUNNING);
    }
}

/// Prints a line to the console, which is the machine's log.
pub fn say(words: &str) {
    // There is nowhere else to report it.
    let _ = writeln!(std::io::stderr(), "husk-init: {words}");
}

/// Ends the machine immediately. Data must have been written before.
pub fn end(code: u8) -> ! {
    // Through the kernel if possible: in a restored machine QEMU's emulated SVM denies ports to a process, since KVM marks the
    // task state segment as busy, as processors do.
    let _ = File::options().write(true).open("/dev/port").and_then(|ports| ports.write_at(&[code], EXIT_PORT.into()));
    if sys::allow_ports(MARKER_PORT, 2).is_ok() {
        sys::write_port(EXIT_PORT, code);
    }
    // The port does not exist, or the VMM needs a moment.
    loop {
        let _ = reboot(RebootMode::RB_POWER_OFF);
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
