//! A machine's use of host CPUs, measured from outside.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::husk::{Running, await_exit, boot, disk_image};
use husk_guests as guests;

/// Skips the test with a visible message without permission to create cgroups.
macro_rules! needs_root {
    () => {
        // Bypasses the test harness, which captures output.
        if !rooted() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: limits of processor time are tested by root");
            return;
        }
    };
}

fn rooted() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

/// The cgroups created by this process.
fn groups_of(pid: u32) -> Vec<PathBuf> {
    let name = format!("husk-{pid}-*");
    let output = Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &name]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(PathBuf::from).collect()
}

/// A machine with two busy vCPUs, limited to half a CPU.
fn held_to_half() -> Running {
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(&config, r#"{"cpus": 2, "cpu_limit_millicpus": 500}"#).unwrap();
    // More shares than other processes, so that the limit is decisive even on a busy host.
    let machine = boot(guests::BUSY, "cpus=2").flag("--config", config.path()).flag("--cpu-shares", "262144");
    machine.start().wait_for("busy")
}

/// Ends a machine that ignores the power button: the first signal presses it, the second ends the machine. Two pending
/// signals of one kind would be merged.
fn end(running: Running) {
    running.signal("TERM");
    running.signal("INT");
    running.wait();
}

/// The CPU usage of each machine during the next seconds.
fn shares_of_time(machines: &[&Running]) -> Vec<f64> {
    const WINDOW: Duration = Duration::from_secs(4);
    let started = Instant::now();
    let before: Vec<Duration> = machines.iter().map(|machine| machine.cpu_time()).collect();
    thread::sleep(WINDOW);
    let shares = machines.iter().zip(before).map(|(machine, before)| machine.cpu_time() - before);
    shares.map(|used| used.as_secs_f64() / started.elapsed().as_secs_f64()).collect()
}

/// Measures several times whether the result is within a tenth of `wanted`: a busy host may temporarily provide less.
#[track_caller]
fn comes_within_a_tenth_of(wanted: f64, mut measure: impl FnMut() -> f64) {
    const LOOKS: usize = 5;
    let mut seen = Vec::new();
    while seen.len() < LOOKS {
        let share = measure();
        println!("{share:.3}, wanted {wanted}");
        if (0.9..1.1).contains(&(share / wanted)) {
            return;
        }
        seen.push(share);
    }
    panic!("{seen:?}, wanted {wanted}");
}

#[test]
fn a_cpu_limit_is_enforced() {
    needs_kvm!();
    needs_root!();
    let running = held_to_half();
    let groups = groups_of(running.pid());
    let [group] = &*groups else { panic!("{groups:?}") };
    let throttled = || {
        let stat = fs::read_to_string(group.join("cpu.stat")).unwrap();
        let line = stat.lines().find_map(|line| line.strip_prefix("nr_throttled ")).unwrap();
        line.parse::<u64>().unwrap()
    };
    let throttled_before = throttled();
    comes_within_a_tenth_of(0.5, || {
        let share = shares_of_time(&[&running])[0];
        assert!(share < 0.55, "{share}");
        share
    });
    // The limit is what throttles it, not the host.
    assert!(throttled() > throttled_before);
    let pid = running.pid();
    end(running);
    assert!(groups_of(pid).is_empty(), "the group goes with the machine");
}

/// The last CPU available to this process.
fn last_processor() -> String {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap().trim();
    list.rsplit([',', '-']).next().unwrap().to_owned()
}

#[test]
fn machines_share_a_cpu_by_their_shares() {
    needs_kvm!();
    needs_root!();
    let cpu = last_processor();
    let start = |shares: &str| {
        let machine = boot(guests::BUSY, "cpus=1").flag("--cpuset", &*cpu).flag("--cpu-shares", shares);
        machine.start().wait_for("busy")
    };
    let (small, large) = (start("1024"), start("3072"));
    comes_within_a_tenth_of(3.0, || {
        let shares = shares_of_time(&[&small, &large]);
        shares[1] / shares[0]
    });
    end(small);
    end(large);
}

#[test]
fn a_cpuset_applies_to_every_thread_without_privileges() {
    needs_kvm!();
    let cpu = last_processor();
    let running = boot(guests::BUSY, "cpus=2").flag("--cpus", "2").flag("--cpuset", &*cpu).start().wait_for("busy");
    let mut threads = 0;
    for thread in fs::read_dir(format!("/proc/{}/task", running.monitor())).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains(&format!("Cpus_allowed_list:\t{cpu}\n")), "{status}");
        threads += 1;
    }
    assert!(threads > 2, "{threads}");
    end(running);
    let ran = boot(guests::EXIT, "").flag("--cpuset", "0,8000").run();
    assert!(ran.expect_line(1).contains("CPU 8000 does not exist"), "{}", ran.stderr);
}

#[test]
fn a_machine_works_within_its_automatic_host_memory_limit() {
    needs_kvm!();
    needs_root!();
    const MIB: u64 = 1 << 20;
    let (_dir, disk) = disk_image(256 * MIB);
    // More data than the page cache may use.
    let machine = boot(guests::DRIVE, "type=write order=sequential depth=8 count=30000").disk(&disk, "");
    let machine = machine.flag("--host-memory", "auto");
    assert!(machine.run().expect(0).contains("requests 30000"));
    let running = boot(guests::BUSY, "cpus=1").flag("--host-memory", "auto").start().wait_for("busy");
    let [group] = &*groups_of(running.pid()) else { panic!("a group") };
    let limit =
        ["memory.max", "memory.limit_in_bytes"].iter().find_map(|file| fs::read_to_string(group.join(file)).ok());
    // The guest's 64, a page table's worth and 32.
    assert_eq!(limit.unwrap().trim(), (97 * MIB).to_string());
    end(running);
    let ran = boot(guests::EXIT, "").flag("--host-memory", "96M").run();
    assert!(ran.expect_line(2).contains("needs 97 MiB"), "{}", ran.stderr);
}

#[test]
fn an_unavailable_limit_is_reported_with_a_remedy() {
    needs_kvm!();
    needs_root!();
    for (flag, value, way) in [
        ("--cpus", "0.5", "CPUQuota=50%"),
        ("--cpu-shares", "512", "CPUWeight=50"),
        ("--host-memory", "1G", "MemoryMax=1024M"),
    ] {
        let husk = boot(guests::EXIT, "").flag(flag, value).command();
        // Replaces the cgroup file system with an empty directory.
        let script = "mount -t tmpfs none /sys/fs/cgroup && exec \"$0\" \"$@\"";
        let mut without = Command::new("unshare");
        without.args(["--mount", "sh", "-c", script]).arg(husk.get_program()).args(husk.get_args());
        let output = without.output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{stderr}");
        assert!(stderr.contains(way) && stderr.contains(" /sys/fs/cgroup/"), "{stderr}");
    }
}

#[test]
fn the_cgroup_of_a_killed_machine_is_removed_by_the_next() {
    needs_kvm!();
    needs_root!();
    let running = held_to_half();
    let (pid, monitor) = (running.pid(), running.monitor());
    running.signal("KILL");
    running.wait();
    assert_eq!(groups_of(pid).len(), 1);
    // The monitor, a member, is killed with it, and exits some milliseconds later.
    await_exit(monitor);
    boot(guests::EXIT, "").flag("--cpus", "0.5").run().expect(42);
    assert!(groups_of(pid).is_empty());
}
