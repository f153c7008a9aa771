//! The parts of a descriptor chain: ranges of guest memory, which are read and written piece by piece.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryError};

use crate::memory::GuestMemory;

/// A part of a chain: `len_bytes` bytes of guest memory from `address`, not validated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestRange {
    /// Guest physical address.
    pub address: GuestAddress,
    /// Length in bytes.
    pub len_bytes: u32,
}

/// The total length of `ranges` in bytes.
pub fn len_bytes(ranges: &[GuestRange]) -> u64 {
    ranges.iter().map(|range| u64::from(range.len_bytes)).sum()
}

/// The part of `ranges` that starts at offset `skip_bytes` and has `len_bytes`, or as many as there are.
pub fn part(ranges: &[GuestRange], skip_bytes: u64, len_bytes: u64) -> impl Iterator<Item = GuestRange> {
    let end = skip_bytes.saturating_add(len_bytes);
    let mut at = 0;
    ranges.iter().filter_map(move |range| {
        let first = skip_bytes.clamp(at, at + u64::from(range.len_bytes)) - at;
        let last = end.clamp(at, at + u64::from(range.len_bytes)) - at;
        at += u64::from(range.len_bytes);
        // Both casts are lossless: the values are within the range's length. An address at the very top saturates and
        // is rejected later.
        let address = GuestAddress(range.address.0.saturating_add(first));
        (first < last).then_some(GuestRange { address, len_bytes: (last - first) as u32 })
    })
}

/// Reads `N` bytes of guest memory.
pub fn read_bytes<const N: usize>(memory: &GuestMemory, address: GuestAddress) -> Result<[u8; N], GuestMemoryError> {
    let mut bytes = [0; N];
    match memory.get_slice(address, N) {
        Ok(slice) => drop(slice.copy_to(&mut bytes)),
        // It may cross from one region into the next.
        Err(_) => memory.read_slice(&mut bytes, address)?,
    }
    Ok(bytes)
}

/// Reads the first `N` bytes of `ranges`, however they are split. `None` if there are fewer or they are outside of
/// memory.
pub fn read_front<const N: usize>(memory: &GuestMemory, ranges: &[GuestRange]) -> Option<[u8; N]> {
    if let Some(first) = ranges.first().filter(|first| first.len_bytes as usize >= N) {
        return read_bytes(memory, first.address).ok();
    }
    let mut bytes = [0; N];
    let mut rest = &mut bytes[..];
    for range in part(ranges, 0, N as u64) {
        let (piece, behind) = rest.split_at_mut_checked(range.len_bytes as usize)?;
        memory.read_slice(piece, range.address).ok()?;
        rest = behind;
    }
    rest.is_empty().then_some(bytes)
}

/// Writes `bytes` to the front of `ranges`, however they are split. Returns whether they are large enough and within
/// memory.
#[must_use]
pub fn write_front(memory: &GuestMemory, ranges: &[GuestRange], bytes: &[u8]) -> bool {
    let mut rest = bytes;
    for GuestRange { address, len_bytes } in part(ranges, 0, bytes.len() as u64) {
        let Some((piece, behind)) = rest.split_at_checked(len_bytes as usize) else { return false };
        if memory.write_slice(piece, address).is_err() {
            return false;
        }
        rest = behind;
    }
    rest.is_empty()
}
