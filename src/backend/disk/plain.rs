//! A raw image or block device, accessed with plain system calls within `submit`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::direct::{self, Alignment};
use super::loss::Loss;
use super::{BlockingDisk, Operation, Request, write_zeroes_out};
use crate::sys;

/// A raw image or a block device, accessed through the host's page cache or directly. Clones are queues of the same disk.
#[derive(Debug, Clone)]
pub struct PlainDisk {
    file: Arc<File>,
    block_device: bool,
    /// What direct transfers must comply with; `None` with the page cache.
    direct: Option<Alignment>,
    loss: Loss,
}

impl AsRawFd for PlainDisk {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl PlainDisk {
    /// Creates a disk from `file`, a block device or a regular file.
    pub fn new(file: File, block_device: bool) -> PlainDisk {
        PlainDisk { file: Arc::new(file), block_device, direct: None, loss: Loss::default() }
    }

    /// The same for a file that is open with O_DIRECT, which demands `alignment`.
    pub fn direct(file: File, block_device: bool, alignment: Alignment) -> PlainDisk {
        PlainDisk { direct: Some(alignment), ..PlainDisk::new(file, block_device) }
    }

    /// Whether it is accessed directly.
    pub fn is_direct(&self) -> bool {
        self.direct.is_some()
    }

    /// Whether the host accepts the buffers of this read or write as they are.
    pub fn accepts(&self, request: &Request) -> bool {
        self.direct.is_none_or(|alignment| alignment.accepts(request))
    }

    /// The open file.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Whether it is a block device.
    pub fn is_block_device(&self) -> bool {
        self.block_device
    }

    /// What to report about a flush that ended with `result`. Without a cache, nothing but the flush itself has failed.
    pub fn flushed(&self, result: io::Result<()>) -> io::Result<()> {
        if self.is_direct() { result } else { self.loss.after_flush(result) }
    }

    /// Repeats `call`, which may process less than requested, until all buffers are consumed.
    fn transfer(
        &self,
        request: &mut Request,
        call: impl Fn(&File, &mut Request) -> io::Result<usize>,
    ) -> io::Result<()> {
        while request.buffers.len_bytes() > 0 {
            if !self.accepts(request) {
                return direct::bounce(&self.file, request);
            }
            match call(&self.file, request) {
                // The image was truncated by another process.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => request.advance(count),
                // The disk demands more than the host reports.
                Err(error) if self.is_direct() && error.raw_os_error() == Some(libc::EINVAL) => {
                    return direct::bounce(&self.file, request);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A discard is a hint: if the host does not support it, there is nothing to do.
    fn discard(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        let call = if self.block_device { sys::disk::discard_blocks } else { sys::disk::punch_hole };
        match call(&self.file, offset_bytes, len_bytes) {
            Err(error) if cannot(&error) => Ok(()),
            result => result,
        }
    }

    fn write_zeroes(&self, offset_bytes: u64, len_bytes: u64, unmap: bool) -> io::Result<()> {
        let call = match (self.block_device, unmap) {
            (true, _) => sys::disk::zero_blocks,
            (false, true) => sys::disk::punch_hole,
            (false, false) => sys::disk::zero_range,
        };
        match call(&self.file, offset_bytes, len_bytes) {
            Err(error) if cannot(&error) => self.write_zeroes_out(offset_bytes, len_bytes),
            result => result,
        }
    }

    fn write_zeroes_out(&self, offset_bytes: u64, len_bytes: u64) -> io::Result<()> {
        write_zeroes_out(offset_bytes, len_bytes, |zeroes, at| self.file.write_all_at(zeroes, at))
    }
}

impl BlockingDisk for PlainDisk {
    fn execute(&mut self, request: &mut Request) -> io::Result<()> {
        let offset_bytes = request.offset_bytes;
        match request.operation {
            Operation::Read => self.transfer(request, |file, request| {
                sys::disk::read_at(file, &mut request.buffers, request.offset_bytes)
            }),
            Operation::Write => self
                .transfer(request, |file, request| sys::disk::write_at(file, &request.buffers, request.offset_bytes)),
            // `File::flush` would do nothing.
            Operation::Flush => self.flushed(self.file.sync_data()),
            Operation::Discard { len_bytes: 0 } | Operation::WriteZeroes { len_bytes: 0, .. } => Ok(()),
            Operation::Discard { len_bytes } => self.discard(offset_bytes, len_bytes),
            Operation::WriteZeroes { len_bytes, unmap } => self.write_zeroes(offset_bytes, len_bytes, unmap),
        }
    }
}

/// Whether the file system or device does not support the operation, or not for this range.
pub fn cannot(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENOTTY))
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::{self, GuestBuffers};

    /// Simulates short transfers, of one to three parts of 16 bytes at a time.
    #[test]
    fn a_short_transfer_is_continued() {
        let memory = Arc::new(memory::reserve(2).unwrap());
        let disk = PlainDisk::new(tempfile::tempfile().unwrap(), false);
        let mut buffers = GuestBuffers::new(memory.clone());
        for part in 0..8u64 {
            memory.write_slice(&[part as u8; 16], GuestAddress(part * 0x100)).unwrap();
            buffers.push(GuestAddress(part * 0x100), 16).unwrap();
        }
        let mut request = Request { token: 0, operation: Operation::Write, offset_bytes: 0, buffers };
        let seen = std::cell::RefCell::new(Vec::new());
        disk.transfer(&mut request, |_, request| {
            let at = request.offset_bytes;
            let count = request.buffers.len_bytes().min(1 + at % 37);
            seen.borrow_mut().push((at, count));
            Ok(count as usize)
        })
        .unwrap();
        let mut at = 0;
        for (offset, count) in seen.take() {
            assert_eq!(offset, at, "a part was written twice or left out");
            at += count;
        }
        assert_eq!(at, 128);
    }
}
