//! Opens and locks disks: raw files, qcow2 files and block devices.
//!
//! ```text
//! DiskConfig ─ twice ─> open, lock ─ block sizes, format ─┬ raw ─> PlainDisk ─────────────┬─> DiskFile
//!                                                         └ qcow2, backing ─> Qcow2Disk ──┘
//! ```

mod backing;
pub mod copy;
mod format;
pub mod stamp;
#[cfg(test)]
mod tests;
mod twice;

use std::fs::{File, TryLockError};
use std::io::{ErrorKind, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::fs::{self, AtFlags, OFlags, StatxFlags};

use crate::backend::disk::{Alignment, PlainDisk, Qcow2Disk, UringDisk};
use crate::config::{Aio, Cache, DISK_BLOCK_BYTES, DiskConfig, Format, Rate, disk_name};
use crate::sys;
use format::warn_of_format;

/// The physical block size of a file: that of the page cache and of most disks.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;
/// The largest physical block size that is passed on.
const PHYSICAL_BLOCK_BYTES_MAX: u32 = 1 << 20;
/// How long after the end of a monitor that was killed the kernel may still have its disks open, in rings: some 25 ms.
const RELEASED_WITHIN: Duration = Duration::from_millis(200);
const LOCK_INTERVAL: Duration = Duration::from_millis(5);
/// linux/magic.h.
const TMPFS_MAGIC: fs::FsWord = 0x0102_1994;

/// An open, locked disk: no other process writes to it, and none reads it while it is open for writing.
#[derive(Debug)]
pub struct DiskFile {
    /// The image that requests operate on. It holds the lock.
    pub image: DiskImage,
    /// The path, for messages.
    pub path: PathBuf,
    /// The size, a nonzero multiple of 512.
    pub capacity_bytes: u64,
    /// Whether it is read-only.
    pub readonly: bool,
    /// The logical block size; the capacity is a multiple of it.
    pub block_bytes: u32,
    /// The physical block size, at least the logical one.
    pub physical_block_bytes: u32,
    /// The serial number.
    pub id: Option<String>,
    /// How a raw image is accessed.
    pub aio: Aio,
    /// The number of queues: 1 for qcow2.
    pub queues: u16,
    /// The guest's rate limits.
    pub rate: Rate,
}

/// A disk image, by format.
#[derive(Debug)]
pub enum DiskImage {
    /// The content of the disk.
    Raw(PlainDisk),
    /// A qcow2 image. The tables read so far are valid.
    Qcow2(Box<Qcow2Disk>),
}

impl DiskFile {
    /// All descriptors.
    pub(super) fn fds(&self) -> Vec<RawFd> {
        match &self.image {
            DiskImage::Raw(disk) => vec![disk.as_raw_fd()],
            DiskImage::Qcow2(disk) => disk.fds(),
        }
    }
}

/// Opens the disks of a machine, in order, and locks them. Fails if the machine would use a file twice, unless it only
/// reads it.
pub fn open_all(configs: &[DiskConfig]) -> Result<Vec<DiskFile>> {
    twice::check(configs)?;
    configs.iter().map(open).collect()
}

/// Opens the disk that `config` describes, and locks it: shared if it is read-only, exclusively if not (flock(2)).
///
/// Fails with one line that names the disk and what is wrong with it.
fn open(config: &DiskConfig) -> Result<DiskFile> {
    let DiskConfig { path, readonly, id, cache, aio, queues, rate, .. } = config;
    let name = disk_name(path);
    let file = open_file(path, *readonly)?;
    let block_device = is_block_device(&file, path)?;
    clear_nonblock(&file).with_context(|| format!("open disk {name}"))?;
    lock(&file, path, *readonly)?;
    let direct = match cache {
        Cache::Writeback => None,
        Cache::None => Some(direct_alignment(&file, block_device).with_context(|| format!("disk {name}"))?),
    };
    let (block_bytes, physical_block_bytes) = block_sizes(config, &file, block_device, direct)?;
    if config.format.is_none() && config.format() == Format::Raw {
        warn_of_format(&file, path, "format");
    }
    let (image, capacity_bytes) = match config.format() {
        Format::Raw => raw_image(config, file, block_device, direct)?,
        Format::Qcow2 => qcow2_image(config, file, block_device)?,
    };
    ensure!(capacity_bytes > 0, "disk {name} is empty");
    ensure!(
        capacity_bytes.is_multiple_of(block_bytes.into()),
        "disk {name} has {capacity_bytes} bytes, which is not a multiple of {block_bytes}"
    );
    let (path, readonly, id) = (path.clone(), *readonly, id.clone());
    let (aio, queues, rate) = (*aio, *queues, *rate);
    Ok(DiskFile { image, path, capacity_bytes, readonly, block_bytes, physical_block_bytes, id, aio, queues, rate })
}

fn open_file(path: &Path, readonly: bool) -> Result<File> {
    let name = disk_name(path);
    // Without O_NONBLOCK, opening a FIFO blocks until the other end is opened.
    match File::options().read(true).write(!readonly).custom_flags(libc::O_NONBLOCK).open(path) {
        Err(error) if error.kind() == ErrorKind::IsADirectory => bail!("disk {name} is a directory"),
        Err(error) if !readonly && matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS)) => {
            Err(anyhow!(error).context(format!("open disk {name} for writing (add `,ro` to open it read-only)")))
        }
        opened => opened.with_context(|| format!("open disk {name}")),
    }
}

