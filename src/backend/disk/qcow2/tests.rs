//! Tests with images created and checked by QEMU.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use super::super::Operation;
use super::*;
use crate::memory::GuestBuffers;
use crate::memory::{self, GuestMemory};

mod backing;
mod truncated;

const MIB: u64 = 1 << 20;
const SIZE: u64 = 64 * MIB;

/// A directory for images, or `None` with a visible message without `qemu-img`.
pub(super) fn dir() -> Option<tempfile::TempDir> {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("SKIPPED: tests of qcow2 need qemu-img (Debian package qemu-utils)");
        return None;
    }
    Some(tempfile::tempdir().unwrap())
}

pub(super) fn qemu_img(words: &[&str]) -> String {
    let output = Command::new("qemu-img").args(words).output().unwrap();
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {words:?}: {text}");
    text
}

fn create(dir: &Path, options: &str) -> PathBuf {
    let path = dir.join("disk.qcow2");
    qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE.to_string()]);
    path
}

fn open(path: &Path, readonly: bool) -> Result<Qcow2Disk, Refusal> {
    Qcow2Disk::open(File::options().read(true).write(!readonly).open(path).unwrap(), readonly, None)
}

/// The content as read by QEMU, after it has checked the image.
pub(super) fn contents(path: &Path) -> Vec<u8> {
    let (from, to) = (path.to_str().unwrap(), path.with_extension("raw"));
    qemu_img(&["check", "-q", from]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", from, to.to_str().unwrap()]);
    std::fs::read(to).unwrap()
}

pub(super) struct Disk {
    pub(super) disk: Qcow2Disk,
    pub(super) memory: Arc<GuestMemory>,
}

impl Disk {
    pub(super) fn new(disk: Qcow2Disk) -> Disk {
        Disk { disk, memory: Arc::new(memory::reserve(4).unwrap()) }
    }

    pub(super) fn run(&mut self, operation: Operation, offset_bytes: u64, parts: &[(u64, u32)]) -> io::Result<()> {
        let mut buffers = GuestBuffers::new(self.memory.clone());
        parts.iter().for_each(|(at, len)| buffers.push(GuestAddress(*at), *len).unwrap());
        self.disk.execute(&mut Request { token: 7, operation, offset_bytes, buffers })
    }

    /// Writes from two separate ranges of guest memory.
    pub(super) fn write(&mut self, at: u64, bytes: &[u8]) {
        let (first, second) = bytes.split_at(bytes.len() / 2);
        self.memory.write_slice(first, GuestAddress(0x1000)).unwrap();
        self.memory.write_slice(second, GuestAddress(0x20_0000)).unwrap();
        let parts = [(0x1000, first.len() as u32), (0x20_0000, second.len() as u32)];
        self.run(Operation::Write, at, &parts).unwrap();
    }

    pub(super) fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
        let (first, second) = (len / 2, len - len / 2);
        self.run(Operation::Read, at, &[(0x1000, first as u32), (0x20_0000, second as u32)]).unwrap();
        let mut bytes = vec![0; len];
        self.memory.read_slice(&mut bytes[..first], GuestAddress(0x1000)).unwrap();
        self.memory.read_slice(&mut bytes[first..], GuestAddress(0x20_0000)).unwrap();
        bytes
    }
}

pub(super) fn pattern(seed: u64) -> impl Iterator<Item = u64> {
    std::iter::successors(Some(seed), |x| Some(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1)))
        .map(|x| x >> 33)
}

fn bytes(seed: u64, len: usize) -> Vec<u8> {
    pattern(seed).map(|x| x as u8 | 1).take(len).collect()
}

/// Performs the same operations on an image and on a vector, which must stay identical.
fn same_as_a_raw_disk(options: &str) {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), options);
    same_as(options, &path, || open(&path, false).unwrap(), vec![0; SIZE as usize]);
}

