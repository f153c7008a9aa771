//! Disks of the host that fail or shrink while a guest uses them: the guest gets an error for what is affected, and the
//! machine goes on. Device mapper simulates the failures.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Mutex;
use std::sync::mpsc::Receiver;

use crate::{TIMEOUT, finish, guests, husk, is_lab, run, start_and_wait};

const BLOCK: usize = 4096;
/// A letter for each block of a disk.
const LETTERS: &str = "abcdefghijklmnop";
/// The ways to access a raw disk.
const RAW: [&str; 5] = ["", ",aio=threads", ",aio=io_uring", ",cache=none", ",cache=none,aio=threads"];

fn is_cached(options: &str) -> bool {
    !options.contains("cache=none")
}

/// A guest that executes commands for its disks.
struct Guest {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Guest {
    fn start(guest: &Path, disks: &[String]) -> Guest {
        let flags: Vec<&str> = disks.iter().flat_map(|disk| ["--disk", disk]).collect();
        let mut command = husk(guest, "vmlinux", "obey", &flags);
        let (mut child, lines) = start_and_wait(command.stdin(Stdio::piped()), "obeys=yes");
        Guest { stdin: child.stdin.take().unwrap(), child, lines }
    }

    /// The value that `command` prints for its disk, counted from 0.
    fn ask(&mut self, command: &str, disk: usize, arguments: &str) -> String {
        let name = char::from(b'a' + disk as u8);
        writeln!(self.stdin, "{command} vd{name} {arguments}").unwrap();
        loop {
            let line = self.lines.recv_timeout(TIMEOUT).unwrap_or_else(|_| panic!("no answer to {command}"));
            if let Some(value) = line.trim().strip_prefix(&format!("{command}=")) {
                return value.to_owned();
            }
        }
    }

    fn reads(&mut self, disk: usize) -> String {
        self.ask("reads", disk, &format!("0 {}", LETTERS.len() - 1))
    }

    fn writes(&mut self, disk: usize, letter: char) -> String {
        self.ask("writes", disk, &format!("0 {} {letter}", LETTERS.len() - 1))
    }

    fn flush(&mut self, disk: usize) -> bool {
        self.ask("flush", disk, "") == "+"
    }

