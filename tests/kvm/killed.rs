//! A machine whose monitor or supervisor is killed at any moment: what its guest has flushed is in the file of the disk.
//!
//! The host goes on, so this is about what husk has handed to the host's kernel when it completes a flush.
//! `HUSK_TEST_KILLS=N` (`scripts/soak power N`) kills N machines instead of a few.

use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use crate::husk::{boot, disk_image, is_emulated, send_signal};
use crate::journal;
use husk_guests as guests;

const MIB: u64 = 1 << 20;
const OPTIONS: [&str; 6] =
    [",format=qcow2", ",aio=threads", ",aio=io_uring", "", ",cache=none,aio=threads", ",cache=none,aio=io_uring"];

/// A duration up to `limit`.
pub fn random(limit: Duration) -> Duration {
    limit.mul_f64((RandomState::new().hash_one(0) >> 32) as f64 / f64::from(u32::MAX))
}

/// Whether files here can be accessed directly; if not, prints a message.
fn has_direct_access() -> bool {
    let (_dir, disk) = disk_image(MIB);
    let ran = boot(guests::BLOCK, "do=round-trip").disk(&disk, ",cache=none").run();
    let refused = ran.stderr.contains("remove cache=none");
    if refused {
        eprintln!("SKIPPED: no direct access to temporary files here: {}", ran.stderr);
    }
    !refused
}

/// Whether there is qemu-img to check images; if not, prints a message.
pub fn has_qemu_img() -> bool {
    let found = Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: qcow2 images are checked by qemu-img (Debian package qemu-utils)");
    }
    found
}

pub fn qemu_img(arguments: &[&str], paths: &[&Path]) -> Output {
    Command::new("qemu-img").args(arguments).args(paths).output().unwrap()
}

/// The process that is killed.
#[derive(Debug, Clone, Copy)]
enum Victim {
    Supervisor,
    Monitor,
}

/// Kills `victim` of a machine whose guest writes and flushes records, after `delay`, and checks its disk. Returns the number of
/// records that the guest was told to be durable.
fn kill_after(delay: Duration, victim: Victim, options: &str) -> u64 {
    let (dir, mut disk) = disk_image(64 * MIB);
    let is_qcow2 = options.contains("qcow2");
    if is_qcow2 {
        disk = dir.path().join("disk.qcow2");
        assert!(qemu_img(&["create", "-q", "-f", "qcow2"], &[&disk, Path::new("64M")]).status.success());
    }
    let machine = boot(guests::BLOCK, "do=journal").disk(&disk, options).start().wait_for("durable 1\n");
    thread::sleep(delay);
    let ran = match victim {
        Victim::Supervisor => {
            machine.signal("KILL");
            let ran = machine.wait();
            assert_eq!(ran.signal, Some(9), "{options}: {}", ran.stderr);
            ran
        }
        Victim::Monitor => {
            send_signal(machine.monitor(), "KILL");
            let ran = machine.wait();
            assert_eq!(ran.expect_line(137), "husk: the monitor process was killed by signal 9");
            ran
        }
    };
    if is_qcow2 {
        // Clusters that nothing refers to are lost space, and no error (exit status 3).
        let checked = qemu_img(&["check", "-q"], &[&disk]);
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{delay:?}: {checked:?}");
        let raw = dir.path().join("disk.raw");
        assert!(qemu_img(&["convert", "-f", "qcow2", "-O", "raw"], &[&disk, &raw]).status.success());
        disk = raw;
    }
    let durable = journal::durable(&ran.text());
    let lost = journal::first_lost(&disk, durable);
    assert_eq!(lost, None, "{victim:?}, {options}, {delay:?}: lost, of {durable} records");
    durable
}

#[test]
fn flushed_writes_survive_kill_9() {
    needs_kvm!();
    let default = if is_emulated() { 2 * OPTIONS.len() } else { 24 };
    let kills = std::env::var("HUSK_TEST_KILLS").map_or(default, |kills| kills.parse().unwrap());
    let (direct, qcow2) = (has_direct_access(), has_qemu_img());
    let possible =
        |options: &&&str| (direct || !options.contains("cache=none")) && (qcow2 || !options.contains("qcow2"));
    let options: Vec<&str> = OPTIONS.iter().filter(possible).copied().collect();
    let ways = [Victim::Monitor, Victim::Supervisor].map(|victim| options.iter().map(move |options| (victim, options)));
    let limit = Duration::from_millis(if is_emulated() { 1000 } else { 200 });
    let mut records = 0;
    for ((victim, options), _) in ways.into_iter().flatten().cycle().zip(0..kills) {
        let delay = random(limit);
        let durable = kill_after(delay, victim, options);
        println!("{victim:?} killed after {delay:?}, {options}: {durable} records");
        records += durable;
    }
    println!("{kills} machines killed, {records} records flushed, 0 lost");
}
