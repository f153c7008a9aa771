//! Machines that start from snapshots: warm images, and machines that were saved with their process.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use ::husk::snapshot::{Snapshot, SnapshotWriter};
use tempfile::TempDir;

use super::guests::guests;
use super::{Ended, TIMEOUT, finish, husk_as_is, image};

/// A size that no other test uses, so that this file's warm images are its own.
const MEMORY: &str = "100M";

/// `husk COMMAND` with the micro kernel and the machine's flags.
fn husk(guests: &Path, command: &str, words: &[&str]) -> Command {
    let kernel = guests.join("micro/vmlinux");
    let fixed = [command, "--memory", MEMORY, "--network", "none", "--kernel", kernel.to_str().unwrap()];
    plain(&[&fixed, words].concat())
}

/// `husk` with these words.
fn plain(words: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
    command.args(words).env("HUSK_DATA", image::store()).stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Makes the warm image that the flags select, and returns its directory.
#[track_caller]
fn warm(guests: &Path, flags: &[&str]) -> PathBuf {
    let ended = finish(husk(guests, "warm", &[flags, &[image::archive()]].concat()), Vec::new());
    ended.expect(0);
    ended.text().trim_end().into()
}

/// Runs a shell command in the test image, with `--verbose`.
fn run(guests: &Path, flags: &[&str], script: &str) -> Ended {
    let words = [&["--verbose"], flags, &[image::archive(), "sh", "-c", script]].concat();
    finish(husk(guests, "run", &words), Vec::new())
}

fn is_warm(ended: &Ended) -> bool {
    ended.errors.contains("the machine starts from a warm image")
}

#[test]
fn a_command_sees_the_same_in_a_warm_machine() {
    let guests = guests!();
    let flags =
        ["--env", "A=b c", "--hostname", "box", "--user", "1:2", "--workdir", "/tmp", "--tmpfs", "/mnt:size=1m"];
    // The size of /dev and these limits depend on the free memory at that time.
    let script = "id; pwd; hostname; env | sort; cat /etc/hosts; sed 's/size=[0-9]*k,nr_inodes=[0-9]*//' /proc/mounts; \
                  ulimit -a | grep -v 'pending signals\\|user processes'; ls /dev /proc/self/fd; \
                  stat -c '%n %A %u:%g' /*; cat /proc/self/cgroup; nproc; exit 7";
    let boot = run(&guests, &[&flags[..], &["--no-warm"]].concat(), script);
    boot.expect(7);
    warm(&guests, &[]);
    for _ in 0..2 {
        let started = run(&guests, &flags, script);
        assert!(is_warm(&started) && !is_warm(&boot), "{}\n{}", started.errors, boot.errors);
        assert_eq!(started.expect(7).text(), boot.text());
    }
    let prefaulted = run(&guests, &["--prefault"], "echo x");
    assert!(!is_warm(&prefaulted), "another balloon: {}", prefaulted.errors);
    assert_eq!(prefaulted.expect(0).text(), "x\n");
    let readonly = run(&guests, &["--read-only"], "echo x > /x");
    assert!(is_warm(&readonly), "{}", readonly.errors);
    readonly.expect(1);
}

#[test]
fn a_warm_machine_gets_disks_and_folders_of_its_own() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "shared\n").unwrap();
    let (folder, file) = (dir.path().display().to_string(), dir.path().join("f").display().to_string());
    let [folder, file] = [format!("{folder}:/mnt"), format!("{file}:/etc/f:ro")];
    let shares = ["-v", &folder, "-v", &file, "--volume", "/data"];
    // The last line lists the processes that are not the kernel's.
    let script = "cat /mnt/f /etc/f; cat /proc/partitions; ls /dev /sys/block /data; ls -l /sys/block /sys/bus/virtio/devices | sed 's/.*-> //'
        sed 's/size=[0-9]*k,nr_inodes=[0-9]*//' /proc/mounts; test ! -e /kept; ls -A /; echo x >/kept; echo y >/data/y
        for p in /proc/[0-9]*; do test ! -e $p/exe || cat $p/comm; done";
    for transport in ["mmio", "pci"] {
        warm(&guests, &["--transport", transport]);
        let flags = [&["--rm", "--scratch", "64M", "--transport", transport], &shares[..]].concat();
        let boot = run(&guests, &[&flags[..], &["--no-warm"]].concat(), script);
        let started = run(&guests, &flags, script);
        assert!(is_warm(&started) && !is_warm(&boot), "{}\n{}", started.errors, boot.errors);
        assert_eq!(started.expect(0).text(), boot.expect(0).text());
        assert!(started.text().starts_with("shared\nshared\n"), "{}", started.text());
        assert!(started.text().ends_with("\ninit\nsh\n"), "{}", started.text());
    }
    let stays = run(&guests, &["--name", "warm-and-stays"], "echo x >>/kept; cat /kept");
    assert!(is_warm(&stays), "{}", stays.errors);
    assert_eq!(stays.expect(0).text(), "x\n");
    assert_eq!(finish(plain(&["start", "-a", "warm-and-stays"]), Vec::new()).expect(0).text(), "x\nx\n");
    finish(plain(&["rm", "warm-and-stays"]), Vec::new()).expect(0);
}

