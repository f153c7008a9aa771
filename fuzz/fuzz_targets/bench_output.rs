//! What an instance of `husk bench` prints: a hostile guest's, in pieces as they are read.
#![no_main]

use std::time::{Duration, Instant};

use husk::bench::run::console::Console;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let start = Instant::now();
    let mut console = Console::default();
    for (number, piece) in (0..).zip(&pieces) {
        console.take(piece, start + Duration::from_millis(number));
    }
    for mark in &console.marks {
        assert!(mark.seconds >= 0.0 && !mark.name.contains(char::is_control));
    }
    assert!(console.failures.iter().all(|failure| !failure.contains(char::is_control)));
    assert!(!console.tail().contains('\u{1b}'));
});