/// Performs random operations on an image that contains `expected`, and on `expected`.
fn same_as(options: &str, path: &Path, open: impl Fn() -> Qcow2Disk, mut expected: Vec<u8>) {
    let mut disk = Disk::new(open());
    assert_eq!(disk.disk.capacity_bytes(), SIZE);
    let mut numbers = pattern(9);
    let mut number = |limit: u64| numbers.next().unwrap() % limit;
    for step in 0..400 {
        let len = 512 * (1 + number(if step % 10 == 0 { 2000 } else { 64 }));
        let at = 512 * number((SIZE - len) / 512 + 1);
        let range = at as usize..(at + len) as usize;
        match number(8) {
            0 => {
                let operation = Operation::WriteZeroes { len_bytes: len, unmap: number(2) == 0 };
                disk.run(operation, at, &[]).unwrap();
                expected[range].fill(0);
            }
            1 => {
                disk.run(Operation::Discard { len_bytes: len }, at, &[]).unwrap();
                // The content after a discard depends on the format: it is the previous one, or zeroes.
                let now = disk.read(at, range.len());
                let before = expected[range.clone()].iter();
                assert!(now.iter().zip(before).all(|(now, before)| *now == 0 || now == before), "{options}: at {at}");
                expected[range].copy_from_slice(&now);
            }
            2 => disk.run(Operation::Flush, 0, &[]).unwrap(),
            3 | 4 => assert!(disk.read(at, range.len()) == expected[range], "{options}: {len} bytes at {at}"),
            _ => {
                let data = bytes(step, range.len());
                disk.write(at, &data);
                expected[range].copy_from_slice(&data);
            }
        }
    }
    drop(disk);
    assert!(contents(path) == expected, "{options}");
    let mut disk = Disk::new(open());
    assert!(disk.read(0, 1 << 20) == expected[..1 << 20], "{options}");
}

#[test]
fn an_image_behaves_like_a_raw_disk() {
    same_as_a_raw_disk("cluster_size=65536");
}

#[test]
fn an_image_with_small_clusters_and_wide_refcounts_behaves_like_a_raw_disk() {
    same_as_a_raw_disk("cluster_size=512,refcount_bits=64");
}

#[test]
fn a_version_2_image_behaves_like_a_raw_disk() {
    same_as_a_raw_disk("compat=0.10");
}

#[test]
fn a_flush_reaches_the_image() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "lazy_refcounts=off");
    let mut disk = Disk::new(open(&path, false).unwrap());
    disk.write(MIB, &bytes(1, 4096));
    disk.run(Operation::Flush, 0, &[]).unwrap();
    // The state if the process were killed now.
    assert!(contents(&path)[MIB as usize..][..4096] == bytes(1, 4096));
    disk.write(2 * MIB, &bytes(2, 4096));
    drop(disk);
    assert!(contents(&path)[2 * MIB as usize..][..4096] == bytes(2, 4096), "dropping it writes it back");
}

#[test]
fn discarded_clusters_are_reused_and_zeroes_take_no_space() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=65536");
    let mut disk = Disk::new(open(&path, false).unwrap());
    let fill = |disk: &mut Disk, from_mib: u64| {
        (from_mib..from_mib + 16).for_each(|mib| disk.write(mib * MIB, &bytes(mib, MIB as usize)));
        disk.run(Operation::Flush, 0, &[]).unwrap();
        std::fs::metadata(&path).unwrap().len()
    };
    let full = fill(&mut disk, 0);
    disk.run(Operation::Discard { len_bytes: 16 * MIB }, 0, &[]).unwrap();
    disk.run(Operation::WriteZeroes { len_bytes: 16 * MIB, unmap: false }, 32 * MIB, &[]).unwrap();
    disk.run(Operation::Flush, 0, &[]).unwrap();
    let refilled = fill(&mut disk, 16);
    assert!(refilled < full + MIB, "{full} bytes have become {refilled}");
}

