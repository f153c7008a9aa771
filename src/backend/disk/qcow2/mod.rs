//! From a request to a qcow2 image, whose tables and clusters the `imago` crate keeps: done when `submit` returns.
//!
//! The image is one file that is already open: whatever other file it names is never looked for.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::fd::BorrowedFd;

use imago::FormatAccess;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::qcow2::Qcow2;

use super::{Completion, DiskBackend, Operation, Request, write_zeroes_out};

mod check;

/// Why an image is not used.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Another file, or none.
    #[error("is no qcow2 image (add `,format=raw` to use it as it is)")]
    NotQcow2,
    /// A file of the host's that whoever made the image has chosen.
    #[error("has a backing file, which is not opened: make one whole image of both with `qemu-img convert -O qcow2`")]
    BackingFile,
    /// The same.
    #[error("keeps its data in another file, which is not opened: make one image with `qemu-img convert -O qcow2`")]
    ExternalData,
    /// What is in it would be taken for the disk's contents.
    #[error("is encrypted, which is not supported: decrypt it with `qemu-img convert`")]
    Encrypted,
    /// Whoever wrote to it last did not come to an end.
    #[error("was not closed by its last user: repair it with `qemu-img check -r all`")]
    Dirty,
    /// Its tables contradict each other, or the file, by accident or not.
    #[error("is damaged, {0}: if you trust where it comes from, repair it with `qemu-img check -r all`")]
    Damaged(&'static str),
    /// It would take too much time or memory to look at.
    #[error(
        "has more clusters than are looked at: make them larger with `qemu-img convert -O qcow2 -o cluster_size=2M`"
    )]
    TooLarge,
    /// Another compression than deflate.
    #[error("is compressed by other means than zlib: convert it with `qemu-img convert -O qcow2`")]
    Compression,
    /// Whatever else is wrong with it.
    #[error("cannot be used as qcow2: {0}")]
    Bad(#[from] io::Error),
}

/// A qcow2 image. Dropping it writes what it holds back.
pub struct Qcow2Disk {
    image: FormatAccess<imago::file::File>,
    done: VecDeque<Completion>,
}

impl Qcow2Disk {
    /// The image in `file`, which is open for writing too unless `readonly`.
    pub fn open(file: File, readonly: bool) -> Result<Qcow2Disk, Refusal> {
        check::check(&file)?;
        // It opens no other file: not even those that the header names.
        let image = Qcow2::<imago::file::File>::open_image(file.try_into()?, !readonly)?;
        Ok(Qcow2Disk { image: FormatAccess::new(image), done: VecDeque::new() })
    }

    /// Size of the disk that the image describes.
    pub fn capacity_bytes(&self) -> u64 {
        self.image.size()
    }

    fn execute(&mut self, request: &mut Request) -> io::Result<()> {
        let offset_bytes = request.offset_bytes;
        match request.operation {
            Operation::Read => {
                let slices = request.buffers.slices();
                let (buffers, _guard) = IoVectorMut::from_volatile_slice(&slices);
                self.image.readv(buffers, offset_bytes)
            }
            Operation::Write => {
                let slices = request.buffers.slices();
                let (buffers, _guard) = IoVector::from_volatile_slice(&slices);
                self.image.writev(buffers, offset_bytes)
            }
            Operation::Flush => {
                // What it keeps of the tables, then all of the file.
                self.image.flush()?;
                self.image.sync()
            }
            // What is discarded is used again; the file does not shrink. A hint, which not every version can take.
            Operation::Discard { len_bytes } => match self.image.discard_to_any(offset_bytes, len_bytes) {
                Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
                result => result,
            },
            Operation::WriteZeroes { len_bytes, unmap } => self.write_zeroes(offset_bytes, len_bytes, unmap),
        }
    }

    fn write_zeroes(&mut self, offset_bytes: u64, len_bytes: u64, unmap: bool) -> io::Result<()> {
        let result = match unmap {
            true => self.image.discard_to_zero(offset_bytes, len_bytes),
            false => self.image.write_zeroes(offset_bytes, len_bytes),
        };
        match result {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                write_zeroes_out(offset_bytes, len_bytes, |zeroes, at| self.image.write(zeroes, at))
            }
            result => result,
        }
    }
}

impl fmt::Debug for Qcow2Disk {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Qcow2Disk").field("image", &self.image).finish_non_exhaustive()
    }
}

impl DiskBackend for Qcow2Disk {
    fn submit(&mut self, mut request: Request) {
        let result = self.execute(&mut request);
        self.done.push_back(Completion { request, result });
    }

    fn reap(&mut self) -> Option<Completion> {
        self.done.pop_front()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn drain(&mut self) {}
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::super::GuestBuffers;
    use super::*;
    use crate::memory::{self, GuestMemory};

    const MIB: u64 = 1 << 20;
    const SIZE: u64 = 64 * MIB;

    /// A folder for images, or `None` and a loud word where there is no `qemu-img`.
    fn folder() -> Option<tempfile::TempDir> {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            eprintln!("SKIPPED: tests of qcow2 need qemu-img (Debian package qemu-utils)");
            return None;
        }
        Some(tempfile::tempdir().unwrap())
    }

