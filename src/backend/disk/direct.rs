//! Direct I/O (O_DIRECT): what the host's disk demands of a request, and a detour for requests that do not comply.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::{Operation, Request};
use crate::sys::IoVecs;

/// What the host demands of direct transfers (STATX_DIOALIGN), powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Alignment {
    /// Of each buffer in memory.
    pub memory_bytes: u32,
    /// Of the position, and of each buffer's length.
    pub offset_bytes: u32,
}

/// The alignment of pages, which every disk accepts.
const PAGE_BYTES: usize = 4096;
/// The size of the buffer for requests that do not comply.
pub const BOUNCE_BYTES: usize = 256 << 10;

impl Alignment {
    /// Whether the host accepts the buffers of a read or write as they are.
    pub fn accepts(&self, request: &Request) -> bool {
        let (memory, block) = (self.memory_bytes as usize, self.offset_bytes as usize);
        request.offset_bytes.is_multiple_of(block as u64)
            && request
                .buffers
                .iovecs()
                .iter()
                .all(|part| (part.iov_base as usize).is_multiple_of(memory) && part.iov_len.is_multiple_of(block))
    }
}

/// Executes a read or write through an aligned buffer, a part at a time. The request must consist of whole blocks.
pub fn bounce(file: &File, request: &mut Request) -> io::Result<()> {
    // Rare enough for an allocation, which otherwise each such disk would keep.
    let mut memory = vec![0; BOUNCE_BYTES + PAGE_BYTES];
    let start = memory.as_ptr().align_offset(PAGE_BYTES);
    let Some(buffer) = memory.get_mut(start..start + BOUNCE_BYTES) else {
        return Err(io::ErrorKind::OutOfMemory.into());
    };
    while request.buffers.len_bytes() > 0 {
        let len = request.buffers.len_bytes().min(BOUNCE_BYTES as u64) as usize;
        let piece = &mut buffer[..len];
        if request.operation == Operation::Read {
            file.read_exact_at(piece, request.offset_bytes)?;
            request.buffers.fill(piece);
            request.offset_bytes += len as u64;
        } else {
            request.buffers.peek(piece);
            file.write_all_at(piece, request.offset_bytes)?;
            request.advance(len);
        }
    }
    Ok(())
}
