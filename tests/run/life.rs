//! The ways in which machines end: signals, faults, many at once, and what they leave behind.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use crate::image::{archive, root, run};
use crate::{Ended, finish, guests, husk_run, shell, wait};

/// Starts a shell command and waits until it has printed `ready`.
fn start(mut command: Command) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = command.spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    if line != "ready\n" {
        child.kill().unwrap();
        panic!("the command did not start: {line:?} {}", wait(child).errors);
    }
    (child, output)
}

fn signal(child: &Child, name: &str) {
    run(Command::new("kill").arg(format!("-{name}")).arg(child.id().to_string()));
}

#[test]
fn signals_are_forwarded_to_the_process() {
    let guests = guests!();
    let usual = [("TERM", 10), ("INT", 11), ("HUP", 12), ("QUIT", 13), ("USR1", 14), ("USR2", 15)];
    // Signals that end husk itself, or that would have no visible effect, if they were not forwarded.
    for (name, code) in usual.into_iter().chain([("ALRM", 16), ("WINCH", 17), ("CONT", 18), ("40", 19)]) {
        let script = format!("trap 'exit {code}' {name}; echo ready; while :; do sleep 0.1; done");
        let (child, _output) = start(husk_run(&guests, &[archive(), "sh", "-c", &script]));
        signal(&child, name);
        wait(child).expect(code);
    }
    let (child, _output) = start(husk_run(&guests, &[archive(), "sh", "-c", "echo ready; exec sleep 1000"]));
    signal(&child, "TERM");
    wait(child).expect(143);
}

#[test]
fn the_third_signal_ends_a_process_that_ignores_them() {
    let script = "trap '' INT QUIT TERM; echo ready; while :; do sleep 0.1; done";
    let (child, _output) = start(husk_run(&guests!(), &[archive(), "sh", "-c", script]));
    // Sent together; two signals of the same kind would be merged.
    let urge = format!("kill -INT {0}; kill -QUIT {0}; kill -TERM {0}", child.id());
    run(Command::new("sh").args(["-c", &urge]));
    let code = wait(child).code;
    assert!(matches!(code, Some(130 | 131 | 143)), "{code:?}");
}

/// Runs `yes`, which blocks because its output is not read.
fn unread(guests: &Path, runtime: &Path) -> (Child, BufReader<std::process::ChildStdout>) {
    let words = ["--rm", "--name", "full", archive(), "sh", "-c", "echo ready; exec yes"];
    let mut command = husk_run(guests, &words);
    command.env("XDG_RUNTIME_DIR", runtime);
    let started = start(command);
    // All buffers are full after this time.
    std::thread::sleep(Duration::from_secs(3));
    started
}

#[test]
fn a_process_with_unread_output_can_be_stopped() {
    // Much longer than the tested operations take.
    const SOON: Duration = Duration::from_secs(20);
    let guests = guests!();
    let runtime = tempfile::tempdir().unwrap();
    let (child, output) = unread(&guests, runtime.path());
    let started = Instant::now();
    let husk = std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into());
    run(Command::new(husk).args(["stop", "-t", "2", "full"]).env("XDG_RUNTIME_DIR", runtime.path()));
    let code = wait(child).code;
    assert!(matches!(code, Some(137 | 143)) && started.elapsed() < SOON, "{code:?} after {:?}", started.elapsed());
    drop(output);

    let (child, output) = unread(&guests, runtime.path());
    let started = Instant::now();
    for name in ["TERM", "INT", "QUIT"] {
        signal(&child, name);
        std::thread::sleep(Duration::from_millis(200));
    }
    let code = wait(child).code;
    assert!(
        matches!(code, Some(130 | 131 | 143)) && started.elapsed() < SOON,
        "{code:?} after {:?}",
        started.elapsed()
    );
    drop(output);
}

