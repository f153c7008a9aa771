//! Copies the files of disks, which are sparse and may be large.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs;
use rustix::io::Errno;

use super::check_is_in_use;
use crate::config::disk_name;
use crate::sys;

/// The amount that is copied at once.
const PIECE_BYTES: u64 = 8 << 20;
/// The same where the kernel does not copy.
const BUFFER_BYTES: usize = 256 << 10;

/// Opens the file of a disk to be copied, while it belongs to a machine. Fails if it is a block device: a copy of all its blocks is
/// nothing that a machine should wait for, and a file behaves differently. Fails if another file has taken its place.
pub fn source(path: &Path) -> Result<File> {
    let name = disk_name(path);
    let open = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let file = open.with_context(|| format!("open disk {name}"))?;
    let kind = file.metadata().with_context(|| format!("open disk {name}"))?.file_type();
    if kind.is_block_device() {
        bail!("disk {name} is a block device, which is not copied: take a snapshot of it by other means (such as LVM)");
    }
    ensure!(kind.is_file(), "disk {name} is not a file");
    check_is_in_use(&file, path)?;
    Ok(file)
}

/// Copies a file into an empty one. Where the file system can, both share their blocks (FICLONE); elsewhere data is copied, and
/// holes stay holes. `progress` is called with the number of bytes that are copied. Fails if it `is_cancelled`.
pub fn copy(from: &File, to: &File, is_cancelled: &dyn Fn() -> bool, progress: &dyn Fn(u64)) -> Result<()> {
    if fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len_bytes = from.metadata()?.len();
    to.set_len(len_bytes)?;
    let (mut at, mut copied_bytes) = (0, 0);
    while at < len_bytes
        && let Some(data) = sys::disk::next_data(from, at)?
    {
        at = data.start;
        while at < data.end.min(len_bytes) {
            ensure!(!is_cancelled(), "it was interrupted");
            let step_bytes = PIECE_BYTES.min(data.end.min(len_bytes) - at);
            copy_piece(from, to, at, step_bytes)?;
            (at, copied_bytes) = (at + step_bytes, copied_bytes + step_bytes);
            progress(copied_bytes);
        }
    }
    Ok(())
}

/// Copies `len_bytes` at `at`.
fn copy_piece(from: &File, to: &File, at: u64, len_bytes: u64) -> io::Result<()> {
    let end = at + len_bytes;
    let (mut source, mut target) = (at, at);
    while target < end {
        let left = (end - target) as usize;
        // It advances both positions. What it cannot copy, such as between some file systems, is read and written.
        match fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), left) {
            Err(Errno::INTR) => {}
            Err(error @ (Errno::NOSPC | Errno::IO | Errno::DQUOT | Errno::FBIG)) => return Err(error.into()),
            Ok(0) | Err(_) => return copy_by_hand(from, to, target, end - target),
            Ok(_) => {}
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, mut at: u64, mut len_bytes: u64) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    while len_bytes > 0 {
        let piece = buffer.get_mut(..BUFFER_BYTES.min(len_bytes as usize)).unwrap_or_default();
        from.read_exact_at(piece, at)?;
        to.write_all_at(piece, at)?;
        (at, len_bytes) = (at + piece.len() as u64, len_bytes - piece.len() as u64);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    /// 64 MiB with some data.
    fn sparse(dir: &Path) -> File {
        let file = tempfile::tempfile_in(dir).unwrap();
        file.set_len((64 << 20) + 512).unwrap();
        for (at, len) in [(0, 1), (20 << 20, 9 << 20), (64 << 20, 512)] {
            file.write_all_at(&vec![7; len], at).unwrap();
        }
        file
    }

    fn content(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_copy_has_the_same_content_and_the_same_holes() {
        // Also from one file system to another.
        for (one, other) in [("/tmp", "/tmp"), ("/dev/shm", "/dev/shm"), ("/dev/shm", "/tmp"), ("/tmp", "/dev/shm")] {
            let (from, to) = (sparse(Path::new(one)), tempfile::tempfile_in(other).unwrap());
            let done = std::cell::Cell::new(0);
            copy(&from, &to, &|| false, &|bytes| done.set(bytes)).unwrap();
            assert!(content(&from) == content(&to), "{one} {other}");
            assert!(to.metadata().unwrap().blocks() * 512 < 10 << 20, "{one} {other}");
            assert!(done.get() == 0 || done.get() >= 9 << 20, "{}", done.get());
        }
        let (from, to) = (sparse(Path::new("/dev/shm")), tempfile::tempfile_in("/dev/shm").unwrap());
        copy_by_hand(&from, &to, 20 << 20, 1 << 20).unwrap();
        assert_eq!(content(&to)[20 << 20..], vec![7; 1 << 20]);
        assert!(copy(&from, &to, &|| true, &|_| {}).unwrap_err().to_string().contains("interrupted"));
    }

    #[test]
    fn only_files_are_copied() {
        let refused = |path: &str| source(Path::new(path)).unwrap_err().to_string();
        assert_eq!(refused("/dev/null"), "disk /dev/null is not a file");
        assert_eq!(refused("/none"), "open disk /none");
    }

    #[test]
    fn a_file_that_has_taken_the_place_of_a_disk_is_not_copied() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let held = File::create(&path).unwrap();
        held.lock().unwrap();
        source(&path).unwrap();
        std::fs::write(dir.path().join("other"), "other").unwrap();
        std::fs::rename(dir.path().join("other"), &path).unwrap();
        let error = source(&path).unwrap_err().to_string();
        assert!(error.ends_with("is not the file that the machine has open: it was replaced"), "{error}");
    }
}
