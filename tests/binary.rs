//! The binary that runs guests is a static, position-independent executable, of which nothing is writable and executable, and
//! whose pointers to functions are read-only once it has started.

use std::fs;

const TYPE_SHARED: u16 = 3;
const LOAD: u32 = 1;
const DYNAMIC: u32 = 2;
const INTERPRETER: u32 = 3;
const STACK: u32 = 0x6474_e551;
const READ_ONLY_AFTER_RELOCATION: u32 = 0x6474_e552;
const EXECUTABLE: u32 = 1;
const WRITABLE: u32 = 2;
/// Tags of the dynamic section: a library, relocations of code, and flags.
const NEEDED: u64 = 1;
const TEXT_RELOCATIONS: u64 = 22;
const FLAGS_1: u64 = 0x6fff_fffb;
const FLAG_NOW: u64 = 1;
const FLAG_PIE: u64 = 0x0800_0000;

/// An integer of `N` bytes, little-endian.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    number[..N].copy_from_slice(&bytes[at..at + N]);
    u64::from_le_bytes(number)
}

/// A program header (elf(5)).
struct Segment {
    kind: u32,
    flags: u32,
    offset: usize,
    len_bytes: usize,
}

fn segments(elf: &[u8]) -> Vec<Segment> {
    let (start, size, count) = (number::<8>(elf, 32), number::<2>(elf, 54), number::<2>(elf, 56));
    let at = |index| (start + index * size) as usize;
    let segment = |at| Segment {
        kind: number::<4>(elf, at) as u32,
        flags: number::<4>(elf, at + 4) as u32,
        offset: number::<8>(elf, at + 8) as usize,
        len_bytes: number::<8>(elf, at + 32) as usize,
    };
    (0..count).map(at).map(segment).collect()
}

#[test]
fn the_executable_is_hardened() {
    let elf = fs::read(env!("CARGO_BIN_EXE_husk")).unwrap();
    assert_eq!((&elf[..5], number::<2>(&elf, 16) as u16), (&b"\x7fELF\x02"[..], TYPE_SHARED));
    let segments = segments(&elf);
    let all = |kind| segments.iter().filter(move |segment| segment.kind == kind);
    assert_eq!(all(INTERPRETER).count(), 0, "it is static");
    assert!(all(LOAD).all(|segment| segment.flags & (EXECUTABLE | WRITABLE) != EXECUTABLE | WRITABLE));
    assert!(all(STACK).count() == 1 && all(STACK).all(|segment| segment.flags & EXECUTABLE == 0));
    assert_eq!(all(READ_ONLY_AFTER_RELOCATION).count(), 1);
    let dynamic = all(DYNAMIC).next().unwrap();
    let entries = elf[dynamic.offset..][..dynamic.len_bytes].chunks_exact(16);
    let entries: Vec<_> = entries.map(|entry| (number::<8>(entry, 0), number::<8>(entry, 8))).collect();
    assert!(!entries.iter().any(|(tag, _)| matches!(*tag, NEEDED | TEXT_RELOCATIONS)));
    let flags = entries.iter().find(|(tag, _)| *tag == FLAGS_1).unwrap().1;
    assert_eq!(flags & (FLAG_NOW | FLAG_PIE), FLAG_NOW | FLAG_PIE);
}
