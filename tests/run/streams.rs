//! Standard streams and terminals: every byte, in order.

use std::io::{self, Read, Write};
use std::process::Stdio;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use crate::background::Machines;
use crate::image::archive;
use crate::terminal::Terminal;
use crate::uplink::is_lab;
use crate::{TIMEOUT, finish, guests, husk_run, husk_under, shell, wait};

const CHUNK_BYTES: usize = 1 << 20;
/// The number of positions in the noise at which a chunk may start.
const SHIFTS: usize = 64 << 10;

/// Poorly compressible data from which each chunk takes a different part: fast to generate and compare, even under
/// emulation.
struct Noise(Vec<u8>);

impl Noise {
    fn new() -> Noise {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        };
        Noise(std::iter::repeat_with(next).take((CHUNK_BYTES + SHIFTS) / 8).flatten().collect())
    }

    fn chunk(&self, number: usize) -> &[u8] {
        &self.0[number * 4099 % SHIFTS..][..CHUNK_BYTES]
    }
}

/// Sends data through `cat`, and compares the output concurrently.
fn there_and_back(kernel: &str, len: u64) {
    let guests = guests!();
    let mut child = husk_under(&guests, kernel, &["-i", archive(), "cat"]).stdin(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let feeder = thread::spawn(move || {
        let noise = Noise::new();
        let mut left = len;
        for number in 0.. {
            let count = left.min(CHUNK_BYTES as u64);
            stdin.write_all(&noise.chunk(number)[..count as usize])?;
            left -= count;
            if left == 0 {
                break;
            }
        }
        io::Result::Ok(())
    });
    let (progress, seen) = mpsc::channel();
    let checker = thread::spawn(move || {
        let (noise, mut bytes, mut come) = (Noise::new(), Vec::new(), 0);
        for number in 0.. {
            bytes.clear();
            (&mut stdout).take(CHUNK_BYTES as u64).read_to_end(&mut bytes)?;
            assert!(noise.chunk(number).starts_with(&bytes), "other bytes come back after {come}");
            come += bytes.len() as u64;
            let _ = progress.send(come);
            if bytes.len() < CHUNK_BYTES {
                break;
            }
        }
        io::Result::Ok(come)
    });
    // No timeout as long as there is progress.
    while seen.recv_timeout(TIMEOUT).is_ok() {}
    let ended = wait(child);
    ended.expect(0);
    assert_eq!(checker.join().unwrap().unwrap(), len, "{}", ended.errors);
    feeder.join().unwrap().unwrap();
}

#[test]
fn a_large_stream_passes_both_ways_unchanged() {
    // 1 GiB, less on an emulated processor, which would take minutes; or as much as requested.
    let asked_mib = std::env::var("HUSK_TEST_STREAM_MIB").ok().and_then(|mib| mib.parse().ok());
    there_and_back("micro", asked_mib.unwrap_or(if is_lab() { 128 } else { 1024 }) << 20);
}

#[test]
fn megabytes_pass_a_stock_kernel_both_ways_unchanged() {
    there_and_back("stock", (16 << 20) + 5);
}

#[test]
fn outputs_are_separate() {
    let ended = shell(&guests!(), &[], "echo one; echo two >&2; echo three");
    assert_eq!(ended.expect(0).text(), "one\nthree\n");
    assert!(ended.errors.ends_with("two\n") && !ended.errors.contains("one"), "{}", ended.errors);
}

#[test]
fn input_is_forwarded_only_on_request() {
    let guests = guests!();
    let without = finish(husk_run(&guests, &[archive(), "wc", "-c"]), b"12345".to_vec());
    assert_eq!(without.expect(0).text(), "0\n");
    let with = finish(husk_run(&guests, &["-i", archive(), "wc", "-c"]), b"12345".to_vec());
    assert_eq!(with.expect(0).text(), "5\n");
}

#[test]
fn a_command_may_exit_with_unread_input() {
    let ended = finish(husk_run(&guests!(), &["-i", archive(), "head", "-c", "3"]), vec![b'x'; 8 << 20]);
    assert_eq!(ended.expect(0).text(), "xxx");
}

#[test]
fn closing_a_stream_leaves_the_others_open() {
    let guests = guests!();
    // Standard output is closed first, and input continues to standard error; then input ends, followed by more output.
    let words = ["-i", archive(), "sh", "-c", "echo first; exec >&-; cat >&2; sleep 1; echo last >&2"];
    let ended = finish(husk_run(&guests, &words), b"through\n".repeat(10_000));
    assert_eq!(ended.expect(0).text(), "first\n");
    assert!(ended.errors.ends_with("through\nlast\n"), "{} bytes", ended.errors.len());
    assert_eq!(ended.errors.matches("through\n").count(), 10_000);
}

#[test]
fn a_writer_is_notified_when_its_reader_is_gone() {
    let mut child = husk_run(&guests!(), &[archive(), "yes"]).spawn().unwrap();
    drop(child.stdout.take());
    // SIGPIPE's number is 13.
    assert_eq!(crate::end_of(&mut child).and_then(|status| status.code()), Some(141));
}

#[test]
fn a_terminal_has_a_size_and_is_edited_by_the_guest() {
    let guests = guests!();
    let mut terminal = Terminal::start(husk_run(&guests, &["-it", archive(), "sh"]));
    terminal.resize(31, 97);
    terminal.wait_for("# ");
    assert!(!terminal.modes().canonical(), "the guest's terminal edits lines, ours is raw");
    assert!(!terminal.modes().changes_output(), "nor does ours change what the guest's has made");
    terminal.type_keys(b"echo size=$(stty size) $(tty)\n");
    terminal.wait_for("size=31 97 /dev/pts/0");
    terminal.resize(40, 100);
    thread::sleep(Duration::from_millis(500));
    terminal.type_keys(b"echo size=$(stty size)\n");
    terminal.wait_for("size=40 100");
    // The guest's terminal turns it into a signal for the foreground process.
    terminal.type_keys(b"echo slee''ping; sleep 1000\n");
    terminal.wait_for("sleeping");
    thread::sleep(Duration::from_secs(1));
    terminal.type_keys(b"\x03");
    terminal.type_keys(b"echo inter''rupted\n");
    terminal.wait_for("interrupted");
    // Output is processed only by the guest's terminal.
    terminal.type_keys(b"stty -opost; printf 'ab\\ncd\\n'; stty opost\n");
    terminal.wait_for("ab\ncd\n");
    terminal.type_keys(b"exit 5\n");
    assert_eq!(terminal.wait(), Some(5));
    assert!(terminal.modes().canonical(), "the terminal is as it was");
}

#[test]
fn a_terminal_works_without_input() {
    let text = shell(&guests!(), &["-t"], "tty; stty size; test -t 2 && echo both").expect(0).text();
    assert_eq!(text.replace('\r', ""), "/dev/pts/0\n24 80\nboth\n");
}

#[test]
fn only_the_attached_streams_are_printed() {
    let guests = guests!();
    let both = "echo out; echo err >&2";
    let printed = |flags: &[&str]| {
        let ended = shell(&guests, flags, both);
        ended.expect(0);
        (ended.text(), ended.errors)
    };
    assert_eq!(printed(&["-a", "stdout"]), ("out\n".into(), String::new()));
    assert_eq!(printed(&["-a", "STDERR"]), (String::new(), "err\n".into()));
    assert_eq!(printed(&["-a", "stdout", "-a", "stderr"]), ("out\n".into(), "err\n".into()));
}

#[test]
fn without_a_signal_proxy_a_signal_ends_the_client_and_the_machine_goes_on() {
    let guests = guests!();
    let script = "trap 'echo signaled' INT TERM; echo up; read line; echo $line; exit 3";
    let mut husk = husk_run(&guests, &["-i", "--sig-proxy=false", archive(), "sh", "-c", script]);
    let mut child = husk.stdin(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut up = [0; 3];
    stdout.read_exact(&mut up).unwrap();
    // Ctrl-C of a terminal is for all of its processes, a signal for the one that the user sees.
    let behind = std::fs::read_to_string(format!("/proc/{0}/task/{0}/children", child.id())).unwrap();
    for pid in [child.id().to_string().as_str(), behind.trim()] {
        assert!(std::process::Command::new("kill").args(["-INT", pid]).status().unwrap().success());
    }
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&child.wait().unwrap()), Some(libc::SIGINT));
    stdin.write_all(b"on\n").unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!((up, rest.as_str()), (*b"up\n", "on\n"));
    shell(&guests, &["--sig-proxy=false"], "exit 7").expect(7);
}

#[test]
fn a_machine_without_a_signal_proxy_goes_on_when_nobody_reads_its_output() {
    let machines = Machines::new(guests!());
    let script = "echo up; read line; for n in 1 2 3; do echo $n || exit 9; done; exit 3";
    let words = ["-i", "--name", "lone", "--sig-proxy=false", archive(), "sh", "-c", script];
    let mut husk = husk_run(&machines.guests, &words);
    husk.env("XDG_RUNTIME_DIR", machines.runtime.path());
    let mut child = husk.stdin(Stdio::piped()).spawn().unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    stdout.read_exact(&mut [0; 3]).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    drop(stdout);
    stdin.write_all(b"on\n").unwrap();
    assert_eq!(machines.ok(&["wait", "lone"]), "3\n");
    assert_eq!(machines.ok(&["logs", "lone"]), "up\n1\n2\n3\n");
}