#[test]
fn warm_machines_are_different_and_know_the_time() {
    let guests = guests!();
    finish(husk(&guests, "warm", &[image::archive(), "sh"]), Vec::new()).expect(0);
    // How often the shell has waited for the disk: field 12 of proc_pid_stat(5).
    let waits = |flags| -> u64 {
        let ended = run(&guests, flags, "read -r line </proc/self/stat; set -- $line; echo ${12}");
        assert_eq!(is_warm(&ended), flags.is_empty());
        ended.expect(0).text().trim_end().parse().unwrap()
    };
    assert_eq!(waits(&[]), 0);
    assert_ne!(waits(&["--no-warm"]), 0);
    let script = "head -c 32 /dev/urandom | md5sum; cat /proc/sys/kernel/random/uuid; hostname; date +%s";
    let machines: Vec<_> = (0..4).map(|_| husk(&guests, "run", &[image::archive(), "sh", "-c", script])).collect();
    let running: Vec<_> = machines.into_iter().map(|mut machine| machine.spawn().unwrap()).collect();
    let mut seen = Vec::new();
    for child in running {
        let ended = super::wait(child);
        ended.expect(0);
        let text = ended.text();
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let time: u64 = lines[3].parse().unwrap();
        assert!(now - time.min(now) < 120 && time <= now + 1, "{time} is not {now}");
        seen.extend(lines.into_iter().take(3));
    }
    let count = seen.len();
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), count, "{seen:?}");
}

#[test]
fn a_snapshot_of_a_waiting_machine_is_for_any_command() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("waiting");
    let path = path.to_str().unwrap();
    assert_eq!(warm(&guests, &["--output", path]), Path::new(path));
    for word in ["one", "two"] {
        let ended = finish(plain(&["run", "--from", path, "echo", word]), Vec::new());
        assert_eq!(ended.expect(0).text(), format!("{word}\n"));
    }
    // With a disk and folders, which the one that was saved did not have.
    fs::write(dir.path().join("f"), "shared\n").unwrap();
    let folder = format!("{}:/mnt:ro", dir.path().display());
    let script = "cat /mnt/f; dd if=/dev/zero of=/big bs=1M count=150 2>&1 | grep -c No.space";
    let at = ["run", "--from", path, "--scratch", "300M", "-v", &folder, "-v", "/data", "sh", "-c", script];
    let ended = finish(plain(&at), Vec::new());
    assert!(ended.expect(1).text().starts_with("shared\n"), "{}", ended.text());
    assert!(ended.text().ends_with("\n0\n"), "more than its memory holds: {}", ended.text());
    let ended =
        finish(plain(&["run", "--from", path, "sh", "-c", "dd if=/dev/zero of=/big bs=1M count=150"]), Vec::new());
    assert!(ended.errors.contains("No space left"), "{}", ended.errors);
    let refused = |words: &[&str], code: i32, why: &str| {
        let ended = finish(plain(words), Vec::new());
        assert!(ended.errors.contains(why), "{words:?}: {}", ended.errors);
        ended.expect(code);
    };
    refused(&["restore", path], 1, "use `husk run --from");
    refused(&["run", "--from", path, "--memory", "1G", "true"], 125, "cannot be used with");
    refused(&["run", "--from", "/nowhere", "true"], 125, "open the snapshot /nowhere");
    let state = Path::new(path).join("state");
    let mut bytes = fs::read(&state).unwrap();
    bytes[100] ^= 1;
    fs::write(&state, bytes).unwrap();
    refused(&["run", "--network", "none", "--from", path, "true"], 125, "it is damaged");
}

#[test]
fn the_memory_that_a_run_touches_is_provided_to_the_next_ones() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("waiting");
    let record = path.join("touched");
    let path = path.to_str().unwrap();
    warm(&guests, &["--output", path]);
    assert!(!record.exists());
    let echo = |word: &str| {
        let ended = finish(plain(&["run", "--from", path, "echo", word]), Vec::new());
        assert_eq!(ended.expect(0).text(), format!("{word}\n"));
        fs::read(&record).unwrap()
    };
    let touched = echo("one");
    assert!(!touched.is_empty() && touched.len() % 8 == 0, "{}", touched.len());
    assert_eq!(echo("two"), touched);
    // What it says makes no difference to the guest.
    for changed in [Vec::new(), vec![0xff; 1 << 20], vec![1; 1001]] {
        fs::write(&record, &changed).unwrap();
        assert_eq!(echo("three"), changed);
    }
}

