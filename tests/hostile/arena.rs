//! Lets a guest do its worst, and checks what that has changed: nothing, for husk, its host and its neighbour.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use crate::husk::{Boot, Ran, Running, boot, disk_image, is_emulated, servers_of};
use husk_guests as guests;

/// How long husk may take to close what a reset device had open, and the like.
const SETTLING: Duration = Duration::from_secs(60);
/// The size of each machine's disk.
pub const DISK_BYTES: u64 = 1 << 20;
/// What one queue of a disk may take for buffers (`block::BUDGET_BYTES`), the most that these guests can make husk use at once.
const GROWTH_MAX_KIB: u64 = 2 << 10;
/// No mapping of husk's own is that large, and guest memory is.
const GUEST_MEMORY_KIB: u64 = 64 << 10;
/// The sources of messages that a guest can trigger: five devices, and the machine. Each may log a line per second; with more, a
/// guest could fill a disk.
const LOG_SOURCES: usize = 6;

/// The number of rounds for a guest's `rounds=`: exits take a hundred times as long on an emulated processor. What the guest does
/// in them is the same in every run, unless HUSK_TEST_SEED is set (`scripts/soak hostile`).
pub fn rounds(count: u32) -> String {
    let seed = std::env::var("HUSK_TEST_SEED").map_or(String::new(), |seed| format!(" seed={seed}"));
    format!("rounds={}{seed}", if is_emulated() { (count / 50).max(1) } else { count })
}

/// A machine with a disk, entropy, a balloon and a vsock device on this bus.
pub fn machine(guest: &str, words: &str, transport: &str, dir: &Path) -> Boot {
    let disk = dir.join("disk.img");
    boot(guest, words).disk(&disk, "").flag("--vsock", dir.join("vsock")).flag("--transport", transport)
}

/// Runs a guest on both buses.
#[track_caller]
pub fn on_both_buses(guest: &str, words: &str) {
    for transport in ["mmio", "pci"] {
        let (dir, disk) = disk_image(DISK_BYTES);
        survives(machine(guest, words, transport, dir.path()));
        assert_eq!(fs::metadata(disk).unwrap().len(), DISK_BYTES, "the disk has another size");
    }
}

/// The threads and open files of these processes of husk, sorted.
fn footprint(pids: &[u32]) -> Vec<String> {
    let mut all: Vec<String> = pids.iter().flat_map(|pid| footprint_of(*pid)).collect();
    all.sort();
    all
}

fn footprint_of(pid: u32) -> Vec<String> {
    let entries = |dir: &str| fs::read_dir(format!("/proc/{pid}/{dir}")).unwrap().flatten();
    let name = |path: PathBuf| fs::read_to_string(path.join("comm")).unwrap_or_default().trim_end().to_owned();
    let target = |path: PathBuf| fs::read_link(path).unwrap_or_default().display().to_string();
    let threads = entries("task").map(|task| name(task.path()));
    // The kernel's workers for io_uring leave when they have been idle for some seconds.
    let threads = threads.filter(|name| !name.is_empty() && !name.starts_with("iou-wrk"));
    threads.chain(entries("fd").map(|file| target(file.path()))).collect()
}

/// The same, once it does not change any more: a guest may be armed before husk has closed what only its start needed.
fn settled_footprint(pids: &[u32]) -> Vec<String> {
    let mut now = footprint(pids);
    loop {
        thread::sleep(Duration::from_millis(200));
        let before = std::mem::replace(&mut now, footprint(pids));
        if before == now {
            return now;
        }
    }
}

/// How many more or fewer there are of each name in `after` than in `before`.
fn differences(before: &[String], after: &[String]) -> Vec<String> {
    let count = |all: &[String], one: &String| all.iter().filter(|other| *other == one).count() as i64;
    let mut both: Vec<&String> = before.iter().chain(after).collect();
    both.sort();
    both.dedup();
    let change = |one: &String| count(after, one) - count(before, one);
    both.into_iter().filter(|one| change(one) != 0).map(|one| format!("{:+} {one}", change(one))).collect()
}

