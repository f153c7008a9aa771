//! Resources that are free when husk has exited, although the kernel releases the virtual machine only afterwards.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use husk_guests as guests;

use crate::husk::{self, boot};

#[test]
fn a_disk_is_free_when_husk_exits_a_thousand_times_in_a_row() {
    needs_kvm!();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk.img");
    File::create(&disk).unwrap().set_len(1 << 20).unwrap();
    let rounds = if husk::is_emulated() { 30 } else { 1000 };
    for round in 0..rounds {
        // This would also fail if the host ran out of memory.
        let mut child = boot(guests::EXIT, "").disk(&disk, "").command();
        let output = child.stdin(Stdio::null()).output().unwrap();
        assert_eq!(output.status.code(), Some(42), "round {round}: {}", String::from_utf8_lossy(&output.stderr));
    }
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
