//! Arbitrary messages of a guest's init to the host's side of its session, in pieces: each turn ends, and the session ends at most
//! once.
//!
//! Covers: guest/session.rs
#![no_main]

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use husk::exit_latch::ExitLatch;
use husk::guest::session::Session;
use husk::timings::Timings;
use husk_protocol::{Role, ToHost, WindowSize, frame};
use libfuzzer_sys::fuzz_target;

/// More than a turn reads.
const PIECES_MAX: usize = 16;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    let Some((first, bytes)) = bytes.split_first() else { return };
    let (ours, mut guest) = UnixStream::pair().expect("a socket can be had");
    guest.set_nonblocking(true).expect("it is a socket");
    let latch = ExitLatch::new().expect("a descriptor can be had");
    let timings = Arc::new(Timings::new(Instant::now()));
    // No terminal, whose size would be asked for.
    let mut session = Session::over(7, ours, Vec::new(), false, timings).expect("descriptors can be had");
    let mut end = None;
    let size = (bytes.len() / PIECES_MAX).max(usize::from(*first) + 1);
    for piece in bytes.chunks(size) {
        // What does not fit is lost, as if the guest had not sent it.
        let _ = guest.write(piece);
        session.on_ready(&latch).expect("no descriptor is missing");
        session.send_signal(*first);
        session.resize_to(WindowSize::default());
        session.check_clock();
        if let Some(end) = &end {
            assert_eq!(session.end(), Some(end), "the first end counts");
        }
        end = session.end().cloned();
        let mut answers = [0; 4096];
        let _ = guest.read(&mut answers);
    }
    drop(guest);
    session.on_ready(&latch).expect("no descriptor is missing");
    let _ = (session.has_started(), session.is_over(), session.is_lost());
});

/// Writes the initial corpus: the messages of a process's life.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/guest_session"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    for (name, messages) in [
        ("exit", vec![ToHost::Admitted, ToHost::Started(2), ToHost::AskTime, ToHost::Exited(3)]),
        ("signal", vec![ToHost::Started(2), ToHost::Signaled(9), ToHost::Exited(0)]),
        (
            "resumed",
            vec![ToHost::Resumed { pid: Some(2), streams: vec![Role::Stdout] }, ToHost::Waiting, ToHost::AskTime],
        ),
        ("failure", vec![ToHost::Failed { message: "no".into(), code: 127 }]),
    ] {
        let mut bytes = vec![5];
        messages.iter().for_each(|message| frame::write(message, &mut bytes).expect("it fits"));
        fs::write(corpus.join(name), bytes).expect("the corpus can be written");
    }
}
