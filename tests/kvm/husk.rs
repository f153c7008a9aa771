//! Runs the built binary with a tiny guest, and checks its output and exit code.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longer than any guest of these tests takes on a busy, emulated machine.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Skips the test with a visible message without KVM; fails it if HUSK_TEST_REQUIRE_KVM is set.
macro_rules! needs_kvm {
    () => {
        if !$crate::husk::kvm_is_usable() {
            return;
        }
    };
}

/// Whether /dev/kvm can be opened. If not, prints a message past the test harness, which only captures output of
/// macros.
pub fn kvm_is_usable() -> bool {
    let Err(error) = File::options().read(true).write(true).open("/dev/kvm") else { return true };
    assert!(std::env::var_os("HUSK_TEST_REQUIRE_KVM").is_none(), "HUSK_TEST_REQUIRE_KVM is set, but /dev/kvm: {error}");
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: /dev/kvm: {error}");
    false
}

/// A `husk boot` command.
#[derive(Clone)]
pub struct Boot {
    flags: Vec<(&'static str, OsString)>,
    input: Option<Vec<u8>>,
}

/// `husk boot` of `guest` with the command line `words`. Standard input is empty by default.
pub fn boot(guest: &str, words: &str) -> Boot {
    let flags = vec![("--kernel", guest.into()), ("--cmdline", words.into()), ("--memory", "64M".into())];
    Boot { flags, input: None }
}

impl Boot {
    /// Sets a flag, replacing its earlier value.
    pub fn flag(mut self, name: &'static str, value: impl Into<OsString>) -> Boot {
        self.flags.retain(|(other, _)| name == "--disk" || *other != name);
        self.flags.push((name, value.into()));
        self
    }

    /// Adds a disk with options.
    pub fn disk(self, path: &Path, options: &str) -> Boot {
        self.flag("--disk", format!("{}{options}", path.display()))
    }

    /// Provides standard input from a pipe that ends after `bytes`.
    pub fn input(mut self, bytes: Vec<u8>) -> Boot {
        self.input = Some(bytes);
        self
    }

    /// The command, for customization.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.arg("boot");
        for (name, value) in &self.flags {
            command.arg(name).arg(value);
        }
        command
    }

    /// Starts it.
    pub fn start(mut self) -> Running {
        let Some(input) = self.input.take() else { return self.start_with(Stdio::null()).0 };
        let (running, pipe) = self.start_with(Stdio::piped());
        // A machine that exits early closes the pipe.
        thread::spawn(move || drop(pipe.unwrap().write_all(&input)));
        running
    }

    /// Starts it with this standard input, and returns the other end of a pipe.
    pub fn start_with(self, stdin: Stdio) -> (Running, Option<ChildStdin>) {
        let mut child = self.command().stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let pipe = child.stdin.take();
        let stdout = Stream::collect(child.stdout.take().unwrap());
        let stderr = Stream::collect(child.stderr.take().unwrap());
        (Running { child: Killed(child), stdout, stderr }, pipe)
    }

    /// Runs it to its end.
    ///
    /// On an emulated processor guests were observed to triple-fault for unknown reasons: such an end is reported
    /// visibly and the guest is booted once more. On a real processor it is a failure.
    pub fn run(self) -> Ran {
        const TRIPLE_FAULT: i32 = 82;
        let again = self.clone();
        let ran = self.start().wait();
        if ran.code != Some(TRIPLE_FAULT) || !is_emulated() {
            return ran;
        }
        eprintln!("RETRIED after: {ran:?}");
        again.start().wait()
    }
}

/// The output of a process so far.
#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    ended: bool,
}

impl Text {
    fn has(&self, words: &str) -> bool {
        self.bytes.windows(words.len()).any(|window| window == words.as_bytes())
    }
}

struct Stream {
    text: Arc<(Mutex<Text>, Condvar)>,
    reader: JoinHandle<()>,
}

impl Stream {
    fn collect(mut from: impl Read + Send + 'static) -> Stream {
        let text = Arc::<(Mutex<Text>, Condvar)>::default();
        let shared = text.clone();
        let reader = thread::spawn(move || {
            let mut buffer = [0; 4096];
            loop {
                let count = from.read(&mut buffer).unwrap_or(0);
                let mut text = shared.0.lock().unwrap();
                text.bytes.extend_from_slice(&buffer[..count]);
                text.ended = count == 0;
                shared.1.notify_all();
                if count == 0 {
                    return;
                }
            }
        });
        Stream { text, reader }
    }

    fn has(&self, words: &str) -> bool {
        self.text.0.lock().unwrap().has(words)
    }

    fn wait_for(&self, words: &str) -> bool {
        let text = self.text.0.lock().unwrap();
        let (text, _) = self.text.1.wait_timeout_while(text, TIMEOUT, |t| !t.has(words) && !t.ended).unwrap();
        text.has(words)
    }

    fn finish(self) -> Vec<u8> {
        self.reader.join().unwrap();
        std::mem::take(&mut self.text.0.lock().unwrap().bytes)
    }
}

/// A process that is killed at the end of its test.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Most have exited and been reaped.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A running husk process, killed if a test fails.
pub struct Running {
    child: Killed,
    stdout: Stream,
    stderr: Stream,
}

