//! A monitor that is killed at any moment: what its guest has flushed is in the file of the disk.
//!
//! The host goes on, so this is about what husk has handed to the host's kernel when it completes a flush.
//! `HUSK_TEST_KILLS=N` kills N monitors instead of 20, or of one for each way to access a disk on an emulated processor.

use std::hash::{BuildHasher, RandomState};
use std::thread;
use std::time::Duration;

use crate::husk::{boot, disk_image, is_emulated};
use crate::journal;
use husk_guests as guests;

const MIB: u64 = 1 << 20;
const OPTIONS: [&str; 5] = [",aio=threads", ",aio=io_uring", "", ",cache=none,aio=threads", ",cache=none,aio=io_uring"];

/// A duration up to `limit`.
fn random(limit: Duration) -> Duration {
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

/// Kills a machine whose guest writes and flushes records, after `delay`, and checks its disk. Returns the number of records
/// that the guest was told to be durable.
fn kill_after(delay: Duration, options: &str) -> u64 {
    let (_dir, disk) = disk_image(64 * MIB);
    let machine = boot(guests::BLOCK, "do=journal").disk(&disk, options).start().wait_for("durable 1\n");
    thread::sleep(delay);
    machine.signal("KILL");
    let ran = machine.wait();
    assert_eq!(ran.signal, Some(9), "{options}: {}", ran.stderr);
    let durable = journal::durable(&ran.text());
    let lost = journal::first_lost(&disk, durable);
    assert_eq!(lost, None, "{options}, {delay:?}: lost, of {durable} records");
    durable
}

#[test]
fn flushed_writes_survive_kill_9() {
    needs_kvm!();
    let default = if is_emulated() { OPTIONS.len() } else { 20 };
    let kills = std::env::var("HUSK_TEST_KILLS").map_or(default, |kills| kills.parse().unwrap());
    let direct = has_direct_access();
    let options = OPTIONS.iter().filter(|options| direct || !options.contains("cache=none"));
    let limit = Duration::from_millis(if is_emulated() { 1000 } else { 200 });
    for (options, _) in options.cycle().zip(0..kills) {
        let delay = random(limit);
        println!("killed after {delay:?}, {options}: {} records", kill_after(delay, options));
    }
}
