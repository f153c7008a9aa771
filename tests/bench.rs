//! `husk bench` end to end: results, output files, error messages, and cleanup. A complete quick run with machines
//! needs a KVM that runs any kernel, on the host or in the lab.

use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use husk::bench::compare;
use husk::bench::report::Report;
use husk::bench::scenario::Scenario;
use tempfile::TempDir;

/// A temporary directory with an image, for one run.
struct Bench {
    dir: TempDir,
}

impl Bench {
    /// On a real disk: overlays and direct I/O are not supported everywhere.
    fn new() -> Bench {
        let dir = TempDir::new_in(std::env::var_os("HUSK_TEST_DISK").unwrap_or("/var/tmp".into())).unwrap();
        let root = dir.path().join("image/bin");
        fs::create_dir_all(&root).unwrap();
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
        fs::copy(busybox.expect("busybox-static is installed"), root.join("busybox")).unwrap();
        symlink("busybox", root.join("sh")).unwrap();
        Bench { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn image(&self) -> String {
        self.path("image").to_str().unwrap().to_owned()
    }

    fn husk(&self, words: &[&str]) -> Command {
        let mut command = Command::new(std::env::var_os("HUSK").unwrap_or(env!("CARGO_BIN_EXE_husk").into()));
        command.current_dir(self.dir.path()).env("HUSK_DATA", self.path("store"));
        command.arg("bench").args(words).stdin(Stdio::null());
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.husk(words).output().unwrap()
    }

    fn report(&self, name: &str) -> Report {
        compare::parse(&fs::read_to_string(self.path(name)).unwrap()).unwrap()
    }

    /// Checks that no directories and mounts are left behind.
    fn expect_nothing_left(&self) {
        let left: Vec<_> = fs::read_dir(self.path("store/bench")).unwrap().flatten().collect();
        assert!(left.is_empty(), "{left:?}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.dir.path().to_str().unwrap()), "{mounts}");
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Returns an available container runtime, or `None` with a message.
fn container(bench: &Bench, test: &str) -> Option<&'static str> {
    let is_root = fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    let listed = text(&bench.run(&["--list"]).stdout);
    let is_present = |name: &&str| listed.contains(&format!("available    {name}: "));
    let found = ["crun", "runc", "bwrap"].into_iter().find(is_present).filter(|_| is_root);
    if found.is_none() {
        eprintln!("SKIPPED: {test} wants root, and one of crun, runc and bwrap");
    }
    found
}

/// Returns the exit code and the single line on standard error of a run that is refused.
fn refused(words: &[&str]) -> (i32, String) {
    let output = Bench::new().run(words);
    let errors = text(&output.stderr);
    assert_eq!(errors.lines().count(), 1, "{errors}");
    (output.status.code().unwrap(), errors.trim_end().to_owned())
}

#[test]
fn errors_are_one_line() {
    assert_eq!(refused(&[]).0, 2);
    assert_eq!(refused(&["--precision", "0", "image"]).0, 2);
    assert_eq!(refused(&["--scenario", "dance", "image"]).0, 2);
    assert_eq!(refused(&["--runs", "0", "image"]).0, 2);
    let (code, printed) = refused(&["--against", "crum", "image"]);
    assert_eq!(code, 2);
    assert!(printed.contains("unknown contender \"crum\": type one of host, bwrap, crun"), "{printed}");
    let (code, printed) = refused(&["--from", "/nowhere.json"]);
    assert_eq!((code, printed.as_str()), (1, "husk: read /nowhere.json: No such file or directory"));
    let (code, printed) = refused(&["--from", "/proc/self/status"]);
    assert_eq!(code, 1);
    assert!(printed.contains("not a report of husk bench"), "{printed}");
    let (code, printed) = refused(&["/nowhere.tar"]);
    assert_eq!(code, 1);
    assert!(printed.contains("/nowhere.tar"), "{printed}");
    let (code, printed) = refused(&["--scenario", "command", "image"]);
    assert_eq!(code, 2);
    assert!(printed.contains("type it after the image and --"), "{printed}");
}

#[test]
fn contenders_are_listed_with_installation_instructions() {
    let bench = Bench::new();
    let output = bench.husk(&["--list"]).env("PATH", "/nowhere").output().unwrap();
    let printed = text(&output.stdout);
    assert!(output.status.success(), "{}", text(&output.stderr));
    for name in ["bwrap", "crun", "runc", "podman", "docker", "qemu-microvm", "firecracker", "cloud-hypervisor"] {
        assert!(printed.contains(&format!("unavailable  {name}: ")), "{name}: {printed}");
    }
    assert!(printed.contains("sudo apt-get install crun"), "{printed}");
}

#[test]
fn a_command_is_measured_compared_and_shown_again() {
    let bench = Bench::new();
    let Some(container) = container(&bench, "a_command_is_measured_compared_and_shown_again") else { return };
    let (image, contenders) = (bench.image(), format!("host,{container}"));
    let words = [
        "--quick",
        "--runs",
        "2",
        "--contenders",
        &contenders,
        "--output",
        "first",
        &image,
        "--",
        "/bin/sh",
        "-c",
        "exit 0",
    ];
    let output = bench.run(&words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("Command, from start to exit"), "{}", text(&output.stdout));
    let report = bench.report("first.json");
    let [metric] = &*report.metrics else { panic!("{:?}", report.metrics) };
    assert_eq!((metric.scenario, report.method.baseline.as_str()), (Scenario::Command, container));
    for outcome in &metric.results {
        assert!(outcome.samples.iter().all(|sample| sample.is_some_and(|sample| sample > 0.0)), "{outcome:?}");
    }
    let page = fs::read_to_string(bench.path("first.html")).unwrap();
    assert!(page.contains("Command, from start to exit"));
    bench.expect_nothing_left();

    let again = bench.run(&["--from", "first.json", "--compare", "first.json"]);
    let printed = text(&again.stdout);
    assert!(again.status.success() && printed.contains("0 regressions"), "{printed}{}", text(&again.stderr));
}

#[test]
fn a_failing_command_is_not_a_fast_run() {
    let bench = Bench::new();
    let Some(container) = container(&bench, "a_failing_command_is_not_a_fast_run") else { return };
    let (image, contenders) = (bench.image(), format!("host,{container}"));
    let words =
        ["--runs", "2", "--contenders", &contenders, "--output", "failed", &image, "--", "/bin/sh", "-c", "exit 3"];
    let output = bench.run(&words);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    let report = bench.report("failed.json");
    for outcome in &report.metrics[0].results {
        assert!(outcome.samples.iter().all(Option::is_none), "{outcome:?}");
        assert!(outcome.failures[0].contains("exit code 3 instead of 0"), "{outcome:?}");
    }
    assert!(report.verdict[0].contains("failed in"), "{:?}", report.verdict);
    bench.expect_nothing_left();
}

#[test]
fn an_interrupted_bench_leaves_nothing_behind() {
    let bench = Bench::new();
    let Some(container) = container(&bench, "an_interrupted_bench_leaves_nothing_behind") else { return };
    let (image, contenders) = (bench.image(), format!("host,{container}"));
    // No other process here sleeps for so long.
    const LONG: &str = "7654327";
    let words = ["--runs", "1", "--contenders", &contenders, &image, "--", "/bin/busybox", "sleep", LONG];
    let mut child = bench.husk(&words).stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for("an instance", || sleeps(LONG));
    Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let status = wait_with_errors(&mut child);
    assert!(status.1.contains("interrupted by signal 2"), "{}", status.1);
    assert_eq!(status.0, Some(1));
    assert!(!sleeps(LONG));
    bench.expect_nothing_left();
}

fn wait_with_errors(child: &mut Child) -> (Option<i32>, String) {
    let mut errors = String::new();
    std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut errors).unwrap();
    (child.wait().unwrap().code(), errors)
}

/// Whether a process other than the benchmark's has this argument.
fn sleeps(word: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let lines = processes.filter_map(|process| fs::read(process.path().join("cmdline")).ok());
    lines.into_iter().any(|line| {
        text(&line).split('\0').collect::<Vec<_>>().windows(2).any(|pair| pair == ["sleep", word])
            && !text(&line).contains("bench")
    })
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(60), "waited for {what} in vain");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_insufficient_budget_counts_no_instances() {
    let bench = Bench::new();
    let image = bench.image();
    let words =
        ["--quick", "--runs", "1", "--scenario", "density", "--contenders", "host", "--output", "density", &image];
    let output = bench.run(&words);
    assert!(output.status.success(), "{}", text(&output.stderr));
    let report = bench.report("density.json");
    let [instances, starts] = &*report.metrics else { panic!("{:?}", report.metrics) };
    assert!(instances.results[0].skipped.as_ref().unwrap().contains("10 instances"), "{instances:?}");
    assert!(instances.results[0].samples.is_empty() && starts.results[0].samples[0].is_some(), "{report:?}");
    bench.expect_nothing_left();
}

#[test]
fn unlimited_contenders_skip_the_out_of_memory_test() {
    let bench = Bench::new();
    let test = "unlimited_contenders_skip_the_out_of_memory_test";
    // Without root, runc cannot enforce limits.
    if container(&bench, test).is_none() || !text(&bench.run(&["--list"]).stdout).contains("present  runc: ") {
        return eprintln!("SKIPPED: {test} wants root, and runc");
    }
    let image = bench.image();
    let husk = bench.husk(&[]).get_program().to_owned();
    fs::copy(husk, bench.path("husk")).unwrap();
    let chown = Command::new("chown").args(["-R", "65534:65534"]).arg(bench.dir.path()).status().unwrap();
    assert!(chown.success());
    let words =
        ["--quick", "--runs", "1", "--scenario", "isolation", "--contenders", "runc", "--output", "held", &image];
    let mut husk = Command::new(bench.path("husk"));
    husk.current_dir(bench.dir.path())
        .env("HUSK_DATA", bench.path("store"))
        .env("HOME", bench.dir.path())
        .env("TMPDIR", bench.dir.path());
    let output = husk.arg("bench").args(words).stdin(Stdio::null()).uid(65534).gid(65534).output().unwrap();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    let report = bench.report("held.json");
    let memory = report.metrics.iter().find(|metric| metric.name == "isolation-memory").unwrap();
    assert!(memory.results[0].skipped.as_ref().unwrap().contains("are not enforced"), "{memory:?}");
    bench.expect_nothing_left();
}

/// Whether this host can run ordinary kernels.
fn runs_machines(bench: &Bench) -> bool {
    let mut husk = Command::new(bench.husk(&[]).get_program());
    husk.arg("doctor").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[test]
fn a_whole_quick_run_measures_machines_and_containers() {
    let bench = Bench::new();
    if !runs_machines(&bench) {
        eprintln!("SKIPPED: a_whole_quick_run_measures_machines_and_containers wants a KVM that runs any kernel");
        return;
    }
    // Of containers, one: the test of contenders runs the others, too.
    let contenders = ["crun", "qemu-microvm", "husk"];
    let image = bench.image();
    // On an emulated host, every start of a machine takes seconds.
    let words = [
        "--quick",
        "--runs",
        "1",
        "--memory",
        "256M",
        "--contenders",
        &contenders.join(","),
        "--output",
        "quick",
        &image,
    ];
    let output = bench.run(&words);
    let printed = format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{printed}");
    let report = bench.report("quick.json");
    assert!(report.contenders.iter().all(|contender| contender.unavailable.is_none()), "{:?}", report.contenders);
    for metric in &report.metrics {
        let names: Vec<&str> = metric.results.iter().map(|outcome| outcome.contender.as_str()).collect();
        assert_eq!(names, contenders, "{}", metric.name);
        for outcome in &metric.results {
            assert_eq!((outcome.samples.len(), &outcome.skipped), (1, &None), "{}: {outcome:?}", metric.name);
            assert!(outcome.samples[0].is_some(), "{}: {outcome:?}", metric.name);
        }
    }
    let scenarios: Vec<Scenario> = report.metrics.iter().map(|metric| metric.scenario).collect();
    for scenario in [Scenario::Start, Scenario::Memory, Scenario::Cpu, Scenario::ContextSwitch, Scenario::Disk] {
        assert!(scenarios.contains(&scenario), "{scenario:?}");
    }
    bench.expect_nothing_left();
    // For validation against the published schema.
    if let Some(copy) = std::env::var_os("HUSK_TEST_BENCH_REPORT") {
        fs::copy(bench.path("quick.json"), copy).unwrap();
    }
}
