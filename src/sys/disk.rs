//! System calls on disk images and block devices.
#![allow(unsafe_code)]

use std::fs::{File, Metadata};
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::IoVecs;

/// _IO(0x12, 104), linux/fs.h: the logical block size.
const BLKSSZGET: libc::c_ulong = 0x1268;
/// _IO(0x12, 123), linux/fs.h: the physical block size.
const BLKPBSZGET: libc::c_ulong = 0x127b;
/// _IO(0x12, 119), linux/fs.h: discard a range.
const BLKDISCARD: libc::c_ulong = 0x1277;
/// _IO(0x12, 127), linux/fs.h: zero a range.
const BLKZEROOUT: libc::c_ulong = 0x127f;

/// The size of what the file system has allocated for a file. st_blocks counts 512-byte units, regardless of the file system.
pub fn allocated_bytes(metadata: &Metadata) -> u64 {
    metadata.blocks().saturating_mul(512)
}

/// Reads from `offset_bytes` into as many of `buffers` as one call accepts (pread(2), preadv(2)). Returns the number of
/// bytes.
pub fn read_at(file: &File, buffers: &mut impl IoVecs, offset_bytes: u64) -> io::Result<usize> {
    let (fd, offset) = (file.as_raw_fd(), offset(offset_bytes)?);
    // SAFETY: `IoVecs` guarantees that each iovec is mapped and not referenced by Rust.
    retry(|| unsafe {
        match buffers.iovecs() {
            // A single part has less overhead this way.
            [one] => libc::pread64(fd, one.iov_base, one.iov_len, offset) as i64,
            all => libc::preadv64(fd, all.as_ptr(), all.len() as i32, offset) as i64,
        }
    })
}

/// Writes as many of `buffers` as one call accepts at `offset_bytes` (pwrite(2), pwritev(2)). Returns the number of
/// bytes.
pub fn write_at(file: &File, buffers: &impl IoVecs, offset_bytes: u64) -> io::Result<usize> {
    let (fd, offset) = (file.as_raw_fd(), offset(offset_bytes)?);
    // SAFETY: `IoVecs` guarantees that each iovec is mapped; it is only read.
    retry(|| unsafe {
        match buffers.iovecs() {
            [one] => libc::pwrite64(fd, one.iov_base, one.iov_len, offset) as i64,
            all => libc::pwritev64(fd, all.as_ptr(), all.len() as i32, offset) as i64,
        }
    })
}

/// Reads like [`read_at`], but only what is in the page cache (RWF_NOWAIT). Fails with `WouldBlock` if that is nothing,
/// and with EOPNOTSUPP if the file system cannot tell.
pub fn read_at_now(file: &File, buffers: &mut impl IoVecs, offset_bytes: u64) -> io::Result<usize> {
    let (fd, offset, all) = (file.as_raw_fd(), offset(offset_bytes)?, buffers.iovecs());
    // SAFETY: `IoVecs` guarantees that each iovec is mapped and not referenced by Rust.
    retry(|| unsafe { libc::preadv2(fd, all.as_ptr(), all.len() as i32, offset, libc::RWF_NOWAIT) as i64 })
}

/// Writes like [`write_at`], but only as much as does not block (RWF_NOWAIT), and fails like [`read_at_now`].
pub fn write_at_now(file: &File, buffers: &impl IoVecs, offset_bytes: u64) -> io::Result<usize> {
    let (fd, offset, all) = (file.as_raw_fd(), offset(offset_bytes)?, buffers.iovecs());
    // SAFETY: `IoVecs` guarantees that each iovec is mapped; it is only read.
    retry(|| unsafe { libc::pwritev2(fd, all.as_ptr(), all.len() as i32, offset, libc::RWF_NOWAIT) as i64 })
}

/// Writes as many of `buffers` as one call accepts at the end of the file (RWF_APPEND). Returns the number of bytes.
pub fn append(file: &File, buffers: &impl IoVecs) -> io::Result<usize> {
    let (fd, all) = (file.as_raw_fd(), buffers.iovecs());
    // SAFETY: `IoVecs` guarantees that each iovec is mapped; it is only read.
    retry(|| unsafe { libc::pwritev2(fd, all.as_ptr(), all.len() as i32, 0, libc::RWF_APPEND) as i64 })
}

/// Deallocates the range, which then reads as zeroes (FALLOC_FL_PUNCH_HOLE).
pub fn punch_hole(file: &File, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset_bytes, len_bytes)
}

/// Zeroes the range, keeping it allocated (FALLOC_FL_ZERO_RANGE).
pub fn zero_range(file: &File, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    fallocate(file, libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE, offset_bytes, len_bytes)
}

/// Discards a range of a block device (BLKDISCARD).
pub fn discard_blocks(device: &File, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    block_range(device, BLKDISCARD, offset_bytes, len_bytes)
}

/// Zeroes a range of a block device (BLKZEROOUT).
pub fn zero_blocks(device: &File, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    block_range(device, BLKZEROOUT, offset_bytes, len_bytes)
}

/// The logical block size of a block device (BLKSSZGET).
pub fn block_bytes(device: &File) -> io::Result<u32> {
    number(device, BLKSSZGET)
}

/// The physical block size of a block device (BLKPBSZGET).
pub fn physical_block_bytes(device: &File) -> io::Result<u32> {
    number(device, BLKPBSZGET)
}

/// A number of a block device that `request` returns.
fn number(device: &File, request: libc::c_ulong) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: both requests write one `int`, to which the pointer refers.
    retry(|| i64::from(unsafe { libc::ioctl(device.as_raw_fd(), request as _, &mut bytes) }))?;
    u32::try_from(bytes).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The free space of the file's file system (fstatvfs(3)).
pub fn free_bytes(file: &File) -> io::Result<u64> {
    let mut found = MaybeUninit::<libc::statvfs64>::uninit();
    // SAFETY: the structure is written completely if the call succeeds, and read only then.
    let found = unsafe {
        if libc::fstatvfs64(file.as_raw_fd(), found.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        found.assume_init()
    };
    Ok(found.f_bavail.saturating_mul(found.f_frsize))
}

/// The next data range at or after `offset_bytes` (SEEK_DATA, SEEK_HOLE); `None` if only a hole follows.
pub fn next_data(file: &File, offset_bytes: u64) -> io::Result<Option<Range<u64>>> {
    let seek = |from: u64, whence| -> io::Result<u64> {
        // SAFETY: no pointer is passed.
        let found = unsafe { libc::lseek64(file.as_raw_fd(), offset(from)?, whence) };
        u64::try_from(found).map_err(|_| io::Error::last_os_error())
    };
    match seek(offset_bytes, libc::SEEK_DATA) {
        Ok(start) => Ok(Some(start..seek(start, libc::SEEK_HOLE)?)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

fn fallocate(file: &File, mode: i32, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    let (offset, len) = (offset(offset_bytes)?, offset(len_bytes)?);
    // SAFETY: no pointer is passed.
    retry(|| i64::from(unsafe { libc::fallocate64(file.as_raw_fd(), mode, offset, len) })).map(drop)
}

fn block_range(device: &File, request: libc::c_ulong, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
    let range = [offset_bytes, len_bytes];
    // SAFETY: both requests read two 64-bit numbers, to which the pointer refers.
    retry(|| i64::from(unsafe { libc::ioctl(device.as_raw_fd(), request as _, &range) })).map(drop)
}

/// File offsets are signed.
fn offset(bytes: u64) -> io::Result<i64> {
    i64::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput.into())
}

/// Retries a call that is interrupted by signals.
fn retry(mut call: impl FnMut() -> i64) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}
