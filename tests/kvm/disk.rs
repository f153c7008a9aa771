//! Disks from a guest's driver to the host's file: supported requests, rejected ones, and robustness.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::husk::{self, boot, disk_image, is_emulated};
use husk_guests as guests;

const MIB: u64 = 1 << 20;

/// Runs the disk guest on an image of 1 MiB, and returns its output.
#[track_caller]
fn block(what: &str, options: &str) -> String {
    let (_dir, disk) = disk_image(MIB);
    boot(guests::BLOCK, &format!("do={what}")).disk(&disk, options).run().expect(0)
}

#[test]
fn what_is_written_is_read_back_and_flushed() {
    needs_kvm!();
    assert_eq!(block("round-trip", ""), "capacity 2048\ndone\n");
}

#[test]
fn a_request_may_lie_in_many_buffers_of_any_length() {
    needs_kvm!();
    block("scattered", "");
}

#[test]
fn a_request_may_lie_in_an_indirect_table() {
    needs_kvm!();
    block("indirect", "");
}

#[test]
fn the_disks_id_is_the_users() {
    needs_kvm!();
    assert!(block("get-id", ",id=spindle-7").contains("id spindle-7\n"));
    assert!(block("get-id", ",id=twenty-bytes-exactly").contains("id twenty-bytes-exactly\n"));
}

#[test]
fn nothing_is_read_or_written_past_the_end() {
    needs_kvm!();
    let (_dir, disk) = disk_image(MIB);
    boot(guests::BLOCK, "do=past-the-end").disk(&disk, "").run().expect(0);
    assert_eq!(fs::metadata(&disk).unwrap().len(), MIB);
}

#[test]
fn an_invalid_request_is_rejected_without_stopping_the_disk() {
    needs_kvm!();
    block("refused", "");
}

#[test]
fn discarded_and_zeroed_sectors_are_the_ones_asked_for() {
    needs_kvm!();
    block("discard", "");
    block("write-zeroes", "");
}

#[test]
fn a_disk_works_however_its_file_is_accessed() {
    needs_kvm!();
    for options in [",aio=io_uring", ",aio=threads", ",num_queues=4"] {
        for what in ["round-trip", "scattered", "discard", "write-zeroes", "interrupt count=100", "past-the-end"] {
            block(what, options);
        }
    }
}

#[test]
fn a_disk_without_a_cache_accepts_any_request() {
    needs_kvm!();
    for what in ["round-trip", "scattered", "discard", "write-zeroes", "past-the-end"] {
        let (_dir, disk) = disk_image(MIB);
        let ran = boot(guests::BLOCK, &format!("do={what}")).disk(&disk, ",cache=none").run();
        if ran.stderr.contains("remove cache=none") {
            return eprintln!("SKIPPED: no direct access to temporary files here: {}", ran.stderr);
        }
        ran.expect(0);
    }
}

/// A loop device for a file, detached when dropped.
struct LoopDevice(String);

