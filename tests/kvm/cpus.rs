//! What a machine gets of the host's processors, seen from outside of it.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::husk::{Running, boot};
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
    boot(guests::BUSY, "cpus=2").flag("--config", config.path()).start().wait_for("busy")
}

#[test]
fn a_machine_held_to_half_a_processor_gets_that_and_no_more() {
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
    let (started, before, throttled_before) = (Instant::now(), running.cpu_time(), throttled());
    thread::sleep(Duration::from_secs(5));
    let share = (running.cpu_time() - before).as_secs_f64() / started.elapsed().as_secs_f64();
    println!("{share:.3} of a processor");
    assert!(share < 0.55, "{share}");
    // A busy host may give less, but it is the limit that stops it here.
    assert!(throttled() > throttled_before);
    // The first presses a button that nobody heeds, the second ends it. Two of one kind might become one.
    running.signal("TERM");
    running.signal("INT");
    let pid = running.pid();
    running.wait();
    assert!(groups_of(pid).is_empty(), "the group goes with the machine");
}

#[test]
fn a_group_left_by_a_killed_machine_goes_with_the_next_one() {
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
