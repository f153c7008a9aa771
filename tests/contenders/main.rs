//! All contenders available on this host: they run in the same root, within their limits, and leave nothing behind.

mod containers;
mod killed;
mod machines;
mod ports;
#[path = "../run/uplink.rs"]
mod uplink;

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use husk::bench::contender::{self, Contender, Job, Launch};
use husk::bench::fixture::{self, Fixture};
use husk::bench::report::{Isolation, Limits};
use husk::bench::work_dir::WorkDir;
use husk::image::{Progress, Source, Store};
use tempfile::TempDir;

const MEMORY_MIB: u64 = 96;
const DATA_BYTES: u64 = 3 << 20;
/// Longer than a machine takes to start, even emulated on a busy host.
const TIMEOUT: Duration = Duration::from_secs(180);
/// A duration that no other process here sleeps for.
const LONG: &str = "7654321";

/// A fixture made from an image of busybox.
struct Lab {
    dir: TempDir,
    work_dir: Option<WorkDir>,
    fixture: Fixture,
    _serial: MutexGuard<'static, ()>,
}

fn log(words: &str) {
    // Bypasses the harness, which captures the output of tests.
    let _ = writeln!(std::io::stderr(), "{words}");
}

/// Returns whether this process is not root, which control groups and overlays need; prints a message if so.
fn is_not_root() -> bool {
    let is_root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    if !is_root {
        log("SKIPPED: control groups and overlays are tested by root");
    }
    !is_root
}

/// Returns whether this host cannot run Linux guests; prints a message if so.
fn cannot_run_machines() -> bool {
    let none = husk::resources::host::runs_only_pvm_guests() || husk::resources::open_kvm().is_err();
    if none {
        log("SKIPPED: this machine's KVM runs no Linux guest");
    }
    none
}

/// On a real disk: overlays are not supported everywhere, and the default may be in memory.
fn temp_dir() -> TempDir {
    TempDir::new_in(std::env::var_os("HUSK_TEST_DISK").unwrap_or("/var/tmp".into())).unwrap()
}

fn prepare_lab() -> Lab {
    let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = temp_dir();
    let files = dir.path().join("files");
    fs::create_dir_all(files.join("bin")).unwrap();
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    fs::copy(busybox, files.join("bin/busybox")).unwrap();
    symlink("busybox", files.join("bin/sh")).unwrap();
    // A symbolic link that leads out of the root.
    symlink(dir.path(), files.join("scratch")).unwrap();
    let store = Store::open(&dir.path().join("images")).unwrap();
    let prepared = store.prepare(&Source::Path { path: files, image: None }, Progress::Hidden).unwrap();
    let base = dir.path().join("bench");
    fs::create_dir(&base).unwrap();
    let work_dir = WorkDir::claim(Some(&base)).unwrap();
    let mut image = fixture::find(prepared.root.to_str().unwrap(), None).unwrap().unwrap();
    let limits = Limits { cpus: 0.5, memory_mib: MEMORY_MIB, cpuset: None };
    let mut fixture = fixture::prepare(&work_dir, &mut image, DATA_BYTES, limits).unwrap();
    fixture.husk = std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()).into();
    assert_eq!(image.info.bytes, fs::metadata(busybox).unwrap().len() + "busybox".len() as u64 + link_bytes(&dir));
    Lab { dir, work_dir: Some(work_dir), fixture, _serial: serial }
}

fn link_bytes(dir: &TempDir) -> u64 {
    dir.path().as_os_str().len() as u64
}

/// A job that runs a shell script.
fn job(instance: u32, script: &str) -> Job {
    let command = ["/bin/busybox", "sh", "-c", script].map(str::to_owned).to_vec();
    Job { command, scratch_mib: None, port: None, instance }
}

fn clean_up(launch: &mut Launch) {
    if let Some(clean_up) = launch.clean_up.take() {
        clean_up().unwrap();
    }
}

fn output(launch: &mut Launch) -> (String, Option<i32>) {
    let output = launch.command.stdin(Stdio::null()).output().unwrap();
    let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (printed, output.status.code())
}

fn start(launch: &mut Launch) -> Child {
    launch.command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// Returns the process of an instance that sleeps.
fn sleeper() -> Option<u32> {
    let is_it = |path: &Path| {
        let line = fs::read(path.join("cmdline")).unwrap_or_default();
        let words: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
        words.first().is_some_and(|word| word.ends_with(b"sleep") || word.ends_with(b"busybox"))
            && words.contains(&LONG.as_bytes())
            && !words.contains(&b"-c".as_slice())
    };
    let entries = fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    entries.filter(|path| is_it(path)).find_map(|path| path.file_name()?.to_str()?.parse().ok())
}

fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        match look() {
            Some(found) => return found,
            None if started.elapsed() > TIMEOUT => panic!("timed out waiting for {what}"),
            None => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Returns everything on this host that belongs to the run.
fn leftovers(fixture: &Fixture) -> Vec<String> {
    let id = fixture.dir.file_name().unwrap().to_str().unwrap();
    let mut leftovers = Vec::new();
    let groups =
        Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &format!("{id}*")]).output().unwrap();
    // The engine's parent group is shared by all of its containers.
    let groups = String::from_utf8(groups.stdout).unwrap();
    leftovers.extend(groups.lines().filter(|path| !path.ends_with("-podman")).map(str::to_owned));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    leftovers.extend(mounts.lines().filter(|line| line.contains(&format!("{id}/instances"))).map(str::to_owned));
    let entries = |path: PathBuf| {
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path().display().to_string())
    };
    leftovers.extend(entries("/run/netns".into()).filter(|path| path.contains(id)));
    let interface = format!("/hb{}-", id.rsplit('-').next().unwrap());
    leftovers.extend(entries("/sys/class/net".into()).filter(|path| path.contains(&interface)));
    leftovers.extend(entries(fixture.dir.join("instances")));
    for runtime in ["crun", "runc"] {
        leftovers.extend(entries(fixture.dir.join(runtime)));
    }
    leftovers.extend(sleeper().map(|process| format!("process {process}")));
    leftovers
}

/// Returns the available contenders, with or without a kernel of their own.
fn present(fixture: &Fixture, machines: bool) -> Vec<Box<dyn Contender>> {
    let mut found = Vec::new();
    for contender in contender::find() {
        let info = contender.describe(fixture);
        assert_eq!(info.name, contender.name());
        match info.unavailable {
            Some(unavailable) => log(&format!("SKIPPED: {}: {}", info.name, unavailable.reason)),
            None if (info.isolation == Isolation::Machine) != machines => {}
            None => {
                // Limits must be enforceable for root.
                assert!(!info.notes.iter().any(|note| note.contains("not enforced")), "{:?}", info.notes);
                assert!(info.version.is_some_and(|version| !version.is_empty()), "{}", info.name);
                assert!(!info.command_line.is_empty());
                found.push(contender);
            }
        }
    }
    found
}

/// Tests check the whole host for leftovers, so they run one at a time.
static SERIAL: Mutex<()> = Mutex::new(());
