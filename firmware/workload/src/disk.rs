//! Disk tasks: sequential and random, through the page cache or with direct I/O.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use husk_init::errors::{Context, Failure};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::sys::Pages;
use crate::task::Task;

const BLOCK_BYTES: usize = 1 << 20;
const SMALL_BYTES: usize = 4096;
/// The maximum size of a scratch file, which is overwritten beyond that.
const SCRATCH_BYTES: u64 = 64 << 20;
/// The maximum size of a file in the root file system, which may be in a small machine's memory.
const ROOT_BYTES: u64 = 32 << 20;
const NAME: &str = ".husk-bench-file";

/// Reads the image's file sequentially, from the disk in each pass.
pub fn read_root(amount: u64, path: &Path) -> Result<Task, Failure> {
    let (file, bytes) = open_data(path, BLOCK_BYTES)?;
    let mut block = Pages::map(BLOCK_BYTES).context("map a buffer")?;
    Ok(Box::new(move || {
        pieces(amount, bytes, BLOCK_BYTES).try_for_each(|Piece { at, len, begins_pass }| {
            if begins_pass {
                forget(&file);
            }
            let part = block.get_mut(..len).unwrap_or_default();
            file.read_exact_at(part, at).context("read")
        })
    }))
}

/// Reads blocks of 4 KiB of the image's file, each part once from the disk in each pass.
pub fn read_root_anywhere(amount: u64, path: &Path) -> Result<Task, Failure> {
    let (file, bytes) = open_data(path, SMALL_BYTES)?;
    let _ = posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_RANDOM);
    let mut anywhere = Anywhere::of(bytes / SMALL_BYTES as u64);
    let mut part = Pages::map(SMALL_BYTES).context("map a buffer")?;
    Ok(Box::new(move || {
        (0..amount).try_for_each(|number| {
            if number % anywhere.count == 0 {
                forget(&file);
            }
            file.read_exact_at(&mut part, anywhere.next() * SMALL_BYTES as u64).context("read")
        })
    }))
}

/// Writes sequentially to a file in the root file system, with fsync(2) after each pass.
pub fn write_root(amount: u64, dir: Option<&Path>) -> Result<Task, Failure> {
    let file = match dir {
        Some(dir) => Temporary::make(dir, 0)?,
        // A container's root may be read-only, but its /tmp is not.
        None => Temporary::make(Path::new("/"), 0).or_else(|_| Temporary::make(Path::new("/tmp"), 0))?,
    };
    write_in_order(file, amount, ROOT_BYTES)
}

/// The same on the scratch disk.
pub fn write(amount: u64, dir: &Path) -> Result<Task, Failure> {
    write_in_order(Temporary::make(dir, 0)?, amount, SCRATCH_BYTES)
}

fn write_in_order(file: Temporary, amount: u64, bytes: u64) -> Result<Task, Failure> {
    let mut block = Incompressible::block(BLOCK_BYTES)?;
    Ok(Box::new(move || {
        for (number, Piece { at, len, begins_pass }) in pieces(amount, bytes, BLOCK_BYTES).enumerate() {
            if begins_pass && number > 0 {
                file.handle.sync_all().context("fsync")?;
            }
            file.handle.write_all_at(block.next(len), at).context("write")?;
        }
        file.handle.sync_all().context("fsync")
    }))
}

/// Reads a scratch file sequentially with direct I/O; the last block is rounded up to 4 KiB.
pub fn read_direct(amount: u64, dir: &Path) -> Result<Task, Failure> {
    let file = Temporary::filled(dir)?;
    let mut block = Pages::map(BLOCK_BYTES).context("map a buffer")?;
    Ok(Box::new(move || {
        pieces(amount, SCRATCH_BYTES, BLOCK_BYTES).try_for_each(|Piece { at, len, .. }| {
            let part = block.get_mut(..len.next_multiple_of(SMALL_BYTES)).unwrap_or_default();
            file.handle.read_exact_at(part, at).context("read")
        })
    }))
}

