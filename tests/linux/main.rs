//! End-to-end tests with Linux guests: stock and purpose-built kernels, disks, the power button and panics.
//!
//! They need a KVM that runs unmodified kernels, and guests: `HUSK_TEST_GUESTS` names a directory with `stock/` and
//! `micro/`, each with `vmlinux`, `bzImage` and `initrd` (scripts/test makes it, and runs this in the lab where the
//! host's KVM will not do). Without it every test says that it was skipped; with it none is.

mod disk;
mod ends;
mod faults;
#[path = "../run/guests.rs"]
mod guests;
mod pci;
mod sizes;
mod sockets;
#[path = "../run/uplink.rs"]
mod uplink;

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use guests::guests;
use uplink::is_lab;

/// Longer than any boot takes, even emulated on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(180);

/// How a machine ended, and its output.
struct Ended {
    code: Option<i32>,
    output: String,
    errors: String,
}

impl Ended {
    /// The `key=value` lines of the guest's init.
    fn values(&self) -> HashMap<&str, &str> {
        self.output.lines().filter_map(|line| line.trim().split_once('=')).collect()
    }

    #[track_caller]
    fn expect(&self, code: i32, what: &str) -> &Ended {
        assert_eq!(self.code, Some(code), "{what}\n{}\n{}", self.output, self.errors);
        self
    }
}

/// `husk boot` of the guest in `guest` with the task `job`, which kernel parameters and ` -- ` may precede.
fn husk(guest: &Path, image: &str, job: &str, flags: &[&str]) -> Command {
    let cmdline = if job.contains(" -- ") { job.to_owned() } else { format!("-- {job}") };
    let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    command.arg("boot").arg("--kernel").arg(guest.join(image)).arg("--initrd").arg(guest.join("initrd"));
    command.args(flags).args(["--cmdline", &cmdline]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Boots a guest to its end. On an emulated processor a triple fault was observed about once in a hundred boots, for
/// unknown reasons: it is reported visibly and the guest is booted once more. On a real processor it is a failure.
fn boot(guest: &Path, image: &str, job: &str, flags: &[&str]) -> Ended {
    const TRIPLE_FAULT: i32 = 82;
    let run = || finish(husk(guest, image, job, flags).spawn().unwrap());
    let ended = run();
    if ended.code != Some(TRIPLE_FAULT) || !is_lab() {
        return ended;
    }
    eprintln!("RETRIED {job} after: {}", ended.errors);
    run()
}

/// Waits for `child` to exit, and kills it after a timeout.
fn finish(mut child: Child) -> Ended {
    let collect = |pipe: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let output = collect(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let errors = collect(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let started = Instant::now();
    let code = loop {
        match child.try_wait().unwrap() {
            Some(status) => break status.code(),
            None if started.elapsed() > TIMEOUT => {
                child.kill().unwrap();
                child.wait().unwrap();
                break None;
            }
            None => thread::sleep(Duration::from_millis(20)),
        }
    };
    Ended { code, output: output.join().unwrap(), errors: errors.join().unwrap() }
}

/// Runs a host program and returns its output.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text} {}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Starts a guest and waits until its init prints `word`. Returns it and its output lines.
fn start_and_wait(command: &mut Command, word: &str) -> (Child, mpsc::Receiver<String>) {
    let mut child = command.spawn().unwrap();
    let (sender, receiver) = mpsc::channel();
    let (line_said, lines) = mpsc::channel();
    let (stdout, word) = (child.stdout.take().unwrap(), word.to_owned());
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let found = line.contains(&word);
            let _ = line_said.send(line);
            if found {
                let _ = sender.send(());
            }
        }
    });
    if receiver.recv_timeout(TIMEOUT).is_err() {
        child.kill().unwrap();
        panic!("the guest did not come up: {:?} {:?}", lines.try_iter().collect::<Vec<_>>(), finish(child).errors);
    }
    (child, lines)
}

fn signal(child: &Child, name: &str) {
    run("kill", &[&format!("-{name}"), &child.id().to_string()]);
}

#[test]
fn timings_cover_every_step() {
    let ended = boot(&guests!().join("micro"), "vmlinux", "mark", &["--timings"]);
    ended.expect(0, "timings");
    let at = |step: &str| {
        let line = ended.errors.lines().find(|line| line.starts_with(step)).unwrap_or_else(|| panic!("no {step}"));
        line[step.len()..].split_whitespace().next().unwrap().parse::<f64>().unwrap()
    };
    let steps = ["KVM ready", "kernel loaded", "first guest instruction", "first kernel output", "PID 1", "exit"];
    let times: Vec<f64> = steps.iter().map(|step| at(step)).collect();
    // `quiet` may delay the kernel's first output beyond the start of PID 1; the other steps are in order.
    let ordered = [times[0], times[1], times[2], times[4], times[5]];
    assert!(ordered.is_sorted() && times[0] > 0.0, "{}", ended.errors);
}
