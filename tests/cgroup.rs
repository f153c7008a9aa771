//! Changes the cgroup limits of a running process: this one. The test has a program of its own, since the limits apply
//! to the whole process.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use husk::sandbox::cgroup::{CgroupLimits, ResourceLimits};

/// The CPU usage of this process during the next seconds, while its threads spin.
fn share() -> f64 {
    let (started, before) = (Instant::now(), cpu_time());
    thread::sleep(Duration::from_secs(3));
    (cpu_time() - before).as_secs_f64() / started.elapsed().as_secs_f64()
}

fn cpu_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    // proc(5): the fields after the name in parentheses start with the third; utime is the 14th, stime the 15th.
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    Duration::from_millis((fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()) * 10)
}

/// Measures several times whether the usage is within a tenth of `wanted`: a busy host may temporarily provide less.
#[track_caller]
fn comes_within_a_tenth_of(wanted: f64) {
    let shares: Vec<f64> = (0..5).map(|_| share()).collect();
    println!("{shares:.3?}, wanted {wanted}");
    assert!(shares.iter().any(|share| (0.9..1.1).contains(&(share / wanted))), "{shares:?}, wanted {wanted}");
    assert!(shares.iter().all(|share| *share < wanted * 1.1), "{shares:?}, wanted {wanted}");
}

fn groups() -> Vec<PathBuf> {
    let name = format!("husk-{}-*", std::process::id());
    let output = Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &name]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(PathBuf::from).collect()
}

/// The content of whichever of these files exists in a cgroup.
fn says(group: &Path, files: [&str; 2]) -> String {
    let text = files.iter().find_map(|file| fs::read_to_string(group.join(file)).ok());
    text.unwrap_or_else(|| panic!("{} has none of {files:?}", group.display())).trim().to_owned()
}

#[test]
fn limits_change_at_run_time_and_are_removed_with_the_cgroup() {
    if Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout != b"0\n") {
        // Bypasses the test harness, which captures output.
        let _ = writeln!(std::io::stderr(), "SKIPPED: limits of processor time are tested by root");
        return;
    }
    let ended = AtomicBool::new(false);
    thread::scope(|scope| {
        let spin = || {
            while !ended.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        };
        scope.spawn(spin);
        scope.spawn(spin);
        let result = std::panic::catch_unwind(change_limits);
        ended.store(true, Ordering::Relaxed);
        result.unwrap();
    });
    assert_eq!(groups(), [""; 0].map(PathBuf::from), "they are removed with it");
}

fn change_limits() {
    let mut cgroup = CgroupLimits::new(&ResourceLimits::default()).unwrap();
    assert!(groups().is_empty(), "nothing was asked for");
    // More shares than other processes, so that the limit is decisive even on a busy host.
    cgroup.set_cpu(Some(500), Some(262_144)).unwrap();
    comes_within_a_tenth_of(0.5);
    cgroup.set_cpu(Some(250), Some(262_144)).unwrap();
    comes_within_a_tenth_of(0.25);
    let all = groups();
    let [group] = &*all else { panic!("one group does for both: {all:?}") };
    assert!(["262144", "10000"].contains(&&*says(group, ["cpu.shares", "cpu.weight"])));
    cgroup.set_cpu(None, Some(512)).unwrap();
    assert!(["-1", "max 100000"].contains(&&*says(group, ["cpu.cfs_quota_us", "cpu.max"])));
    assert!(["512", "50"].contains(&&*says(group, ["cpu.shares", "cpu.weight"])));
    cgroup.set_cpu(None, None).unwrap();
    assert!(["1024", "100"].contains(&&*says(group, ["cpu.shares", "cpu.weight"])));
    assert_eq!(cgroup.limits(), ResourceLimits::default());
    let error = cgroup.set_memory(Some(1 << 30)).unwrap_err().to_string();
    assert!(error.contains("--host-memory"), "{error}");
    drop(cgroup);

    // Both controllers, in one cgroup or in two.
    let limits = ResourceLimits { cpu_millicpus: Some(1500), memory_bytes: Some(1 << 30), ..ResourceLimits::default() };
    let mut cgroup = CgroupLimits::new(&limits).unwrap();
    assert_eq!(cgroup.limits(), limits);
    cgroup.set_memory(Some(2 << 30)).unwrap();
    let files = ["memory.max", "memory.limit_in_bytes"];
    let memory = groups().into_iter().find(|group| files.iter().any(|file| group.join(file).exists())).unwrap();
    assert_eq!(says(&memory, files), (2_u64 << 30).to_string());
    cgroup.set_memory(None).unwrap();
    assert!(says(&memory, files).parse::<u64>().is_ok_and(|bytes| bytes > 1 << 60) || says(&memory, files) == "max");
}