/// Writes blocks of 4 KiB to a scratch file at random with direct I/O.
pub fn write_anywhere(amount: u64, dir: &Path) -> Result<Task, Failure> {
    let file = Temporary::filled(dir)?;
    let mut block = Incompressible::block(SMALL_BYTES)?;
    let mut anywhere = Anywhere::of(SCRATCH_BYTES / SMALL_BYTES as u64);
    Ok(Box::new(move || {
        (0..amount).try_for_each(|_| {
            let at = anywhere.next() * SMALL_BYTES as u64;
            file.handle.write_all_at(block.next(SMALL_BYTES), at).context("write")
        })
    }))
}

/// Reads blocks of 4 KiB of a scratch file at random with direct I/O.
pub fn read_anywhere(amount: u64, dir: &Path) -> Result<Task, Failure> {
    let file = Temporary::filled(dir)?;
    let mut part = Pages::map(SMALL_BYTES).context("map a buffer")?;
    let mut anywhere = Anywhere::of(SCRATCH_BYTES / SMALL_BYTES as u64);
    Ok(Box::new(move || {
        (0..amount).try_for_each(|_| {
            file.handle.read_exact_at(&mut part, anywhere.next() * SMALL_BYTES as u64).context("read")
        })
    }))
}

/// Appends blocks of 4 KiB to a scratch file, with fdatasync(2) after each.
pub fn append(amount: u64, dir: &Path) -> Result<Task, Failure> {
    let file = Temporary::make(dir, 0)?;
    let mut block = Incompressible::block(SMALL_BYTES)?;
    Ok(Box::new(move || {
        for Piece { at, len, begins_pass } in pieces(amount * SMALL_BYTES as u64, SCRATCH_BYTES, SMALL_BYTES) {
            if begins_pass {
                // Overwriting would not be appending.
                file.handle.set_len(0).context("truncate")?;
            }
            file.handle.write_all_at(block.next(len), at).context("append")?;
            file.handle.sync_data().context("fdatasync")?;
        }
        Ok(())
    }))
}

/// A block in a pass over a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    at: u64,
    len: usize,
    begins_pass: bool,
}

/// Sequential passes over a file of `bytes`, in blocks, until `amount` is reached.
fn pieces(amount: u64, bytes: u64, block: usize) -> impl Iterator<Item = Piece> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let at = done % bytes;
        let len = (amount - done).min(bytes - at).min(block as u64);
        done += len;
        (len > 0).then_some(Piece { at, len: len as usize, begins_pass: at == 0 })
    })
}

/// A permutation of the numbers below `count` in an unpredictable order, repeated.
struct Anywhere {
    count: u64,
    mask: u64,
    state: u64,
}

impl Anywhere {
    fn of(count: u64) -> Anywhere {
        Anywhere { count, mask: count.next_power_of_two() - 1, state: 0 }
    }

    /// A linear congruential generator with full period (Hull and Dobell 1962), skipping values that are too large.
    fn next(&mut self) -> u64 {
        loop {
            self.state = self.state.wrapping_mul(0x0019_660d).wrapping_add(0x3c6e_f35f) & self.mask;
            if self.state < self.count {
                return self.state;
            }
        }
    }
}

/// Incompressible data: all pages of all blocks differ.
struct Incompressible {
    pages: Pages,
    number: u64,
}

impl Incompressible {
    fn block(len: usize) -> Result<Incompressible, Failure> {
        let mut pages = Pages::map(len).context("map a buffer")?;
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        for word in pages.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        Ok(Incompressible { pages, number: 0 })
    }

    fn next(&mut self, len: usize) -> &[u8] {
        for page in self.pages.chunks_exact_mut(SMALL_BYTES) {
            self.number += 1;
            if let Some(word) = page.first_chunk_mut() {
                *word = self.number.to_le_bytes();
            }
        }
        self.pages.get(..len).unwrap_or_default()
    }
}

/// A temporary file of a task.
struct Temporary {
    handle: File,
    path: PathBuf,
}

