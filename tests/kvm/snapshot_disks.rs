//! Snapshots with the machine's disks: machines write to copies of their own, and find in them what they had written.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use husk_guests as guests;
use tempfile::TempDir;

use crate::background::Machines;
use crate::husk::disk_image;
use crate::killed::{has_qemu_img, qemu_img};

/// Starts a guest that checks all it has written to its disk, again and again.
fn start(machines: &Machines, disk: &Path, options: &str) {
    let flags = ["--name", "first", "--cpus", "3", "--disk", &format!("{}{options}", disk.display())];
    machines.start(guests::STEADY, "", &flags);
    machines.await_log("first", "1\n");
}

fn save(machines: &Machines, name: &str, file: &str) -> String {
    let path = machines.runtime.path().join(file).to_str().unwrap().to_owned();
    machines.ok(&["snapshot", "--with-disks", name, &path]);
    path
}

/// Ends a guest, which has found nothing wrong.
#[track_caller]
fn end(machines: &Machines, name: &str) {
    let mut attached = machines.attach(name);
    attached.stdin.as_mut().unwrap().write_all(b"\x04").unwrap();
    machines.await_log(name, "end\n");
    attached.wait_with_output().unwrap();
    machines.await_status(name, "exited");
    assert_eq!(machines.inspect(name, "State/ExitCode"), "0", "{}", machines.ok(&["logs", name]));
}

fn run_side_by_side(disk: &Path, options: &str) {
    let machines = Machines::new();
    let data = tempfile::tempdir().unwrap();
    start(&machines, disk, options);
    let path = save(&machines, "first", "snapshot");
    let saved = fs::read(Path::new(&path).join("disk-0")).unwrap();
    for name in ["second", "third"] {
        machines.ok(&["restore", "-d", "--name", name, &path]);
    }
    // Of a copy, which nobody else can have.
    let again = format!("{path}.again");
    machines.ok(&["snapshot", "second", &again]);
    machines.ok(&["restore", "-d", "--name", "fourth", &again]);
    fs::remove_dir_all(&again).unwrap();
    for words in [["suspend", "second"], ["start", "second"]] {
        assert!(machines.command(&words).env("HUSK_DATA", data.path()).status().unwrap().success());
    }
    ["first", "second", "third", "fourth"].iter().for_each(|name| end(&machines, name));
    assert!(fs::read(Path::new(&path).join("disk-0")).unwrap() == saved, "the snapshot has changed");
    machines.ok(&["restore", "-d", "--name", "last", &path]);
    end(&machines, "last");
    assert_eq!(fs::read_dir(data.path().join("suspended")).unwrap().count(), 0);
}

#[test]
fn machines_of_a_snapshot_with_a_disk_run_side_by_side() {
    needs_kvm!();
    let (_dir, disk) = disk_image(1 << 20);
    run_side_by_side(&disk, "");
}

#[test]
fn machines_of_a_snapshot_with_an_image_in_qcow2_run_side_by_side() {
    needs_kvm!();
    if !has_qemu_img() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    assert!(qemu_img(&["create", "-q", "-f", "qcow2"], &[&disk, Path::new("1M")]).status.success());
    run_side_by_side(&disk, ",format=qcow2");
}

/// A machine `echo` with a disk that takes a while to copy, which is in the directory.
fn with_large_disk() -> (Machines, TempDir, PathBuf) {
    let machines = Machines::new();
    let dir = tempfile::tempdir().unwrap();
    let disk = dir.path().join("disk");
    fs::write(&disk, vec![1; 256 << 20]).unwrap();
    machines.start(guests::SERIAL, "do=echo wait=interrupt", &["--name", "echo", "--disk", disk.to_str().unwrap()]);
    machines.await_log("echo", "ready");
    (machines, dir, disk)
}

#[test]
fn a_paused_machine_stays_paused_until_its_disks_are_copied() {
    needs_kvm!();
    let (machines, dir, _) = with_large_disk();
    machines.ok(&["pause", "echo"]);
    let path = dir.path().join("snapshot");
    let words = ["snapshot", "--with-disks", "echo", path.to_str().unwrap()];
    let mut snapshot = machines.command(&words).stdout(Stdio::null()).spawn().unwrap();
    while !path.join("disk-0").exists() {
        std::hint::spin_loop();
    }
    while !machines.command(&["unpause", "echo"]).stderr(Stdio::null()).status().unwrap().success() {}
    let copied = fs::metadata(path.join("disk-0")).unwrap().blocks();
    assert!(copied * 512 >= 256 << 20, "{copied} blocks are copied when the guest goes on");
    assert!(snapshot.wait().unwrap().success());
}

#[test]
fn a_machine_can_be_killed_while_its_disks_are_copied() {
    needs_kvm!();
    let (machines, dir, disk) = with_large_disk();
    let path = dir.path().join("snapshot");
    machines.ok(&["snapshot", "--stop", "--with-disks", "echo", path.to_str().unwrap()]);
    let words = ["restore", "-d", "--name", "other", path.to_str().unwrap()];
    let restore = machines.command(&words).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while !machines.command(&["kill", "other"]).stderr(Stdio::null()).status().unwrap().success() {}
    let output = restore.wait_with_output().unwrap();
    // Where files can share blocks, there is nothing to wait for.
    let shared = dir.path().join("shared");
    let share = Command::new("cp").arg("--reflink=always").args([&disk, &shared]).stderr(Stdio::null()).status();
    if !share.is_ok_and(|status| status.success()) {
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains("copy a disk of the snapshot: it was interrupted"), "{errors}");
        assert_eq!(machines.ok(&["ps", "-aq"]).lines().count(), 1, "nothing is left of it");
    }
}
