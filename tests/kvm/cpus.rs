//! What a machine gets of the host's processors, seen from outside of it.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::husk::{Running, boot, disk_image};
use husk_guests as guests;

/// Leaves the test, aloud, where control groups are not ours to make.
macro_rules! needs_root {
    () => {
        // Written past the harness, which keeps what a test prints.
        if !rooted() {
            let _ = writeln!(std::io::stderr(), "SKIPPED: limits of processor time are tested by root");
            return;
        }
    };
}

fn rooted() -> bool {
    Command::new("id").arg("-u").output().is_ok_and(|output| output.stdout == b"0\n")
}

/// The control groups that the process of this number made.
fn groups_of(pid: u32) -> Vec<PathBuf> {
    let name = format!("husk-{pid}-*");
    let output = Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", &name]).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().map(PathBuf::from).collect()
}

/// A machine of two vCPUs that do all they can, held to half a processor between them.
fn held_to_half() -> Running {
    let config = tempfile::NamedTempFile::new().unwrap();
    fs::write(&config, r#"{"cpus": 2, "cpu_limit_millicpus": 500}"#).unwrap();
    // Before all others, so that on a busy host too it is the limit that decides.
    let machine = boot(guests::BUSY, "cpus=2").flag("--config", config.path()).flag("--cpu-shares", "262144");
    machine.start().wait_for("busy")
}

/// Ends a machine that heeds nothing: the first signal presses a button, the second ends it. Two of one kind might
/// become one.
fn end(running: Running) {
    running.signal("TERM");
    running.signal("INT");
    running.wait();
}

/// What each of these machines gets of a processor in the next seconds.
fn shares_of_time(machines: &[&Running]) -> Vec<f64> {
    const WINDOW: Duration = Duration::from_secs(4);
    let started = Instant::now();
    let before: Vec<Duration> = machines.iter().map(|machine| machine.cpu_time()).collect();
    thread::sleep(WINDOW);
    let shares = machines.iter().zip(before).map(|(machine, before)| machine.cpu_time() - before);
    shares.map(|used| used.as_secs_f64() / started.elapsed().as_secs_f64()).collect()
}

/// Looks a few times whether `measure` is within a tenth of `wanted`: a busy host may give less for a while.
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
    // It is the limit that stops it here, and not the host.
    assert!(throttled() > throttled_before);
    let pid = running.pid();
    end(running);
    assert!(groups_of(pid).is_empty(), "the group goes with the machine");
}

/// The last of the processors that this process may run on.
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
    for thread in fs::read_dir(format!("/proc/{}/task", running.pid())).unwrap() {
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
    // More than the page cache may have of it.
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
        // Where control groups were is an empty directory.
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
    let pid = running.pid();
    running.signal("KILL");
    running.wait();
    assert_eq!(groups_of(pid).len(), 1);
    boot(guests::EXIT, "").flag("--cpus", "0.5").run().expect(42);
    assert!(groups_of(pid).is_empty());
}
