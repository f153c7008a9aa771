//! Parses and validates block requests (virtio 1.2 §5.2.6).
//!
//! The chain's layout is arbitrary: its readable bytes are the header and the data to write, its writable bytes are the
//! data to read and finally the status. Each is read from guest memory only once.

use vm_memory::{Bytes, GuestAddress};

use super::RingError;
use crate::backend::disk::{Operation, SECTOR_BYTES};
use crate::memory::{GuestBuffers, GuestMemory};
use crate::virtio::queue::{self, Chain, GuestRange};

/// The maximum data size of a request: what the offered segments can hold, 254 of 256 KiB.
pub const REQUEST_BYTES_MAX: u64 = SEGMENTS_MAX as u64 * SEGMENT_BYTES_MAX as u64;
/// `seg_max`: a chain has at most the queue's 256 descriptors, minus one each for the header and the status.
pub const SEGMENTS_MAX: u32 = 254;
/// `size_max`, the maximum size of a segment.
pub const SEGMENT_BYTES_MAX: u32 = 256 << 10;
/// `max_discard_sectors`: 64 MiB, so that no request takes long: a file system may have to free as many extents as it
/// consists of.
pub const DISCARD_SECTORS_MAX: u32 = 128 << 10;
/// `max_write_zeroes_sectors`: 64 MiB, which the host may have to write out.
pub const WRITE_ZEROES_SECTORS_MAX: u32 = 128 << 10;

// Request types, virtio 1.2 §5.2.6.
const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const HEADER_BYTES: usize = 16;
/// The size of a segment of a discard or write zeroes request. Only one per request is offered.
const RANGE_BYTES: usize = 16;
/// In a segment's `flags`: the space may be deallocated.
const FLAG_UNMAP: u32 = 1 << 0;

/// The properties of a disk against which requests are validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DiskShape {
    /// The capacity, a multiple of [`SECTOR_BYTES`].
    pub capacity_bytes: u64,
    /// Whether the disk is read-only.
    pub readonly: bool,
    /// The logical block size, a power of two of at least [`SECTOR_BYTES`]; the capacity is a multiple of it.
    pub block_bytes: u32,
    /// The physical block size, a power of two: what the host's disk writes at once.
    pub physical_block_bytes: u32,
}

/// The status byte that ends a request (virtio 1.2 §5.2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// VIRTIO_BLK_S_OK.
    Ok = 0,
    /// VIRTIO_BLK_S_IOERR.
    IoError = 1,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported = 2,
}

/// The action for a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// A disk operation on the buffers that were filled in.
    Disk {
        /// The operation.
        operation: Operation,
        /// The position.
        offset_bytes: u64,
    },
    /// Return the disk's serial number.
    GetId,
}

/// A request, read once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRequest {
    /// The address of the status byte, which is written last.
    pub status: GuestAddress,
    /// The action, or the status with which the request is rejected.
    pub action: Result<Action, Status>,
}

impl BlockRequest {
    /// Reads the request in `chain` for a disk of `shape`, and appends its data buffers to `buffers`, which must be
    /// empty.
    ///
    /// Fails only if the chain has no byte for a status, so that the error cannot be reported to the driver.
    pub fn parse(chain: &Chain, shape: &DiskShape, buffers: &mut GuestBuffers) -> Result<BlockRequest, RingError> {
        let last = chain.writable().last().ok_or(RingError::Chain("no room for a status byte"))?;
        let status = GuestAddress(last.address.0.saturating_add(u64::from(last.len_bytes).saturating_sub(1)));
        let action = action(chain, shape, buffers);
        if action.is_err() {
            buffers.clear();
        }
        Ok(BlockRequest { status, action })
    }

    /// The writable part of `chain` without the status.
    pub fn data_to_fill(chain: &Chain) -> impl Iterator<Item = GuestRange> {
        queue::part(chain.writable(), 0, queue::len_bytes(chain.writable()).saturating_sub(1))
    }
}

