//! Machines whose output is not read can be paused, stopped, killed and detached from as usual.

use std::io::Read;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;

use crate::background::Machines;
use crate::husk::{end_of, monitor_of, send_signal};

/// Much longer than the tested operations take.
const SOON: Duration = Duration::from_secs(30);
/// More than a pipe and husk buffer together.
const MORE_THAN_IS_HELD: usize = 160 << 10;
/// Fits into both buffers, but not into the pipe alone.
const LESS_THAN_IS_HELD: usize = 80 << 10;

/// A machine in the foreground that prints this much to a pipe that is not read.
fn unread(machines: &Machines, bytes: usize) -> Child {
    let cmdline = format!("do=flood bytes={bytes}");
    let words = ["boot", "--name", "full", "--memory", "64M", "--kernel", guests::SERIAL, "--cmdline", &cmdline];
    let child = machines.command(&words).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    while machines.ok(&["ps", "-q"]).is_empty() {
        thread::sleep(Duration::from_millis(10));
    }
    machines.await_status("full", "running");
    // The buffers are full when the guest makes no progress.
    let used = || -> Vec<String> {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", child.id())).unwrap().flatten();
        tasks.map(|task| std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default()).collect()
    };
    let mut before = used();
    loop {
        thread::sleep(Duration::from_millis(300));
        let now = used();
        if std::mem::replace(&mut before, now.clone()) == now {
            break;
        }
    }
    child
}

/// A machine that has ended with unread output. Only its own process can tell that reliably on a busy host.
fn ended_unread(machines: &Machines) -> Child {
    let child = unread(machines, LESS_THAN_IS_HELD);
    while machines.run(&["pause", "full"]).status.success() {
        machines.ok(&["unpause", "full"]);
        thread::sleep(Duration::from_millis(100));
    }
    assert!(machines.fails(&["pause", "full"], 1).contains("has exited"));
    child
}

#[track_caller]
fn ends_soon(mut child: Child, since: Instant, code: i32) {
    let status = end_of(&mut child).expect("husk ends");
    assert!(since.elapsed() < SOON, "{:?}", since.elapsed());
    assert_eq!(status.code(), Some(code), "{status}");
}

#[test]
fn a_machine_with_unread_output_is_paused_without_loss() {
    needs_kvm!();
    let machines = Machines::new();
    let mut child = unread(&machines, MORE_THAN_IS_HELD);
    machines.ok(&["pause", "full"]);
    assert_eq!(machines.status("full"), "paused");
    machines.ok(&["stats", "--json", "full"]);
    machines.ok(&["unpause", "full"]);
    let mut printed = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut printed).unwrap();
    let expected = |at: usize| if at % 64 == 63 { b'\n' } else { b'!' + (at % 64) as u8 };
    assert_eq!(printed.iter().enumerate().find(|(at, byte)| **byte != expected(*at)), None);
    assert_eq!(printed.len(), MORE_THAN_IS_HELD);
    ends_soon(child, Instant::now(), 0);
}

#[test]
fn a_machine_with_unread_output_can_be_stopped() {
    needs_kvm!();
    let machines = Machines::new();
    let child = unread(&machines, MORE_THAN_IS_HELD);
    let started = Instant::now();
    machines.ok(&["stop", "-t", "1", "full"]);
    ends_soon(child, started, 137);

    let child = unread(&machines, MORE_THAN_IS_HELD);
    machines.ok(&["pause", "full"]);
    let started = Instant::now();
    machines.ok(&["stop", "-t", "1", "full"]);
    ends_soon(child, started, 137);

    let child = unread(&machines, MORE_THAN_IS_HELD);
    let started = Instant::now();
    machines.ok(&["kill", "full"]);
    ends_soon(child, started, 137);

    let child = unread(&machines, MORE_THAN_IS_HELD);
    let started = Instant::now();
    send_signal(child.id(), "TERM");
    send_signal(child.id(), "INT");
    let mut child = child;
    let code = end_of(&mut child).expect("husk ends").code();
    assert!(matches!(code, Some(130 | 143)) && started.elapsed() < SOON, "{code:?} after {:?}", started.elapsed());
    assert_eq!(machines.dirs().len(), 0);
}

