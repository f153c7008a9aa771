//! Parses the output of a `husk bench` instance, which comes from an untrusted guest, in pieces as they are read.
//!
//! Covers: bench/run/output.rs
#![no_main]

use std::time::{Duration, Instant};

use husk::bench::run::output::OutputParser;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|pieces: Vec<Vec<u8>>| {
    let start = Instant::now();
    let mut output = OutputParser::default();
    for (number, piece) in (0..).zip(&pieces) {
        output.feed(piece, start + Duration::from_millis(number));
    }
    for timing in &output.timings {
        assert!(timing.seconds >= 0.0 && !timing.name.contains(char::is_control));
    }
    assert!(output.failures.iter().all(|failure| !failure.contains(char::is_control)));
    assert!(!output.tail().contains('\u{1b}'));
});
