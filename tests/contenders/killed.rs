//! Leftovers of a killed run, removed by the next one.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::PoisonError;
use std::thread;
use std::time::Duration;

use husk::bench::work_dir::WorkDir;

use crate::{LONG, SERIAL, is_not_root, job, prepare_lab, present, sleeper, start, wait_for};

/// Lists Docker's images, tagged or not; empty if the daemon does not answer.
fn images() -> String {
    let list = Command::new("docker").args(["images", "--all", "--quiet"]).output();
    list.map_or(String::new(), |list| String::from_utf8(list.stdout).unwrap())
}

const VICTIM: &str = "HUSK_TEST_VICTIM";

/// Starts all containers and waits to be killed.
fn run_victim() {
    let lab = prepare_lab();
    let mut launches = Vec::new();
    for mut contender in present(&lab.fixture, false) {
        contender.prepare(&lab.fixture).unwrap();
        let mut launch = contender.launch(&lab.fixture, &job(1, &format!("/bin/busybox sleep {LONG}"))).unwrap();
        launches.push((start(&mut launch), launch));
    }
    wait_for("the processes", sleeper);
    thread::sleep(Duration::from_secs(2));
    // With a single test thread, the harness has started a line.
    println!("\ndirectory: {}", lab.fixture.dir.display());
    thread::sleep(Duration::from_secs(600));
}

#[test]
fn leftovers_of_a_killed_bench_are_removed_by_the_next() {
    const NAME: &str = "killed::leftovers_of_a_killed_bench_are_removed_by_the_next";
    if is_not_root() {
        return;
    }
    if std::env::var_os(VICTIM).is_some() {
        return run_victim();
    }
    let _serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
    let before = images();
    let mut victim = Command::new(std::env::current_exe().unwrap());
    victim.args(["--exact", NAME, "--nocapture"]).env(VICTIM, "1").stdout(Stdio::piped());
    let mut victim = victim.spawn().unwrap();
    let mut lines = BufReader::new(victim.stdout.take().unwrap()).lines().map_while(Result::ok);
    let dir = lines.find_map(|line| Some(PathBuf::from(line.strip_prefix("directory: ")?))).unwrap();
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert!(sleeper().is_some() && dir.exists());
    let base = dir.parent().unwrap();
    let work_dir = WorkDir::claim(Some(base)).unwrap();
    assert_eq!(fs::read_dir(base).unwrap().count(), 1, "only the new one is there");
    assert!(work_dir.dir != dir && work_dir.dir.exists());
    // Engines stop containers asynchronously.
    wait_for("the end of what was left", || sleeper().is_none().then_some(()));
    let id = dir.file_name().unwrap().to_str().unwrap();
    let places = ["/sys/fs/cgroup", "/run", "-maxdepth", "2", "-name", &format!("{id}*")];
    assert_eq!(String::from_utf8(Command::new("find").args(places).output().unwrap().stdout).unwrap(), "");
    assert!(!fs::read_to_string("/proc/self/mountinfo").unwrap().contains(id));
    assert_eq!(images(), before);
    drop(work_dir);
    fs::remove_dir_all(base.parent().unwrap()).unwrap();
}
