//! Guests with little memory: a program that uses up all of it is killed soon, and a program that only reads more than
//! fits into memory is not.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::background::Machines;
use crate::image::{archive, root, run};
use crate::{TIMEOUT, finish, guests, husk_under};

const KERNELS: [&str; 2] = ["micro", "stock"];
/// The dentries and inodes of this many files take twice as much memory as is available.
const FILES: usize = 30_000;
/// Shell functions; `leave N` takes memory until N MiB are available.
const TAKE: &str = r#"set -e; mebibytes() { echo $(($(sed -n "s/$1: *\([0-9]*\).*/\1/p" /proc/meminfo) / 1024)); }
    mount -o remount,size=100% /dev/shm
    leave() { dd if=/dev/zero of=/dev/shm/taken bs=1M count=$(($(mebibytes MemAvailable) - $1)); }"#;

/// An archive with the test image's root and many empty files.
fn many_files() -> &'static str {
    static ARCHIVE: OnceLock<(TempDir, String)> = OnceLock::new();
    let make = || {
        let dir = tempfile::tempdir().unwrap();
        let (small, path) = (dir.path().join("root.tar"), dir.path().join("many.tar"));
        run(Command::new(root().join("bin/busybox"))
            .args(["tar", "-c", "-C"])
            .arg(root())
            .arg("-f")
            .arg(&small)
            .arg("."));
        let many = (0..FILES).flat_map(|n| header(&format!("many/{}/{n}", n / 100)));
        fs::write(&path, many.chain(fs::read(small).unwrap()).collect::<Vec<u8>>()).unwrap();
        let path = path.to_str().unwrap().to_owned();
        (dir, path)
    };
    &ARCHIVE.get_or_init(make).1
}

/// The header of an empty file in a ustar archive, with its checksum.
fn header(name: &str) -> [u8; 512] {
    let mut record = [0; 512];
    let mut put = |at: usize, bytes: &[u8]| record[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, name.as_bytes());
    for (at, field) in [(100, "0000644\0"), (108, "0000000\0"), (116, "0000000\0"), (124, "00000000000\0")] {
        put(at, field.as_bytes());
    }
    put(136, b"00000000000\0        0");
    put(257, b"ustar\x0000");
    let sum: u32 = record.iter().map(|&byte| u32::from(byte)).sum();
    record[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    record
}

/// Starts a machine named `small` and waits for the first line of its output. Returns the line, and the output of a
/// `husk exec` right after it.
fn first_line_and_exec(guests: &Path, kernel: &str, script: &str) -> (String, String) {
    let runtime = tempfile::tempdir().unwrap();
    let mut command = husk_under(guests, kernel, &["--rm", "--name", "small", archive(), "sh", "-c", script]);
    let started = Instant::now();
    let mut child = command.env("XDG_RUNTIME_DIR", runtime.path()).spawn().unwrap();
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let _ = sender.send((line, output));
    });
    let received = receiver.recv_timeout(TIMEOUT);
    eprintln!("{kernel}: first line after {:?}", started.elapsed());
    let mut exec = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    exec.args(["exec", "small", "echo", "here"]).env("XDG_RUNTIME_DIR", runtime.path());
    exec.stdout(Stdio::piped()).stderr(Stdio::piped());
    let exec_output = received.is_ok().then(|| finish(exec, Vec::new()).text());
    child.kill().unwrap();
    child.wait().unwrap();
    let (line, _) = received.expect("the machine prints a line in time");
    (line, exec_output.unwrap_or_default())
}

#[test]
fn a_program_that_takes_all_memory_is_killed_and_the_machine_answers() {
    let guests = guests!();
    for kernel in KERNELS {
        let outputs = first_line_and_exec(&guests, kernel, "tail /dev/zero; echo $?; exec sleep 1000");
        assert_eq!(outputs, ("137\n".into(), "here\n".into()), "{kernel}");
    }
}

#[test]
fn a_kill_for_lack_of_memory_is_an_event_and_inspected() {
    let guests = guests!();
    for kernel in KERNELS {
        let machines = Machines::new(guests.clone());
        let run = |name: &str, script: &str| {
            let words = ["-d", "--name", name, archive(), "sh", "-c", script];
            let mut command = husk_under(&guests, kernel, &words);
            command.env("XDG_RUNTIME_DIR", machines.runtime.path());
            finish(command, Vec::new()).expect(0);
        };
        let is_killed = |name: &str| machines.ok(&["inspect", "-f", "{{.State.OOMKilled}}", name]);
        let actions = |name: &str| {
            let filter = format!("container={name}");
            machines.ok(&["events", "--since", "1h", "--until", "0s", "--filter", &filter, "--format", "{{.Action}}"])
        };
        run("whole", "exec tail /dev/zero");
        assert_eq!(machines.ok(&["wait", "whole"]), "137\n", "{kernel}");
        assert_eq!((is_killed("whole"), actions("whole")), ("true\n".into(), "create\nstart\noom\ndie\n".into()));
        assert!(machines.ok(&["ps", "-a"]).contains("Exited (137)"));
        // A process that is not init's child, of a machine that goes on.
        run("part", "tail /dev/zero & echo; sleep 1000");
        let started = Instant::now();
        while is_killed("part") == "false\n" {
            assert!(started.elapsed() < TIMEOUT, "{kernel}");
            thread::sleep(Duration::from_millis(100));
        }
        assert_eq!(actions("part"), "create\nstart\noom\n");
        run("none", "kill -9 $$");
        assert_eq!(machines.ok(&["wait", "none"]), "137\n");
        assert_eq!((is_killed("none"), actions("none")), ("false\n".into(), "create\nstart\ndie\n".into()));
    }
}

#[test]
fn a_walk_through_more_files_than_memory_holds_runs_to_its_end() {
    let guests = guests!();
    let script = format!("{TAKE}; leave 30; find / -xdev -size +1000000k; echo $?; find /many -name '1*' | wc -l");
    for kernel in KERNELS {
        let ended = finish(husk_under(&guests, kernel, &[many_files(), "sh", "-c", &script]), Vec::new());
        let count = ended.expect(0).text();
        assert!(count.starts_with("0\n") && count.len() > 6, "{kernel}: {count}");
    }
}

#[test]
fn reading_a_file_larger_than_memory_again_and_again_goes_on() {
    let guests = guests!();
    let script = format!(
        "{TAKE}; total=$(mebibytes MemTotal); leave $((total / 10))
        cd /srv; dd if=/dev/zero of=large bs=1M count=$((total / 2))
        for n in 1 2 3; do cat large >/dev/null; done"
    );
    for kernel in KERNELS {
        let words = ["--scratch", "1G", archive(), "sh", "-c", &script];
        finish(husk_under(&guests, kernel, &words), Vec::new()).expect(0);
    }
}
