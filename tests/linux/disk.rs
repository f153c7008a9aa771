//! A guest's writes to its disks, verified on the host.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use crate::{Ended, boot, guests, husk, run, start_and_wait};

/// A disk image of `bytes`, optionally with an ext4 file system.
pub fn disk(dir: &Path, bytes: u64, file_system: bool) -> String {
    let path = dir.join("disk.img");
    File::create(&path).unwrap().set_len(bytes).unwrap();
    let path = path.to_str().unwrap().to_owned();
    if file_system {
        // The largest logical block size of a disk.
        run("mkfs.ext4", &["-q", "-F", "-b", "4096", &path]);
    }
    path
}

/// Checks that the raw disk `image` contains the guest's data.
pub fn holds_what_was_written(image: &str, ended: &Ended, what: &str) {
    assert_eq!(ended.expect(0, what).values()["unmounted"], "yes");
    run("e2fsck", &["-f", "-n", image]);
    let data = format!("{image}.data");
    run("debugfs", &["-R", &format!("dump /data {data}"), image]);
    assert_eq!(fs::metadata(&data).unwrap().len(), 16 << 20);
    let sha256 = run("sha256sum", &[&data]);
    assert_eq!(sha256.split_whitespace().next(), Some(ended.values()["sha256"]), "{what}");
}

#[test]
fn synced_data_is_on_the_disk() {
    let guests = guests!();
    for kernel in ["stock", "micro"] {
        let dir = tempfile::tempdir().unwrap();
        let image = disk(dir.path(), 64 << 20, true);
        let ended = boot(&guests.join(kernel), "vmlinux", "write", &["--disk", &image, "--cpus", "2"]);
        holds_what_was_written(&image, &ended, kernel);
    }
}

#[test]
fn synced_data_is_on_the_disk_however_it_is_accessed() {
    let guests = guests!();
    for options in
        [",aio=io_uring,num_queues=2", ",aio=threads,block_size=4096", ",cache=none", ",cache=none,num_queues=2"]
    {
        let dir = tempfile::tempdir().unwrap();
        let image = disk(dir.path(), 64 << 20, true);
        let flags = ["--disk", &format!("{image}{options}"), "--cpus", "2"];
        let ended = boot(&guests.join("micro"), "vmlinux", "write", &flags);
        if ended.errors.contains("remove cache=none") {
            eprintln!("SKIPPED: no direct access to temporary files here");
            continue;
        }
        holds_what_was_written(&image, &ended, options);
    }
}

#[test]
fn a_partition_table_in_blocks_of_4096_bytes_is_read() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path(), 64 << 20, false);
    // A partition of 1000 blocks from block 16 (MBR).
    let mut table = [0; 512];
    table[446 + 4] = 0x83;
    table[446 + 8..446 + 16].copy_from_slice(&[16_u32.to_le_bytes(), 1000_u32.to_le_bytes()].concat());
    table[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&image, table).unwrap();
    File::options().write(true).open(&image).unwrap().set_len(64 << 20).unwrap();
    for (options, logical, partition) in [(",num_queues=2", "512", "16 1000"), (",block_size=4096", "4096", "128 8000")]
    {
        let flags = ["--disk", &format!("{image}{options}"), "--cpus", "2"];
        let ended = boot(&guests.join("stock"), "vmlinux", "blocks", &flags);
        let values = ended.expect(0, options).values();
        let queues = if logical == "512" { "2" } else { "1" };
        assert_eq!([values["logical"], values["physical"], values["partition"]], [logical, "4096", partition]);
        assert_eq!(values["queues"], queues);
    }
}

#[test]
fn synced_data_is_in_the_qcow2_image() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let raw = disk(dir.path(), 64 << 20, true);
    let image = raw.replace(".img", ".qcow2");
    // Compressed, so that clusters must be decompressed, and relocated on writes.
    run("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &image]);
    let ended = boot(&guests.join("micro"), "vmlinux", "write", &["--disk", &image, "--cpus", "2"]);
    run("qemu-img", &["check", "-q", &image]);
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", &image, &raw]);
    holds_what_was_written(&raw, &ended, "qcow2");
}

#[test]
fn a_read_only_disk_is_not_modified() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path(), 32 << 20, true);
    let before = fs::read(&image).unwrap();
    let ended = boot(&guests.join("micro"), "vmlinux", "read_only", &["--disk", &format!("{image},ro")]);
    let values = ended.expect(0, "read-only disk").values();
    assert_eq!((values["ro"], values["mounted"], values["written"]), ("1", "yes", "no"));
    assert!(fs::read(&image).unwrap() == before, "the image changed");
}

#[test]
fn a_disk_may_exceed_two_tebibytes() {
    const MIB: u64 = 1 << 20;
    const SIZE_MIB: u64 = 3 << 20;
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path(), MIB, false);
    // Extended as a user would: sparse, after it was created.
    File::options().write(true).open(&image).unwrap().set_len(SIZE_MIB * MIB).unwrap();
    let at_mib = SIZE_MIB - 1;
    let ended = boot(&guests.join("micro"), "vmlinux", &format!("far {at_mib}"), &["--disk", &image]);
    let values = ended.expect(0, "disk of 3 TiB").values();
    assert_eq!((values["bytes"], values["found"]), (&*(SIZE_MIB * MIB).to_string(), "far away"));
    let mut file = File::open(&image).unwrap();
    let mut found = [0; 8];
    file.seek(SeekFrom::Start(at_mib * MIB)).unwrap();
    file.read_exact(&mut found).unwrap();
    assert_eq!(&found, b"far away");
}

#[test]
fn kill_9_leaves_nothing_behind() {
    let guests = guests!();
    let dir = tempfile::tempdir().unwrap();
    let image = disk(dir.path(), 32 << 20, true);
    let guest = guests.join("micro");
    let flags = ["--disk", &*image];
    let (mut child, _) = start_and_wait(&mut husk(&guest, "vmlinux", "hold", &flags), "holding=yes");
    boot(&guest, "vmlinux", "report", &flags).expect(1, "a disk in use is refused");
    child.kill().unwrap();
    child.wait().unwrap();
    let ended = boot(&guest, "vmlinux", "write", &flags);
    assert_eq!(ended.expect(0, "the disk is free again").values()["unmounted"], "yes");
    let files: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(files, ["disk.img"]);
}
