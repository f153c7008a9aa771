//! Everyone that `husk bench` compares and that this host has: started in one root, held to its limits, and gone without a trace.

#[path = "run/uplink.rs"]
mod uplink;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use husk::bench::contender::{self, Contender, Ground, Job, Launch, Unable};
use husk::bench::ground::{self, Plot};
use husk::bench::result::{Limits, Walls};
use husk::image::{Progress, Source, Store};
use tempfile::TempDir;

const MEMORY_MIB: u64 = 96;
const DATA_BYTES: u64 = 3 << 20;
/// What no other process here waits for.
const LONG: &str = "7654321";

/// A bench's ground, laid from an image of busybox.
struct Lab {
    folder: TempDir,
    plot: Option<Plot>,
    ground: Ground,
    _alone: MutexGuard<'static, ()>,
}

fn say(words: &str) {
    // Written past the harness, which keeps what a test prints.
    let _ = writeln!(std::io::stderr(), "{words}");
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0)
}

/// On a disk that is one: an overlay cannot be on some others, and a test's folder may be in memory.
fn folder() -> TempDir {
    TempDir::new_in(std::env::var_os("HUSK_TEST_DISK").unwrap_or("/var/tmp".into())).unwrap()
}

fn lay() -> Lab {
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let folder = folder();
    let files = folder.path().join("files");
    fs::create_dir_all(files.join("bin")).unwrap();
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists()).unwrap();
    fs::copy(busybox, files.join("bin/busybox")).unwrap();
    symlink("busybox", files.join("bin/sh")).unwrap();
    // What would lead out of the root if it were followed.
    symlink(folder.path(), files.join("scratch")).unwrap();
    let store = Store::open(&folder.path().join("images")).unwrap();
    let prepared = store.prepare(&Source::Path { path: files, image: None }, &Progress::hidden()).unwrap();
    let base = folder.path().join("bench");
    fs::create_dir(&base).unwrap();
    let plot = Plot::claim(Some(&base)).unwrap();
    let mut image = ground::find(prepared.root.to_str().unwrap(), None).unwrap().unwrap();
    let limits = Limits { cpus: 0.5, memory_mib: MEMORY_MIB, cpuset: None };
    let mut ground = ground::lay(&plot, &mut image, DATA_BYTES, limits).unwrap();
    ground.husk = std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()).into();
    assert_eq!(image.about.bytes, fs::metadata(busybox).unwrap().len() + "busybox".len() as u64 + link_bytes(&folder));
    Lab { folder, plot: Some(plot), ground, _alone: alone }
}

fn link_bytes(folder: &TempDir) -> u64 {
    folder.path().as_os_str().len() as u64
}

/// A job that a shell does in the instance.
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
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    (said, output.status.code())
}

fn start(launch: &mut Launch) -> Child {
    launch.command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// The process of an instance that waits for long.
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
            None if started.elapsed() > Duration::from_secs(60) => panic!("waited for {what} in vain"),
            None => thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// The limit of memory that a process is held to.
fn memory_limit(process: u32) -> String {
    let groups = fs::read_to_string(format!("/proc/{process}/cgroup")).unwrap();
    let group = |kind: &str| {
        groups.lines().find_map(|line| line.split(':').nth(1).filter(|name| *name == kind).and(line.split(':').nth(2)))
    };
    let file = match group("memory") {
        Some(path) => format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"),
        None => format!("/sys/fs/cgroup{}/memory.max", group("").unwrap()),
    };
    fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}")).trim().to_owned()
}

/// What is on this host that has the bench's name.
fn traces(ground: &Ground) -> Vec<String> {
    let id = ground.folder.file_name().unwrap().to_str().unwrap();
    let mut traces = Vec::new();
    let groups =
        Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &format!("{id}*")]).output().unwrap();
    // An engine's own group is that of all of its containers.
    let groups = String::from_utf8(groups.stdout).unwrap();
    traces.extend(groups.lines().filter(|path| !path.ends_with("-podman")).map(str::to_owned));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    traces.extend(mounts.lines().filter(|line| line.contains(&format!("{id}/instances"))).map(str::to_owned));
    let entries = |path: PathBuf| {
        fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path().display().to_string())
    };
    traces.extend(entries("/run/netns".into()).filter(|path| path.contains(id)));
    traces.extend(entries(ground.folder.join("instances")));
    for runtime in ["crun", "runc"] {
        traces.extend(entries(ground.folder.join(runtime)));
    }
    traces.extend(sleeper().map(|process| format!("process {process}")));
    traces
}

