//! Sends arbitrary FUSE requests to the server of a shared folder: each gets a reply that fits, and none ends the server.
//!
//! Covers: fs/attributes.rs fs/files.rs fs/folders.rs fs/handles.rs fs/inodes.rs fs/link.rs fs/mod.rs fs/names.rs fs/wire.rs
//! fs/worker.rs
#![no_main]

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use husk::fs::fuzzing::Guest;
use libfuzzer_sys::fuzz_target;

static GUEST: OnceLock<Guest> = OnceLock::new();

fuzz_target!(init: start(), |bytes: &[u8]| {
    let guest = GUEST.get().expect("it was started");
    // Each piece is a request; its first two bytes tell its length and the room for its reply.
    let mut rest = bytes;
    while let [len, room, behind @ ..] = rest {
        let (request, next) = behind.split_at(behind.len().min(usize::from(*len)));
        let room = u32::from(*room) * 64;
        let mut request = request.to_vec();
        let len = (request.len() as u32).to_le_bytes();
        if let Some(field) = request.get_mut(..4) {
            field.copy_from_slice(&len);
        }
        let reply = guest.send(&request, room).expect("the server lives");
        assert!(reply <= room && (reply == 0 || reply >= 16));
        rest = next;
    }
});

/// Starts the server, and writes the initial corpus: a request of each kind.
fn start() {
    let dir = std::env::temp_dir().join(format!("husk-share-{}", std::process::id()));
    fs::create_dir_all(dir.join("d")).expect("a folder can be made");
    fs::write(dir.join("f"), b"content").expect("a file can be made");
    assert!(GUEST.set(Guest::new(&dir).expect("the server starts")).is_ok());
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/share_request"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    for opcode in 1..53_u32 {
        let header = |opcode: u32, node: u64| {
            let mut bytes = [0; 40];
            bytes[4..8].copy_from_slice(&opcode.to_le_bytes());
            bytes[16..24].copy_from_slice(&node.to_le_bytes());
            bytes.to_vec()
        };
        let look_up = [header(1, 1), b"f\0".to_vec()].concat();
        let request = [header(opcode, 2), vec![1; 8], vec![0; 32], b"f\0d\0user.a\0".to_vec()].concat();
        let seed: Vec<u8> =
            [look_up, request].iter().flat_map(|request| [&[request.len() as u8, 9][..], request].concat()).collect();
        fs::write(corpus.join(format!("opcode-{opcode}")), seed).expect("a seed can be written");
    }
}
