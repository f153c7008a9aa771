//! The lines that are looked for outside.

use std::io::Write;

/// Says one thing to whoever takes the times, and waits until it has left: a serial port may still be sending it.
pub fn line(words: std::fmt::Arguments) {
    let mut stdout = std::io::stdout();
    // One write, so that no other process's words come between. Who does not listen is not told.
    let _ = stdout.write_all(format!("work: {words}\n").as_bytes()).and_then(|()| stdout.flush());
    let _ = nix::sys::termios::tcdrain(&stdout);
}