fn action(chain: &Chain, shape: &DiskShape, buffers: &mut GuestBuffers) -> Result<Action, Status> {
    let header: [u8; HEADER_BYTES] = read(chain.readable(), 0, buffers.memory())?;
    let ([kind, rest @ ..], []) = header.as_chunks::<4>() else { return Err(Status::IoError) };
    let [_reserved, sector_low, sector_high] = rest else { return Err(Status::IoError) };
    let sector = join(*sector_low, *sector_high);
    let to_write = queue::part(chain.readable(), HEADER_BYTES as u64, u64::MAX);
    match u32::from_le_bytes(*kind) {
        T_IN => transfer(Operation::Read, sector, BlockRequest::data_to_fill(chain), shape, buffers),
        T_OUT if shape.readonly => Err(Status::IoError),
        T_OUT => transfer(Operation::Write, sector, to_write, shape, buffers),
        T_FLUSH => Ok(Action::Disk { operation: Operation::Flush, offset_bytes: 0 }),
        T_GET_ID => Ok(Action::GetId),
        kind @ (T_DISCARD | T_WRITE_ZEROES) => range(kind, chain, shape, buffers.memory()),
        _ => Err(Status::Unsupported),
    }
}

fn transfer(
    operation: Operation,
    sector: u64,
    data: impl Iterator<Item = GuestRange>,
    shape: &DiskShape,
    buffers: &mut GuestBuffers,
) -> Result<Action, Status> {
    for range in data {
        buffers.push(range.address, range.len_bytes).map_err(|_| Status::IoError)?;
        if buffers.len_bytes() > REQUEST_BYTES_MAX {
            return Err(Status::IoError);
        }
    }
    let offset_bytes = place(sector, buffers.len_bytes(), shape)?;
    Ok(Action::Disk { operation, offset_bytes })
}

/// A discard or write zeroes request: its data is the segment to discard or zero.
fn range(kind: u32, chain: &Chain, shape: &DiskShape, memory: &GuestMemory) -> Result<Action, Status> {
    if queue::len_bytes(chain.readable()) != (HEADER_BYTES + RANGE_BYTES) as u64 || shape.readonly {
        return Err(Status::IoError);
    }
    let segment: [u8; RANGE_BYTES] = read(chain.readable(), HEADER_BYTES as u64, memory)?;
    let ([sector_low, sector_high, sectors, flags], []) = segment.as_chunks::<4>() else { return Err(Status::IoError) };
    let (sectors, flags) = (u32::from_le_bytes(*sectors), u32::from_le_bytes(*flags));
    let len_bytes = u64::from(sectors) * SECTOR_BYTES;
    let (operation, sectors_max, flags_known) = match kind {
        T_DISCARD => (Operation::Discard { len_bytes }, DISCARD_SECTORS_MAX, 0),
        _ => {
            let unmap = flags & FLAG_UNMAP != 0;
            (Operation::WriteZeroes { len_bytes, unmap }, WRITE_ZEROES_SECTORS_MAX, FLAG_UNMAP)
        }
    };
    if flags & !flags_known != 0 {
        return Err(Status::Unsupported);
    }
    if sectors > sectors_max {
        return Err(Status::IoError);
    }
    let offset_bytes = place(join(*sector_low, *sector_high), len_bytes, shape)?;
    Ok(Action::Disk { operation, offset_bytes })
}

/// The offset of `len_bytes` bytes starting at `sector`, if they are whole blocks within the disk.
fn place(sector: u64, len_bytes: u64, shape: &DiskShape) -> Result<u64, Status> {
    let offset_bytes = sector.checked_mul(SECTOR_BYTES).ok_or(Status::IoError)?;
    let end = offset_bytes.checked_add(len_bytes).ok_or(Status::IoError)?;
    let good = (offset_bytes | len_bytes).is_multiple_of(shape.block_bytes.into()) && end <= shape.capacity_bytes;
    if good { Ok(offset_bytes) } else { Err(Status::IoError) }
}

