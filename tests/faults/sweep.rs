//! Runs a machine once for each fault at each of its system calls, and judges how it has ended.

use std::collections::HashMap;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use husk_guests as guests;
use nix::errno::Errno;
use nix::sys::signal::Signal;

use crate::calls::{describe, faults_of};
use crate::husk::own_lines;
use crate::journal::{self, RECORD_BYTES};
use crate::tracer::{Call, End, Fault, trace};

/// The records that the guest has room for.
const RECORDS: u64 = 4;
/// The runs of a sample.
const SAMPLE: usize = 25;

/// A fault at the n-th time (from 0) that a thread makes a call.
struct Point {
    call: Call,
    time: u32,
    fault: Fault,
}

impl Point {
    fn describe(&self) -> String {
        format!("{:?} at {}, time {}", self.fault, describe(&self.call), self.time + 1)
    }
}

/// How a machine has ended, and what it has printed and logged.
struct Ran {
    end: End,
    printed: String,
    log: String,
    /// Whether the fault has happened. Threads do not always make the same calls.
    happened: bool,
}

/// A machine with these flags whose guest writes and flushes, in a directory of its own.
fn run(dir: &Path, flags: &[&str], mut fault: impl FnMut(&Call) -> Option<Fault>) -> Ran {
    let [disk, out, err] = ["disk.img", "out", "err"].map(|name| dir.join(name));
    File::create(&disk).unwrap().set_len(RECORDS * RECORD_BYTES as u64).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
    command.args(["boot", "--kernel", guests::BLOCK, "--cmdline", "do=journal", "--memory", "64M", "--disk"]);
    command.arg(&disk).arg("--vsock").arg(dir.join("vsock")).args(flags).env("XDG_RUNTIME_DIR", dir);
    command.stdin(Stdio::null()).stdout(File::create(&out).unwrap()).stderr(File::create(&err).unwrap());
    let (mut is_own, mut happened) = (false, false);
    let end = trace(&mut command, |call| {
        // Before its first look at the host it is the start of Rust's runtime.
        is_own |= call.number == libc::SYS_statx;
        let fault = if is_own { fault(call) } else { None };
        happened |= fault.is_some();
        fault
    });
    let printed = String::from_utf8_lossy(&fs::read(out).unwrap()).into_owned();
    Ran { end, printed, log: own_lines(&fs::read(err).unwrap()), happened }
}

/// The calls of a machine that nothing happens to, with how often each was made.
fn calls_of(flags: &[&str]) -> Vec<(Call, u32)> {
    let dir = tempfile::tempdir().unwrap();
    let (mut calls, mut order) = (HashMap::new(), Vec::new());
    let ran = run(dir.path(), flags, |call| {
        let times = calls.entry(call.clone()).or_insert(0);
        if *times == 0 {
            order.push(call.clone());
        }
        *times += 1;
        None
    });
    assert_eq!(ran.end, End::Exited(0), "{}{}", ran.printed, ran.log);
    judge(&ran, dir.path(), None).unwrap();
    order.into_iter().map(|call| (call.clone(), calls[&call])).collect()
}

/// What machines have left behind.
fn left_in(dir: &Path) -> Vec<PathBuf> {
    let machines = fs::read_dir(dir.join("husk")).map(|entries| entries.flatten().map(|entry| entry.path()));
    let machines = machines.into_iter().flatten().filter(|path| !path.ends_with("events"));
    machines.chain(Some(dir.join("vsock")).filter(|path| path.exists())).collect()
}

/// What is wrong with how a machine has ended.
fn judge(ran: &Ran, dir: &Path, signal: Option<Signal>) -> Result<(), String> {
    let Ran { end, printed, log, .. } = ran;
    let lines: Vec<&str> = log.lines().collect();
    let own = lines.iter().all(|line| line.starts_with("husk: "));
    // Rust's library panics without memory for a thread.
    let panicked = log.contains("panicked") && !log.contains("failed to allocate an alternative stack");
    if !own || panicked {
        return Err("its log is not made of messages for users".into());
    }
    match end {
        End::Exited(0) => {}
        // The guest has seen an error and has reported it.
        End::Exited(guests::EXIT_CHECK_FAILED) if lines.len() <= 2 => {}
        // husk or the host failed, KVM failed, or the sandbox did.
        End::Exited(1 | 83 | 159) if lines.len() == 1 => {}
        End::Exited(code) if signal.is_some_and(|signal| *code == 128 + signal as i32) => {}
        End::Killed(by) if signal.is_some_and(|signal| *by == signal as i32) && lines.is_empty() => {}
        End::TimedOut => return Err("it did not end".into()),
        _ => return Err("it did not end as documented, with one line".into()),
    }
    let durable = journal::durable(printed);
    if let Some(lost) = journal::first_lost(&dir.join("disk.img"), durable) {
        return Err(format!("record {lost} of {durable} is lost"));
    }
    let mut left = left_in(dir);
    if !left.is_empty() && signal.is_none() {
        // What cannot be removed is removed by the next machine.
        run(dir, &[], |_| None);
        left = left_in(dir);
    }
    if left.is_empty() { Ok(()) } else { Err(format!("it has left {left:?}")) }
}

