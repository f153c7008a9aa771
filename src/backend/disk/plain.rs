//! A raw image or block device, accessed with plain system calls within `submit`.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{BlockingDisk, Operation, Request, write_zeroes_out};
use crate::sys;

/// A raw image or a block device, accessed through the host's page cache.
#[derive(Debug)]
pub struct PlainDisk {
    file: File,
    block_device: bool,
}

impl PlainDisk {
    /// Creates a disk from `file`, a block device or a regular file.
    pub fn new(file: File, block_device: bool) -> PlainDisk {
        PlainDisk { file, block_device }
    }

    /// Repeats `call`, which may process less than requested, until all buffers are consumed.
    fn transfer(
        &self,
        request: &mut Request,
        call: impl Fn(&File, &mut Request, u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut at = request.offset_bytes;
        while request.buffers.len_bytes() > 0 {
            match call(&self.file, request, at)? {
                // The image was truncated by another process.
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => {
                    request.buffers.advance(count);
                    at += count as u64;
                }
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
            Operation::Read => {
                self.transfer(request, |file, request, at| sys::disk::read_at(file, &mut request.buffers, at))
            }
            Operation::Write => {
                self.transfer(request, |file, request, at| sys::disk::write_at(file, &request.buffers, at))
            }
            // `File::flush` would do nothing.
            Operation::Flush => self.file.sync_data(),
            Operation::Discard { len_bytes: 0 } | Operation::WriteZeroes { len_bytes: 0, .. } => Ok(()),
            Operation::Discard { len_bytes } => self.discard(offset_bytes, len_bytes),
            Operation::WriteZeroes { len_bytes, unmap } => self.write_zeroes(offset_bytes, len_bytes, unmap),
        }
    }
}

/// Whether the file system or device does not support the operation, or not for this range.
fn cannot(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENOTTY))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::GuestBuffers;
    use crate::memory::{self, GuestMemory};

    fn run(file: &File, operation: Operation, offset_bytes: u64, buffers: GuestBuffers) -> io::Result<()> {
        let mut disk = PlainDisk::new(file.try_clone().unwrap(), false);
        disk.execute(&mut Request { token: 7, operation, offset_bytes, buffers })
    }

    fn memory() -> Arc<GuestMemory> {
        Arc::new(memory::reserve(2).unwrap())
    }

    fn image(len_bytes: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(len_bytes).unwrap();
        file
    }

    fn contents(file: &File, offset_bytes: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; len];
        file.read_exact_at(&mut bytes, offset_bytes).unwrap();
        bytes
    }

    #[test]
    fn scattered_memory_is_written_and_read_back_in_order() {
        let (memory, file) = (memory(), image(1 << 20));
        // More parts than one call accepts.
        let parts = 3000;
        let mut buffers = [GuestBuffers::new(memory.clone()), GuestBuffers::new(memory.clone())];
        for part in 0..parts {
            memory.write_obj(part as u16, GuestAddress(part * 64)).unwrap();
            buffers[0].push(GuestAddress(part * 64), 2).unwrap();
            buffers[1].push(GuestAddress((1 << 20) + part * 64), 2).unwrap();
        }
        let [from, to] = buffers;
        run(&file, Operation::Write, 512, from).unwrap();
        run(&file, Operation::Read, 512, to).unwrap();
        for part in 0..parts {
            let back: u16 = memory.read_obj(GuestAddress((1 << 20) + part * 64)).unwrap();
            assert_eq!(u64::from(back), part);
        }
        assert_eq!(contents(&file, 510, 6), [0, 0, 0, 0, 1, 0]);
    }

    /// Simulates short transfers, of one to three parts of 16 bytes at a time.
    #[test]
    fn a_short_transfer_is_continued() {
        let (memory, file) = (memory(), image(4096));
        let disk = PlainDisk::new(file, false);
        let mut buffers = GuestBuffers::new(memory.clone());
        for part in 0..8u64 {
            memory.write_slice(&[part as u8; 16], GuestAddress(part * 0x100)).unwrap();
            buffers.push(GuestAddress(part * 0x100), 16).unwrap();
        }
        let mut request = Request { token: 0, operation: Operation::Write, offset_bytes: 0, buffers };
        let seen = std::cell::RefCell::new(Vec::new());
        disk.transfer(&mut request, |_, request, at| {
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

    #[test]
    fn a_truncated_image_is_an_error() {
        let (memory, file) = (memory(), image(512));
        let mut buffers = GuestBuffers::new(memory);
        buffers.push(GuestAddress(0), 1024).unwrap();
        assert_eq!(run(&file, Operation::Read, 0, buffers).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn flush_reaches_the_disk() {
        let nothing = || GuestBuffers::new(memory());
        run(&image(512), Operation::Flush, 0, nothing()).unwrap();
        // The null device rejects fsync: without an error, it was not called.
        let null = File::options().write(true).open("/dev/null").unwrap();
        let error = run(&null, Operation::Flush, 0, nothing()).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }

    #[test]
    fn write_zeroes_works_with_and_without_unmap_and_without_host_support() {
        let nothing = || GuestBuffers::new(memory());
        for unmap in [true, false] {
            let file = image(1 << 20);
            file.write_all_at(&[0xaa; 1 << 20], 0).unwrap();
            run(&file, Operation::WriteZeroes { len_bytes: 100 << 10, unmap }, 512, nothing()).unwrap();
            let end = 512 + (100 << 10);
            assert_eq!(contents(&file, 0, 513)[511..], [0xaa, 0]);
            assert_eq!(contents(&file, end - 1, 2), [0, 0xaa]);
            assert!(contents(&file, 512, 100 << 10).iter().all(|byte| *byte == 0));
            assert_eq!(file.metadata().unwrap().len(), 1 << 20);
        }
        let file = image(1 << 20);
        file.write_all_at(&[0xaa; 1 << 20], 0).unwrap();
        PlainDisk::new(file.try_clone().unwrap(), false).write_zeroes_out(512, 100 << 10).unwrap();
        assert_eq!(contents(&file, 512 + (100 << 10) - 1, 2), [0, 0xaa]);
        run(&file, Operation::WriteZeroes { len_bytes: 0, unmap: false }, 0, nothing()).unwrap();
        assert_eq!(contents(&file, 0, 1), [0xaa]);
    }

    #[test]
    fn a_discarded_range_is_deallocated() {
        use std::os::unix::fs::MetadataExt;
        let file = image(1 << 20);
        file.write_all_at(&[0xaa; 1 << 20], 0).unwrap();
        file.sync_data().unwrap();
        let before = file.metadata().unwrap().blocks();
        run(&file, Operation::Discard { len_bytes: 512 << 10 }, 0, GuestBuffers::new(memory())).unwrap();
        let freed = before - file.metadata().unwrap().blocks();
        assert!(freed >= 1024, "{freed} blocks of 512 bytes were freed");
        assert_eq!(contents(&file, 512 << 10, 1), [0xaa]);
        // Not a block device: the discard is unsupported, which is no error for a hint.
        let mut disk = PlainDisk::new(file, true);
        let buffers = GuestBuffers::new(memory());
        let discard = Operation::Discard { len_bytes: 512 };
        disk.execute(&mut Request { token: 0, operation: discard, offset_bytes: 0, buffers }).unwrap();
    }
}
