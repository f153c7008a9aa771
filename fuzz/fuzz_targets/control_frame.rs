//! Parses arbitrary control messages: each is either rejected, or parsed to a value that is serialized and parsed again
//! without a change.
//!
//! Covers: ../firmware/protocol/src/frame.rs ../firmware/protocol/src/hello.rs ../firmware/protocol/src/session.rs
//! monitor/message.rs
#![no_main]

use std::fs;
use std::path::Path;

use husk::monitor::message::{self, Event, Reply};
use husk::sys::violation::Report;
use husk_protocol::frame::{self, Message, Reader};
use husk_protocol::{HELLO_BYTES, Hello, Identity, Overlay, Process, Renewal, Role, Run, Spec, ToGuest, ToHost};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: write_seeds(), |bytes: &[u8]| {
    read::<ToHost>(bytes);
    read::<ToGuest>(bytes);
    // What a monitor process that was taken over tells its supervisor.
    let _ = (message::decode::<Reply>(bytes), message::decode::<Event>(bytes), Report::parse(bytes));
    if let Some(hello) = bytes.first_chunk::<HELLO_BYTES>().and_then(|bytes| Hello::from_bytes(*bytes).ok()) {
        assert_eq!(Hello::from_bytes(hello.to_bytes()), Ok(hello));
    }
    if let Ok(spec) = Spec::from_bytes(bytes) {
        assert_eq!(spec.to_bytes().and_then(|bytes| Spec::from_bytes(&bytes)), Ok(spec));
    }
});

/// Parses messages from pieces of the size in the first byte, and then serializes and parses each of them again.
fn read<M: Message + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    let mut reader = Reader::default();
    let size = bytes.first().map_or(1, |byte| usize::from(*byte) + 1);
    for piece in bytes.chunks(size) {
        reader.push(piece);
        loop {
            match reader.take::<M>() {
                Ok(Some(message)) => {
                    let mut again = Reader::default();
                    let mut out = Vec::new();
                    frame::write(&message, &mut out).expect("what was read fits");
                    again.push(&out);
                    assert_eq!(again.take(), Ok(Some(message)));
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
}

/// Writes the initial corpus: messages of both sides.
fn write_seeds() {
    let corpus = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/corpus/control_frame"));
    fs::create_dir_all(corpus).expect("the corpus can be made");
    let process = Process { args: vec![b"sh".to_vec()], env: vec![b"A=b".to_vec()], ..Process::default() };
    let (mut host, mut guest) = (Vec::new(), Vec::new());
    let resumed = ToHost::Resumed { pid: Some(2), streams: vec![Role::Stdout] };
    let failed = ToHost::Failed { message: "no".into(), code: 127 };
    for message in [ToHost::Started(2), failed, ToHost::Exited(3), resumed, ToHost::Renewed(Err("no".into()))] {
        frame::write(&message, &mut host).expect("it fits");
    }
    let renewal = Renewal { time_ns: 1 << 60, entropy: [1; 32] };
    let identity = Identity { hostname: "box".into(), ..Identity::default() };
    let run = Box::new(Run { identity: identity.clone(), process: process.clone(), ..Run::default() });
    let renew = ToGuest::Renew { renewal: renewal.clone(), identity: Box::new(identity), cut: true };
    let begin = ToGuest::Begin(renewal, Overlay::Disk("/dev/vdb".into()), run);
    for message in [ToGuest::Start(Box::new(process)), ToGuest::Signal(15), renew, begin, ToGuest::Finish] {
        frame::write(&message, &mut guest).expect("it fits");
    }
    let hello = Hello { session: 1, role: Role::Stdin }.to_bytes().to_vec();
    let reply = message::encode(&Reply::Usage(Box::default())).expect("it fits");
    let event = message::encode(&Event::Log(2, "a line".into())).expect("it fits");
    for (name, bytes) in [("host", host), ("guest", guest), ("hello", hello), ("reply", reply), ("event", event)] {
        fs::write(corpus.join(name), bytes).expect("the corpus can be written");
    }
}