/// Whether all points are tried, instead of a sample that differs from run to run.
fn is_full() -> bool {
    std::env::var("HUSK_TEST_FAULTS").is_ok_and(|which| which == "all")
}

/// Tries all points, or a sample of them, and reports those where a machine did not end as it should.
#[track_caller]
fn sweep(what: &str, flags: &[&str], faults: impl Fn(&Call) -> Vec<Fault>) {
    let mut points = Vec::new();
    for (call, times) in calls_of(flags) {
        let faults = faults(&call);
        let new = |time| {
            faults.iter().map({
                let call = call.clone();
                move |fault| Point { call: call.clone(), time, fault: *fault }
            })
        };
        points.extend((0..times).flat_map(new));
    }
    let step = if is_full() { 1 } else { points.len().div_ceil(SAMPLE) };
    let first = RandomState::new().hash_one(0) as usize % step;
    let (mut tried, mut wrong) = (0, Vec::new());
    for point in points.iter().skip(first).step_by(step) {
        let dir = tempfile::tempdir().unwrap();
        let mut times = 0;
        let ran = run(dir.path(), flags, |call| {
            let is_it = *call == point.call && {
                times += 1;
                times == point.time + 1
            };
            is_it.then_some(point.fault)
        });
        tried += u32::from(ran.happened);
        let signal = match point.fault {
            Fault::Signal(signal) => Some(signal),
            _ => None,
        };
        if let Err(reason) = judge(&ran, dir.path(), signal) {
            wrong.push(format!("{}: {reason}: {:?}\n{}{}", point.describe(), ran.end, ran.printed, ran.log));
            eprintln!("{}", wrong.last().unwrap());
        }
    }
    println!("{what}: {tried} operations tried, {} faults", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A machine to which this happens at the first call with this number of a thread.
#[track_caller]
fn run_with(thread: &str, number: libc::c_long, fault: Fault) -> Ran {
    let dir = tempfile::tempdir().unwrap();
    let mut has_happened = false;
    let ran = run(dir.path(), &PLAIN, |call| {
        let is_it = call.number == number && call.thread == thread && !std::mem::replace(&mut has_happened, true);
        is_it.then_some(fault)
    });
    let signal = if let Fault::Signal(signal) = fault { Some(signal) } else { None };
    let judged = judge(&ran, dir.path(), signal);
    assert!(ran.happened && judged.is_ok(), "{judged:?}: {:?} {}{}", ran.end, ran.printed, ran.log);
    ran
}

const PLAIN: [&str; 0] = [];
const LARGER: [&str; 4] = ["--transport", "pci", "--cpus", "2"];

#[test]
fn a_call_that_fails_ends_in_one_line_or_is_tolerated() {
    needs_kvm!();
    sweep("errors", &PLAIN, faults_of);
}

#[test]
fn a_call_that_fails_in_a_larger_machine_ends_in_one_line_or_is_tolerated() {
    needs_kvm!();
    sweep("errors in a larger machine", &LARGER, faults_of);
}

#[test]
fn a_signal_at_any_step_ends_a_machine_cleanly() {
    needs_kvm!();
    let signals = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    sweep("signals", &PLAIN, |_| signals.map(Fault::Signal).into());
}

#[test]
fn a_thread_that_cannot_be_confined_ends_the_machine() {
    needs_kvm!();
    for thread in ["monitor/loader", "monitor/monitor", "monitor/vcpu0", "monitor/virtio-rng"] {
        let ran = run_with(thread, libc::SYS_seccomp, Fault::Error(Errno::ENOMEM));
        assert_eq!(ran.end, End::Exited(1));
        assert_eq!(ran.log, "husk: the monitor process failed: confine a thread: Cannot allocate memory\n");
    }
}

#[test]
fn a_monitor_that_fails_says_why() {
    needs_kvm!();
    let ran = run_with("monitor/husk", libc::SYS_dup2, Fault::Error(Errno::EMFILE));
    let line = "husk: close the standard streams of the monitor process: Too many open files\n";
    assert_eq!((ran.end, &*ran.log), (End::Exited(1), line));
}

#[test]
fn a_signal_right_after_a_machine_has_a_directory_leaves_none() {
    needs_kvm!();
    for call in [libc::SYS_mkdir, libc::SYS_flock, libc::SYS_bind, libc::SYS_listen, libc::SYS_rename] {
        run_with("husk", call, Fault::Signal(Signal::SIGHUP));
    }
}

#[test]
fn nothing_is_called_again_and_again() {
    needs_kvm!();
    let made: u32 = calls_of(&PLAIN).iter().map(|(_, times)| times).sum();
    assert!(made < 5000, "{made} calls");
}
