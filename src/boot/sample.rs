//! Kernel images for tests.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};

/// A segment of an ELF image: its address, content and size in memory.
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

/// An unnamed file with the content `bytes`.
pub fn file(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// The offset of [`bzimage`]'s payload in the protected-mode code.
pub const PAYLOAD_OFFSET: u32 = 0x300;

/// A bzImage of protocol 2.15 with `payload`: it runs at 16 MiB, and takes 4 MiB there.
pub fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut code = b"code".to_vec();
    code.resize(PAYLOAD_OFFSET as usize, 0xcc);
    code.extend_from_slice(payload);
    code.resize(code.len().next_multiple_of(16), 0);
    let mut image = vec![0; 1024];
    image[0x1f1] = 1;
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    for (at, field) in [(0x1fe, 0xaa55), (0x206, 0x020f), (0x210, 0x100), (0x236, 1)] {
        put(&mut image, at, &u16::to_le_bytes(field));
    }
    let payload_bytes = payload.len() as u32;
    for (at, field) in [
        (0x1f4, code.len() as u32 / 16),
        (0x22c, 0x7fff_ffff),
        (0x230, 2 << 20),
        (0x238, 2047),
        (0x248, PAYLOAD_OFFSET),
        (0x24c, payload_bytes),
        (0x258, 16 << 20),
        (0x260, 4 << 20),
    ] {
        put(&mut image, at, &field.to_le_bytes());
    }
    image.extend(code);
    image
}

/// Replaces the bytes at `at`.
pub fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// The commands with which Linux's build packs a kernel, before the size is appended; gzip's trailer already has it.
pub const PACKERS: [&str; 6] = [
    "gzip -n -9",
    "bzip2 -9",
    "lzma -9",
    "xz --check=crc32 --x86 --lzma2=dict=32MiB",
    "lz4 -l -9 -c",
    "zstd -22 --ultra",
];

/// Packs `kernel` as a bzImage's payload with the command `packer`; `None` with a visible message if it is not
/// installed.
pub fn packed(kernel: &[u8], packer: &str) -> Option<Vec<u8>> {
    let mut words = packer.split(' ');
    let program = words.next().unwrap();
    let (input, mut output) = (file(kernel), Vec::new());
    std::io::Seek::rewind(&mut &input).unwrap();
    let child = Command::new(program).args(words).stdin(input).stdout(Stdio::piped()).spawn();
    let Ok(mut child) = child else {
        eprintln!("SKIPPED: {program} is not installed, so its payloads are not tested");
        return None;
    };
    child.stdout.take().unwrap().read_to_end(&mut output).unwrap();
    assert!(child.wait().unwrap().success(), "{packer}");
    if program != "gzip" {
        output.extend((kernel.len() as u32).to_le_bytes());
    }
    Some(output)
}

/// An unsupported payload: LZO's magic number.
pub const LZO: &[u8] = b"\x89LZO\0\x0d\x0a\x1a\x0a..............";

/// A moderately compressible ELF kernel of `len` bytes and headers.
pub fn kernel(len: u32) -> Vec<u8> {
    let mut state = 1u32;
    let bytes: Vec<u8> = (0..len)
        .map(|n| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Relative calls, for xz's x86 filter.
            if n.is_multiple_of(5) { 0xe8 } else { (state >> 30) as u8 }
        })
        .collect();
    elf(1 << 20, &[Segment { address: 1 << 20, bytes: &bytes, memory_bytes: 2 << 20 }], None)
}

/// The offset of [`unified`]'s PE header, followed by the section table.
pub const PE_AT: usize = 0x80;
/// The alignment of sections in the file.
pub const PE_ALIGNMENT: usize = 512;

/// A PE file for x86-64 with these sections, in this order; names have at most 8 bytes.
pub fn unified(sections: &[(&str, &[u8])]) -> Vec<u8> {
    let mut image = vec![0; PE_AT];
    put(&mut image, 0, b"MZ");
    put(&mut image, 0x3c, &(PE_AT as u32).to_le_bytes());
    image.extend(b"PE\0\0");
    image.extend(0x8664u16.to_le_bytes());
    image.extend((sections.len() as u16).to_le_bytes());
    image.extend([0; 16]);
    let mut data_at = (image.len() + 40 * sections.len()).next_multiple_of(PE_ALIGNMENT);
    let mut data = Vec::new();
    for (name, bytes) in sections {
        let in_file = bytes.len().next_multiple_of(PE_ALIGNMENT);
        let mut header = name.as_bytes().to_vec();
        header.resize(8, 0);
        for field in [bytes.len(), 0x1_0000, in_file, data_at] {
            header.extend((field as u32).to_le_bytes());
        }
        header.resize(40, 0);
        image.extend(header);
        data.extend_from_slice(bytes);
        data.resize(data.len() + in_file - bytes.len(), 0);
        data_at += in_file;
    }
    image.resize(image.len().next_multiple_of(PE_ALIGNMENT), 0);
    image.extend(data);
    image
}
