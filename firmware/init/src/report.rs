//! From init to whoever watches the machine from outside: ports for marks and the end, the console for words.

use std::io::Write;

use nix::sys::reboot::{RebootMode, reboot};

use crate::sys;

/// A write marks that the first process runs.
const MARKER_PORT: u16 = 0x603;
/// A write ends the machine with that exit code.
const EXIT_PORT: u16 = 0x604;
const RUNNING: u8 = 1;

/// Marks that the first process runs.
pub fn running() {
    if sys::allow_ports(MARKER_PORT, 2).is_ok() {
        sys::write_port(MARKER_PORT, RUNNING);
    }
}

/// Prints a line on the console: the machine's log.
pub fn say(words: &str) {
    // There is nobody else to tell.
    let _ = writeln!(std::io::stderr(), "husk-init: {words}");
}

/// Ends the machine at once. What is to be kept has been written.
pub fn end(code: u8) -> ! {
    if sys::allow_ports(MARKER_PORT, 2).is_ok() {
        sys::write_port(EXIT_PORT, code);
    }
    // The port is not there, or the monitor needs a moment.
    loop {
        let _ = reboot(RebootMode::RB_POWER_OFF);
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
}