    /// Powers the machine off, and returns what husk has logged.
    fn end(mut self) -> String {
        writeln!(self.stdin, "poweroff -f").unwrap();
        let ended = finish(self.child);
        ended.expect(0, "power-off");
        assert!(!ended.errors.contains("panicked"), "{}", ended.errors);
        ended.errors
    }
}

/// An image of [`LETTERS`].
fn image(dir: &Path, name: &str) -> String {
    let path = dir.join(name);
    let bytes: Vec<u8> = LETTERS.bytes().flat_map(|letter| [letter; BLOCK]).collect();
    fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The letters on `disk`.
fn letters(disk: &str) -> String {
    fs::read(disk).unwrap().chunks(BLOCK).map(|block| char::from(block[0])).collect()
}

/// A loop device for an image and a mapped device on top of it, removed when dropped.
struct Mapped {
    name: String,
    under: String,
    sectors: u64,
}

impl Mapped {
    /// `None` with a visible message if this user cannot create one.
    fn of(image: &str, name: &str) -> Option<Mapped> {
        if !Command::new("dmsetup").args(["targets"]).output().is_ok_and(|targets| targets.status.success()) {
            assert!(!is_lab(), "scripts/test provides dmsetup");
            eprintln!("SKIPPED: this test needs root and dmsetup (Debian package dmsetup)");
            return None;
        }
        // Busybox cannot find a free loop device and use it at once.
        static FREE: Mutex<()> = Mutex::new(());
        let found = FREE.lock().unwrap();
        let under = run("losetup", &["-f"]).trim().to_owned();
        run("losetup", &[&under, image]);
        drop(found);
        let mapped = Mapped { name: format!("husk-{}-{name}", std::process::id()), under, sectors: size(image) / 512 };
        run("dmsetup", &["create", &mapped.name, "--noudevsync", "--table", &mapped.whole()]);
        Some(mapped)
    }

    /// Its device, whether or not udev names it.
    fn path(&self) -> String {
        format!("/dev/{}", run("dmsetup", &["info", "-c", "--noheadings", "-o", "blkdevname", &self.name]).trim())
    }

    /// All of it works.
    fn whole(&self) -> String {
        format!("0 {} linear {} 0", self.sectors, self.under)
    }

    /// Reads and writes of these sectors fail.
    fn bad(&self, from: u64, until: u64) -> String {
        let Mapped { under, sectors, .. } = self;
        format!(
            "0 {from} linear {under} 0\n{from} {} error\n{until} {} linear {under} {until}",
            until - from,
            sectors - until
        )
    }

    /// All of it fails: with the `feature` `error_writes`, only writes and flushes.
    fn down(&self, feature: &str) -> String {
        let count = feature.split_whitespace().count();
        format!("0 {} flakey {} 0 0 86400 {count} {feature}", self.sectors, self.under)
    }

    /// Changes what it does, while it is in use.
    fn turn_into(&self, table: &str) {
        let path = tempfile::NamedTempFile::new().unwrap();
        fs::write(path.path(), format!("{table}\n")).unwrap();
        run("dmsetup", &["reload", &self.name, path.path().to_str().unwrap()]);
        run("dmsetup", &["resume", "--noudevsync", "--noflush", "--nolockfs", &self.name]);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // A machine that was just killed may still have it open.
        let removed = Command::new("dmsetup").args(["remove", "--retry", "--noudevsync", &self.name]).status();
        let detached = Command::new("losetup").args(["-d", &self.under]).status();
        if !std::thread::panicking() {
            assert!(removed.unwrap().success() && detached.unwrap().success());
        }
    }
}

fn size(path: &str) -> u64 {
    fs::metadata(path).unwrap().len()
}

/// An image, a device on it, and the flag of a disk on that, for each way to access a disk.
fn mapped_disks(dir: &Path, test: &str) -> Option<(Vec<String>, Vec<Mapped>, Vec<String>)> {
    let images: Vec<String> = (0..RAW.len()).map(|index| image(dir, &format!("{index}.img"))).collect();
    let named = images.iter().zip(0..);
    let devices: Vec<Mapped> =
        named.map(|(image, index)| Mapped::of(image, &format!("{test}{index}"))).collect::<Option<_>>()?;
    let flags = devices.iter().zip(RAW).map(|(device, options)| format!("{}{options}", device.path())).collect();
    Some((images, devices, flags))
}

#[test]
fn bad_sectors_fail_and_all_others_work() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let Some((images, devices, flags)) = mapped_disks(dir.path(), "bad") else { return };
    devices.iter().for_each(|device| device.turn_into(&device.bad(3 * 8, 5 * 8)));
    let mut guest = Guest::start(&guests.join("micro"), &flags);
    for (index, options) in RAW.iter().enumerate() {
        assert_eq!(guest.reads(index), "abc--fghijklmnop", "{options}");
        assert_eq!(guest.ask("writes", index, "8 15 X"), "++++++++", "{options}");
        assert!(guest.flush(index), "{options}");
        // In the page cache, writes fail only once they are written back.
        let failed = if is_cached(options) { "++" } else { "--" };
        assert_eq!(guest.ask("writes", index, "3 4 X"), failed, "{options}");
        assert_eq!(guest.flush(index), !is_cached(options), "{options}");
        // The host may keep what it could not write.
        assert_eq!(guest.reads(index).replace('X', "-")[..5], *"abc--", "{options}");
    }
    let log = guest.end();
    assert!(log.contains("Input/output error"), "{log}");
    drop(devices);
    images.iter().for_each(|image| assert_eq!(letters(image), "abcdefghXXXXXXXX"));
}

#[test]
fn a_disk_that_fails_for_a_while_works_again_but_does_not_hide_what_was_lost() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let Some((images, devices, flags)) = mapped_disks(dir.path(), "while") else { return };
    let mut guest = Guest::start(&guests.join("micro"), &flags);
    for ((index, options), device) in RAW.iter().enumerate().zip(&devices) {
        let cached = is_cached(options);
        assert_eq!(guest.ask("writes", index, "0 1 X"), "++", "{options}");
        assert!(guest.flush(index), "{options}");
        device.turn_into(&device.down("error_writes"));
        assert_eq!(guest.ask("writes", index, "2 3 Y"), if cached { "++" } else { "--" }, "{options}");
        assert!(!guest.flush(index), "{options}");
        assert_eq!(guest.ask("reads", index, "14 15"), "op", "{options}");
        device.turn_into(&device.down(""));
        // Neither the host nor the guest has read these.
        assert!(cached || guest.ask("reads", index, "8 9") == "--", "{options}");
        device.turn_into(&device.whole());
        assert_eq!(guest.ask("reads", index, "8 9"), "ij", "{options}");
        assert_eq!(guest.ask("writes", index, "4 5 Z"), "++", "{options}");
        // The host's page cache has forgotten what it could not write.
        assert_eq!(guest.flush(index), !cached, "{options}");
    }
    let log = guest.end();
    assert!(log.contains("Flush at byte 0 failed: Input/output error"), "{log}");
    drop(devices);
    for (image, options) in images.iter().zip(RAW) {
        assert_eq!(letters(image), "XXcdZZghijklmnop", "{options}");
    }
}

