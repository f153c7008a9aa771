//! Reads a damaged log of a machine's streams: reading ends, and returns no more bytes than there are.
//!
//! Covers: console/stream_log.rs
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use husk::console::stream_log::{self, LogReader, Stream};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    static PLACE: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_, path) = PLACE.get_or_init(|| {
        let place = tempfile::tempdir_in("/dev/shm").expect("a directory can be made");
        let path = place.path().join("streams.log");
        (place, path)
    });
    fs::write(path, bytes).expect("a file can be written");
    let mut reader = LogReader::open(path);
    let mut read_bytes = 0;
    while let Some((head, content)) = reader.read().expect("it can be read") {
        assert!(!content.is_empty() && content.len() <= head.len_bytes as usize);
        read_bytes += content.len() as u64;
    }
    assert!(read_bytes + reader.damaged_bytes() <= bytes.len() as u64);
});

/// Writes the initial corpus: lines of both streams, and damage between them.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/stream_log"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let lines = [stream_log::records(Stream::Output, b"a line\n"), stream_log::records(Stream::Errors, b"another\n")];
    fs::write(corpus.join("lines"), lines.concat()).expect("the corpus can be written");
    fs::write(corpus.join("damage"), lines.join(&b"xyz"[..])).expect("the corpus can be written");
}