    fn qemu_img(words: &[&str]) -> String {
        let output = Command::new("qemu-img").args(words).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "qemu-img {words:?}: {text}");
        text
    }

    fn create(folder: &Path, options: &str) -> PathBuf {
        let path = folder.join("disk.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, path.to_str().unwrap(), &SIZE.to_string()]);
        path
    }

    fn open(path: &Path, readonly: bool) -> Result<Qcow2Disk, Refusal> {
        Qcow2Disk::open(File::options().read(true).write(!readonly).open(path).unwrap(), readonly)
    }

    /// What QEMU finds in the image, which it has to find in order first.
    fn contents(path: &Path) -> Vec<u8> {
        let (from, to) = (path.to_str().unwrap(), path.with_extension("raw"));
        qemu_img(&["check", "-q", from]);
        qemu_img(&["convert", "-f", "qcow2", "-O", "raw", from, to.to_str().unwrap()]);
        std::fs::read(to).unwrap()
    }

    struct Disk {
        disk: Qcow2Disk,
        memory: Arc<GuestMemory>,
    }

    impl Disk {
        fn new(disk: Qcow2Disk) -> Disk {
            Disk { disk, memory: Arc::new(memory::reserve(4).unwrap()) }
        }

        fn run(&mut self, operation: Operation, offset_bytes: u64, parts: &[(u64, u32)]) -> io::Result<()> {
            let mut buffers = GuestBuffers::new(self.memory.clone());
            parts.iter().for_each(|(at, len)| buffers.push(GuestAddress(*at), *len).unwrap());
            self.disk.submit(Request { token: 7, operation, offset_bytes, buffers });
            let completion = self.disk.reap().unwrap();
            assert_eq!(completion.request.token, 7);
            assert!(self.disk.reap().is_none());
            completion.result
        }

        /// Writes from two places of guest memory.
        fn write(&mut self, at: u64, bytes: &[u8]) {
            let (first, second) = bytes.split_at(bytes.len() / 2);
            self.memory.write_slice(first, GuestAddress(0x1000)).unwrap();
            self.memory.write_slice(second, GuestAddress(0x20_0000)).unwrap();
            let parts = [(0x1000, first.len() as u32), (0x20_0000, second.len() as u32)];
            self.run(Operation::Write, at, &parts).unwrap();
        }

        fn read(&mut self, at: u64, len: usize) -> Vec<u8> {
            let (first, second) = (len / 2, len - len / 2);
            self.run(Operation::Read, at, &[(0x1000, first as u32), (0x20_0000, second as u32)]).unwrap();
            let mut bytes = vec![0; len];
            self.memory.read_slice(&mut bytes[..first], GuestAddress(0x1000)).unwrap();
            self.memory.read_slice(&mut bytes[first..], GuestAddress(0x20_0000)).unwrap();
            bytes
        }
    }

    fn pattern(seed: u64) -> impl Iterator<Item = u64> {
        std::iter::successors(Some(seed), |x| Some(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1)))
            .map(|x| x >> 33)
    }

    fn bytes(seed: u64, len: usize) -> Vec<u8> {
        pattern(seed).map(|x| x as u8 | 1).take(len).collect()
    }

    /// Does the same to an image and to a plain vector, which then have to be the same.
    fn same_as_a_raw_disk(options: &str) {
        let Some(folder) = folder() else { return };
        let path = create(folder.path(), options);
        let mut disk = Disk::new(open(&path, false).unwrap());
        assert_eq!(disk.disk.capacity_bytes(), SIZE);
        let mut expected = vec![0; SIZE as usize];
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
                    // What it reads as afterwards is the format's choice.
                    let now = disk.read(at, range.len());
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
        assert!(contents(&path) == expected, "{options}");
        let mut disk = Disk::new(open(&path, false).unwrap());
        assert!(disk.read(0, 1 << 20) == expected[..1 << 20], "{options}");
    }

    #[test]
    fn an_image_is_what_a_raw_disk_would_be() {
        same_as_a_raw_disk("cluster_size=65536");
    }

    #[test]
    fn an_image_of_small_clusters_and_wide_counts_is_what_a_raw_disk_would_be() {
        same_as_a_raw_disk("cluster_size=512,refcount_bits=64");
    }

    #[test]
    fn an_image_of_the_old_version_is_what_a_raw_disk_would_be() {
        same_as_a_raw_disk("compat=0.10");
    }

    #[test]
    fn a_flush_reaches_the_image() {
        let Some(folder) = folder() else { return };
        let path = create(folder.path(), "lazy_refcounts=off");
        let mut disk = Disk::new(open(&path, false).unwrap());
        disk.write(MIB, &bytes(1, 4096));
        disk.run(Operation::Flush, 0, &[]).unwrap();
        // As it would be found if we were killed now.
        assert!(contents(&path)[MIB as usize..][..4096] == bytes(1, 4096));
        disk.write(2 * MIB, &bytes(2, 4096));
        drop(disk);
        assert!(contents(&path)[2 * MIB as usize..][..4096] == bytes(2, 4096), "dropping it writes it back");
    }

    #[test]
    fn what_is_discarded_makes_room_for_other_data_and_zeroes_take_none() {
        let Some(folder) = folder() else { return };
        let path = create(folder.path(), "cluster_size=65536");
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
    fn compressed_clusters_are_read_and_may_be_written_over() {
        let Some(folder) = folder() else { return };
        let (raw, path) = (folder.path().join("plain"), folder.path().join("disk.qcow2"));
        // As text would be: it shrinks, but not to nothing.
        let mut expected: Vec<u8> = bytes(5, 4 * MIB as usize).iter().map(|byte| byte & 0x1f).collect();
        std::fs::write(&raw, &expected).unwrap();
        qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", raw.to_str().unwrap(), path.to_str().unwrap()]);
        assert!(std::fs::metadata(&path).unwrap().len() < 3 * MIB, "it was not compressed");
        let mut disk = Disk::new(open(&path, true).unwrap());
        for at in (0..4 * MIB).step_by(MIB as usize) {
            assert!(disk.read(at, MIB as usize) == expected[at as usize..][..MIB as usize], "{at}");
        }
        drop(disk);
        let mut disk = Disk::new(open(&path, false).unwrap());
        disk.write(MIB + 512, &[7; 1024]);
        expected[MIB as usize + 512..][..1024].fill(7);
        drop(disk);
        assert!(contents(&path) == expected);
    }

    #[test]
    fn a_snapshot_in_the_image_stays_as_it_was() {
        let Some(folder) = folder() else { return };
        let path = create(folder.path(), "cluster_size=65536");
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
    fn an_image_that_names_other_files_is_refused() {
        let Some(folder) = folder() else { return };
        let base = create(folder.path(), "cluster_size=65536");
        let path = folder.path().join("top.qcow2");
        let words =
            ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base.to_str().unwrap(), path.to_str().unwrap()];
        qemu_img(&words);
        assert!(matches!(open(&path, false), Err(Refusal::BackingFile)));
        create(folder.path(), &format!("data_file={}", folder.path().join("data.raw").display()));
        assert!(matches!(open(&base, false), Err(Refusal::ExternalData)));
    }

    #[test]
    fn a_bad_image_is_refused_in_one_line() {
        let Some(folder) = folder() else { return };
        let path = create(folder.path(), "cluster_size=65536");
        let good = std::fs::read(&path).unwrap();
        let refusal = |change: fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            std::fs::write(&path, &bytes).unwrap();
            open(&path, false).unwrap_err().to_string()
        };
        for (part, change) in [
            ("no qcow2", (|bytes| bytes[0] = 0) as fn(&mut Vec<u8>)),
            ("no qcow2", |bytes| bytes.truncate(40)),
            ("encrypted", |bytes| bytes[35] = 1),
            ("not closed", |bytes| bytes[79] |= 1),
            ("marked so", |bytes| bytes[79] |= 2),
            ("other means", |bytes| bytes[79] |= 8),
            ("feature", |bytes| bytes[72] |= 0x80),
            ("v9", |bytes| bytes[7] = 9),
            ("makes no sense", |bytes| bytes[23] = 40),
            ("makes no sense", |bytes| bytes[99] = 7),
            ("more clusters", |bytes| bytes[36..40].fill(0xff)),
            ("half a cluster", |bytes| bytes[47] = 1),
            ("not in the file", |bytes| bytes[44] = 1),
            // The first level, then its first table, onto the header; a table of the second level that is the first level.
            ("two things", |bytes| bytes[40..48].fill(0)),
            ("two things", |bytes| bytes[0x3_0005] = 1),
            ("two things", |bytes| bytes[0x3_0005] = 3),
            ("not in the file", |bytes| bytes[0x3_0000..0x3_0008].copy_from_slice(&(1_u64 << 40).to_be_bytes())),
            // The only block of counts, and a count in it.
            ("counted as free", |bytes| bytes[0x1_0000..0x1_0008].fill(0)),
            ("counted as free", |bytes| bytes[0x2_0001] = 0),
        ] {
            let line = refusal(change);
            assert!(line.contains(part) && !line.contains('\n'), "{part}: {line}");
        }
        std::fs::write(&path, &good).unwrap();
        open(&path, false).unwrap();
    }

    #[test]
    fn a_read_only_image_stays_as_it_is() {
        let Some(folder) = folder() else { return };
        let path = create(folder.path(), "cluster_size=65536");
        let before = std::fs::read(&path).unwrap();
        let mut disk = Disk::new(open(&path, true).unwrap());
        assert!(disk.read(0, 4096).iter().all(|byte| *byte == 0));
        assert!(disk.run(Operation::Write, 0, &[(0x1000, 512)]).is_err());
        drop(disk);
        assert!(std::fs::read(&path).unwrap() == before);
    }
}