#[test]
fn a_signal_before_the_process_starts_ends_the_machine() {
    let child = husk_run(&guests!(), &[archive(), "sleep", "1000"]).spawn().unwrap();
    std::thread::sleep(Duration::from_millis(300));
    let started = Instant::now();
    signal(&child, "TERM");
    wait(child).expect(143);
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[test]
fn orphans_are_reaped_and_killed_with_the_process() {
    let script = "for n in 1 2 3 4 5; do (sh -c 'sleep 0.1 & exit' &); done; sleep 1
        grep -l '^State:.Z' /proc/[0-9]*/status | wc -l
        (trap '' TERM HUP; sleep 1000 >/dev/null &); (sleep 1000 &); exit 6";
    assert_eq!(shell(&guests!(), &[], script).expect(6).text(), "0\n");
}

#[test]
fn a_panic_is_reported_with_the_kernels_last_messages() {
    let ended = shell(&guests!(), &[], "echo c >/proc/sysrq-trigger");
    ended.expect(81);
    let words = "husk: the guest kernel panicked: sysrq triggered crash\n";
    assert!(ended.errors.contains(words) && ended.errors.contains("guest: "), "{}", ended.errors);
}

#[test]
fn kernel_messages_are_shown_on_request() {
    let ended = shell(&guests!(), &["--verbose"], "echo clean");
    assert_eq!(ended.expect(0).text(), "clean\n");
    assert!(ended.errors.contains("Run /init as init process"), "{}", ended.errors);
}

#[test]
fn timings_cover_every_step() {
    let ended = shell(&guests!(), &["--timings"], "true");
    for step in
        ["image and kernel ready", "first guest instruction", "PID 1", "process started", "process exited", "exit"]
    {
        let line = ended.errors.lines().find(|line| line.starts_with(step));
        assert!(line.is_some_and(|line| !line.ends_with('-')), "{step}: {}", ended.errors);
    }
}

#[test]
fn ten_machines_share_an_image() {
    let guests = guests!();
    let start = |n: i32| {
        let script = format!("echo {n} >/srv/mine; sleep 2; test $(ls /srv | wc -l) = 2; cat /srv/mine");
        husk_run(&guests, &[archive(), "sh", "-c", &script]).spawn().unwrap()
    };
    let children: Vec<Child> = (0..10).map(start).collect();
    for (n, child) in children.into_iter().enumerate() {
        assert_eq!(wait(child).expect(0).text(), format!("{n}\n"));
    }
}

#[test]
fn leftovers_of_a_killed_machine_are_removed_by_the_next() {
    let guests = guests!();
    let runtime = tempfile::tempdir().unwrap();
    let husk = |script: &str| {
        let mut command = husk_run(&guests, &[archive(), "sh", "-c", script]);
        command.env("XDG_RUNTIME_DIR", runtime.path());
        command
    };
    let dirs = || {
        let entries = fs::read_dir(runtime.path().join("husk")).unwrap().flatten();
        entries.filter(|entry| entry.path().is_dir()).count()
    };
    let (mut child, _output) = start(husk("echo ready; sleep 1000"));
    assert_eq!(dirs(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(dirs(), 1, "nobody could have removed it");
    let (other, _output) = start(husk("echo ready; read x; sleep 1000"));
    assert_eq!(dirs(), 1, "the other's own");
    finish(husk("true"), Vec::new()).expect(0);
    assert_eq!(dirs(), 1, "the one that still runs");
    signal(&other, "TERM");
    wait(other).expect(143);
    assert_eq!(dirs(), 0);
}

/// A disk with the test image's root file system and an init, without a partition table.
fn disk(dir: &Path, init: &str) -> String {
    let (tree, path) = (dir.join("tree"), dir.join("disk.img"));
    run(Command::new("cp").arg("-a").arg(root()).arg(&tree));
    fs::create_dir(tree.join("sbin")).unwrap();
    let init_path = tree.join("sbin/init");
    fs::write(&init_path, init).unwrap();
    run(Command::new("chmod").arg("755").arg(&init_path));
    fs::File::create(&path).unwrap().set_len(32 << 20).unwrap();
    run(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(&tree).arg(&path));
    path.to_str().unwrap().to_owned()
}

fn run_disk(guests: &Path, words: &[&str]) -> Ended {
    finish(husk_run(guests, words), Vec::new())
}

#[test]
fn a_disk_runs_its_own_init_and_keeps_its_data() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let disk =
        disk(dir.path(), "#!/bin/sh\necho pid=$$; echo kept >/srv/new && sync && mount -o remount,ro /\npoweroff -f\n");
    let text = run_disk(&guests, &[&disk]).expect(0).text();
    assert!(text.contains("pid=1"), "{text}");
    run(Command::new("e2fsck").args(["-f", "-n", &disk]));
    assert_eq!(run(Command::new("debugfs").args(["-R", "cat /srv/new", &disk])), "kept\n");
    let words =
        ["--read-only", "--os-init=/bin/sh", &disk, "-c", "echo pid=$$; touch /srv/x || echo unchanged; poweroff -f"];
    let text = run_disk(&guests, &words).expect(0).text();
    assert!(text.contains("pid=1") && text.contains("unchanged"), "{text}");
}

/// Makes the file system of `disk` the second partition of a qcow2 disk, after an empty one.
fn partitioned(dir: &Path, disk: &str) -> String {
    const SECTOR_BYTES: u64 = 512;
    const STARTS: [u32; 2] = [2048, 4096];
    let (raw, qcow2) = (dir.join("table.img"), dir.join("table.qcow2"));
    let system = fs::read(disk).unwrap();
    let sectors = [STARTS[1] - STARTS[0], (system.len() as u64 / SECTOR_BYTES) as u32];
    // A master boot record: four entries at byte 446 with type (Linux) and position, followed by the signature.
    let mut image = vec![0; SECTOR_BYTES as usize * STARTS[1] as usize];
    for (entry, (start, sectors)) in STARTS.iter().zip(sectors).enumerate() {
        let at = 446 + 16 * entry;
        image[at + 4] = 0x83;
        image[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        image[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
    }
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    image.extend(system);
    fs::write(&raw, image).unwrap();
    run(Command::new("qemu-img").args(["convert", "-O", "qcow2"]).arg(raw).arg(&qcow2));
    qcow2.to_str().unwrap().to_owned()
}

#[test]
fn the_partition_of_a_qcow2_disk_that_has_an_init_is_the_root() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let disk = disk(dir.path(), "#!/bin/sh\nmount -t proc proc /proc\ngrep ' / ' /proc/mounts\npoweroff -f\n");
    let text = run_disk(&guests, &[&partitioned(dir.path(), &disk)]).expect(0).text();
    assert!(text.contains("/dev/vda2 / ext4"), "{text}");
}

#[test]
fn an_image_can_run_its_own_init() {
    let words = ["--os-init=/bin/sh", archive(), "-c", "echo pid=$$ > /dev/console; touch /srv/x && poweroff -f"];
    let text = run_disk(&guests!(), &words).expect(0).text();
    assert!(text.contains("pid=1"), "{text}");
}
