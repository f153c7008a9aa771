//! husk run as a user runs it: the built binary, a tiny guest, its output and its exit code.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Longer than any guest of these tests takes on a busy machine that emulates it.
const PATIENCE: Duration = Duration::from_secs(300);

/// Leaves the test, aloud, where there is no KVM to run it on; fails it where HUSK_TEST_REQUIRE_KVM says there must be.
macro_rules! needs_kvm {
    () => {
        if !$crate::husk::kvm_is_usable() {
            return;
        }
    };
}

/// Whether /dev/kvm opens. If not, says so where it is seen: the test harness keeps only what is printed by macros.
pub fn kvm_is_usable() -> bool {
    let Err(error) = File::options().read(true).write(true).open("/dev/kvm") else { return true };
    assert!(std::env::var_os("HUSK_TEST_REQUIRE_KVM").is_none(), "HUSK_TEST_REQUIRE_KVM is set, but /dev/kvm: {error}");
    let test = thread::current().name().unwrap_or("a test").to_owned();
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: /dev/kvm: {error}");
    false
}

/// A `husk boot` to be started.
#[derive(Clone)]
pub struct Boot {
    flags: Vec<(&'static str, OsString)>,
    input: Option<Vec<u8>>,
}

/// `husk boot` of `guest`, told `words` on its command line. Standard input is empty unless given.
pub fn boot(guest: &str, words: &str) -> Boot {
    let flags = vec![("--kernel", guest.into()), ("--cmdline", words.into()), ("--memory", "64M".into())];
    Boot { flags, input: None }
}

impl Boot {
    /// Sets a flag to this value, instead of the one it had.
    pub fn flag(mut self, name: &'static str, value: impl Into<OsString>) -> Boot {
        self.flags.retain(|(other, _)| name == "--disk" || *other != name);
        self.flags.push((name, value.into()));
        self
    }

    /// Adds a disk, with its options behind a comma.
    pub fn disk(self, path: &Path, options: &str) -> Boot {
        self.flag("--disk", format!("{}{options}", path.display()))
    }

    /// Gives standard input from a pipe that ends behind `bytes`.
    pub fn input(mut self, bytes: Vec<u8>) -> Boot {
        self.input = Some(bytes);
        self
    }

    /// The command itself, for what is not common.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_husk"));
        command.arg("boot");
        for (name, value) in &self.flags {
            command.arg(name).arg(value);
        }
        command
    }

    /// Starts it.
    pub fn start(self) -> Running {
        let stdin = if self.input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut child = self.command().stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        if let (Some(mut pipe), Some(input)) = (child.stdin.take(), self.input) {
            // A machine that ends before it has read all leaves a broken pipe.
            thread::spawn(move || drop(pipe.write_all(&input)));
        }
        let stdout = Stream::collect(child.stdout.take().unwrap());
        let stderr = Stream::collect(child.stderr.take().unwrap());
        Running { child: Killed(child), stdout, stderr }
    }

    /// Starts it and waits for its end.
    ///
    /// On an emulated processor guests were seen to triple-fault, of unproven cause: there such an end is told loudly
    /// and the guest is booted once more. On a real one it counts.
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

/// What a process has printed so far.
#[derive(Default)]
struct Text {
    bytes: Vec<u8>,
    ended: bool,
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

    fn wait_for(&self, words: &str) -> bool {
        let has = |text: &Text| text.bytes.windows(words.len()).any(|window| window == words.as_bytes());
        let text = self.text.0.lock().unwrap();
        let (text, _) = self.text.1.wait_timeout_while(text, PATIENCE, |t| !has(t) && !t.ended).unwrap();
        has(&text)
    }

    fn finish(self) -> Vec<u8> {
        self.reader.join().unwrap();
        std::mem::take(&mut self.text.0.lock().unwrap().bytes)
    }
}

/// A process that does not outlive the test that started it.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        // Most have ended, and have been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A husk that runs. Killed if a test fails before its end.
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

    /// Waits until the guest has printed `words`.
    pub fn wait_for(mut self, words: &str) -> Running {
        if !self.stdout.wait_for(words) {
            let _ = self.child.0.kill();
            panic!("the guest never said {words:?}: {:?}", self.wait());
        }
        self
    }

    /// Sends a signal by its name.
    pub fn signal(&self, name: &str) {
        send_signal(self.pid(), name);
    }

    /// Whether it has not ended yet.
    pub fn runs(&mut self) -> bool {
        self.child.0.try_wait().unwrap().is_none()
    }

    /// Time on a processor so far, of all its threads, in and out of the guest.
    pub fn cpu_time(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap();
        // proc(5): the fields behind the name in parentheses begin with the third; utime is the 14th, stime the 15th.
        let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap();
        Duration::from_millis(ticks * 10)
    }

    /// Waits for its end.
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

/// Whether each instruction here takes as long as a hundred do elsewhere, and an exit half a millisecond. Said by who
/// knows: a stopwatch takes an idle machine for a fast one.
pub fn is_emulated() -> bool {
    std::env::var_os("HUSK_TEST_EMULATED").is_some()
}

/// Sends a signal, by its name, to one process.
pub fn send_signal(pid: u32, name: &str) {
    let status = Command::new("sh").args(["-c", &format!("kill -s {name} {pid}")]).status().unwrap();
    assert!(status.success());
}

/// Waits for the end of `child`; kills it and returns nothing when it takes too long.
pub fn end_of(child: &mut Child) -> Option<ExitStatus> {
    let deadline = Instant::now() + PATIENCE;
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

/// What husk said of this run: without what it says of every run on a host like this one.
pub fn own_lines(stderr: &[u8]) -> String {
    text(stderr).split_inclusive('\n').filter(|line| !line.contains("KVM on this host is the PVM module")).collect()
}

/// What is left of a husk that has ended.
#[derive(Debug)]
pub struct Ran {
    /// Exit code, unless a signal ended it.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// What the guest printed.
    pub stdout: Vec<u8>,
    /// What husk printed.
    pub stderr: String,
}

impl Ran {
    /// What the guest printed, as text.
    pub fn text(&self) -> String {
        text(&self.stdout)
    }

    /// Asserts the exit code, and returns what the guest printed.
    #[track_caller]
    pub fn expect(&self, code: i32) -> String {
        assert_eq!(self.code, Some(code), "{}\n{}", self.text(), self.stderr);
        self.text()
    }

    /// Asserts the exit code and that husk said one line, and returns it.
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

/// A place for a test's files, and an image of this many bytes in it.
pub fn disk_image(bytes: u64) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    (dir, path)
}

/// Processes with `word` in their arguments.
pub fn processes_with(word: &str) -> Vec<u32> {
    processes_that_say("cmdline", word)
}

/// Processes with `word` among their variables, those of machines in the background too.
pub fn processes_of(word: &str) -> Vec<u32> {
    processes_that_say("environ", word)
}

fn processes_that_say(file: &str, word: &str) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let said = std::fs::read(entry.path().join(file)).unwrap_or_default();
        if text(&said).contains(word) {
            found.push(pid);
        }
    }
    found
}
