//! Machines answer while they are saved.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;

use crate::background::Machines;
use crate::husk::{monitor_of, own_lines, send_signal};
use crate::snapshot::restored;

/// Longer than anything here takes, and shorter than a monitor may make no progress.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A machine whose monitor was stopped while it writes the memory.
struct Busy {
    machines: Machines,
    path: String,
    monitor: u32,
    snapshot: Child,
}

impl Busy {
    fn new() -> Busy {
        let machines = Machines::new();
        let initrd = machines.runtime.path().join("initrd");
        fs::write(&initrd, vec![1; 40 << 20]).unwrap();
        machines.start(
            guests::SERIAL,
            "do=echo wait=interrupt",
            &["--name", "echo", "--initrd", initrd.to_str().unwrap()],
        );
        machines.await_log("echo", "ready");
        let monitor = monitor_of(machines.inspect("echo", "State/Pid").parse().unwrap());
        let path = machines.runtime.path().join("snapshot").to_str().unwrap().to_owned();
        loop {
            let mut command = machines.command(&["snapshot", "echo", &path]);
            let mut snapshot = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
            let memory = Path::new(&path).join("memory");
            while fs::metadata(&memory).map_or(0, |found| found.blocks()) == 0 {
                std::hint::spin_loop();
            }
            send_signal(monitor, "STOP");
            thread::sleep(Duration::from_millis(300));
            if snapshot.try_wait().unwrap().is_none() {
                return Busy { machines, path, monitor, snapshot };
            }
            // It was faster.
            send_signal(monitor, "CONT");
            fs::remove_dir_all(&path).unwrap();
        }
    }
}

#[test]
fn a_machine_answers_while_it_is_saved_and_goes_on() {
    needs_kvm!();
    let Busy { machines, path, monitor, snapshot } = Busy::new();
    let started = Instant::now();
    assert!(machines.ok(&["ps"]).contains("echo"));
    assert_eq!(machines.status("echo"), "running");
    assert!(machines.ok(&["stats", "--no-stream", "echo"]).contains("echo"));
    assert!(machines.ok(&["logs", "echo"]).starts_with("ready"));
    for words in
        [&["pause", "echo"][..], &["update", "--memory", "32M", "echo"], &["snapshot", "echo", &format!("{path}.2")]]
    {
        let line = machines.fails(words, 1);
        assert!(line.contains("the machine is being saved: try again"), "{line}");
    }
    let mut attached = machines.attach("echo");
    attached.stdin.take().unwrap().write_all(b"typed").unwrap();
    assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
    send_signal(monitor, "CONT");
    let output = snapshot.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    machines.await_log("echo", "typed");
    let _ = attached.kill();
    attached.wait().unwrap();
    assert!(restored(&machines, &path, "word\x04").starts_with("word"));
}

#[test]
fn a_machine_can_be_killed_and_stopped_while_it_is_saved() {
    needs_kvm!();
    let Busy { machines, path, snapshot, .. } = Busy::new();
    let started = Instant::now();
    machines.ok(&["kill", "echo"]);
    assert_eq!(machines.ok(&["wait", "echo"]), "137\n");
    assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
    let output = snapshot.wait_with_output().unwrap();
    assert_eq!((output.status.code(), own_lines(&output.stderr).lines().count()), (Some(1), 1), "{output:?}");
    assert!(!Path::new(&path).exists());
    let Busy { machines, snapshot, .. } = Busy::new();
    machines.ok(&["stop", "--time", "1", "echo"]);
    machines.await_status("echo", "exited");
    assert_eq!(snapshot.wait_with_output().unwrap().status.code(), Some(1));
}
