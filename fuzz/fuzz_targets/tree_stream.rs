//! From arbitrary bytes as what a guest sends when files are copied from it: nothing is made, changed or followed outside of the
//! folder that they go to.
#![no_main]

use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::OnceLock;

use husk_protocol::tree::{self, Trust};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

const PRECIOUS: &[u8] = b"precious";

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    static PLACE: OnceLock<TempDir> = OnceLock::new();
    // In memory: it is about names, and not about a disk.
    let place = PLACE.get_or_init(|| tempfile::tempdir_in("/dev/shm").expect("a folder can be made")).path();
    let to = place.join("to");
    fs::write(place.join("precious"), PRECIOUS).expect("a file can be written");
    let _ = tree::receive(&mut &bytes[..], &to, Trust::default(), &mut |_| {});
    let mut names: Vec<_> = fs::read_dir(place).expect("the folder is there").map(|e| e.unwrap().file_name()).collect();
    names.retain(|name| name != "to" && name != "precious");
    assert!(names.is_empty(), "made outside: {names:?}");
    assert_eq!(fs::read(place.join("precious")).expect("it is there"), PRECIOUS);
    remove(&to);
});

/// Removes what was made, folders that may not be entered too.
fn remove(path: &Path) {
    let Ok(metadata) = path.symlink_metadata() else { return };
    if metadata.is_dir() {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(path, fs::Permissions::from_mode(0o700)).expect("it is ours");
        for entry in fs::read_dir(path).expect("it can be read") {
            remove(&entry.expect("it can be read").path());
        }
        fs::remove_dir(path).expect("it is empty");
    } else if let Err(error) = fs::remove_file(path) {
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

/// What the fuzzing starts from: a tree with a bit of everything, sent as it is sent.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/tree_stream"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let from = tempfile::tempdir().expect("a folder can be made");
    fs::create_dir_all(from.path().join("a/b")).expect("a folder can be made");
    fs::write(from.path().join("a/file"), "content").expect("a file can be written");
    std::os::unix::fs::symlink("../../precious", from.path().join("a/link")).expect("a link can be made");
    for (name, path) in
        [("tree", from.path().join("a")), ("file", from.path().join("a/file")), ("contents", from.path().join("a/."))]
    {
        let mut bytes = Vec::new();
        tree::send(&path, &mut bytes, &mut |_| {}).expect("it can be sent");
        fs::write(corpus.join(name), bytes).expect("the corpus can be written");
    }
}
