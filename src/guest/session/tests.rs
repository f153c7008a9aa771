//! An init that breaks the rules of the protocol: it ends its machine with one line, or only harms itself.

use std::io::{Read, Write};
use std::thread;

use husk_protocol::MAIN_SESSION;
use husk_protocol::frame::{self, Message};

use super::control::UNSENT_MAX_BYTES;
use super::*;
use crate::console::hub::Hub;
use crate::console::stream_log::StreamLog;

mod restored;

/// The maximum size of the log of a machine's output in these tests.
const LOG_MAX_BYTES: u64 = 256 << 10;

/// A machine's main session, and what its guest connects to.
struct Host {
    dir: tempfile::TempDir,
    session: Session,
    latch: ExitLatch,
}

impl Host {
    fn new() -> Host {
        Host::with(|listener, endpoints, timings| Session::new(listener, false, false, endpoints, timings))
    }

    fn with(session: impl FnOnce(UnixListener, Endpoints, Arc<Timings>) -> Result<Session>) -> Host {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("vsock_1024")).unwrap();
        let log = StreamLog::open(dir.path().join("streams.log"), LOG_MAX_BYTES).unwrap();
        let endpoints = Endpoints::Hub(Arc::new(Hub::new(log)));
        let timings = Arc::new(Timings::new(Instant::now()));
        let session = session(listener, endpoints, timings).unwrap();
        Host { dir, session, latch: ExitLatch::new().unwrap() }
    }

    /// A connection of the guest, which sends `bytes` first.
    fn connect(&mut self, bytes: &[u8]) -> UnixStream {
        let mut stream = UnixStream::connect(self.dir.path().join("vsock_1024")).unwrap();
        stream.write_all(bytes).unwrap();
        self.turn();
        stream
    }

    fn join(&mut self, role: Role) -> UnixStream {
        self.connect(&Hello { session: MAIN_SESSION, role }.to_bytes())
    }

    /// Handles what the guest has sent.
    fn turn(&mut self) {
        self.session.on_ready(&self.latch).unwrap();
    }

    /// Sends messages of the guest, one at a time.
    fn hear(&mut self, control: &mut UnixStream, messages: &[ToHost]) {
        for message in messages {
            let mut bytes = Vec::new();
            frame::write(message, &mut bytes).unwrap();
            control.write_all(&bytes).unwrap();
            self.turn();
        }
    }

    /// Waits for an event of a stream's thread.
    fn wait_until(&mut self, what: impl Fn(&Session) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !what(&self.session) {
            assert!(Instant::now() < deadline);
            thread::sleep(Duration::from_millis(1));
            self.turn();
        }
    }

    fn said(&self) -> Option<String> {
        self.latch.reason().map(|reason| reason.to_string())
    }
}

fn is_closed(stream: &mut UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    !matches!(stream.read(&mut [0; 64]), Err(error) if error.kind() == ErrorKind::WouldBlock)
}

#[test]
fn messages_in_any_order_end_the_session_once_and_only_with_its_streams() {
    let failed = ToHost::Failed { message: "no".into(), code: 127 };
    let ends = [ToHost::Exited(3), ToHost::Signaled(9), failed];
    let others = [ToHost::Admitted, ToHost::Started(0), ToHost::AskTime, ToHost::Started(u32::MAX)];
    for seed in 0..50 {
        let mut random = fastrand::Rng::with_seed(seed);
        let mut messages: Vec<ToHost> = ends.iter().chain(&others).cycle().take(21).cloned().collect();
        random.shuffle(&mut messages);
        let mut host = Host::new();
        let mut control = host.join(Role::Control);
        host.hear(&mut control, &messages);
        let first = messages.iter().find(|message| ends.contains(message));
        assert_eq!((host.session.end(), host.session.is_over()), (first, false), "seed {seed}");
        let outputs = [Role::Stdout, Role::Stderr].map(|role| host.join(role));
        assert!(!host.session.is_over(), "its output may follow");
        drop(outputs);
        host.wait_until(Session::is_over);
        assert_eq!(host.said(), None, "seed {seed}");
    }
}

#[test]
fn what_is_no_message_ends_the_machine_with_one_line() {
    let long = 0xffff_ffff_u32.to_le_bytes();
    let content = [&[9, 0, 0, 0][..], &[0xff; 9]].concat();
    for (bytes, reason) in [
        (&long[..], "a message of 4294967295 bytes is too long"),
        (&[0; 4], "unknown message"),
        (&content, "unknown message"),
        // A text that claims to be longer than its message.
        (&[7, 0, 0, 0, 2, 0xff, 0xff, 0xff, 0x7f, b'a', 0], "unknown message"),
    ] {
        let mut host = Host::new();
        let mut control = host.join(Role::Control);
        host.hear(&mut control, &[ToHost::Started(1)]);
        control.write_all(bytes).unwrap();
        host.turn();
        assert_eq!(host.said(), Some(format!("lost the connection to the guest's init: {reason}")));
        // Nothing more is read.
        assert!(is_closed(&mut control) && host.session.is_lost());
    }
}

#[test]
fn a_message_without_an_end_keeps_nothing_waiting_but_itself() {
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    control.write_all(&(ToHost::MAX_BYTES as u32).to_le_bytes()).unwrap();
    control.write_all(&[0; 100]).unwrap();
    host.turn();
    assert_eq!((host.said(), host.session.end(), host.session.has_started()), (None, None, false));
    // Its user can end the machine, before the process has started with one signal.
    host.session.on_signal(libc::SIGTERM, &host.latch);
    assert_eq!(host.latch.reason(), Some(ExitReason::Killed(libc::SIGTERM)));
}