#[test]
fn the_virtual_machine_is_released_while_its_output_is_not_read() {
    needs_kvm!();
    let machines = Machines::new();
    let mut child = ended_unread(&machines);
    let has_vm = || {
        let files = std::fs::read_dir(format!("/proc/{}/fd", monitor_of(child.id()))).unwrap().flatten();
        files
            .filter_map(|file| std::fs::read_link(file.path()).ok())
            .any(|target| target.ends_with("anon_inode:kvm-vm"))
    };
    let since = Instant::now();
    while has_vm() {
        assert!(since.elapsed() < SOON, "the virtual machine is kept for a reader");
        thread::sleep(Duration::from_millis(10));
    }
    let mut printed = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut printed).unwrap();
    assert_eq!(printed.len(), LESS_THAN_IS_HELD, "nothing is lost");
    ends_soon(child, Instant::now(), 0);
}

#[test]
fn draining_the_output_can_be_cut_short() {
    needs_kvm!();
    let machines = Machines::new();
    let child = ended_unread(&machines);
    let started = Instant::now();
    machines.ok(&["stop", "-t", "1", "full"]);
    ends_soon(child, started, 0);

    let child = ended_unread(&machines);
    let started = Instant::now();
    machines.ok(&["kill", "full"]);
    ends_soon(child, started, 0);

    let child = ended_unread(&machines);
    let started = Instant::now();
    send_signal(child.id(), "TERM");
    ends_soon(child, started, 0);

    // Without any request, everything is delivered.
    let mut child = ended_unread(&machines);
    let mut printed = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut printed).unwrap();
    assert_eq!(printed.len(), LESS_THAN_IS_HELD);
    ends_soon(child, Instant::now(), 0);
    assert_eq!(machines.dirs().len(), 0);
}

#[test]
fn a_client_that_does_not_read_does_not_block_the_machine() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=flood bytes=100000000", &["--name", "web"]);
    let mut asleep = machines.attach("web");
    thread::sleep(Duration::from_secs(1));
    let started = Instant::now();
    machines.ok(&["pause", "web"]);
    machines.ok(&["unpause", "web"]);
    let mut awake = machines.attach("web");
    let mut byte = [0];
    awake.stdout.take().unwrap().read_exact(&mut byte).unwrap();
    machines.ok(&["stop", "-t", "1", "web"]);
    assert!(started.elapsed() < SOON, "{:?}", started.elapsed());
    // It is blocked on a pipe, and exits as soon as it receives a signal.
    send_signal(asleep.id(), "TERM");
    end_of(&mut asleep).expect("it ends");
    end_of(&mut awake).expect("it ends");
}

/// Reads some of a command's output and closes the pipe; returns its exit status and messages.
fn read_a_little(machines: &Machines, words: &[&str]) -> std::process::Output {
    let mut child = machines.command(words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
    end_of(&mut child).expect("it ends");
    child.wait_with_output().unwrap()
}

#[test]
fn a_reader_that_closes_early_is_not_an_error() {
    needs_kvm!();
    let machines = Machines::new();
    machines.start(guests::SERIAL, "do=flood bytes=100000000", &["--name", "web"]);
    machines.await_log("web", "\n");
    let commands: [&[&str]; 4] = [&["logs", "web"], &["logs", "-f", "web"], &["attach", "web"], &["stats", "web"]];
    for words in commands {
        if words == ["logs", "web"] {
            // More than a pipe holds.
            while machines.ok(words).len() < MORE_THAN_IS_HELD {
                thread::sleep(Duration::from_millis(100));
            }
        }
        let ended = read_a_little(&machines, words);
        assert_eq!((ended.status.code(), ended.stderr.as_slice()), (Some(0), &b""[..]), "{words:?}");
    }
}