#[test]
fn compressed_clusters_are_read_and_overwritten() {
    let Some(dir) = dir() else { return };
    for options in ["compression_type=zlib", "compression_type=zstd", "compression_type=zstd,cluster_size=2M"] {
        let (raw, path) = (dir.path().join("plain"), dir.path().join("disk.qcow2"));
        // Compressible like text.
        let mut expected: Vec<u8> = bytes(5, 4 * MIB as usize).iter().map(|byte| byte & 0x1f).collect();
        std::fs::write(&raw, &expected).unwrap();
        let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from, to]);
        assert!(qemu_img(&["check", to]).contains("100.00% compressed"), "{options}");
        let mut disk = Disk::new(open(&path, true).unwrap());
        for at in [0, 65_536 - 512, MIB + 512, 4 * MIB - 4096] {
            assert!(disk.read(at, 4096.min(expected.len() - at as usize)) == expected[at as usize..][..4096], "{at}");
        }
        drop(disk);
        let mut disk = Disk::new(open(&path, false).unwrap());
        disk.write(MIB + 512, &[7; 1024]);
        expected[MIB as usize + 512..][..1024].fill(7);
        disk.run(Operation::WriteZeroes { len_bytes: 1024, unmap: false }, 3 * MIB + 512, &[]).unwrap();
        expected[3 * MIB as usize + 512..][..1024].fill(0);
        disk.write(2 * MIB, &[9; 256 << 10]);
        expected[2 * MIB as usize..][..256 << 10].fill(9);
        drop(disk);
        assert!(contents(&path) == expected, "{options}");
    }
}

#[test]
fn an_invalid_compressed_cluster_is_an_error() {
    for compression in [packed::Compression::Deflate, packed::Compression::Zstd] {
        for packed in [&[][..], &[0x28, 0xb5, 0x2f, 0xfd], &[0xff; 512], &[0; 512], &[1, 0, 0, 0xff, 0xff]] {
            assert!(compression.unpack(packed, 512).is_err(), "{compression:?}: {packed:?}");
        }
    }
}

#[test]
fn a_snapshot_in_the_image_is_not_modified() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=65536");
    let mut disk = Disk::new(open(&path, false).unwrap());
    disk.write(0, &bytes(1, MIB as usize));
    drop(disk);
    qemu_img(&["snapshot", "-c", "before", path.to_str().unwrap()]);
    let mut disk = Disk::new(open(&path, false).unwrap());
    disk.write(0, &bytes(2, MIB as usize));
    drop(disk);
    assert!(contents(&path)[..MIB as usize] == bytes(2, MIB as usize));
    qemu_img(&["snapshot", "-a", "before", path.to_str().unwrap()]);
    assert!(contents(&path)[..MIB as usize] == bytes(1, MIB as usize));
}

#[test]
fn an_image_that_refers_to_an_external_data_file_is_rejected() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), &format!("data_file={}", dir.path().join("data.raw").display()));
    assert!(matches!(open(&path, false), Err(Refusal::ExternalData)));
}

#[test]
fn a_bad_image_is_rejected_in_one_line() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=65536");
    let good = std::fs::read(&path).unwrap();
    let refusal = |change: fn(&mut Vec<u8>)| {
        let mut bytes = good.clone();
        change(&mut bytes);
        std::fs::write(&path, &bytes).unwrap();
        open(&path, false).unwrap_err().to_string()
    };
    for (part, change) in [
        ("not a qcow2", (|bytes| bytes[0] = 0) as fn(&mut Vec<u8>)),
        ("not a qcow2", |bytes| bytes.truncate(40)),
        ("encrypted", |bytes| bytes[35] = 1),
        ("not closed", |bytes| (bytes[79], bytes[63]) = (bytes[79] | 1, 1)),
        ("marked as corrupt", |bytes| bytes[79] |= 2),
        ("unknown compression type (9)", |bytes| (bytes[79], bytes[104]) = (bytes[79] | 8, 9)),
        ("extended L2 entries", |bytes| bytes[79] |= 16),
        ("qcow2 features", |bytes| bytes[72] |= 0x80),
        ("version 9", |bytes| bytes[7] = 9),
        ("too small for its size", |bytes| bytes[27] = 1),
        ("its header is invalid", |bytes| bytes[23] = 40),
        ("its header is invalid", |bytes| bytes[99] = 7),
        ("too many clusters", |bytes| bytes[36..40].fill(0xff)),
        ("not aligned to a cluster", |bytes| bytes[47] = 1),
        ("outside the file", |bytes| bytes[44] = 1),
        // The L1 table, then its first L2 table, over the header; an L2 table that is the L1 table.
        ("used twice", |bytes| bytes[40..48].fill(0)),
        ("used twice", |bytes| bytes[0x3_0005] = 1),
        ("used twice", |bytes| bytes[0x3_0005] = 3),
        ("outside the file", |bytes| bytes[0x3_0000..0x3_0008].copy_from_slice(&(1_u64 << 40).to_be_bytes())),
        // A refcount in the only block, for a cluster that a snapshot may use.
        ("counted as free", |bytes| (bytes[0x2_0001], bytes[63]) = (0, 1)),
    ] {
        let line = refusal(change);
        assert!(line.contains(part) && !line.contains('\n'), "{part}: {line}");
    }
    std::fs::write(&path, &good).unwrap();
    open(&path, false).unwrap();
}

