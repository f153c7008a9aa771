//! Reads two arbitrary layers of an image, merges them, and builds a root file system.
//!
//! Of `unpack.rs`, the thread that reads ahead is left out: it would take more time than the rest.
//!
//! Covers: image/tar image/layer.rs image/tree.rs image/unpack.rs image/erofs
#![no_main]

#[path = "../archives.rs"]
mod archives;

use std::fs;
use std::path::Path;

use husk::image::{Form, fuzzing};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: write_seeds(), |input: (bool, u16, &[u8])| {
    let (is_packed, at, bytes) = input;
    // Layers are split at a record boundary, so that archives in the corpus remain valid if the split changes.
    let at = (usize::from(at) * 512).min(bytes.len());
    let (lower, upper) = bytes.split_at(at);
    let form = if is_packed { Form::Lz4 } else { Form::Plain };
    let fixed = |bytes: &[u8]| checksummed(bytes);
    if let Ok(size) = fuzzing::layers(&fixed(lower), &fixed(upper), form) {
        assert!(size > 0 && size % 4096 == 0, "{size} bytes");
    }
});

/// Corrects the checksums of headers, which a fuzzer would not guess.
fn checksummed(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for record in bytes.chunks_exact_mut(512) {
        if record[257..262] != *b"ustar" {
            continue;
        }
        let counted = |(at, byte): (usize, &u8)| if (148..156).contains(&at) { 32 } else { u32::from(*byte) };
        let sum: u32 = record.iter().enumerate().map(counted).sum();
        record[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    bytes
}

/// Writes the initial corpus, in the encoding of the target's input: each archive with and without compression.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/image_layer"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    for (name, archive, lower_records) in archives::seeds() {
        for is_packed in [false, true] {
            let head = [u8::from(is_packed), lower_records as u8, (lower_records >> 8) as u8];
            let name = format!("{name}{}", if is_packed { "-packed" } else { "" });
            fs::write(corpus.join(name), [&head[..], &archive].concat()).expect("the corpus can be written");
        }
    }
}
