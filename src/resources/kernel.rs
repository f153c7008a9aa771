//! Opens kernels such that they load fast: a bzImage is unpacked once and then found in a cache by its content.
//!
//! The cache has a file `SHA256.elf` for each bzImage, and a second name for it that identifies the bzImage without
//! reading it.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use sha2::{Digest, Sha256};

use super::cache::{Cache, Identity};
use crate::boot::{BzImage, Kernel, KernelImage};
use crate::sys;

/// Enough for a developer who builds kernels all day: two names per kernel, and 30 MiB per pair.
const NAMES_KEPT: usize = 16;
/// Shorter operations need no progress bar.
const PROGRESS_AFTER: Duration = Duration::from_millis(200);

/// Opens the kernel at `path`: a vmlinux directly, a bzImage as the kernel that it contains, a unified kernel image by
/// its parts.
///
/// A bzImage with unsupported compression is returned as [`Kernel::BzImage`] and unpacks itself. An unusable cache only
/// costs time.
pub fn open(path: &Path) -> Result<KernelImage> {
    let cache = Cache::of_user("unpacked", NAMES_KEPT);
    open_with_cache(path, cache.as_ref()).with_context(|| format!("open kernel {}", path.display()))
}

fn open_with_cache(path: &Path, cache: Option<&Cache>) -> Result<KernelImage> {
    // Otherwise opening a FIFO without a writer would block.
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_dir() {
        bail!("is a directory");
    }
    ensure!(kind.is_file(), "not a regular file");
    let identity = Identity::of(&file)?;
    let KernelImage { kernel, initrd, cmdline } = KernelImage::identify(file)?;
    let kernel = match kernel {
        Kernel::BzImage(image) if image.can_be_unpacked() => unpacked(&image, &identity, cache)?,
        kernel => kernel,
    };
    Ok(KernelImage { kernel, initrd, cmdline })
}

/// Unpacks the kernel in `image`, from or into the cache, or to memory.
fn unpacked(image: &BzImage, identity: &Identity, cache: Option<&Cache>) -> Result<Kernel> {
    if let Some(cache) = cache {
        let shortcut = format!("{}.elf", identity.name);
        if let Some(kernel) = cached(cache, &shortcut, image) {
            return Ok(kernel);
        }
        let entry = content_name(image)?;
        let kernel = cached(cache, &entry, image).map_or_else(|| unpack_to_cache(image, cache, &entry), Ok);
        match kernel {
            Ok(kernel) => {
                if identity.settled && Identity::of(image.file())?.name == identity.name {
                    // Replaces a link to a damaged file. If it cannot be created, the next boot takes a few
                    // milliseconds longer.
                    let _ = fs::remove_file(cache.path(&shortcut));
                    let _ = fs::hard_link(cache.path(&entry), cache.path(&shortcut));
                }
                return Ok(kernel);
            }
            Err(error) => log::info!("the decompressed kernel is not cached: {error:#}"),
        }
    }
    let file = sys::memory_file(c"husk-kernel").context("create a file in memory")?;
    unpack_to(image, &file)?;
    Kernel::elf(file)
}

/// The cache name of a bzImage: its SHA-256.
fn content_name(image: &BzImage) -> Result<String> {
    let mut hash = Sha256::new();
    let mut reader = image.reader();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match reader.read(&mut buffer)? {
            0 => break,
            len => hash.update(&buffer[..len]),
        }
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).chain([".elf".to_owned()]).collect())
}

/// The entry in the cache, if it is intact.
fn cached(cache: &Cache, name: &str, image: &BzImage) -> Option<Kernel> {
    let file = cache.open(name)?;
    let whole = file.metadata().ok()?.len() == image.unpacked_bytes();
    let kernel = whole.then(|| Kernel::elf(file).ok()).flatten();
    if kernel.is_none() {
        log::warn!("{} is corrupted: decompressing the kernel again", cache.path(name).display());
    }
    kernel
}

fn unpack_to_cache(image: &BzImage, cache: &Cache, entry: &str) -> Result<Kernel> {
    cache.fill(entry, |file| {
        unpack_to(image, file)?;
        Kernel::elf(file.try_clone()?)
    })
}