/// Every feature of the format is read, or refused by its name: all kinds that QEMU creates, and every bit of the header.
#[test]
fn every_feature_is_read_or_refused_by_its_name() {
    let Some(dir) = dir() else { return };
    let (mib, data) = (MIB as usize, dir.path().join("data.raw"));
    let (data, secret) = (format!("data_file={}", data.display()), "--object=secret,id=key,data=key");
    for (options, refused) in [
        ("compat=0.10", None),
        ("compat=1.1", None),
        ("lazy_refcounts=on", None),
        ("compression_type=zstd", None),
        ("refcount_bits=1", None),
        ("refcount_bits=64", None),
        ("preallocation=metadata", None),
        ("preallocation=full", None),
        ("cluster_size=512", None),
        ("cluster_size=2M", None),
        (&data, Some("external data file")),
        ("extended_l2=on", Some("extended L2 entries")),
        ("encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10", Some("encrypted")),
        ("encrypt.format=aes,encrypt.key-secret=key", Some("encrypted")),
    ] {
        let path = dir.path().join("disk.qcow2");
        qemu_img(&["create", "-q", secret, "-f", "qcow2", "-o", options, path.to_str().unwrap(), "4M"]);
        match (open(&path, false), refused) {
            (Ok(disk), None) => {
                let mut disk = Disk::new(disk);
                disk.write(MIB, &bytes(1, mib));
                drop(disk);
                assert!(contents(&path)[mib..2 * mib] == bytes(1, mib), "{options}");
            }
            (Err(refusal), Some(reason)) => assert!(refusal.to_string().contains(reason), "{options}: {refusal}"),
            (other, _) => panic!("{options}: {other:?}"),
        }
    }
}

#[test]
fn every_feature_bit_is_known_ignored_as_specified_or_refused() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=65536");
    // A persistent bitmap, with its autoclear bit and header extension.
    qemu_img(&["bitmap", "--add", path.to_str().unwrap(), "changes"]);
    let good = std::fs::read(&path).unwrap();
    let with_bit = |field: usize, bit: usize| {
        let mut image = good.clone();
        image[field + 7 - bit / 8] |= 1 << (bit % 8);
        std::fs::write(&path, image).unwrap();
        open(&path, false).map(drop).map_err(|refusal| refusal.to_string())
    };
    for bit in 0..64 {
        let expected = match bit {
            0 | 3 => None,
            1 => Some("marked as corrupt".to_owned()),
            2 => Some("external data file".to_owned()),
            4 => Some("extended L2".to_owned()),
            _ => Some(format!("unknown qcow2 features ({:#x})", 1_u64 << bit)),
        };
        match (with_bit(72, bit), expected) {
            (Ok(()), None) => assert_eq!(std::fs::read(&path).unwrap()[79] & 1, 0, "it is not dirty any more"),
            (Err(line), Some(part)) => assert!(line.contains(&part), "bit {bit}: {line}"),
            (other, _) => panic!("incompatible feature {bit}: {other:?}"),
        }
        // Compatible features can be ignored.
        with_bit(80, bit).unwrap();
        assert!(std::fs::read(&path).unwrap()[80..88] != [0; 8], "they are kept");
        // Whoever writes without knowing an autoclear feature clears it, so that others do not trust a stale bitmap.
        with_bit(88, bit).unwrap();
        assert_eq!(std::fs::read(&path).unwrap()[88..96], [0; 8]);
    }
}

#[test]
fn a_read_only_image_is_not_modified() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=65536");
    let before = std::fs::read(&path).unwrap();
    let mut disk = Disk::new(open(&path, true).unwrap());
    assert!(disk.read(0, 4096).iter().all(|byte| *byte == 0));
    assert!(disk.run(Operation::Write, 0, &[(0x1000, 512)]).is_err());
    drop(disk);
    assert!(std::fs::read(&path).unwrap() == before);
}

