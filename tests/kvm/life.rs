//! Machine lifecycles, repeated and interrupted: what a machine leaves behind, and what it refuses to start.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::background::Machines;
use crate::husk::{await_none_with, boot, disk_image, processes_with};
use husk_guests as guests;

#[test]
fn two_hundred_machines_in_a_row_all_end() {
    needs_kvm!();
    for run in 0..200 {
        let ran = boot(guests::EXIT, "").run();
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(42), ""), "run {run}");
    }
}

#[test]
fn a_machine_that_is_killed_leaves_nothing_behind() {
    needs_kvm!();
    let (dir, disk) = disk_image(1 << 20);
    let place = dir.path().to_str().unwrap();
    let running = boot(guests::BLOCK, "do=hold").disk(&disk, "").start().wait_for("ready");
    assert_eq!(processes_with(place), [running.pid()]);
    running.signal("KILL");
    assert_eq!(running.wait().signal, Some(libc::SIGKILL));
    await_none_with(place);
    let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["disk.img"]);
    boot(guests::BLOCK, "do=round-trip").disk(&disk, "").run().expect(0);
}

#[test]
fn a_disk_in_use_is_refused_and_readers_share() {
    needs_kvm!();
    let (_dir, disk) = disk_image(1 << 20);
    let writer = boot(guests::BLOCK, "do=hold").disk(&disk, "").start().wait_for("ready");
    for options in ["", ",ro"] {
        let ran = boot(guests::EXIT, "").disk(&disk, options).run();
        let line = ran.expect_line(1);
        assert!(line.contains("in use") && line.contains(disk.to_str().unwrap()), "{line}");
    }
    writer.signal("KILL");
    writer.wait();

    let reader = boot(guests::BLOCK, "do=hold").disk(&disk, ",ro").start().wait_for("ready");
    boot(guests::EXIT, "").disk(&disk, ",ro").run().expect(42);
    assert!(boot(guests::EXIT, "").disk(&disk, "").run().expect_line(1).contains("in use"));
    reader.signal("KILL");
    reader.wait();
}

#[test]
fn the_first_sigterm_presses_the_power_button() {
    needs_kvm!();
    let running = boot(guests::POWER, "do=wait-for-button").start().wait_for("listening");
    running.signal("TERM");
    assert_eq!(running.wait().expect(0), "ready\nlistening\npower button\n");
}

#[test]
fn a_second_signal_ends_a_guest_that_ignores_the_first() {
    needs_kvm!();
    for what in ["halt", "spin"] {
        let mut running = boot(guests::POWER, &format!("do={what}")).start().wait_for("ready");
        running.signal("TERM");
        thread::sleep(Duration::from_millis(300));
        assert!(running.runs(), "the first signal is only a request");
        running.signal("TERM");
        running.wait().expect(128 + libc::SIGTERM);
    }
}

#[test]
fn every_vcpu_is_stopped_wherever_it_is() {
    needs_kvm!();
    let running = boot(guests::POWER, "do=spin").flag("--cpus", "4").start().wait_for("ready");
    running.signal("INT");
    thread::sleep(Duration::from_millis(50));
    running.signal("INT");
    running.wait().expect(128 + libc::SIGINT);
}

/// Starts with these flags and expects an exit code and one line with these words.
#[track_caller]
fn refused(flags: &[(&'static str, &str)], code: i32, words: &str) {
    let mut husk = boot(guests::EXIT, "");
    for (flag, value) in flags {
        husk = husk.flag(flag, *value);
    }
    let ran = husk.run();
    let line = ran.expect_line(code);
    assert!(line.to_lowercase().contains(&words.to_lowercase()), "{line}");
    assert!(ran.stdout.is_empty());
}

#[test]
fn a_machine_too_large_for_the_host_is_rejected() {
    needs_kvm!();
    refused(&[("--memory", "1000T")], 2, "memory");
    refused(&[("--memory", "4T")], 1, "this host has");
    // A host with less memory than requested: the shell limits address space, in KiB.
    let husk = boot(guests::EXIT, "").flag("--memory", "64G").command();
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -v 8000000; exec \"$0\" \"$@\""]).arg(husk.get_program()).args(husk.get_args());
    let output = limited.output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let told = ["reserve 65536 MiB of guest memory: ", "65536 MiB of memory: this host has "];
    assert!(told.iter().any(|words| stderr.contains(words)), "{stderr}");
}

#[test]
fn an_initrd_larger_than_memory_is_rejected() {
    needs_kvm!();
    let (_dir, initrd) = disk_image(65 << 20);
    refused(&[("--initrd", initrd.to_str().unwrap())], 1, "initrd");
}

#[test]
fn a_bad_disk_is_rejected() {
    needs_kvm!();
    let (dir, odd) = disk_image(1000);
    let empty = dir.path().join("empty.img");
    fs::write(&empty, "").unwrap();
    let missing = dir.path().join("missing.img");
    for (path, words) in [(&*odd, "512"), (&*empty, "empty"), (&*missing, "no such file"), (dir.path(), "director")] {
        refused(&[("--disk", path.to_str().unwrap())], 1, words);
    }
}

#[test]
fn an_invalid_kernel_is_rejected() {
    needs_kvm!();
    let (dir, zeroes) = disk_image(1 << 20);
    let words = dir.path().join("kernel.txt");
    fs::write(&words, "not a kernel\n".repeat(1000)).unwrap();
    let cut = dir.path().join("cut.elf");
    fs::write(&cut, &fs::read(guests::POWER).unwrap()[..4500]).unwrap();
    for path in [&zeroes, &words, &cut, &dir.path().join("missing")] {
        refused(&[("--kernel", path.to_str().unwrap())], 1, "kernel");
    }
}

#[test]
fn ps_lists_the_last_machines_and_logs_all_lines() {
    needs_kvm!();
    let machines = Machines::new();
    let ids: Vec<String> = (0..3)
        .map(|number| {
            machines
                .start(guests::SERIAL, "do=echo wait=interrupt", &["--name", &format!("m{number}")])
                .trim_end()
                .to_owned()
        })
        .collect();
    machines.ok(&["kill", "m2"]);
    machines.ok(&["wait", "m2"]);
    let listed = |flags: &[&str]| -> Vec<String> {
        machines.ok(&[&["ps", "-q"], flags].concat()).lines().map(str::to_owned).collect()
    };
    assert_eq!(listed(&[]), [&*ids[1], &ids[0]]);
    assert_eq!(listed(&["-l"]), [&*ids[2]], "stopped ones are included");
    assert_eq!(listed(&["-n", "2"]), [&*ids[2], &ids[1]]);
    assert_eq!(listed(&["-n", "9"]).len(), 3);
    let log = machines.ok(&["logs", "-n", "all", "m0"]);
    assert_eq!(log, machines.ok(&["logs", "m0"]));
    machines.ok(&["stop", "--timeout", "0", "m0", "m1"]);
    assert_eq!(listed(&[]), [""; 0]);
}