impl Running {
    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.0.id()
    }

    /// The process that runs its guest.
    #[allow(dead_code)] // not in every test program
    pub fn monitor(&self) -> u32 {
        monitor_of(self.pid())
    }

    /// Waits until the guest has printed `words`.
    pub fn wait_for(mut self, words: &str) -> Running {
        if !self.stdout.wait_for(words) {
            let _ = self.child.0.kill();
            panic!("the guest never printed {words:?}: {:?}", self.wait());
        }
        self
    }

    /// Whether the guest has printed `words` by now.
    #[allow(dead_code)] // not in every test program
    pub fn has_printed(&self, words: &str) -> bool {
        self.stdout.has(words)
    }

    /// Sends a signal by name.
    pub fn signal(&self, name: &str) {
        send_signal(self.pid(), name);
    }

    /// Whether it is still running.
    pub fn runs(&mut self) -> bool {
        self.child.0.try_wait().unwrap().is_none()
    }

    /// The CPU time of all of the monitor's threads so far, inside and outside of the guest.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.monitor())).unwrap();
        // proc(5): the fields after the name in parentheses start with the third; utime is the 14th, stime the 15th.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    /// Waits for its exit.
    pub fn wait(mut self) -> Ran {
        let status = end_of(&mut self.child.0);
        let (stdout, stderr) = (self.stdout.finish(), self.stderr.finish());
        let status = status.unwrap_or_else(|| {
            let last = &stdout[stdout.len().saturating_sub(1000)..];
            panic!("husk did not end: {}{}", text(last), text(&stderr))
        });
        Ran { code: status.code(), signal: status.signal(), stdout, stderr: own_lines(&stderr) }
    }
}

/// Whether the processor is emulated: instructions are about a hundred times slower, and an exit takes half a
/// millisecond. Configured explicitly, because measurements are unreliable.
pub fn is_emulated() -> bool {
    std::env::var_os("HUSK_TEST_EMULATED").is_some()
}

/// Sends a signal, by name, to a process.
pub fn send_signal(pid: u32, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -s {name} {pid}")]).status().unwrap();
    assert!(status.success());
}

/// Waits for `child` to exit; kills it and returns `None` after a timeout.
pub fn end_of(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            let _ = child.wait();
            return None;
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// husk's messages about this run, without those that apply to the host in general.
pub fn own_lines(stderr: &[u8]) -> String {
    text(stderr).split_inclusive('\n').filter(|line| !line.contains("KVM on this host is the PVM module")).collect()
}

/// The result of a husk process.
#[derive(Debug)]
pub struct Ran {
    /// The exit code, unless it was killed by a signal.
    pub code: Option<i32>,
    /// The signal that killed it.
    pub signal: Option<i32>,
    /// The guest's output.
    pub stdout: Vec<u8>,
    /// husk's messages.
    pub stderr: String,
}

impl Ran {
    /// The guest's output as text.
    pub fn text(&self) -> String {
        text(&self.stdout)
    }

    /// Asserts the exit code, and returns the guest's output.
    #[track_caller]
    pub fn expect(&self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{}\n{}", self.text(), self.stderr);
        self.text()
    }

    /// Asserts the exit code and a single line of husk, and returns the line.
    #[track_caller]
    pub fn expect_line(&self, code: i32) -> &str {
        self.expect(code);
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        self.stderr.trim_end()
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A temporary directory with an image of this size.
pub fn disk_image(bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    (dir, path)
}

/// The monitor process of the machine that `supervisor` runs.
#[allow(dead_code)] // not in every test program
pub fn monitor_of(supervisor: u32) -> u32 {
    let is_monitor = |pid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        parent_of(*pid) == Some(supervisor) && name.trim_end() == "monitor"
    };
    processes().find(is_monitor).expect("it has a monitor")
}

/// The processes that serve the folders of the machine that `supervisor` runs.
#[allow(dead_code)] // not in every test program
pub fn servers_of(supervisor: u32) -> Vec<u32> {
    let is_server = |pid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        parent_of(*pid) == Some(supervisor) && name.trim_end() == "share"
    };
    processes().filter(is_server).collect()
}

/// Waits for the exit of a process that was killed.
#[allow(dead_code)] // not in every test program
#[track_caller]
pub fn await_exit(pid: u32) {
    let deadline = Instant::now() + TIMEOUT;
    while std::fs::metadata(format!("/proc/{pid}/exe")).is_ok() {
        assert!(Instant::now() < deadline, "process {pid} runs");
        thread::sleep(Duration::from_millis(1));
    }
}

fn processes() -> impl Iterator<Item = u32> {
    std::fs::read_dir("/proc").unwrap().flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn parent_of(pid: u32) -> Option<u32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

/// Processes with `word` in their arguments, except monitors, whose supervisors have the same.
pub fn processes_with(word: &str) -> Vec<u32> {
    let all = processes_that_say("cmdline", word);
    all.iter().copied().filter(|pid| parent_of(*pid).is_none_or(|parent| !all.contains(&parent))).collect()
}

/// Asserts that soon there is no process with `word` in its arguments. A monitor exits some milliseconds after its supervisor.
#[allow(dead_code)] // not in every test program
#[track_caller]
pub fn await_none_with(word: &str) {
    let deadline = Instant::now() + TIMEOUT;
    while !processes_that_say("cmdline", word).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", processes_that_say("cmdline", word));
        thread::sleep(Duration::from_millis(1));
    }
}

/// Asserts that soon there is no process with `word` in its environment.
#[allow(dead_code)] // not in every test program
#[track_caller]
pub fn await_none_of(word: &str) {
    let deadline = Instant::now() + TIMEOUT;
    while !processes_of(word).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", processes_of(word));
        thread::sleep(Duration::from_millis(1));
    }
}

/// Processes with `word` in their environment, including machines in the background.
pub fn processes_of(word: &str) -> Vec<u32> {
    processes_that_say("environ", word)
}

fn processes_that_say(file: &str, word: &str) -> Vec<u32> {
    let says = |pid: &u32| text(&std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default()).contains(word);
    processes().filter(says).collect()
}
