//! The marker lines for the reader outside.

use std::io::Write;

/// Prints a line and waits until it has left: a serial port may still be sending it.
pub fn line(words: std::fmt::Arguments) {
    let mut stdout = std::io::stdout();
    // A single write, so that no other process's output interleaves. Errors are ignored.
    let _ = stdout.write_all(format!("work: {words}\n").as_bytes()).and_then(|()| stdout.flush());
    let _ = nix::sys::termios::tcdrain(&stdout);
}