/// Reads `N` bytes at offset `skip_bytes` of `ranges`, however they are split.
fn read<const N: usize>(ranges: &[GuestRange], skip_bytes: u64, memory: &GuestMemory) -> Result<[u8; N], Status> {
    // They are usually within a single range.
    if let [range, ..] = ranges
        && u64::from(range.len_bytes) >= skip_bytes + N as u64
    {
        let address = GuestAddress(range.address.0.saturating_add(skip_bytes));
        return queue::read_bytes(memory, address).map_err(|_| Status::IoError);
    }
    let mut bytes = [0; N];
    let mut done = 0;
    for range in queue::part(ranges, skip_bytes, N as u64) {
        let end = done + range.len_bytes as usize;
        let piece = bytes.get_mut(done..end).ok_or(Status::IoError)?;
        memory.read_slice(piece, range.address).map_err(|_| Status::IoError)?;
        done = end;
    }
    if done == N { Ok(bytes) } else { Err(Status::IoError) }
}

fn join(low: [u8; 4], high: [u8; 4]) -> u64 {
    u64::from(u32::from_le_bytes(low)) | u64::from(u32::from_le_bytes(high)) << 32
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;
    use crate::memory;
    use crate::sys::IoVecs;

    const SHAPE: DiskShape =
        DiskShape { capacity_bytes: 1 << 20, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };

    fn parts(parts: &[(u64, u32)]) -> Vec<GuestRange> {
        parts.iter().map(|(at, len)| GuestRange { address: GuestAddress(*at), len_bytes: *len }).collect()
    }

    fn header(memory: &GuestMemory, kind: u32, sector: u64) {
        memory.write_obj([kind, 0, sector as u32, (sector >> 32) as u32], GuestAddress(0)).unwrap();
    }

    #[test]
    fn a_request_becomes_plain_data() {
        let memory = Arc::new(memory::reserve(1).unwrap());
        let chain = Chain::from_parts(0, parts(&[(0, 16)]), parts(&[(0x1000, 1000), (0x8000, 25)]));
        header(&memory, T_IN, 2);
        let mut buffers = GuestBuffers::new(memory);
        let request = BlockRequest::parse(&chain, &SHAPE, &mut buffers).unwrap();
        let action = Action::Disk { operation: Operation::Read, offset_bytes: 1024 };
        assert_eq!(request, BlockRequest { status: GuestAddress(0x8018), action: Ok(action) });
        assert_eq!((buffers.len_bytes(), buffers.iovecs().len()), (1024, 2));
    }

    #[test]
    fn the_status_is_the_last_byte_even_at_the_end_of_the_address_space() {
        let memory = Arc::new(memory::reserve(1).unwrap());
        header(&memory, T_FLUSH, 0);
        let mut buffers = GuestBuffers::new(memory);
        for (at, len, status) in [(0x10, 1, 0x10), (0x10, 5, 0x14), (u64::MAX, 1, u64::MAX), (u64::MAX, 9, u64::MAX)] {
            let chain = Chain::from_parts(0, parts(&[(0, 16)]), parts(&[(at, len)]));
            let request = BlockRequest::parse(&chain, &SHAPE, &mut buffers).unwrap();
            assert_eq!(request.status, GuestAddress(status));
        }
    }

    /// A driver that changes a header while it is read gets one of the two requests, or a mixture that is validated as
    /// such; what was validated is what is executed.
    #[test]
    fn a_header_that_changes_while_it_is_read_is_read_once() {
        let memory = Arc::new(memory::reserve(1).unwrap());
        let ended = Arc::new(AtomicBool::new(false));
        header(&memory, T_IN, 0);
        let changer = std::thread::spawn({
            let (memory, ended) = (memory.clone(), ended.clone());
            move || {
                while !ended.load(Ordering::Relaxed) {
                    header(&memory, T_OUT, u64::MAX / 512 - 1);
                    header(&memory, T_IN, 2047);
                }
            }
        });
        let chain = Chain::from_parts(0, parts(&[(0, 16)]), parts(&[(0x1000, 512), (0x8000, 1)]));
        let mut buffers = GuestBuffers::new(memory);
        for _ in 0..100_000 {
            buffers.clear();
            match BlockRequest::parse(&chain, &SHAPE, &mut buffers).unwrap().action {
                Ok(Action::Disk { offset_bytes, .. }) => {
                    assert!(offset_bytes + buffers.len_bytes() <= SHAPE.capacity_bytes, "{offset_bytes:#x}");
                }
                action => assert_eq!((action, buffers.len_bytes()), (Err(Status::IoError), 0)),
            }
        }
        ended.store(true, Ordering::Relaxed);
        changer.join().unwrap();
    }
}
