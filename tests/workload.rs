//! The workload program of `husk bench`: every task, and its other commands.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use husk::bench::scenario::{METRICS, Unit};
use husk::bench::workload;

/// The program in a temporary directory, with a file to read.
struct Place {
    dir: tempfile::TempDir,
    program: PathBuf,
}

impl Place {
    fn new() -> Place {
        // Not in /tmp, which may be a tmpfs without direct I/O.
        let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let program = workload::write(dir.path()).unwrap();
        fs::write(dir.path().join("data"), (0..300_000_u32).flat_map(u32::to_le_bytes).collect::<Vec<u8>>()).unwrap();
        Place { dir, program }
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(words).stdin(Stdio::null());
        command
    }

    fn work(&self, tasks: &[String]) -> Output {
        let mut command = self.command(&["do", "--cpus", "2"]);
        command.args(tasks).arg("--root-data").arg(self.path().join("data"));
        command.arg("--root").arg(self.path()).arg("--scratch").arg(self.path()).output().unwrap()
    }
}

/// Kills a program that would continue.
struct Running(Child);

impl Running {
    fn start(command: &mut Command) -> (Running, BufReader<ChildStdout>) {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        (Running(child), stdout)
    }

    fn terminate(&mut self) -> Option<i32> {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), rustix::process::Signal::TERM)
            .unwrap();
        self.0.wait().unwrap().code()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn line(stdout: &mut BufReader<ChildStdout>) -> String {
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    line
}

fn lines(output: &Output) -> Vec<&str> {
    std::str::from_utf8(&output.stdout).unwrap().lines().collect()
}

#[test]
fn every_measure_begins_and_ends_once_in_turn_and_leaves_nothing() {
    let place = Place::new();
    let (mut tasks, mut expected) = (Vec::new(), Vec::new());
    for metric in METRICS.iter().filter(|metric| metric.is_workload) {
        // Not a multiple of any block size, and larger than the file to read.
        let amount = if metric.unit == Unit::MibPerSecond { 2_500_001 } else { 13 };
        tasks.push(format!("{}={amount}", metric.name));
        expected.extend([format!("work: begin {}", metric.name), format!("work: end {} {amount}", metric.name)]);
    }
    assert_eq!(tasks.len(), 18);
    let output = place.work(&tasks);
    assert_eq!(lines(&output), expected);
    assert_eq!((output.status.code(), &output.stderr[..]), (Some(0), &b""[..]));
    let mut left: Vec<_> = fs::read_dir(place.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["data", "work"]);
}

#[test]
fn failures_are_reported_and_the_rest_is_done() {
    let place = Place::new();
    let missing = place.path().join("missing");
    let tasks = ["do", "root-read=1000", "syscall=5", "scratch-fsync=1", "--root-data", "/nonexistent", "--scratch"];
    let output = place.command(&tasks).arg(&missing).output().unwrap();
    let failed = format!("work: fail scratch-fsync create {}/.husk-bench-file: ", missing.display());
    match lines(&output)[..] {
        [read, "work: begin syscall", "work: end syscall 5", fsync] => {
            assert!(read.starts_with("work: fail root-read read /nonexistent: "), "{read}");
            assert!(fsync.starts_with(&failed), "{fsync}");
        }
        ref other => panic!("{other:?}"),
    }
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn unknown_arguments_are_rejected_in_one_line() {
    let place = Place::new();
    for words in [&["do", "dance=1"][..], &[], &["crash", "kernel"], &["guest", "hello"], &["hello", "--exit", "many"]]
    {
        let output = place.command(words).output().unwrap();
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(2), &b""[..]), "{words:?}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            stderr.starts_with("husk-workload: ") && stderr.contains("type") && stderr.lines().count() == 1,
            "{stderr}"
        );
    }
}

#[test]
fn hello_exits_with_the_given_code() {
    let place = Place::new();
    let output = place.command(&["hello", "--exit", "42"]).output().unwrap();
    assert_eq!((output.status.code(), lines(&output)), (Some(42), vec!["work: ready"]));
    assert_eq!(place.command(&["hello"]).status().unwrap().code(), Some(0));
}

#[test]
fn idle_returns_its_memory_and_sleeps_until_terminated() {
    let place = Place::new();
    let (mut running, mut stdout) = Running::start(&mut place.command(&["idle", "--touch", "64"]));
    assert_eq!(line(&mut stdout), "work: ready\n");
    let status = fs::read_to_string(format!("/proc/{}/status", running.0.id())).unwrap();
    let kib = |name: &str| -> u32 {
        let value = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        value.trim().trim_end_matches(" kB").parse().unwrap()
    };
    assert!(kib("VmHWM:") >= 64 << 10 && kib("VmRSS:") < 16 << 10, "{status}");
    assert_eq!(running.terminate(), Some(0));
}

