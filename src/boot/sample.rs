//! Kernel images for tests, made byte by byte.

use std::fs::File;
use std::io::Write;

/// A segment of an ELF image: where it goes, its bytes, and how much memory it takes.
pub struct Segment<'a> {
    pub address: u64,
    pub bytes: &'a [u8],
    pub memory_bytes: u64,
}

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;

/// An x86-64 ELF image, with `note` as its note segment.
pub fn elf(entry: u64, segments: &[Segment], note: Option<&[u8]>) -> Vec<u8> {
    let count = segments.len() + usize::from(note.is_some());
    let mut data_at = HEADER_BYTES + count * PROGRAM_HEADER_BYTES;
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend(entry.to_le_bytes());
    image.extend((HEADER_BYTES as u64).to_le_bytes());
    image.extend(0u64.to_le_bytes());
    image.extend([0, 0, 0, 0, 64, 0, 56, 0, count as u8, 0, 0, 0, 0, 0, 0, 0]);
    let note = note.map(|bytes| (4u32, 0, bytes, bytes.len() as u64));
    let loads = segments.iter().map(|s| (1u32, s.address, s.bytes, s.memory_bytes));
    let mut data = Vec::new();
    for (kind, address, bytes, memory_bytes) in note.into_iter().chain(loads) {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for field in [data_at as u64, !address, address, bytes.len() as u64, memory_bytes, 4] {
            image.extend(field.to_le_bytes());
        }
        data.extend_from_slice(bytes);
        data_at += bytes.len();
    }
    image.extend(data);
    image
}

/// An ELF note.
pub fn note(name: &[u8], kind: u32, value: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for field in [name.len() as u32, value.len() as u32, kind] {
        note.extend(field.to_le_bytes());
    }
    for field in [name, value] {
        note.extend_from_slice(field);
        note.resize(note.len().next_multiple_of(4), 0);
    }
    note
}

/// A file with `bytes` in it, that no path leads to.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}
