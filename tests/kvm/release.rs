//! Resources that are free when husk has exited, although the kernel releases the virtual machine only afterwards.

use std::fs;
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;

use crate::background::Machines;
use crate::husk::{self, await_none_of, boot, disk_image};

#[test]
fn a_thousand_starts_on_one_disk() {
    needs_kvm!();
    let machines = Machines::new();
    let (dir, disk) = disk_image(1 << 20);
    let disk = disk.to_str().unwrap();
    let rounds = if husk::is_emulated() { 30 } else { 1000 };
    for round in 0..rounds {
        // The disk is locked by husk. This would also fail if the host ran out of memory.
        let words = ["boot", "--kernel", guests::EXIT, "--memory", "64M", "--disk", disk];
        let output = machines.run(&words);
        assert_eq!(output.status.code(), Some(42), "round {round}: {}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!((machines.dirs().len(), machines.names()), (0, 0));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "only the disk itself");
    await_none_of(machines.place());
}

/// The processes of a process group, except zombies.
fn processes_of_group(group: u32) -> Vec<String> {
    let is_member = |stat: &String| {
        // proc_pid_stat(5): pid (comm) state ppid pgrp. The command name may contain any characters.
        let fields = stat.rsplit(')').next().unwrap_or_default();
        let fields: Vec<&str> = fields.split_whitespace().collect();
        matches!(fields[..], [state, _, pgrp, ..] if state != "Z" && pgrp == group.to_string())
    };
    let stats = fs::read_dir("/proc").unwrap().flatten();
    stats.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok()).filter(is_member).collect()
}

#[test]
fn nothing_is_left_of_a_machine_and_its_outputs_are_closed() {
    needs_kvm!();
    for _ in 0..20 {
        let mut command = boot(guests::EXIT, "").command();
        let command = command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (mut stdout, mut stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        assert_eq!(husk::end_of(&mut child).expect("husk exits").code(), Some(42));
        for pipe in [&stdout as &dyn std::os::fd::AsFd, &stderr] {
            rustix::io::ioctl_fionbio(pipe, true).unwrap();
        }
        let mut rest = Vec::new();
        stdout.read_to_end(&mut rest).expect("no process can write to standard output any more");
        stderr.read_to_end(&mut rest).expect("no process can write to standard error any more");
        let deadline = Instant::now() + Duration::from_secs(60);
        while !processes_of_group(child.id()).is_empty() {
            assert!(Instant::now() < deadline, "{:?}", processes_of_group(child.id()));
            thread::sleep(Duration::from_millis(1));
        }
    }
}
