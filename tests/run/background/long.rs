//! Resource usage of a machine after many processes and endless output.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::Machines;
use crate::{guests, monitor_of, wait};

/// The resources of a machine's husk processes and its init: descriptors, threads and memory.
#[derive(Debug, Clone, Copy)]
struct Resources {
    descriptors: [u64; 2],
    threads: [u64; 2],
    memory_kib: [u64; 2],
}

impl Resources {
    fn by(machines: &Machines, name: &str) -> Resources {
        let inspected: serde_json::Value = serde_json::from_str(&machines.ok(&["inspect", name])).unwrap();
        let pid = inspected[0]["State"]["Pid"].to_string();
        let processes = [monitor_of(&pid), pid];
        let count_of = |pid: &str, what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count() as u64;
        let count = |what: &str| processes.iter().map(|pid| count_of(pid, what)).sum();
        let script =
            "ls /proc/1/fd | wc -l; sed -n 's/^Threads:\\t//p; s/^VmRSS:\\t* *\\([0-9]*\\) kB/\\1/p' /proc/1/status";
        let init = machines.ok(&["exec", name, "sh", "-c", script]);
        let init: Vec<u64> = init.lines().map(|line| line.trim().parse().unwrap()).collect();
        // The memory precedes the threads in /proc/PID/status.
        let [descriptors, memory_kib, threads] = init[..] else { panic!("{init:?}") };
        Resources {
            descriptors: [count("fd"), descriptors],
            threads: [count("task"), threads],
            memory_kib: [processes.iter().map(|pid| own_memory_kib(pid)).sum(), memory_kib],
        }
    }
}

/// What husk has written to memory, without guest memory, which is the only large mapping, and without huge pages, which
/// the kernel creates at any time. What is only read, such as its code, becomes resident as it is first used.
fn own_memory_kib(pid: &str) -> u64 {
    const GUEST_KIB: u64 = 64 << 10;
    let (mut sum_kib, mut is_guest) = (0, false);
    // Empty if it has just exited.
    for line in fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default().lines() {
        let mut words = line.split_whitespace();
        let (name, kib) = (words.next().unwrap(), words.next().and_then(|kib| kib.parse::<u64>().ok()));
        match (name, kib) {
            ("Size:", Some(kib)) => is_guest = kib >= GUEST_KIB,
            ("Shared_Dirty:" | "Private_Dirty:", Some(kib)) if !is_guest => sum_kib += kib,
            ("AnonHugePages:", Some(kib)) if !is_guest => sum_kib -= kib,
            _ => {}
        }
    }
    sum_kib
}

#[test]
fn a_thousand_sequential_processes_leave_nothing_behind() {
    let machines = Machines::new(guests!());
    machines.start("box", &[], "sleep 100000").expect(0);
    let run = |numbers: std::ops::Range<i32>| {
        for n in numbers {
            // Every tenth has a different exit code.
            let code = if n % 10 == 9 { 1 + n % 100 } else { 0 };
            machines.husk(&["exec", "box", "sh", "-c", &format!("exit {code}")]).expect(code);
        }
        Resources::by(&machines, "box")
    };
    let early = run(0..100);
    let mut late = run(100..1000);
    let grown = |late: Resources| {
        late.descriptors
            .iter()
            .chain(&late.threads)
            .zip(early.descriptors.iter().chain(&early.threads))
            .any(|(l, e)| l > e)
    };
    // A connection of the last process may still be open.
    for _ in 0..100 {
        if !grown(late) {
            break;
        }
        late = run(0..1);
    }
    assert!(!grown(late), "{early:?} became {late:?}");
    // Anything that a process leaves behind would exist 900 times.
    for (before, after) in early.memory_kib.iter().zip(late.memory_kib) {
        assert!(after < before + 256, "{early:?} became {late:?}");
    }
}