/// Those that are here, with a kernel of their own or without.
fn present(ground: &Ground, machines: bool) -> Vec<Box<dyn Contender>> {
    let mut found = Vec::new();
    for contender in contender::find() {
        let about = contender.about(ground);
        assert_eq!(about.name, contender.name());
        match about.absent {
            Some(absent) => say(&format!("SKIPPED: {}: {}", about.name, absent.why)),
            None if (about.walls == Walls::Machine) != machines => {}
            None => {
                // For root there is always a way.
                assert!(!about.notes.iter().any(|note| note.contains("not applied")), "{:?}", about.notes);
                assert!(about.version.is_some_and(|version| !version.is_empty()), "{}", about.name);
                assert!(!about.command_line.is_empty());
                found.push(contender);
            }
        }
    }
    found
}

#[test]
fn everyone_here_runs_the_same_within_limits_and_leaves_nothing() {
    if !is_root() {
        say("SKIPPED: control groups and overlays are tested by root");
        return;
    }
    let mut lab = lay();
    let ground = &lab.ground;
    assert!(!fs::symlink_metadata(ground.root.join("scratch")).unwrap().is_symlink());
    assert_eq!(fs::metadata(ground.root.join(".husk-bench/data")).unwrap().len(), DATA_BYTES);
    for mut contender in present(ground, false) {
        let name = contender.name().to_owned();
        say(&name);
        contender.prepare(ground).unwrap();
        runs_in_the_root(&*contender, ground);
        forgets_changes(&*contender, ground);
        is_held(&*contender, ground);
        leaves_nothing_when_killed(&*contender, ground);
        contender.clean_up(ground).unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounted: Vec<_> = mounts.lines().filter(|line| line.contains(ground.folder.to_str().unwrap())).collect();
        assert!(mounted.is_empty(), "{name} left {mounted:?}");
    }
    let folder = lab.ground.folder.clone();
    lab.plot.take();
    assert!(!folder.exists());
    let id = folder.file_name().unwrap().to_str().unwrap();
    let left = Command::new("find")
        .args(["/sys/fs/cgroup", "/run", "-maxdepth", "2", "-name", &format!("{id}*")])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(left.stdout).unwrap(), "");
    drop(lab.folder);
}

fn runs_in_the_root(contender: &dyn Contender, ground: &Ground) {
    let name = contender.name();
    let script = "echo work: ready; cd /.husk-bench; busybox=/bin/busybox; $busybox ls; $busybox id -u; $busybox pwd; \
                  $busybox test -r /proc/self/status && echo proc; $busybox env; exit 7";
    let mut launch = contender.launch(ground, &job(1, script)).unwrap();
    let (said, code) = output(&mut launch);
    clean_up(&mut launch);
    assert_eq!(code, Some(7), "{name}: {said}");
    for line in ["work: ready", "data", "work", "0", "proc", "HOME=/root"] {
        assert!(said.lines().any(|said| said == line), "{name} did not say {line}: {said}");
    }
    assert_eq!(traces(ground), Vec::<String>::new(), "{name}");
}

fn forgets_changes(contender: &dyn Contender, ground: &Ground) {
    let name = contender.name();
    let script = "echo x > /changed && /bin/busybox sync && echo y > /scratch/file && echo done";
    let mut launch = contender.launch(ground, &Job { scratch_mib: Some(64), ..job(2, script) }).unwrap();
    let (said, code) = output(&mut launch);
    clean_up(&mut launch);
    assert_eq!((said.trim(), code), ("done", Some(0)), "{name}");
    assert!(!ground.root.join("changed").exists(), "{name}");
    assert!(!ground.root.join("scratch/file").exists(), "{name}");
    assert_eq!(traces(ground), Vec::<String>::new(), "{name}");
}