#[test]
fn a_damaged_warm_image_only_costs_time() {
    let guests = guests!();
    let path = warm(&guests, &["--cpus", "2"]);
    fs::File::options().write(true).open(path.join("memory")).unwrap().set_len(4096).unwrap();
    let ended = run(&guests, &["--cpus", "2"], "nproc");
    assert!(!is_warm(&ended) && ended.errors.contains("the file `memory` has 4096 bytes"), "{}", ended.errors);
    assert_eq!(ended.expect(0).text(), "2\n");
    assert_eq!(warm(&guests, &["--cpus", "2"]), path);
    // Whole, but with a state that no machine can have.
    let Snapshot { description, .. } = Snapshot::open(&path).unwrap();
    fs::remove_dir_all(&path).unwrap();
    let writer = SnapshotWriter::create(&path).unwrap();
    writer.memory().set_len(description.config.memory_mib << 20).unwrap();
    writer.finish(&description, b"{}").unwrap();
    let ended = run(&guests, &["--cpus", "2"], "nproc");
    assert!(ended.errors.contains("the warm image cannot be used"), "{}", ended.errors);
    assert_eq!(ended.expect(0).text(), "2\n");
    fs::remove_dir_all(&path).unwrap();
    assert_eq!(warm(&guests, &["--cpus", "2"]), path);
    let ended = run(&guests, &["--cpus", "2"], "nproc");
    assert!(is_warm(&ended), "{}", ended.errors);
    assert_eq!(ended.expect(0).text(), "2\n");
}

/// A machine in the background that counts, and its state directory.
struct Counter {
    runtime: TempDir,
}

impl Counter {
    fn start(guests: &Path) -> Counter {
        let counter = Counter { runtime: tempfile::tempdir().unwrap() };
        let script = "n=0; while [ ! -e /end ]; do echo $n; n=$((n+1)); sleep 0.1; done; exit 9";
        let mut command = husk_as_is(guests, "micro", "96M", &["-d", "--name", "first", "--network", "none"]);
        command.args([image::archive(), "sh", "-c", script]).env("XDG_RUNTIME_DIR", counter.runtime.path());
        finish(command, Vec::new()).expect(0);
        counter
    }

    #[track_caller]
    fn ok(&self, words: &[&str]) -> String {
        let mut command = plain(words);
        command.env("XDG_RUNTIME_DIR", self.runtime.path());
        let ended = finish(command, Vec::new());
        assert_eq!(ended.code, Some(0), "{words:?}: {}", ended.errors);
        ended.text()
    }

    /// Lets a machine's command end, and checks that it does. What tells it so may be killed by that.
    fn end(&self, name: &str) {
        self.ok(&["exec", "-d", name, "touch", "/end"]);
        assert_eq!(self.ok(&["wait", name]), "9\n");
    }

    /// The numbers that a machine has printed.
    fn numbers(&self, name: &str) -> Vec<u32> {
        self.ok(&["logs", name]).lines().map(|line| line.trim().parse().unwrap()).collect()
    }

    #[track_caller]
    fn await_number(&self, name: &str, number: u32) {
        let start = Instant::now();
        while self.numbers(name).last().is_none_or(|last| *last < number) {
            assert!(start.elapsed() < TIMEOUT, "{:?}", self.numbers(name));
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        let mut command = plain(&["rm", "-f", "first", "second", "third"]);
        let _ = command.env("XDG_RUNTIME_DIR", self.runtime.path()).status();
    }
}

#[test]
fn a_process_continues_in_restored_machines() {
    let guests = guests!();
    let counter = Counter::start(&guests);
    let path = counter.runtime.path().join("counter.snap");
    let path = path.to_str().unwrap();
    counter.await_number("first", 5);
    counter.ok(&["snapshot", "first", path]);
    let at = counter.numbers("first").last().copied().unwrap();
    counter.await_number("first", at + 3);
    counter.ok(&["rm", "-f", "first"]);
    for name in ["second", "third"] {
        counter.ok(&["restore", "-d", "--name", name, path]);
    }
    for name in ["second", "third"] {
        counter.await_number(name, at + 10);
        let numbers = counter.numbers(name);
        assert!(numbers.windows(2).all(|pair| pair[1] == pair[0] + 1), "{numbers:?}");
        assert!(numbers[0] <= at + 1 && numbers[0] >= 5, "it continues at {at}: {numbers:?}");
        assert_eq!(counter.ok(&["exec", name, "echo", "inside"]), "inside\n");
    }
    counter.end("third");
    counter.await_number("second", at + 12);
    // Without its first machine, from a snapshot of a restored one.
    let again = format!("{path}.again");
    counter.ok(&["snapshot", "--stop", "second", &again]);
    counter.ok(&["rm", "second"]);
    counter.ok(&["restore", "-d", "--name", "second", &again]);
    counter.await_number("second", at + 20);
    counter.end("second");
}