fn unpack_to(image: &BzImage, file: &File) -> Result<()> {
    let started = Instant::now();
    let bar = ProgressBar::with_draw_target(Some(image.unpacked_bytes()), ProgressDrawTarget::hidden());
    bar.set_style(ProgressStyle::with_template("decompressing the kernel {bar:30} {bytes}/{total_bytes}")?);
    let on_terminal = std::io::stderr().is_terminal();
    image.unpack(&mut SparseWriter { file, at: 0 }, &mut |done| {
        if on_terminal && bar.is_hidden() && started.elapsed() > PROGRESS_AFTER {
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        bar.set_position(done);
    })?;
    bar.finish_and_clear();
    Ok(file.set_len(image.unpacked_bytes())?)
}

/// Writes a file sequentially, with a hole for each block of zeroes, which make up a third of a kernel.
struct SparseWriter<'a> {
    file: &'a File,
    at: u64,
}

impl Write for SparseWriter<'_> {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        const ZEROES: [u8; 4096] = [0; 4096];
        let is_zero = |block: &[u8]| ZEROES.starts_with(block);
        let blocks: Vec<&[u8]> = buffer.chunks(ZEROES.len()).collect();
        let mut rest = buffer;
        for run in blocks.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let (bytes, after) = rest.split_at(run.iter().map(|block| block.len()).sum());
            if !run.first().is_some_and(|block| is_zero(block)) {
                self.file.write_all_at(bytes, self.at)?;
            }
            self.at += bytes.len() as u64;
            rest = after;
        }
        Ok(buffer.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::PathBuf;
    use std::time::SystemTime;

    use tempfile::TempDir;

    use super::*;
    use crate::boot::sample;

    fn open_in(path: &Path, dir: Option<&Path>) -> Result<Kernel> {
        Ok(open_with_cache(path, dir.map(|dir| Cache::at(dir, NAMES_KEPT)).as_ref())?.kernel)
    }

    /// A directory with a bzImage, and the content that it unpacks to.
    fn bzimage() -> (TempDir, PathBuf, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("bzImage");
        let kernel = sample::kernel(64 << 10);
        let payload = sample::packed(&kernel, "gzip -n -9").expect("gzip is part of every Debian");
        fs::write(&path, sample::bzimage(&payload)).unwrap();
        (dir, path, kernel)
    }

    fn read(kernel: &Kernel) -> Vec<u8> {
        let Kernel::Elf(file) = kernel else { panic!("no ELF image") };
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn names(cache: &Path) -> Vec<PathBuf> {
        fs::read_dir(cache).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// The only file in `cache`.
    fn only_entry(cache: &Path) -> PathBuf {
        let names = names(cache);
        let [entry] = names.as_slice() else { panic!("{names:?}") };
        assert!(entry.to_str().unwrap().ends_with(".elf"));
        entry.clone()
    }

    #[test]
    fn a_bzimage_is_unpacked_once() {
        let (dir, path, kernel) = bzimage();
        let cache = dir.path().join("a/b");
        assert!(read(&open_in(&path, Some(&cache)).unwrap()) == kernel);
        let first = fs::metadata(only_entry(&cache)).unwrap().ino();
        let copy = dir.path().join("copy");
        fs::copy(&path, &copy).unwrap();
        assert!(read(&open_in(&copy, Some(&cache)).unwrap()) == kernel);
        assert_eq!(fs::metadata(only_entry(&cache)).unwrap().ino(), first);
    }

    #[test]
    fn an_unchanged_bzimage_is_not_read_again() {
        let (dir, path, kernel) = bzimage();
        let cache = dir.path().join("cache");
        std::thread::sleep(Duration::from_millis(1100));
        open_in(&path, Some(&cache)).unwrap();
        let (shortcuts, entries): (Vec<_>, Vec<_>) =
            names(&cache).into_iter().partition(|name| name.to_str().unwrap().contains('-'));
        let ([shortcut], [entry]) = (shortcuts.as_slice(), entries.as_slice()) else {
            panic!("{shortcuts:?} {entries:?}")
        };
        fs::remove_file(entry).unwrap();
        assert!(read(&open_in(&path, Some(&cache)).unwrap()) == kernel);
        assert_eq!(only_entry(&cache), *shortcut, "found by it");

        // Another kernel in the same file, with the same size and time.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        let mut other = kernel.clone();
        *other.last_mut().unwrap() ^= 1;
        let payload = sample::packed(&other, "gzip -n -9").unwrap();
        fs::write(&path, sample::bzimage(&payload)).unwrap();
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        assert!(read(&open_in(&path, Some(&cache)).unwrap()) == other);
    }

    #[test]
    fn the_least_recently_used_entry_is_evicted() {
        let (dir, path, _) = bzimage();
        let cache = dir.path().join("cache");
        fs::create_dir(&cache).unwrap();
        for age in 1..=20 {
            let file = File::create(cache.join(format!("{age}.elf"))).unwrap();
            file.set_modified(SystemTime::now() - Duration::from_secs(age * 60)).unwrap();
        }
        open_in(&path, Some(&cache)).unwrap();
        assert_eq!(names(&cache).len(), NAMES_KEPT);
        assert!(cache.join("15.elf").exists() && !cache.join("16.elf").exists());
    }

    #[test]
    fn zeroes_are_holes_in_the_cache() {
        let file = tempfile::tempfile().unwrap();
        let mut bytes = vec![0; 1 << 20];
        bytes[4096] = 1;
        bytes[50_000] = 2;
        let mut writer = SparseWriter { file: &file, at: 0 };
        for chunk in bytes.chunks(65_536) {
            writer.write_all(chunk).unwrap();
        }
        file.set_len(bytes.len() as u64).unwrap();
        assert!(file.metadata().unwrap().blocks() * 512 < bytes.len() as u64 / 2);
        let mut back = vec![0xff; bytes.len()];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back == bytes);
    }

    #[test]
    fn a_damaged_entry_is_rewritten() {
        let (dir, path, kernel) = bzimage();
        let cache = dir.path().join("cache");
        open_in(&path, Some(&cache)).unwrap();
        let entry = only_entry(&cache);
        for damaged in [kernel[..kernel.len() - 1].to_vec(), vec![0; kernel.len()], vec![]] {
            fs::write(&entry, damaged).unwrap();
            assert!(read(&open_in(&path, Some(&cache)).unwrap()) == kernel);
            assert!(fs::read(only_entry(&cache)).unwrap() == kernel);
        }
    }

    #[test]
    fn without_a_cache_it_is_unpacked_to_memory() {
        let (_dir, path, kernel) = bzimage();
        // No directory can be created below a file, even by root.
        for cache in [None, Some(path.join("cache"))] {
            assert!(read(&open_in(&path, cache.as_deref()).unwrap()) == kernel);
        }
    }

    #[test]
    fn files_of_killed_processes_are_reused() {
        let (dir, path, kernel) = bzimage();
        let cache = dir.path().join("cache");
        open_in(&path, Some(&cache)).unwrap();
        let entry = only_entry(&cache);
        let part = entry.with_extension("part");
        fs::remove_file(&entry).unwrap();
        fs::write(&part, vec![0xff; 2 * kernel.len()]).unwrap();

        let other = File::open(&part).unwrap();
        other.lock().unwrap();
        assert!(read(&open_in(&path, Some(&cache)).unwrap()) == kernel);
        assert!(!entry.exists(), "another husk is at it");
        // Closing it is not enough: a child started by another test shares the lock for a moment.
        other.unlock().unwrap();
        assert!(read(&open_in(&path, Some(&cache)).unwrap()) == kernel);
        assert!(fs::read(only_entry(&cache)).unwrap() == kernel);
    }

    #[test]
    fn concurrent_processes_all_get_the_kernel() {
        let (dir, path, kernel) = bzimage();
        let cache = dir.path().join("cache");
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| assert!(read(&open_in(&path, Some(&cache)).unwrap()) == kernel));
            }
        });
        assert!(fs::read(only_entry(&cache)).unwrap() == kernel);
    }

    #[test]
    fn a_damaged_bzimage_leaves_nothing_in_the_cache() {
        let (dir, path, _) = bzimage();
        let cache = dir.path().join("cache");
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0xff;
        fs::write(&path, bytes).unwrap();
        let error = format!("{:#}", open_in(&path, Some(&cache)).unwrap_err());
        assert!(error.starts_with("decompress the kernel in the bzImage (gzip): "), "{error}");
        assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
    }

    #[test]
    fn an_invalid_kernel_is_rejected_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::write(at("text"), "#!/bin/sh\n").unwrap();
        let error = |path: &Path| format!("{:#}", open(path).unwrap_err());
        let expected = [
            ("absent", "No such file or directory (os error 2)"),
            (".", "is a directory"),
            ("text", "not a kernel: expected an ELF vmlinux, a bzImage or a unified kernel image"),
        ];
        for (name, why) in expected {
            assert_eq!(error(&at(name)), format!("open kernel {}: {why}", at(name).display()));
        }
        // This FIFO never has a writer.
        let made = std::process::Command::new("mkfifo").arg(at("fifo")).status().unwrap();
        assert!(made.success() && error(&at("fifo")).ends_with(": not a regular file"));
    }
}
