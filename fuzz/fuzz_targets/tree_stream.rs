//! Receives an arbitrary stream from a guest, as for `husk cp`: nothing outside of the requested name is created,
//! changed or followed, including existing files.
//!
//! Covers: ../firmware/protocol/src/tree image/tar_stream.rs image/tar_write.rs
#![no_main]

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::OnceLock;

use husk::image::tar_stream;
use husk_protocol::tree::{self, Terms};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

const PRECIOUS: &[u8] = b"precious";
const DIR_MODE: u32 = 0o711;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    static PLACE: OnceLock<TempDir> = OnceLock::new();
    // In memory, because only names matter.
    let place = PLACE.get_or_init(|| tempfile::tempdir_in("/dev/shm").expect("a directory can be made")).path();
    let precious = place.join("precious");
    for name in ["asked", "."] {
        let to = place.join("to");
        fs::create_dir_all(to.join("there")).expect("a directory can be made");
        for dir in [&to, &to.join("there")] {
            fs::set_permissions(dir, mode(DIR_MODE)).expect("it is ours");
        }
        symlink("../../precious", to.join("there/link")).expect("a link can be made");
        symlink("..", to.join("up")).expect("a link can be made");
        fs::write(&precious, PRECIOUS).expect("a file can be written");
        let terms = Terms { name: Some(name.into()), must_be_dir: name == ".", ..Terms::default() };
        let _ = tree::receive(&mut &bytes[..], &to, terms, &mut |_| {});
        assert_eq!(names(place, &["to", "precious"]), [""; 0], "made outside");
        if name == "asked" {
            assert_eq!(names(&to, &["asked", "there", "up"]), [""; 0], "made beside it");
        }
        assert_eq!(fs::read(&precious).expect("it is there"), PRECIOUS);
        assert_eq!([&to, &to.join("there")].map(|dir| fs::metadata(dir).unwrap().mode() & 0o7777), [DIR_MODE; 2]);
        remove(&to);
        let mut archive = Vec::new();
        if tar_stream::receive(bytes, name.as_bytes(), tar_stream::Content::Files, &mut archive).is_ok() && !bytes.is_empty() && archive.len() > 1024 {
            let first = archive.iter().position(|byte| matches!(byte, 0 | b'/')).expect("a name ends");
            assert!(archive.starts_with(b"pax\0") || &archive[..first] == name.as_bytes(), "another name in the archive");
        }
    }
});

fn mode(mode: u32) -> fs::Permissions {
    fs::Permissions::from_mode(mode)
}

/// The names in a directory, except those that are expected.
fn names(dir: &Path, expected: &[&str]) -> Vec<String> {
    let entries = fs::read_dir(dir).expect("the directory is there");
    let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
    names.filter(|name| !expected.contains(&name.as_str())).collect()
}

/// Removes a tree, including directories without permissions.
fn remove(path: &Path) {
    let Ok(metadata) = path.symlink_metadata() else { return };
    if metadata.is_dir() {
        fs::set_permissions(path, mode(0o700)).expect("it is ours");
        for entry in fs::read_dir(path).expect("it can be read") {
            remove(&entry.expect("it can be read").path());
        }
        fs::remove_dir(path).expect("it is empty");
    } else if let Err(error) = fs::remove_file(path) {
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }
}

/// Writes the initial corpus: valid streams of a tree, a file, and the contents of a directory.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/tree_stream"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let from = tempfile::tempdir().expect("a directory can be made");
    fs::create_dir_all(from.path().join("a/b")).expect("a directory can be made");
    fs::write(from.path().join("a/file"), "content").expect("a file can be written");
    symlink("../../precious", from.path().join("a/link")).expect("a link can be made");
    for (name, path) in
        [("tree", from.path().join("a")), ("file", from.path().join("a/file")), ("contents", from.path().join("a/."))]
    {
        let mut bytes = Vec::new();
        tree::send(&path, false, &mut bytes, &mut |_| {}).expect("it can be sent");
        fs::write(corpus.join(name), bytes).expect("the corpus can be written");
    }
}