#[test]
fn extended_l2_entries_are_rejected_with_a_command_to_convert_them() {
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "extended_l2=on,cluster_size=128k");
    let line = open(&path, false).unwrap_err().to_string();
    assert!(line.contains("qemu-img convert -O qcow2 -o extended_l2=off OLD NEW"), "{line}");
    let new = dir.path().join("new.qcow2");
    let words = ["convert", "-O", "qcow2", "-o", "extended_l2=off", path.to_str().unwrap(), new.to_str().unwrap()];
    qemu_img(&words);
    open(&new, false).unwrap();
}

/// The state after a power failure if a writer orders refcounts before references without a sync in between.
#[test]
fn lost_refcounts_are_repaired_without_data_loss() {
    let Some(dir) = dir() else { return };
    for (options, dirty) in [("cluster_size=4096", false), ("cluster_size=512,lazy_refcounts=on", true)] {
        let path = create(dir.path(), options);
        let mut disk = Disk::new(open(&path, false).unwrap());
        disk.write(MIB, &bytes(1, MIB as usize));
        drop(disk);
        let mut image = std::fs::read(&path).unwrap();
        let expected = contents(&path);
        let u64_at = |image: &[u8], at: usize| u64::from_be_bytes(*image[at..].first_chunk().unwrap()) as usize;
        let (table, cluster) = (u64_at(&image, 48), 1 << image[23]);
        // The second refcount block is missing in the table; the first is zeroed.
        image[table + 8..table + 16].fill(0);
        let block = u64_at(&image, table);
        image[block..block + cluster].fill(0);
        image[79] |= u8::from(dirty);
        std::fs::write(&path, &image).unwrap();
        let mut disk = Disk::new(open(&path, true).unwrap());
        assert!(disk.read(MIB, MIB as usize) == bytes(1, MIB as usize), "{options}");
        drop(disk);
        assert!(std::fs::read(&path).unwrap() == image, "a read-only open repairs nothing");
        let mut disk = Disk::new(open(&path, false).unwrap());
        assert!(contents(&path) == expected, "{options}");
        assert_eq!(std::fs::read(&path).unwrap()[79] & 1, 0);
        disk.write(8 * MIB, &bytes(2, MIB as usize));
        assert!(disk.read(MIB, MIB as usize) == bytes(1, MIB as usize), "{options}");
        drop(disk);
        assert!(contents(&path)[8 * MIB as usize..][..MIB as usize] == bytes(2, MIB as usize));
    }
}

#[test]
fn discarded_clusters_are_deallocated_on_the_host() {
    use std::os::unix::fs::MetadataExt;
    let Some(dir) = dir() else { return };
    let path = create(dir.path(), "cluster_size=65536");
    let used_bytes = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let mut disk = Disk::new(open(&path, false).unwrap());
    let fill = |disk: &mut Disk| (0..16).for_each(|mib| disk.write(mib * MIB, &bytes(mib, MIB as usize)));
    for operation in [
        Operation::Discard { len_bytes: SIZE },
        Operation::WriteZeroes { len_bytes: SIZE, unmap: true },
        Operation::Discard { len_bytes: 16 * MIB },
    ] {
        fill(&mut disk);
        disk.run(Operation::Flush, 0, &[]).unwrap();
        assert!(used_bytes() > 16 * MIB);
        // A driver need not flush afterwards.
        disk.run(operation, 0, &[]).unwrap();
        assert!(used_bytes() < MIB, "{} bytes are used after {operation:?}", used_bytes());
        assert!(disk.read(0, MIB as usize).iter().all(|byte| *byte == 0));
    }
    drop(disk);
    assert!(contents(&path).iter().all(|byte| *byte == 0));
}