fn is_held(contender: &dyn Contender, ground: &Ground) {
    let name = contender.name();
    let mut launch = contender.launch(ground, &job(3, &format!("exec /bin/busybox sleep {LONG}"))).unwrap();
    let mut child = start(&mut launch);
    let process = wait_for("the process", sleeper);
    let limit = memory_limit(process);
    assert_eq!(limit, (MEMORY_MIB << 20).to_string(), "{name}");
    let more = contender.more_processes(ground, &job(3, ""));
    if name == "podman" || name == "docker" {
        assert!(more.contains(&process) && more.len() == 2, "{name}: {more:?} of {process}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    clean_up(&mut launch);
    assert_eq!(traces(ground), Vec::<String>::new(), "{name}");
}

/// Of which killing the front process is only the beginning.
fn leaves_nothing_when_killed(contender: &dyn Contender, ground: &Ground) {
    let name = contender.name();
    for instance in 4..6 {
        let mut launch =
            contender.launch(ground, &job(instance, &format!("/bin/busybox sleep {LONG} & wait"))).unwrap();
        let mut child = start(&mut launch);
        wait_for("the process", sleeper);
        child.kill().unwrap();
        child.wait().unwrap();
        clean_up(&mut launch);
        wait_for(&format!("{name}'s end"), || traces(ground).is_empty().then_some(()));
    }
}

#[test]
fn machines_run_the_same_and_leave_nothing() {
    if husk::resources::host::runs_only_pvm_guests() || husk::resources::open_kvm().is_err() {
        say("SKIPPED: this machine's KVM runs no Linux guest");
        return;
    }
    let lab = lay();
    let ground = &lab.ground;
    for mut contender in present(ground, true) {
        let name = contender.name().to_owned();
        contender.prepare(ground).unwrap();
        let script = "echo work: ready; cd /.husk-bench; /bin/busybox ls -1; /bin/busybox id -u; exit 7";
        let (said, code) = machine(&*contender, ground, &job(1, script));
        assert_eq!(code, Some(7), "{name}: {said}");
        for line in ["work: ready", "data", "work", "0"] {
            assert!(said.lines().any(|said| said.trim() == line), "{name} did not say {line}: {said}");
        }
        let script = "/bin/busybox df /scratch; echo x > /scratch/x && echo done; /bin/busybox free -m";
        let (said, code) = machine(&*contender, ground, &Job { scratch_mib: Some(64), ..job(2, script) });
        assert!(said.lines().any(|said| said.trim() == "done") && code == Some(0), "{name}: {code:?} {said}");
        let mut launch = contender.launch(ground, &job(3, &format!("/bin/busybox sleep {LONG}"))).unwrap();
        let mut child = start(&mut launch);
        thread::sleep(Duration::from_secs(2));
        child.kill().unwrap();
        child.wait().unwrap();
        clean_up(&mut launch);
        assert_eq!(traces(ground), Vec::<String>::new(), "{name}");
        contender.clean_up(ground).unwrap();
    }
    let disks = fs::read_dir(ground.store.join("disks")).unwrap().count();
    assert_eq!(disks, 0);
}

/// What a machine says, and the exit code of its command, whichever way it comes.
fn machine(contender: &dyn Contender, ground: &Ground, job: &Job) -> (String, Option<i32>) {
    let mut launch = contender.launch(ground, job).unwrap();
    let started = Instant::now();
    let (said, code) = output(&mut launch);
    say(&format!("{}: {:.1} s", contender.name(), started.elapsed().as_secs_f64()));
    clean_up(&mut launch);
    assert_eq!(traces(ground), Vec::<String>::new(), "{}", contender.name());
    let told = said.lines().find_map(|line| line.trim().strip_prefix("work: exit ")?.parse().ok());
    (said, if launch.passes_exit_code { code } else { told })
}

#[test]
fn what_listens_in_a_container_is_reached() {
    if !is_root() {
        say("SKIPPED: control groups and overlays are tested by root");
        return;
    }
    let lab = lay();
    for mut contender in present(&lab.ground, false) {
        contender.prepare(&lab.ground).unwrap();
        is_reached(&*contender, &lab.ground);
        contender.clean_up(&lab.ground).unwrap();
    }
}

#[test]
fn what_listens_in_a_machine_is_reached() {
    if husk::resources::host::runs_only_pvm_guests() || husk::resources::open_kvm().is_err() {
        say("SKIPPED: this machine's KVM runs no Linux guest");
        return;
    }
    if uplink::host().is_none() {
        return;
    }
    let lab = lay();
    for contender in present(&lab.ground, true) {
        is_reached(&*contender, &lab.ground);
    }
}

fn is_reached(contender: &dyn Contender, ground: &Ground) {
    let name = contender.name();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let command = ["/.husk-bench/work", "serve", &port.to_string()].map(str::to_owned).to_vec();
    let job = Job { command, scratch_mib: None, port: Some(port), instance: 9 };
    let mut launch = match contender.launch(ground, &job) {
        Err(error) if error.is::<Unable>() => return say(&format!("SKIPPED: {name}: {error}")),
        launch => launch.unwrap(),
    };
    let address = launch.address.unwrap();
    let mut child = start(&mut launch);
    // The bench's own server echoes what follows an `e`. A way that leads on takes connections before there is anybody.
    let echoes = || {
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(1)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"ex").ok()?;
        let mut byte = [0];
        stream.read_exact(&mut byte).ok().filter(|()| byte == *b"x")
    };
    wait_for(&format!("{name}'s port"), || {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{name}: {ended:?}");
        echoes()
    });
    say(&format!("{name} is reached at {address}"));
    child.kill().unwrap();
    child.wait().unwrap();
    clean_up(&mut launch);
    assert_eq!(traces(ground), Vec::<String>::new(), "{name}");
}

/// What Docker keeps for its containers, with a name or without; nothing where it does not answer.
fn images() -> String {
    let list = Command::new("docker").args(["images", "--all", "--quiet"]).output();
    list.map_or(String::new(), |list| String::from_utf8(list.stdout).unwrap())
}

const VICTIM: &str = "HUSK_TEST_VICTIM";

/// Starts all containers, and waits to be killed.
fn be_killed() {
    let lab = lay();
    let mut launches = Vec::new();
    for mut contender in present(&lab.ground, false) {
        contender.prepare(&lab.ground).unwrap();
        let mut launch = contender.launch(&lab.ground, &job(1, &format!("/bin/busybox sleep {LONG}"))).unwrap();
        launches.push((start(&mut launch), launch));
    }
    wait_for("the processes", sleeper);
    thread::sleep(Duration::from_secs(2));
    // On one processor the harness has begun a line.
    println!("\nfolder: {}", lab.ground.folder.display());
    thread::sleep(Duration::from_secs(600));
}

#[test]
fn what_a_killed_bench_leaves_is_cleared_by_the_next() {
    const NAME: &str = "what_a_killed_bench_leaves_is_cleared_by_the_next";
    if !is_root() {
        say("SKIPPED: control groups and overlays are tested by root");
        return;
    }
    if std::env::var_os(VICTIM).is_some() {
        return be_killed();
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let before = images();
    let mut victim = Command::new(std::env::current_exe().unwrap());
    victim.args(["--exact", NAME, "--nocapture"]).env(VICTIM, "1").stdout(Stdio::piped());
    let mut victim = victim.spawn().unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    let folder = lines.find_map(|line| Some(PathBuf::from(line.strip_prefix("folder: ")?))).unwrap();
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert!(sleeper().is_some() && folder.exists());
    let base = folder.parent().unwrap();
    let plot = Plot::claim(Some(base)).unwrap();
    assert_eq!(fs::read_dir(base).unwrap().count(), 1, "only the new one is there");
    assert!(plot.folder != folder && plot.folder.exists());
    // Those of an engine end when it has seen that they are to.
    wait_for("the end of what was left", || sleeper().is_none().then_some(()));
    let id = folder.file_name().unwrap().to_str().unwrap();
    let places = ["/sys/fs/cgroup", "/run", "-maxdepth", "2", "-name", &format!("{id}*")];
    assert_eq!(String::from_utf8(Command::new("find").args(places).output().unwrap().stdout).unwrap(), "");
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(id));
    assert_eq!(images(), before);
    drop(plot);
    fs::remove_dir_all(base.parent().unwrap()).unwrap();
}

/// Tests look for what is left on the whole host, so that they run one by one.
static ALONE: Mutex<()> = Mutex::new(());