/// A raw image in `file`, and its capacity.
fn raw_image(
    config: &DiskConfig,
    file: File,
    block_device: bool,
    direct: Option<Alignment>,
) -> Result<(DiskImage, u64)> {
    let name = disk_name(&config.path);
    // The metadata of a block device does not contain its size.
    let capacity_bytes = (&file).seek(SeekFrom::End(0)).with_context(|| format!("size of disk {name}"))?;
    let image = match direct {
        None => PlainDisk::new(file, block_device),
        Some(alignment) => {
            bypass_cache(&file).with_context(|| format!("disk {name}"))?;
            PlainDisk::direct(file, block_device, alignment)
        }
    };
    if config.aio == Aio::IoUring {
        let refused = || format!("disk {name} cannot use io_uring on this host: remove aio=io_uring");
        UringDisk::check(&image).with_context(refused)?;
    }
    Ok((DiskImage::Raw(image), capacity_bytes))
}

/// A qcow2 image in `file` with its backing files, and its capacity.
fn qcow2_image(config: &DiskConfig, file: File, block_device: bool) -> Result<(DiskImage, u64)> {
    let DiskConfig { path, readonly, cache, aio, queues, backing, .. } = config;
    let name = disk_name(path);
    ensure!(*aio == Aio::Auto, "disk {name} is a qcow2 image, which has no aio=: remove it");
    ensure!(*queues == 1, "disk {name} is a qcow2 image, which has a single queue: remove num_queues=");
    ensure!(*cache != Cache::None, "disk {name} is a qcow2 image, which needs the page cache: remove cache=none");
    ensure!(!block_device, "disk {name} is a block device, and qcow2 needs a file that can grow");
    let backing = backing::open(backing)?;
    let image =
        Qcow2Disk::open(file, *readonly, backing).map_err(|refusal| anyhow!("disk {name} {}", refusal.of(path)))?;
    let capacity_bytes = image.capacity_bytes();
    Ok((DiskImage::Qcow2(Box::new(image)), capacity_bytes))
}