#[test]
fn a_process_that_ignores_signals_or_never_ends_is_killed_by_three() {
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    host.hear(&mut control, &[ToHost::Started(1)]);
    for _ in 0..2 {
        host.session.on_signal(libc::SIGINT, &host.latch);
        assert_eq!(host.latch.reason(), None);
    }
    host.session.on_signal(libc::SIGINT, &host.latch);
    assert_eq!(host.latch.reason(), Some(ExitReason::Killed(libc::SIGINT)));
    // One that has exited, whose output does not end: one signal is enough.
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    let _outputs = [Role::Stdout, Role::Stderr].map(|role| host.join(role));
    host.hear(&mut control, &[ToHost::Started(1), ToHost::Exited(0)]);
    assert!(!host.session.is_over());
    host.session.on_signal(libc::SIGTERM, &host.latch);
    assert_eq!(host.latch.reason(), Some(ExitReason::Killed(libc::SIGTERM)));
}

#[test]
fn a_guest_that_does_not_exit_when_told_to_is_given_up() {
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    host.hear(&mut control, &[ToHost::Exited(0)]);
    drop([Role::Stdout, Role::Stderr].map(|role| host.join(role)));
    host.wait_until(Session::is_over);
    let left_ms = host.session.timeout_ms(&host.latch);
    assert!((1..=SHUTDOWN_TIMEOUT.as_millis() as i32).contains(&left_ms) && host.said().is_none());
    // More messages do not give it more time.
    host.hear(&mut control, &[ToHost::Started(1), ToHost::AskTime, ToHost::Exited(1)]);
    assert!(host.session.timeout_ms(&host.latch) <= left_ms);
    host.session.finish_by = Some(Instant::now());
    assert_eq!(host.session.timeout_ms(&host.latch), 0);
    let reason = "lost the connection to the guest's init: it did not exit when it was told to";
    assert_eq!(host.said().as_deref(), Some(reason));
}

#[test]
fn questions_whose_answers_are_not_read_take_no_memory() {
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    control.set_nonblocking(true).unwrap();
    let mut question = Vec::new();
    frame::write(&ToHost::AskTime, &mut question).unwrap();
    let questions = question.repeat(800);
    let mut asked_bytes = 0;
    while asked_bytes < 16 << 20 {
        // What does not fit into the socket is cut off in the middle of a question, and continues there.
        let from = asked_bytes % question.len();
        asked_bytes += control.write(&questions[from..]).unwrap_or(0);
        host.turn();
        let kept = host.session.control.as_ref().unwrap();
        assert!(kept.unsent_bytes() <= UNSENT_MAX_BYTES + 64, "{} bytes", kept.unsent_bytes());
    }
    assert_eq!(host.said(), None);
    // It is served again once it reads.
    let mut answers = [0; 64 << 10];
    while host.session.control.as_ref().is_some_and(|control| control.unsent_bytes() > 0) {
        let _ = control.read(&mut answers);
        host.turn();
    }
}

#[test]
fn connections_that_nobody_needs_are_closed() {
    let mut host = Host::new();
    let hello = |session, role| Hello { session, role }.to_bytes();
    let mut control = host.join(Role::Control);
    let mut other_version = hello(MAIN_SESSION, Role::Stdout);
    other_version[4] ^= 1;
    for bytes in [
        hello(MAIN_SESSION, Role::Control),
        // The process has no input.
        hello(MAIN_SESSION, Role::Stdin),
        hello(1, Role::Stdout),
        hello(u64::MAX, Role::Stderr),
        other_version,
        *b"GET / HTTP/1.1\r\n",
    ] {
        assert!(is_closed(&mut host.connect(&bytes)), "{bytes:?}");
    }
    let mut output = host.join(Role::Stdout);
    assert!(is_closed(&mut host.join(Role::Stdout)) && !is_closed(&mut output) && !is_closed(&mut control));
}

#[test]
fn a_flood_of_silent_connections_takes_a_few_descriptors() {
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    let mut flood: Vec<_> = (0..200).map(|_| host.connect(b"hus")).collect();
    let open = flood.iter_mut().map(is_closed).filter(|is_closed| !is_closed).count();
    assert_eq!((open, host.session.pending.len()), (PENDING_MAX, PENDING_MAX));
    host.hear(&mut control, &[ToHost::Started(1)]);
    assert!(host.session.has_started(), "those that it has are served");
    // There is room again once they are gone.
    drop(flood);
    host.turn();
    assert!(!is_closed(&mut host.join(Role::Stdout)));
}

#[test]
fn a_flood_of_output_fills_neither_memory_nor_disk() {
    let mut host = Host::new();
    let mut control = host.join(Role::Control);
    let mut outputs = [Role::Stdout, Role::Stderr].map(|role| host.join(role));
    host.hear(&mut control, &[ToHost::Started(1)]);
    let noise: Vec<u8> = (0..64 << 10).map(|at| at as u8).collect();
    for _ in 0..100 {
        outputs.iter_mut().for_each(|output| output.write_all(&noise).unwrap());
    }
    host.hear(&mut control, &[ToHost::Exited(0)]);
    drop(outputs);
    host.wait_until(Session::is_over);
    let files = std::fs::read_dir(host.dir.path()).unwrap().flatten();
    let bytes: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
    assert!(bytes <= LOG_MAX_BYTES + (128 << 10), "{bytes} bytes");
    assert_eq!(host.said(), None);
}
