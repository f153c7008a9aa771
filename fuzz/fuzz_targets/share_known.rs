//! Restores arbitrary bytes as what a saved machine knows of a folder: that fails or names files of the folder, and ends nothing.
//!
//! Covers: fs/saved.rs fs/handles.rs fs/inodes.rs
#![no_main]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use husk::fs::fuzzing;
use libfuzzer_sys::fuzz_target;

static KNOWN: OnceLock<(PathBuf, Vec<u8>)> = OnceLock::new();

/// The magic number and the identity of the folder, without which nothing else is read.
const BEGIN_BYTES: usize = 40;

fuzz_target!(init: start(), |bytes: &[u8]| {
    let (dir, known) = KNOWN.get().expect("it was made");
    let begin = known.get(..BEGIN_BYTES).expect("it begins so");
    let _ = fuzzing::restore(dir, &[begin, bytes].concat());
    let _ = fuzzing::restore(dir, bytes);
});

/// Makes the folder, and writes the initial corpus: an inode and a handle.
fn start() {
    let dir = std::env::temp_dir().join(format!("husk-known-{}", std::process::id()));
    fs::create_dir_all(&dir).expect("a folder can be made");
    fs::write(dir.join("f"), b"content").expect("a file can be made");
    let known = fuzzing::known(&dir).expect("the folder can be saved");
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/share_known"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    // The file is known by the folder's identity: it is opened, and found to be another one.
    let identity = known.get(8..BEGIN_BYTES).expect("it has an identity");
    let place = [identity, &1_u32.to_le_bytes(), b"f"].concat();
    let inode = [&2_u64.to_le_bytes()[..], &1_u64.to_le_bytes(), &place, &[0; 8]].concat();
    let handle = [&1_u64.to_le_bytes()[..], &2_u32.to_le_bytes(), &place, &[0; 8]].concat();
    let seed = [&3_u64.to_le_bytes()[..], &1_u64.to_le_bytes(), &inode, &handle].concat();
    fs::write(corpus.join("file"), seed).expect("a seed can be written");
    assert!(KNOWN.set((dir, known)).is_ok());
}
