//! End-to-end tests of `husk run` with husk's init, under both kernels.
//!
//! They have the same prerequisites as tests/linux, and are skipped without them. The image is created here with
//! busybox, in the format of `docker save`.

mod background;
mod copies;
mod debian;
mod guests;
mod health;
mod image;
mod life;
mod memory;
mod net;
mod process;
mod published;
mod reach;
mod restored;
mod settings;
mod share;
mod stays;
mod streams;
#[path = "../kvm/terminal.rs"]
mod terminal;
mod uplink;
mod volumes;
mod warm;

use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use guests::guests;

/// Longer than any command here takes, even emulated on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(180);

/// Required by `terminal`.
mod husk {
    pub(crate) use super::end_of;
}

/// The result and output of a run.
struct Ended {
    code: Option<i32>,
    output: Vec<u8>,
    errors: String,
}

impl Ended {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).into_owned()
    }

    #[track_caller]
    fn expect(&self, code: i32) -> &Ended {
        assert_eq!(self.code, Some(code), "{}\n{}", self.text(), self.errors);
        self
    }
}

/// `husk run` with a kernel, these flags, image and command, without a network.
fn husk_under(guests: &std::path::Path, kernel: &str, words: &[&str]) -> Command {
    husk_with(guests, kernel, memory_for(kernel), words)
}

/// The same, with this much memory.
fn husk_with(guests: &std::path::Path, kernel: &str, memory: &str, words: &[&str]) -> Command {
    husk_as_is(guests, kernel, memory, &[&["--network", "none"], words].concat())
}

/// The same, with the network in the flags or the default one.
fn husk_networked(guests: &std::path::Path, kernel: &str, words: &[&str]) -> Command {
    husk_as_is(guests, kernel, memory_for(kernel), words)
}

fn memory_for(kernel: &str) -> &'static str {
    if kernel == "micro" { "96M" } else { "192M" }
}

fn husk_as_is(guests: &std::path::Path, kernel: &str, memory: &str, words: &[&str]) -> Command {
    if std::env::var("HUSK_TEST_WARM").is_ok_and(|value| !value.is_empty()) {
        make_warm(guests, kernel, memory, words);
    }
    husk_command("run", guests, kernel, memory, words)
}

/// Makes the warm image that a machine of this kind starts from, if it has no other flags: then all tests have to pass in
/// machines that have not booted for them.
fn make_warm(guests: &std::path::Path, kernel: &str, memory: &str, words: &[&str]) {
    static MADE: Mutex<Vec<[String; 2]>> = Mutex::new(Vec::new());
    let kind = [kernel.to_owned(), memory.to_owned()];
    let mut made = MADE.lock().unwrap();
    if words.starts_with(&["--network", "none"]) && words.contains(&image::archive()) && !made.contains(&kind) {
        let words = ["--network", "none", image::archive()];
        finish(husk_command("warm", guests, kernel, memory, &words), Vec::new()).expect(0);
        made.push(kind);
    }
}

fn husk_command(name: &str, guests: &std::path::Path, kernel: &str, memory: &str, words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    command.args([name, "--memory", memory, "--kernel"]);
    match kernel {
        "host" => command.arg(kernel),
        _ => command.arg(guests.join(kernel).join("vmlinux")),
    };
    command.args(words);
    command.env("HUSK_DATA", image::store()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The monitor process of the machine that process `supervisor` runs.
fn monitor_of(supervisor: &str) -> String {
    let is_monitor = |pid: &String| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.contains(&format!("\nPPid:\t{supervisor}\n")) && status.starts_with("Name:\tmonitor\n")
    };
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| entry.file_name().into_string().ok()).find(is_monitor).expect("it has a monitor")
}

/// `husk run` with the micro kernel.
fn husk_run(guests: &std::path::Path, words: &[&str]) -> Command {
    husk_under(guests, "micro", words)
}

/// Runs a shell command in the test image.
fn shell(guests: &std::path::Path, flags: &[&str], script: &str) -> Ended {
    finish(husk_run(guests, &[flags, &[image::archive(), "sh", "-c", script]].concat()), Vec::new())
}

/// Runs to the end with `input` on standard input, and kills the process after a timeout.
fn finish(mut command: Command, input: Vec<u8>) -> Ended {
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().unwrap();
    let feeder = child.stdin.take().map(|mut stdin| {
        thread::spawn(move || {
            // The process may not read all of its input.
            let _ = stdin.write_all(&input);
        })
    });
    let ended = wait(child);
    feeder.map(|feeder| feeder.join());
    ended
}

fn wait(mut child: Child) -> Ended {
    let collect = |pipe: Option<Box<dyn Read + Send>>| {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            pipe.map(|mut pipe| pipe.read_to_end(&mut bytes));
            bytes
        })
    };
    let output = collect(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let errors = collect(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let code = end_of(&mut child).and_then(|status| status.code());
    let errors = String::from_utf8_lossy(&errors.join().unwrap()).into_owned();
    Ended { code, output: output.join().unwrap(), errors }
}

/// Waits for `child` to exit; kills it and returns `None` after a timeout.
fn end_of(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + TIMEOUT;
    while Instant::now() < deadline {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        thread::sleep(Duration::from_millis(10));
    }
    let _ = child.kill();
    let _ = child.wait();
    None
}