/// The memory that husk has allocated for itself, in KiB: all that is anonymous and not the guest's.
pub fn own_memory_kib(pid: u32) -> u64 {
    // Empty once it has ended, which is noticed elsewhere.
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let (mut size, mut sum) = (0, 0);
    for line in maps.lines() {
        let kib = || line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).unwrap();
        if line.starts_with("Size:") {
            size = kib();
        } else if line.starts_with("Anonymous:") && size < GUEST_MEMORY_KIB {
            sum += kib();
        }
    }
    sum
}

/// A machine that has nothing to do with the others, and returns what it is sent.
pub struct Neighbour {
    machine: Option<Running>,
    pipe: ChildStdin,
    questions: u32,
}

impl Neighbour {
    pub fn start() -> Neighbour {
        let (machine, pipe) = boot(guests::SERIAL, "do=echo wait=interrupt").start_with(Stdio::piped());
        Neighbour { machine: Some(machine.wait_for("ready\n")), pipe: pipe.unwrap(), questions: 0 }
    }

    /// Asserts that it is as alive as ever.
    #[track_caller]
    pub fn answers(&mut self) {
        self.questions += 1;
        let question = format!("<{}>", self.questions);
        self.pipe.write_all(question.as_bytes()).unwrap();
        self.machine = self.machine.take().map(|machine| machine.wait_for(&question));
    }
}

/// Boots a hostile guest and lets it do its worst.
///
/// Asserts that the machine is still there afterwards, with the threads and files that it had before and no more memory than
/// its devices have budgets for; that it has logged no more than it may; and that its neighbour has answered all the time.
/// Returns the result after the guest has ended the machine.
#[track_caller]
pub fn survives(hostile: Boot) -> Ran {
    let tried = rounds_of(&hostile);
    let mut neighbour = Neighbour::start();
    let started = Instant::now();
    let (machine, pipe) = hostile.start_with(Stdio::piped());
    let (machine, mut pipe) = (machine.wait_for("armed\n"), pipe.unwrap());
    // The monitor, and what serves its folders.
    let pids: Vec<u32> = std::iter::once(machine.monitor()).chain(servers_of(machine.pid())).collect();
    let memory_of_all = || pids.iter().map(|pid| own_memory_kib(*pid)).sum::<u64>();
    let (before, memory_kib) = (settled_footprint(&pids), memory_of_all());
    pipe.write_all(b"!").unwrap();
    let (mut machine, mut peak_kib) = (machine, memory_kib);
    while machine.runs() && !machine.has_printed("spent\n") {
        neighbour.answers();
        peak_kib = peak_kib.max(memory_of_all());
        thread::sleep(Duration::from_millis(5));
    }
    if !machine.runs() {
        let ran = machine.wait();
        panic!("the machine ended with {:?}: {}\n{}", ran.code, ran.text(), ran.stderr);
    }
    neighbour.answers();
    let deadline = Instant::now() + SETTLING;
    let changes = || differences(&before, &footprint(&pids));
    while !changes().is_empty() && Instant::now() < deadline {
        thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(changes(), [""; 0]);
    let growth_kib = memory_of_all().max(peak_kib).saturating_sub(memory_kib);
    assert!(growth_kib <= GROWTH_MAX_KIB, "husk has grown by {growth_kib} KiB");
    pipe.write_all(b"!").unwrap();
    let ran = machine.wait();
    ran.expect(0);
    assert_well_ended(&ran, started.elapsed());
    neighbour.answers();
    println!("{tried} rounds survived");
    ran
}

/// How often a guest does what it does.
fn rounds_of(hostile: &Boot) -> u32 {
    let words = hostile.command().get_args().filter_map(|word| word.to_str()).collect::<Vec<_>>().join(" ");
    words.split(' ').find_map(|word| word.strip_prefix("rounds=")?.parse().ok()).unwrap_or(1)
}

/// Asserts that husk did not panic, and logged no more than it may in this time.
#[track_caller]
fn assert_well_ended(ran: &Ran, elapsed: Duration) {
    assert_eq!(ran.signal, None, "{}", ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    let lines_max = LOG_SOURCES * (elapsed.as_secs() as usize + 2);
    assert!(ran.stderr.lines().count() <= lines_max, "the guest can fill the log: {}", ran.stderr);
}
