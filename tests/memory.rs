//! Ballooning: memory that is returned automatically, memory withheld by a target, and memory that the guest gets back; also
//! after a restore, of which the guest is told.
//!
//! Real guests, as for tests/linux, but as machines in this process: what is tested is measured and changed while they
//! run. Without `HUSK_TEST_GUESTS` every test says that it was skipped.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use husk::config::{MachineConfig, VsockConfig};
use husk::machine::Machine;
use husk::memory;
use husk::resources::memory_use::MemoryUse;
use husk::resources::{self, Outside, Resources, SnapshotFiles, Source};
use husk::timings::Timings;

#[path = "run/guests.rs"]
mod guests;
use guests::guests;

/// Longer than anything here takes, even emulated on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(180);
/// Served by firmware/guests/linux/memory.c.
const PORT: u32 = 1003;
const MEMORY_MIB: u64 = 512;
/// The memory used by a program in the guest: more than half.
const TAKEN_MIB: u64 = 300;

struct Guest {
    config: MachineConfig,
    machine: Machine,
    /// What it has printed since it was built.
    console: Arc<Mutex<String>>,
    // Its cgroup goes after it.
    _outside: Outside,
    name: String,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Guest {
    /// Starts a guest that serves memory requests.
    fn start(guests: &Path, kernel: &str, memory_target_mib: Option<u64>) -> Guest {
        Guest::start_with(guests, kernel, |config| config.memory_target_mib = memory_target_mib)
    }

    fn start_with(guests: &Path, kernel: &str, change: impl FnOnce(&mut MachineConfig)) -> Guest {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v.sock");
        let mut config = MachineConfig {
            kernel: guests.join(kernel).join("vmlinux"),
            initrd: Some(guests.join(kernel).join("initrd")),
            cmdline: "-- memory".into(),
            memory_mib: MEMORY_MIB,
            vsock: Some(VsockConfig { socket: socket.clone(), cid: 3 }),
            ..MachineConfig::default()
        };
        change(&mut config);
        config.validate().unwrap();
        let (machine, console, outside) = start(&config, resources::open(&config).unwrap());
        let guest = Guest { config, machine, console, _outside: outside, name: kernel.to_owned(), socket, _dir: dir };
        guest.wait_for("its programs run", || guest.call().is_some());
        guest
    }

    /// Saves the machine, ends it, and continues with another one.
    fn restored(self) -> Guest {
        let Guest { config, mut machine, _outside: outside, name, socket, _dir: dir, .. } = self;
        let state = machine.save().unwrap().encode().unwrap();
        let file = tempfile::tempfile().unwrap();
        memory::write_to(machine.memory(), &file, None).unwrap();
        drop((machine, outside));
        let source = Source::Snapshot(SnapshotFiles {
            state,
            memory: file,
            touched: None,
            shares: Vec::new(),
            added_devices: 0,
        });
        let (machine, console, outside) = start(&config, resources::open_for(&config, source).unwrap());
        Guest { config, machine, console, _outside: outside, name, socket, _dir: dir }
    }

    /// Waits for a condition, and returns how long it took.
    #[track_caller]
    fn wait_for(&self, what: &str, happened: impl Fn() -> bool) {
        let started = Instant::now();
        while !happened() {
            assert_eq!(self.machine.exit_latch().reason(), None, "{}: {what}", self.name);
            assert!(
                started.elapsed() < TIMEOUT,
                "{}: {what}: not with {} MiB resident",
                self.name,
                self.resident_mib()
            );
            thread::sleep(Duration::from_millis(100));
        }
        println!(
            "{}: {what}: {:.1} s, {} MiB resident",
            self.name,
            started.elapsed().as_secs_f64(),
            self.resident_mib()
        );
    }

    fn memory_use(&self) -> MemoryUse {
        MemoryUse::of(std::process::id(), &self.machine.memory_ranges()).unwrap()
    }

    /// The resident guest memory on the host.
    fn resident_mib(&self) -> u64 {
        self.memory_use().guest.rss_bytes >> 20
    }

    fn balloon(&self) -> &husk::virtio::balloon::BalloonHandle {
        self.machine.controls().balloon.as_ref().unwrap()
    }

    /// A connection to the program in the guest, if it is running.
    fn call(&self) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        writeln!(stream, "CONNECT {PORT}").unwrap();
        line(&mut stream)?.starts_with("OK ").then_some(stream)
    }

    /// Makes a program in the guest use this much memory for as long as the connection lasts. `None` if the guest
    /// killed it.
    fn take(&self, mib: u64) -> Option<UnixStream> {
        let mut stream = self.call().expect("it serves");
        writeln!(stream, "{mib}").unwrap();
        (line(&mut stream)? == "done\n").then_some(stream)
    }
}

fn start(config: &MachineConfig, opened: (Resources, Outside)) -> (Machine, Arc<Mutex<String>>, Outside) {
    let (resources, outside) = opened;
    let timings = Arc::new(Timings::new(Instant::now()));
    let mut machine = Machine::build(config, resources, timings, || Ok(()), &|| false).unwrap();
    let console = Arc::new(Mutex::new(String::new()));
    let (output, printed) = (machine.console_output().clone(), console.clone());
    thread::spawn(move || {
        while let Some(bytes) = output.take() {
            printed.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes));
        }
    });
    machine.resume();
    (machine, console, outside)
}