#[test]
fn a_qcow2_image_on_a_failing_disk_is_an_error_and_stays_consistent() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let under = dir.path().join("under.img");
    File::create(&under).unwrap().set_len(32 << 20).unwrap();
    let Some(device) = Mapped::of(under.to_str().unwrap(), "qcow2") else { return };
    run("mkfs.ext4", &["-q", "-F", "-O", "^has_journal", &device.path()]);
    let mounted = dir.path().join("mounted");
    fs::create_dir(&mounted).unwrap();
    let mounted = mounted.to_str().unwrap();
    run("mount", &["-t", "ext4", &device.path(), mounted]);
    let disk = format!("{mounted}/disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", &disk, "1M"]);
    let mut guest = Guest::start(&guests.join("micro"), std::slice::from_ref(&disk));
    assert_eq!(guest.writes(0, 'X'), "+".repeat(16));
    assert!(guest.flush(0));
    device.turn_into(&device.down("error_writes"));
    assert_eq!(guest.writes(0, 'Y'), "+".repeat(16));
    assert!(!guest.flush(0));
    device.turn_into(&device.whole());
    assert!(!guest.flush(0), "what was lost is not written later");
    assert_eq!(guest.reads(0).len(), 16);
    guest.end();
    run("umount", &[mounted]);
    run("mount", &["-t", "ext4", &device.path(), mounted]);
    run("qemu-img", &["check", "-q", &disk]);
    run("umount", &[mounted]);
}

#[test]
fn what_is_cut_off_a_disk_in_use_is_an_error_until_it_is_written_again() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let images: Vec<String> = (0..RAW.len()).map(|index| image(dir.path(), &format!("{index}.img"))).collect();
    let disks: Vec<String> = images.iter().zip(RAW).map(|(image, options)| format!("{image}{options}")).collect();
    let mut guest = Guest::start(&guests.join("micro"), &disks);
    for ((index, image), options) in images.iter().enumerate().zip(RAW) {
        let whole = guest.reads(index);
        assert_eq!(whole, LETTERS, "{options}");
        // Within a block, whose read is then a short one.
        let file = File::options().write(true).open(image).unwrap();
        file.set_len(8 * BLOCK as u64 + 512).unwrap();
        assert_eq!(guest.reads(index), "abcdefgh--------", "{options}");
        assert!(guest.flush(index), "{options}");
        assert_eq!(guest.ask("writes", index, "15 15 X"), "+", "{options}");
        let again = guest.reads(index);
        // The file has grown again, with a hole in between, which reads as zeroes.
        assert_eq!(again.replace('\0', ""), "abcdefghiX", "{options}");
        assert_eq!(size(image), (LETTERS.len() * BLOCK) as u64, "{options}");
    }
    let log = guest.end();
    assert!(log.contains("unexpected end of file"), "{log}");
}

#[test]
fn what_is_cut_off_a_qcow2_image_in_use_is_an_error() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let (raw, disk) = (image(dir.path(), "raw.img"), dir.path().join("disk.qcow2"));
    let disk = disk.to_str().unwrap().to_owned();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4096", &raw, &disk]);
    let mut guest = Guest::start(&guests.join("micro"), std::slice::from_ref(&disk));
    assert_eq!(guest.reads(0), LETTERS);
    File::options().write(true).open(&disk).unwrap().set_len(size(&disk) - 8 * BLOCK as u64).unwrap();
    assert_eq!(guest.reads(0), "abcdefgh--------");
    assert_eq!(guest.ask("writes", 0, "15 15 X"), "+");
    assert_eq!(guest.ask("reads", 0, "15 15"), "X");
    assert!(guest.flush(0));
    guest.end();
}