#[test]
fn ticks_continue_until_terminated() {
    let place = Place::new();
    let (mut running, mut stdout) = Running::start(&mut place.command(&["tick", "20"]));
    let heard: Vec<_> = (0..4).map(|_| line(&mut stdout)).collect();
    assert_eq!(heard, ["work: ready\n", "work: tick\n", "work: tick\n", "work: tick\n"]);
    assert_eq!(running.terminate(), Some(0));
}

#[test]
fn connections_are_served_until_terminated() {
    let place = Place::new();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (mut running, mut stdout) = Running::start(&mut place.command(&["serve", &port.to_string()]));
    assert_eq!(line(&mut stdout), "work: ready\n");
    let connect = || TcpStream::connect(("127.0.0.1", port)).unwrap();
    // An idle connection does not block others.
    let (mut echo, mut source) = (connect(), connect());
    echo.write_all(b"ex").unwrap();
    source.write_all(&[&b"r"[..], &1_000_000_u64.to_le_bytes()].concat()).unwrap();
    let mut received = Vec::new();
    source.read_to_end(&mut received).unwrap();
    assert_eq!(received.len(), 1_000_000);
    let mut byte = [0];
    echo.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"x");
    assert_eq!(running.terminate(), Some(0));
}

#[test]
fn memory_is_allocated_until_exhausted() {
    let place = Place::new();
    // An allocation failure instead of a kill is reported.
    let script = format!("ulimit -v 200000; exec {} crash memory", place.program.display());
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(matches!(lines(&output)[..], ["work: ready", end] if end.starts_with("work: fail crash map memory")));
}

/// The first process of a PID namespace stands in for a machine's: it has the same rights, and its reboot(2) ends the
/// namespace.
fn guest(place: &Place, words: &[&str]) -> Option<Output> {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIPPED: this test mounts file systems, and so needs root");
        return None;
    }
    let root = place.path().join("root");
    if !root.exists() {
        for dir in ["dev", "proc", "sys", "tmp", "run", "scratch", ".husk-bench"] {
            fs::create_dir_all(root.join(dir)).unwrap();
        }
        workload::write(&root.join(".husk-bench")).unwrap();
    }
    let mut command = Command::new("timeout");
    command.args(["-s", "KILL", "30", "unshare", "--pid", "--fork", "--mount", "--net", "chroot"]);
    Some(command.arg(&root).args(["/.husk-bench/work", "guest"]).args(words).stdin(Stdio::null()).output().unwrap())
}

#[test]
fn the_first_process_of_a_machine_runs_its_command_and_ends_the_machine() {
    let place = Place::new();
    let program = "/.husk-bench/work";
    for (words, expected) in [
        (vec!["--", program, "hello", "--exit", "7"], vec!["work: ready", "work: exit 7"]),
        (vec!["--end", "reset", program, "do", "exec=3"], vec!["work: begin exec", "work: end exec 3", "work: exit 0"]),
        (
            vec![program, "do", "root-write=5000"],
            vec!["work: begin root-write", "work: end root-write 5000", "work: exit 0"],
        ),
    ] {
        let Some(output) = guest(&place, &words) else { return };
        assert_eq!(lines(&output), expected, "{output:?}");
    }
}

#[test]
fn a_failed_setup_is_reported_and_ends_the_machine() {
    let place = Place::new();
    let program = "/.husk-bench/work";
    let Some(output) = guest(&place, &["/nonexistent"]) else { return };
    assert!(
        matches!(lines(&output)[..], [reason, "work: exit 127"] if reason.starts_with("work: fail guest start /nonexistent"))
    );
    // Waits as long as a driver may take.
    let network = guest(&place, &["--net", "10.0.0.2/24,10.0.0.1", program, "hello"]).unwrap();
    let [reason, "work: exit 125"] = lines(&network)[..] else { panic!("{network:?}") };
    assert!(reason.starts_with("work: fail guest there is no /sys/class/net/eth0"), "{reason}");
    fs::remove_dir(place.path().join("root/run")).unwrap();
    let mount = guest(&place, &[program, "hello"]).unwrap();
    let [reason, "work: exit 125"] = lines(&mount)[..] else { panic!("{mount:?}") };
    assert!(reason.starts_with("work: fail guest mount tmpfs on /run"), "{reason}");
}