/// The next complete line, if there is one.
fn line(stream: &mut UnixStream) -> Option<String> {
    let (mut line, mut byte) = (String::new(), [0]);
    while !line.ends_with('\n') {
        match stream.read(&mut byte) {
            Ok(1) => line.push(byte[0].into()),
            _ => return None,
        }
    }
    Some(line)
}

/// Freed memory that the guest may keep: it reports whole blocks of 2 MiB, and the fragments between them are not
/// returned.
const KEPT_MIB: u64 = TAKEN_MIB / 3;

fn idle_memory_goes_back(kernel: &str) {
    let guests = guests!();
    let guest = Guest::start(&guests, kernel, None);
    let before_mib = guest.resident_mib();
    let taken = guest.take(TAKEN_MIB).expect("there is room");
    let full_mib = guest.resident_mib();
    println!("{kernel}: {before_mib} MiB resident before, {full_mib} MiB while {TAKEN_MIB} MiB are in use");
    assert!(full_mib >= TAKEN_MIB);
    drop(taken);
    guest.wait_for("freed memory went back", || guest.resident_mib() < before_mib + KEPT_MIB);
    // The guest can use it again.
    drop(guest.take(TAKEN_MIB).expect("there is room again"));
    let target_mib = MEMORY_MIB - 64;
    guest.balloon().set_target_mib(target_mib).unwrap();
    guest.wait_for("a little was given up", || guest.balloon().present_mib() == target_mib);
}

#[test]
fn a_guest_has_the_target_amount_of_memory() {
    const LOW_MIB: u64 = 192;
    let guests = guests!();
    // The stock kernel clears each page in its balloon, which takes minutes here.
    let guest = Guest::start(&guests, "micro", Some(LOW_MIB));
    let kept = |what: &str| {
        guest.wait_for(what, || guest.balloon().present_mib() <= LOW_MIB);
        // Its program is killed for lack of memory by the guest.
        assert!(guest.take(TAKEN_MIB).is_none(), "{what}");
        let resident_mib = guest.resident_mib();
        assert!(resident_mib <= LOW_MIB, "{what}: {resident_mib} MiB");
    };
    kept("started with less than it may have");
    guest.balloon().ask_for_statistics();
    guest.wait_for("statistics say so", || {
        let total_bytes = guest.balloon().statistics().and_then(|statistics| statistics.total_bytes);
        total_bytes.is_some_and(|total_bytes| total_bytes <= LOW_MIB << 20)
    });
    guest.balloon().set_target_mib(MEMORY_MIB).unwrap();
    guest.wait_for("the target was raised", || guest.balloon().present_mib() == MEMORY_MIB);
    let taken = guest.take(TAKEN_MIB).expect("there is room");
    assert!(guest.resident_mib() >= TAKEN_MIB);
    drop(taken);
    guest.balloon().set_target_mib(LOW_MIB).unwrap();
    kept("the target was lowered");
}

#[test]
fn memory_freed_by_a_micro_guest_is_returned() {
    idle_memory_goes_back("micro");
}

#[test]
fn memory_freed_by_a_stock_guest_is_returned() {
    idle_memory_goes_back("stock");
}

#[test]
fn a_restored_guest_renews_its_random_numbers_and_returns_memory() {
    let guests = guests!();
    let guest = Guest::start_with(&guests, "micro", |config| config.cmdline = "ignore_loglevel -- memory".into());
    let reseeded = "random: crng reseeded due to virtual machine fork";
    assert!(!guest.console.lock().unwrap().contains(reseeded));
    let guest = guest.restored();
    guest.wait_for("it has other random numbers", || guest.console.lock().unwrap().contains(reseeded));
    let taken = guest.take(TAKEN_MIB).expect("there is room");
    assert!(guest.resident_mib() >= TAKEN_MIB);
    drop(taken);
    guest.wait_for("freed memory went back", || guest.resident_mib() < TAKEN_MIB / 2);
    drop(guest.take(TAKEN_MIB).expect("there is room again"));
}

#[test]
fn a_machine_works_within_its_needed_host_memory() {
    const SMALL_MIB: u64 = 256;
    let guests = guests!();
    if run("id", &["-u"]) != "0\n" {
        eprintln!("SKIPPED: control groups are tested by root");
        return;
    }
    let mut needed_mib = 0;
    let guest = Guest::start_with(&guests, "micro", |config| {
        config.memory_mib = SMALL_MIB;
        needed_mib = config.host_memory_needed_mib();
        config.host_memory_mib = Some(needed_mib);
    });
    // Everything except what the guest's kernel needs; if it kills the program the memory was used nevertheless.
    let taken = guest.take(SMALL_MIB - 40);
    assert!(taken.is_some() && guest.resident_mib() > SMALL_MIB - 40);
    let use_of = guest.memory_use();
    println!("guest {} KiB, husk {} KiB", use_of.guest.rss_bytes >> 10, use_of.husk.rss_bytes >> 10);
    // The limit of this process, in either cgroup version.
    let limit_bytes = needed_mib << 20;
    let groups = run("find", &["/sys/fs/cgroup", "-name", &format!("husk-{}-*", std::process::id())]);
    let limited = groups.lines().any(|group| {
        ["memory.max", "memory.limit_in_bytes"].iter().any(|file| {
            let text = std::fs::read_to_string(Path::new(group).join(file)).unwrap_or_default();
            text.trim() == limit_bytes.to_string()
        })
    });
    assert!(limited, "{groups}");
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}