#[test]
fn discards_and_zeroes_allocate_no_tables() {
    let Some(dir) = dir() else { return };
    for options in ["cluster_size=512", "cluster_size=65536", "cluster_size=2M", "compat=0.10"] {
        let path = create(dir.path(), options);
        let before = std::fs::read(&path).unwrap();
        let mut disk = Disk::new(open(&path, false).unwrap());
        for unmap in [false, true] {
            disk.run(Operation::Discard { len_bytes: SIZE - 512 }, 512, &[]).unwrap();
            disk.run(Operation::WriteZeroes { len_bytes: SIZE - 1024, unmap }, 512, &[]).unwrap();
        }
        disk.run(Operation::Flush, 0, &[]).unwrap();
        drop(disk);
        assert!(std::fs::read(&path).unwrap() == before, "{options}");
    }
}

#[test]
fn cached_tables_stay_within_their_limit_for_any_cluster_size() {
    let Some(dir) = dir() else { return };
    // Each of these steps uses a different page of the L2 tables.
    for (options, size, step_bytes, steps) in
        [("cluster_size=2M", "4T", 1 << 30, 1500), ("cluster_size=512", "12G", MIB, 9000)]
    {
        let path = dir.path().join("large.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), size]);
        let mut disk = Disk::new(open(&path, false).unwrap());
        for step in 0..steps {
            disk.write(step * step_bytes, &[step as u8; 512]);
            let kept = disk.disk.image.tables.kept_bytes();
            assert!(kept < tables::CACHE_BYTES + (64 << 10), "{kept} bytes are kept");
        }
        for step in (0..steps).step_by(61) {
            assert_eq!(disk.read(step * step_bytes, 512), [step as u8; 512], "{options}");
        }
        // The second time these tables are empty.
        for _ in 0..2 {
            disk.run(Operation::Discard { len_bytes: steps * step_bytes }, 0, &[]).unwrap();
            let kept = disk.disk.image.tables.kept_bytes();
            assert!(kept < tables::CACHE_BYTES + (64 << 10), "{kept} bytes are kept, {options}");
        }
        drop(disk);
        qemu_img(&["check", "-q", path.to_str().unwrap()]);
        std::fs::remove_file(path).unwrap();
    }
}

/// With any bytes changed, an image is either rejected, or is a valid disk, also when opened again.
#[test]
fn a_corrupted_image_is_rejected_or_stays_valid() {
    let Some(dir) = dir() else { return };
    let mut numbers = pattern(11);
    let mut number = |limit: usize| numbers.next().unwrap() as usize % limit;
    let mut opened = 0;
    for options in ["cluster_size=512", "cluster_size=1024,refcount_bits=1", "cluster_size=512,refcount_bits=64"] {
        let (raw, path) = (dir.path().join("plain"), dir.path().join("disk.qcow2"));
        std::fs::write(&raw, [&[1; 8192][..], &bytes(1, 8192), &[0; 200 << 10]].concat()).unwrap();
        let (from, to) = (raw.to_str().unwrap(), path.to_str().unwrap());
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", options, from, to]);
        let good = std::fs::read(&path).unwrap();
        for round in 0..600 {
            let mut image = good.clone();
            for _ in 0..1 + number(3) {
                let end = if number(2) == 0 { 112 } else { image.len() };
                let at = number(end);
                image[at] = [0, 1, 0x80, 0xff, image[at] ^ 1, number(256) as u8][number(6)];
            }
            std::fs::write(&path, &image).unwrap();
            let Ok(disk) = open(&path, round % 4 == 0) else { continue };
            opened += 1;
            let end = disk.capacity_bytes() / 512 * 512;
            let mut disk = Disk::new(disk);
            for at in [0, 512, 8192, end / 1024 * 512].into_iter().filter(|at| at + 4096 <= end) {
                let part: &[(u64, u32)] = &[(0x1000, 4096)];
                let _ = disk.run(Operation::Read, at, part);
                let _ = disk.run(Operation::Write, at, part);
                let _ = disk.run(Operation::WriteZeroes { len_bytes: 1536, unmap: round % 2 == 0 }, at, &[]);
                let _ = disk.run(Operation::Discard { len_bytes: 4096 }, at, &[]);
                let _ = disk.run(Operation::Flush, 0, &[]);
                let _ = disk.run(Operation::Write, at, part);
            }
            drop(disk);
            open(&path, round % 4 == 0).unwrap_or_else(|refusal| panic!("{options}, round {round}: {refusal}"));
        }
    }
    assert!(opened > 300, "{opened} were opened");
}
