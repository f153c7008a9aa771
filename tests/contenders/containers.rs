//! Contenders without a kernel of their own: same root, same limits.

use std::fs;
use std::process::Command;

use husk::bench::contender::{Contender, Job};
use husk::bench::fixture::Fixture;

use crate::{
    DATA_BYTES, LONG, MEMORY_MIB, clean_up, is_not_root, job, leftovers, log, output, prepare_lab, present, sleeper,
    start, wait_for,
};

#[test]
fn containers_run_the_workload_within_limits_and_leave_nothing_behind() {
    if is_not_root() {
        return;
    }
    let mut lab = prepare_lab();
    let fixture = &lab.fixture;
    assert!(!fs::symlink_metadata(fixture.root.join("scratch")).unwrap().is_symlink());
    assert_eq!(fs::metadata(fixture.root.join(".husk-bench/data")).unwrap().len(), DATA_BYTES);
    for mut contender in present(fixture, false) {
        let name = contender.name().to_owned();
        log(&name);
        contender.prepare(fixture).unwrap();
        runs_in_the_root(&*contender, fixture);
        forgets_changes(&*contender, fixture);
        enforces_limits(&*contender, fixture);
        leaves_nothing_when_killed(&*contender, fixture);
        contender.clean_up(fixture).unwrap();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounted: Vec<_> = mounts.lines().filter(|line| line.contains(fixture.dir.to_str().unwrap())).collect();
        assert!(mounted.is_empty(), "{name} left {mounted:?}");
    }
    let dir = lab.fixture.dir.clone();
    lab.work_dir.take();
    assert!(!dir.exists());
    let id = dir.file_name().unwrap().to_str().unwrap();
    let left = Command::new("find")
        .args(["/sys/fs/cgroup", "/run", "-maxdepth", "2", "-name", &format!("{id}*")])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(left.stdout).unwrap(), "");
    drop(lab.dir);
}

fn runs_in_the_root(contender: &dyn Contender, fixture: &Fixture) {
    let name = contender.name();
    let script = "echo work: ready; cd /.husk-bench; busybox=/bin/busybox; $busybox ls; $busybox id -u; $busybox pwd; \
                  $busybox test -r /proc/self/status && echo proc; $busybox env; exit 7";
    let mut launch = contender.launch(fixture, &job(1, script)).unwrap();
    let (printed, code) = output(&mut launch);
    clean_up(&mut launch);
    assert_eq!(code, Some(7), "{name}: {printed}");
    for line in ["work: ready", "data", "work", "0", "proc", "HOME=/root"] {
        assert!(printed.lines().any(|printed| printed == line), "{name} did not log {line}: {printed}");
    }
    assert_eq!(leftovers(fixture), Vec::<String>::new(), "{name}");
}

fn forgets_changes(contender: &dyn Contender, fixture: &Fixture) {
    let name = contender.name();
    let script = "echo x > /changed && /bin/busybox sync && echo y > /scratch/file && echo done";
    let mut launch = contender.launch(fixture, &Job { scratch_mib: Some(64), ..job(2, script) }).unwrap();
    let (printed, code) = output(&mut launch);
    clean_up(&mut launch);
    assert_eq!((printed.trim(), code), ("done", Some(0)), "{name}");
    assert!(!fixture.root.join("changed").exists(), "{name}");
    assert!(!fixture.root.join("scratch/file").exists(), "{name}");
    assert_eq!(leftovers(fixture), Vec::<String>::new(), "{name}");
}

fn enforces_limits(contender: &dyn Contender, fixture: &Fixture) {
    let name = contender.name();
    let mut launch = contender.launch(fixture, &job(3, &format!("exec /bin/busybox sleep {LONG}"))).unwrap();
    let mut child = start(&mut launch);
    let process = wait_for("the process", sleeper);
    let limit = memory_limit(process);
    assert_eq!(limit, (MEMORY_MIB << 20).to_string(), "{name}");
    let more = contender.extra_processes(fixture, &job(3, ""));
    if name == "podman" || name == "docker" {
        assert!(more.contains(&process) && more.len() == 2, "{name}: {more:?} of {process}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    clean_up(&mut launch);
    assert_eq!(leftovers(fixture), Vec::<String>::new(), "{name}");
}

/// Killing the process in the foreground must not leave the rest of the instance behind.
fn leaves_nothing_when_killed(contender: &dyn Contender, fixture: &Fixture) {
    let name = contender.name();
    for instance in 4..6 {
        let mut launch =
            contender.launch(fixture, &job(instance, &format!("/bin/busybox sleep {LONG} & wait"))).unwrap();
        let mut child = start(&mut launch);
        wait_for("the process", sleeper);
        child.kill().unwrap();
        child.wait().unwrap();
        clean_up(&mut launch);
        wait_for(&format!("{name}'s end"), || leftovers(fixture).is_empty().then_some(()));
    }
}

/// Returns the memory limit of a process.
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
