//! Parses the output of a `husk bench` instance, which comes from an untrusted guest, in pieces as they are read: what is
//! kept is bounded and safe to print.
//!
//! Covers: bench/run/output.rs
#![no_main]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use husk::bench::run::output::OutputParser;
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    // The size of a piece, such that lines and markers are split.
    let Some((size, bytes)) = bytes.split_first() else { return };
    let start = Instant::now();
    let (mut output, mut at) = (OutputParser::default(), start);
    for piece in bytes.chunks(usize::from(*size) + 1) {
        at += Duration::from_millis(1);
        output.feed(piece, at);
    }
    for timing in &output.timings {
        assert!(timing.seconds >= 0.0 && !timing.name.contains(char::is_control));
    }
    output.add_failure("its own".into());
    assert!(output.failures.iter().all(|failure| !failure.contains(char::is_control)));
    assert!(output.failures.len() <= 64 && output.timings.len() <= 256);
    assert!(!output.unfinished().is_some_and(|name| name.contains(char::is_control)));
    assert!(output.longest_stall(at) <= at - start);
    output.reset_stall();
    assert!(output.longest_stall(at) <= at - start);
    let tail = output.tail();
    assert!(!tail.contains('\u{1b}') && tail.chars().count() <= 64 << 10);
});

/// Writes the initial corpus: good output, output that makes no sense, and more than is kept.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/bench_output"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let good =
        "[    0.5] init\r\nwork: ready\r\nwork: tick\nwork: begin fork\nwork: tick\nwork: end fork 12\nwork: exit 0\n";
    let bad = "work: begin a\nwork: begin b\nwork: fail b no \x1b[31mmemory\nwork: end c 1\nwork: begin d\nwork: end d 1\n\
        work: begin d\nwork: end d 1\nwork: exit 256\nwork: begin \u{1b}\nwork: end d\nwork: never mind work: ready\nwork: begin e\n";
    let long = format!("{}\nwork: ready\n", "x".repeat(10_000));
    let failures = "work: end a 1\n".repeat(80);
    for (name, text) in [("good", good), ("bad", bad), ("long", &long), ("failures", &failures)] {
        for size in [0, 6, u8::MAX] {
            let bytes = [&[size][..], text.as_bytes()].concat();
            fs::write(corpus.join(format!("{name}-{size}")), bytes).expect("the corpus can be written");
        }
    }
    // The end is trimmed at twice its limit, which takes more than an input's usual size.
    fs::write(corpus.join("endless"), vec![b'x'; 140 << 10]).expect("the corpus can be written");
}