/// The logical and physical block sizes: as configured, or those of the block device; for a file 512 bytes, or what
/// direct I/O demands, and those of a page.
fn block_sizes(config: &DiskConfig, file: &File, block_device: bool, direct: Option<Alignment>) -> Result<(u32, u32)> {
    let name = disk_name(&config.path);
    let (logical, physical) = if block_device {
        let logical = sys::disk::block_bytes(file);
        let sizes = logical.and_then(|logical| Ok((logical, sys::disk::physical_block_bytes(file)?)));
        sizes.with_context(|| format!("block size of disk {name}"))?
    } else {
        (direct.map_or(0, |direct| direct.offset_bytes), PHYSICAL_BLOCK_BYTES)
    };
    // The guest must not use smaller blocks than the device, nor larger ones than drivers support.
    let default_bytes = logical.clamp(*DISK_BLOCK_BYTES.start(), *DISK_BLOCK_BYTES.end());
    let block_bytes = config.block_bytes.unwrap_or(default_bytes);
    if let Some(direct) = direct {
        let least = direct.offset_bytes;
        ensure!(block_bytes >= least, "disk {name} needs blocks of {least} bytes without a cache: remove cache=none");
    }
    Ok((block_bytes, physical.clamp(block_bytes, PHYSICAL_BLOCK_BYTES_MAX)))
}

/// What direct I/O on `file` demands (STATX_DIOALIGN), if its file system supports that.
fn direct_alignment(file: &File, block_device: bool) -> Result<Alignment> {
    let refusal = "is on a file system without direct I/O, such as tmpfs: remove cache=none";
    // tmpfs accepts O_DIRECT since Linux 6.6, but is nothing but a cache.
    ensure!(block_device || fs::fstatfs(file)?.f_type != TMPFS_MAGIC, refusal);
    let stat = fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
    if stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0 {
        let (memory_bytes, offset_bytes) = (stat.stx_dio_mem_align, stat.stx_dio_offset_align);
        ensure!(memory_bytes.is_power_of_two() && offset_bytes.is_power_of_two(), refusal);
        return Ok(Alignment { memory_bytes, offset_bytes });
    }
    // Not reported before Linux 6.1, and not by all file systems.
    let block_bytes = if block_device { sys::disk::block_bytes(file)? } else { PHYSICAL_BLOCK_BYTES };
    Ok(Alignment { memory_bytes: block_bytes, offset_bytes: block_bytes })
}

/// Turns on O_DIRECT, after the file's contents have been looked at.
fn bypass_cache(file: &File) -> Result<()> {
    let set = || fs::fcntl_setfl(file, fs::fcntl_getfl(file)? | OFlags::DIRECT);
    set().context("cannot be accessed directly: remove cache=none")
}

/// Clears O_NONBLOCK, with which io_uring fails requests that would block.
fn clear_nonblock(file: &File) -> Result<()> {
    Ok(fs::fcntl_setfl(file, fs::fcntl_getfl(file)? - OFlags::NONBLOCK)?)
}

/// Whether `file` is a block device. Fails if it is no disk.
fn is_block_device(file: &File, path: &Path) -> Result<bool> {
    let name = disk_name(path);
    let kind = file.metadata().with_context(|| format!("open disk {name}"))?.file_type();
    ensure!(!kind.is_dir(), "disk {name} is a directory");
    ensure!(kind.is_block_device() || kind.is_file(), "disk {name} is neither a file nor a block device");
    Ok(kind.is_block_device())
}

/// Fails if nobody has `file`, which was just opened at `path`, locked: then it is not the one that a running machine has there.
fn check_is_in_use(file: &File, path: &Path) -> Result<()> {
    // Where it cannot be locked like this, such as for writing on some network file systems, nothing is known.
    let is_free = file.try_lock().is_ok();
    ensure!(!is_free, "disk {} is not the file that the machine has open: it was replaced", disk_name(path));
    Ok(())
}

fn lock(file: &File, path: &Path, readonly: bool) -> Result<()> {
    let name = disk_name(path);
    let started = Instant::now();
    loop {
        match if readonly { file.try_lock_shared() } else { file.try_lock() } {
            Err(TryLockError::WouldBlock) if started.elapsed() < RELEASED_WITHIN => sleep(LOCK_INTERVAL),
            Err(TryLockError::WouldBlock) => bail!("disk {name} is in use by another process"),
            Err(TryLockError::Error(error)) => return Err(error).with_context(|| format!("lock disk {name}")),
            Ok(()) => return Ok(()),
        }
    }
}
