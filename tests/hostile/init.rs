//! A guest of `husk run` whose init breaks the rules of the protocol: its machine goes on, or ends with one line.

use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;
use tempfile::TempDir;

use crate::arena::own_memory_kib;
use crate::husk::{end_of, own_lines};

/// What husk may take for itself: buffers of the streams and of connections, and what it prepared the machine with.
const MEMORY_MAX_KIB: u64 = 16 << 10;
/// Of devices, vCPUs and streams.
const THREADS_MAX: usize = 20;
/// How long a guest that floods or says nothing is watched.
const WATCHED: Duration = Duration::from_secs(3);

/// Its root and husk's files.
struct Place(TempDir);

impl Place {
    fn new() -> Place {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("root")).unwrap();
        Place(dir)
    }

    fn start(&self, task: &str) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.args(["run", "--network", "none", "--memory", "64M", "--kernel", guests::LIAR]);
        command.arg(self.0.path().join("root")).arg(format!("do={task}"));
        for name in ["HUSK_DATA", "XDG_RUNTIME_DIR"] {
            command.env(name, self.0.path());
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }
}

/// The output, once it has ended, with husk's messages about this guest, and the guest's errors.
fn finish(mut child: Child) -> (Option<i32>, String, String) {
    let status = end_of(&mut child).expect("husk did not end");
    let Output { stdout, stderr, .. } = child.wait_with_output().unwrap();
    let lines = own_lines(&stderr);
    let lines = lines.split_inclusive('\n').filter(|line| !line.contains("taken as a root filesystem")).collect();
    (status.code(), String::from_utf8_lossy(&stdout).into_owned(), lines)
}

/// Lets the guest go on for a while, and then ends it. Asserts that husk keeps its memory and threads within bounds.
#[track_caller]
fn watch_and_end(task: &str) {
    let place = Place::new();
    let mut child = place.start(task);
    let (pid, begun) = (child.id(), Instant::now());
    let threads = || std::fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    while begun.elapsed() < WATCHED {
        let (kib, threads) = (own_memory_kib(pid), threads());
        assert!(kib > 0, "it ended early: {:?}", finish(child));
        assert!(kib <= MEMORY_MAX_KIB && threads <= THREADS_MAX, "{kib} KiB, {threads} threads");
        thread::sleep(Duration::from_millis(50));
    }
    // One ends it before its process has started, and three afterwards; those that a busy process has not read yet are one.
    let until = Instant::now() + Duration::from_secs(30);
    while child.try_wait().unwrap().is_none() && Instant::now() < until {
        let _ = Command::new("sh").args(["-c", &format!("kill -s TERM {pid}")]).stderr(Stdio::null()).status();
        thread::sleep(Duration::from_millis(100));
    }
    let (code, _, lines) = finish(child);
    assert_eq!(code, Some(143), "{lines}");
    assert!(!lines.contains("panicked"), "{lines}");
}

#[test]
fn messages_in_any_order_leave_the_first_end() {
    needs_kvm!();
    let (code, output, lines) = finish(Place::new().start("jumble"));
    assert_eq!((code, output.as_str(), lines.as_str()), (Some(3), "output\n", "errors\n"));
}

#[test]
fn what_is_no_message_ends_the_machine_with_one_line() {
    needs_kvm!();
    for task in ["noise", "lengths"] {
        let (code, output, lines) = finish(Place::new().start(task));
        assert_eq!((code, output.as_str(), lines.lines().count()), (Some(125), "", 1), "{task}: {lines}");
        assert!(lines.starts_with("husk: lost the connection to the guest's init: a message of "), "{lines}");
    }
}

#[test]
fn a_reason_of_a_guest_is_one_line_of_husk() {
    needs_kvm!();
    let (code, _, lines) = finish(Place::new().start("words"));
    assert_eq!(code, Some(126), "{lines}");
    assert_eq!(lines, "husk: no husk: all is well\u{fffd}]0;owned\u{fffd}\u{fffd}xyz\n");
}

#[test]
fn a_flood_of_connections_leaves_room_for_the_process() {
    needs_kvm!();
    let (code, _, lines) = finish(Place::new().start("hellos"));
    assert_eq!((code, lines.as_str()), (Some(5), ""));
}

#[test]
fn a_guest_that_says_nothing_can_be_ended() {
    needs_kvm!();
    watch_and_end("silence");
}

#[test]
fn floods_of_output_and_of_questions_take_no_memory() {
    needs_kvm!();
    watch_and_end("flood");
    watch_and_end("questions");
}