/// The total size of the logs in a machine's directory.
fn log_bytes(machines: &Machines, id: &str) -> u64 {
    let files = fs::read_dir(machines.runtime.path().join("husk").join(id)).unwrap().flatten();
    // A file may be renamed in the meantime.
    files.filter_map(|file| file.metadata().ok()).map(|metadata| metadata.len()).sum()
}

const LINE: &str = "the quick brown fox jumps over the lazy dog, and nobody minds it";
/// About 1 MiB with its lines.
const LINES_OF_A_PIECE: usize = 16 << 10;

/// Prints the lines after pieces, with their numbers, as fast as `husk logs`.
const PIECES: &str = "grep -n '^piece '";

/// The pieces printed by [`PIECES`], and the number of lines before each.
fn pieces(found: &str) -> Vec<(u64, usize)> {
    let (mut pieces, mut last) = (Vec::new(), 0);
    for found in found.lines() {
        let (line, piece) = found.split_once(":piece ").unwrap();
        let line: usize = line.parse().unwrap();
        pieces.push((piece.parse().unwrap(), line - last - 1));
        last = line;
    }
    pieces
}

#[test]
fn a_log_stays_within_its_size_and_is_followed_across_files() {
    const LOG_MAX_BYTES: u64 = 8 << 20;
    let machines = Machines::new(guests!());
    // This many MiB, or as many as requested manually.
    let count: u64 = std::env::var("HUSK_TEST_LOG_MIB").map_or(64, |count| count.parse().unwrap());
    let script = format!(
        "yes '{LINE}' | head -n {LINES_OF_A_PIECE} >/tmp/piece; n=0
        while [ $n -lt {count} ]; do cat /tmp/piece; n=$((n + 1)); echo piece $n; done"
    );
    let id = machines.start("loud", &["--log-max", "8M"], &script).expect(0).text().trim().to_owned();
    let inspected: serde_json::Value = serde_json::from_str(&machines.ok(&["inspect", "loud"])).unwrap();
    let pid = inspected[0]["State"]["Pid"].to_string();
    let (before_kib, started) = (own_memory_kib(&pid), Instant::now());
    // Through a pipe, as users search a log.
    let logs = |flags: &str| {
        let husk = machines.command(&[]);
        let script = format!("exec 2>&1; {} logs {flags} loud | {PIECES}", husk.get_program().display());
        let mut shell = Command::new("sh");
        shell.args(["-c", &script]).env("XDG_RUNTIME_DIR", machines.runtime.path()).stdin(Stdio::null());
        shell.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let follower = logs("-f");
    let (mut most_bytes, mut most_kib) = (0, 0);
    while Path::new(&format!("/proc/{pid}/smaps")).exists() {
        most_bytes = most_bytes.max(log_bytes(&machines, &id));
        most_kib = most_kib.max(own_memory_kib(&pid));
        thread::sleep(Duration::from_millis(200));
    }
    let followed = wait(follower).expect(0).text();
    println!(
        "{count} MiB in {:?}, most {most_bytes} bytes of logs; {before_kib} KiB became {most_kib}",
        started.elapsed()
    );
    // In addition to the process's output there are a few kernel messages, and the record.
    assert!(most_bytes < LOG_MAX_BYTES + (64 << 10), "{most_bytes} bytes");
    assert!(most_kib < before_kib + 1024, "{before_kib} KiB became {most_kib}");
    // The latest file may be nearly empty; the previous one is full.
    let kept = pieces(&wait(logs("")).expect(0).text());
    let whole = (1..=count).rev().map(|piece| (piece, LINES_OF_A_PIECE)).take(kept.len() - 1);
    assert!(kept.len() >= 4 && kept.iter().skip(1).rev().copied().eq(whole), "{kept:?}");
    // A reader slower than the time to fill two files misses some, and continues to the end.
    let followed = pieces(&followed);
    assert!(followed.is_sorted() && followed.last().is_some_and(|last| last.0 == count), "{followed:?}");
    println!("{} of them were followed", followed.len());
    assert_eq!(machines.ok(&["wait", "loud"]), "0\n");
}