impl LoopDevice {
    /// `None` with a visible message if this user cannot create one.
    fn of(file: &Path) -> Option<LoopDevice> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(made) if made.status.success() => {
                Some(LoopDevice(String::from_utf8(made.stdout).unwrap().trim().into()))
            }
            other => {
                eprintln!("SKIPPED: this test needs a loop device: {other:?}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        assert!(Command::new("losetup").args(["--detach", &self.0]).status().unwrap().success());
    }
}

#[test]
fn a_block_device_is_a_disk_that_discards_and_zeroes() {
    needs_kvm!();
    let (_dir, disk) = disk_image(MIB);
    let Some(device) = LoopDevice::of(&disk) else { return };
    for what in ["round-trip", "discard", "write-zeroes", "past-the-end"] {
        for options in ["", ",aio=io_uring", ",aio=threads", ",cache=none", ",cache=none,aio=threads"] {
            boot(guests::BLOCK, &format!("do={what}")).disk(Path::new(&device.0), options).run().expect(0);
        }
    }
}

/// A system call filter that refuses io_uring_setup(2), as container runtimes do and `kernel.io_uring_disabled` does.
fn forbid_io_uring(dir: &Path) -> PathBuf {
    const IO_URING_SETUP: u32 = 425;
    // linux/filter.h, linux/seccomp.h: load the number; if it is this one, return EPERM; allow all others.
    let program: [(u16, u8, u8, u32); 4] =
        [(0x20, 0, 0, 0), (0x15, 0, 1, IO_URING_SETUP), (0x06, 0, 0, 0x0005_0001), (0x06, 0, 0, 0x7fff_0000)];
    let bytes: Vec<u8> = program
        .iter()
        .flat_map(|(code, if_true, if_false, value)| {
            [&code.to_le_bytes()[..], &[*if_true, *if_false], &value.to_le_bytes()].concat()
        })
        .collect();
    let path = dir.join("filter");
    fs::write(&path, bytes).unwrap();
    path
}

/// The lab's kernel has no `kernel.io_uring_disabled`, and another machine's must not be changed: bubblewrap applies a filter.
#[test]
fn without_io_uring_a_disk_uses_blocking_calls_and_says_so() {
    needs_kvm!();
    if Command::new("bwrap").arg("--version").output().is_err() {
        return eprintln!("SKIPPED: this test needs bwrap (Debian package bubblewrap)");
    }
    let (dir, disk) = disk_image(MIB);
    let filter = forbid_io_uring(dir.path());
    let run = |options: &str, words: &[&str]| {
        let husk = boot(guests::BLOCK, "do=round-trip").disk(&disk, options).command();
        let script = r#"exec bwrap --dev-bind / / --seccomp 3 "$@" 3<"$0""#;
        let mut command = Command::new("sh");
        command.args(["-c", script]).arg(&filter).arg(husk.get_program()).args(husk.get_args()).args(words);
        let output = command.stdin(Stdio::null()).output().unwrap();
        (output.status.code(), husk::own_lines(&output.stderr))
    };
    let reason = "Operation not permitted";
    let (code, log) = run("", &["--verbose"]);
    let line = format!("io_uring is not available, so disks use blocking calls: {reason}");
    assert_eq!((code, log.matches(&line).count()), (Some(0), 1), "{log}");
    assert_eq!(run(",aio=threads", &[]), (Some(0), String::new()));
    assert_eq!(run("", &[]), (Some(0), String::new()), "it is as good");
    let refusal = format!("disk {} cannot use io_uring on this host: remove aio=io_uring: {reason}", disk.display());
    assert_eq!(run(",aio=io_uring", &[]), (Some(1), format!("husk: {refusal}\n")));
}

#[test]
fn a_read_only_disk_is_not_written() {
    needs_kvm!();
    let (_dir, disk) = disk_image(MIB);
    let before = fs::metadata(&disk).unwrap().modified().unwrap();
    boot(guests::BLOCK, "do=read-only").disk(&disk, ",ro").run().expect(0);
    assert_eq!(fs::metadata(&disk).unwrap().modified().unwrap(), before);
}

#[test]
fn a_read_only_file_is_sufficient_for_a_read_only_disk() {
    needs_kvm!();
    let (_dir, disk) = disk_image(MIB);
    let mut permissions = fs::metadata(&disk).unwrap().permissions();
    permissions.set_readonly(true);
    fs::set_permissions(&disk, permissions).unwrap();
    boot(guests::BLOCK, "do=read-only").disk(&disk, ",ro").run().expect(0);
}

#[test]
fn a_driver_that_sleeps_is_woken_for_each_request() {
    needs_kvm!();
    let count = if is_emulated() { 100 } else { 1000 };
    block(&format!("interrupt count={count}"), "");
}

#[test]
fn completed_writes_are_in_the_file() {
    needs_kvm!();
    let (_dir, disk) = disk_image(MIB);
    boot(guests::BLOCK, "do=stamp sectors=64").disk(&disk, "").run().expect(0);
    let image = fs::read(&disk).unwrap();
    for (number, sector) in image.chunks(512).enumerate().take(64) {
        assert_eq!(sector[..8], (number as u64).to_le_bytes());
        assert!(sector[8..].iter().all(|byte| *byte == 0x5a));
    }
    assert!(image[64 * 512..].iter().all(|byte| *byte == 0));
}

/// The rate of requests with these options, after the initial burst.
fn rate_of(disk: &Path, options: &str, words: &str, burst: u64) -> f64 {
    const COUNT: u64 = 400;
    let text = boot(guests::DRIVE, &format!("{words} order=random count={COUNT}")).disk(disk, options).run().expect(0);
    let ns = text.split_once("ns ").and_then(|(_, rest)| rest.split_whitespace().next()).unwrap();
    (COUNT - burst) as f64 / (ns.parse::<f64>().unwrap() / 1e9)
}

#[test]
fn a_limit_on_a_disk_holds() {
    needs_kvm!();
    let (_dir, disk) = disk_image(16 * MIB);
    // Requests of 4 KiB: 200 per second in both cases. The burst is that of a tenth of a second unless specified.
    for (options, burst, words) in [
        (",iops=200", 20, "type=read depth=1"),
        (",iops=200,iops-burst=100", 100, "type=write depth=32"),
        (",bps=800k", 20, "type=read depth=4"),
        (",bps=800k,bps-burst=400k,iops=5000", 100, "type=write depth=1"),
    ] {
        // A busy host may slow the guest down, but it never exceeds the limit.
        let rates = (0..5).map(|_| rate_of(&disk, options, words, burst)).inspect(|rate| {
            println!("{words}, {options}: {rate:.1} a second");
            assert!(*rate < 220.0, "{words}, {options}: {rate} a second");
        });
        assert!(rates.into_iter().any(|rate| rate > 180.0), "{words}, {options}");
    }
}

#[test]
fn a_second_disk_is_the_second() {
    needs_kvm!();
    let ((_first_dir, first), (_second_dir, second)) = (disk_image(MIB), disk_image(2 * MIB));
    let ran = boot(guests::BLOCK, "do=stamp disk=1").disk(&first, "").disk(&second, "").run();
    assert!(ran.expect(0).contains("capacity 4096\n"));
    assert!(fs::read(&first).unwrap().iter().all(|byte| *byte == 0));
    assert_eq!(fs::read(&second).unwrap()[512], 1);
}

#[test]
fn a_disk_beyond_two_tib_has_its_last_sector() {
    needs_kvm!();
    let (_dir, disk) = disk_image(3 << 40);
    let text = boot(guests::BLOCK, "do=round-trip").disk(&disk, "").run().expect(0);
    assert!(text.contains(&format!("capacity {}\n", (3u64 << 40) / 512)), "{text}");
}

/// A misbehaving driver gets an error or DEVICE_NEEDS_RESET, and a working disk after a reset.
#[track_caller]
fn survives(what: &str) -> husk::Ran {
    let (_dir, disk) = disk_image(MIB);
    let ran = boot(guests::HOSTILE, &format!("do={what}")).disk(&disk, "").run();
    ran.expect(0);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
    assert!(ran.stderr.lines().count() <= 100, "the guest can fill the log: {}", ran.stderr);
    assert!(fs::read(&disk).unwrap().iter().all(|byte| *byte == 0), "nothing of this was a write");
    ran
}

#[test]
fn broken_chains_do_not_stop_the_machine() {
    needs_kvm!();
    let text = survives("chains").text();
    for claim in ["descriptor points at itself", "head outside the table", "next outside the table"] {
        assert!(text.contains(&format!("{claim}: needs reset\n")), "{text}");
    }
}

#[test]
fn addresses_outside_memory_do_not_stop_the_machine() {
    needs_kvm!();
    survives("addresses");
}

#[test]
fn absurd_indirect_tables_do_not_stop_the_machine() {
    needs_kvm!();
    survives("indirect");
}

#[test]
fn rings_in_the_wrong_place_or_of_the_wrong_size_do_not_stop_the_machine() {
    needs_kvm!();
    survives("rings");
}

#[test]
fn registers_out_of_order_and_resets_under_way_do_not_stop_the_machine() {
    needs_kvm!();
    survives("protocol");
}