impl Temporary {
    fn make(dir: &Path, flags: i32) -> Result<Temporary, Failure> {
        let path = dir.join(NAME);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(flags == 0).custom_flags(flags);
        match options.open(&path) {
            Ok(handle) => Ok(Temporary { handle, path }),
            Err(error) if flags & libc::O_DIRECT != 0 && error.kind() == ErrorKind::InvalidInput => {
                Err(Failure::new(format_args!("the file system of {} has no direct I/O", dir.display())))
            }
            Err(error) => Err(error).context(format_args!("create {}", path.display())),
        }
    }

    /// A file that is completely on the disk, opened with direct I/O.
    fn filled(dir: &Path) -> Result<Temporary, Failure> {
        let cached = Temporary::make(dir, 0)?;
        let mut block = Incompressible::block(BLOCK_BYTES)?;
        for Piece { at, len, .. } in pieces(SCRATCH_BYTES, SCRATCH_BYTES, BLOCK_BYTES) {
            cached.handle.write_all_at(block.next(len), at).context("fill the file")?;
        }
        cached.handle.sync_all().context("fsync")?;
        forget(&cached.handle);
        let direct = Temporary::make(dir, libc::O_DIRECT)?;
        // The other handle takes over the path.
        let Temporary { path, .. } = &cached;
        debug_assert_eq!(*path, direct.path);
        std::mem::forget(cached);
        Ok(direct)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn open_data(path: &Path, least: usize) -> Result<(File, u64), Failure> {
    let what = || format!("read {}", path.display());
    let file = File::open(path).context(what())?;
    let bytes = file.metadata().context(what())?.len();
    if bytes < least as u64 {
        return Err(Failure::new(format_args!("{} has less than {least} bytes", path.display())));
    }
    Ok((file, bytes))
}

/// Drops a file's pages from the page cache.
fn forget(file: &File) {
    let _ = posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn passes_cover_a_file_in_order_and_end_with_the_amount() {
        let all: Vec<(u64, usize, bool)> =
            pieces(25, 10, 4).map(|piece| (piece.at, piece.len, piece.begins_pass)).collect();
        let pass = [(0, 4, true), (4, 4, false), (8, 2, false)];
        assert_eq!(all, [pass.as_slice(), &pass, &[(0, 4, true), (4, 1, false)]].concat());
        assert_eq!(pieces(0, 10, 4).count(), 0);
    }

    #[test]
    fn random_access_covers_everything_once() {
        for count in [1, 2, 3, 1000, 1024, 16384] {
            let mut anywhere = Anywhere::of(count);
            for _ in 0..3 {
                let seen: HashSet<u64> = (0..count).map(|_| anywhere.next()).collect();
                assert_eq!(seen.len() as u64, count);
                assert!(seen.iter().all(|number| *number < count));
            }
        }
        let mut anywhere = Anywhere::of(16384);
        let mut last = anywhere.next();
        let neighbours =
            (0..16000).filter(|_| anywhere.next().abs_diff(std::mem::replace(&mut last, anywhere.state)) == 1);
        assert!(neighbours.count() < 100, "it is not in order");
    }

    #[test]
    fn no_page_is_written_twice() {
        let mut block = Incompressible::block(2 * SMALL_BYTES).unwrap();
        let mut seen = HashSet::new();
        for _ in 0..3 {
            assert!(block.next(2 * SMALL_BYTES).chunks(SMALL_BYTES).all(|page| seen.insert(page.to_vec())));
        }
    }

    #[test]
    fn created_files_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        for prepare in [write, append] {
            let mut task = prepare(10, dir.path()).unwrap();
            task().unwrap();
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
            drop(task);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_file_that_is_missing_or_too_short_is_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        assert!(read_root(1, &path).is_err());
        std::fs::write(&path, [0; SMALL_BYTES]).unwrap();
        assert!(read_root(1, &path).is_err());
        assert!(read_root_anywhere(1, &path).is_ok());
    }
}
