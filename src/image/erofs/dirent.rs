//! Encodes directories (linux, fs/erofs/erofs_fs.h: `erofs_dirent`).
//!
//! Each block has records followed by names; names are sorted bytewise across the whole directory, including `.` and
//! `..`.

use super::BLOCK_BYTES;

const RECORD_BYTES: usize = 12;

/// A name, its inode's location and its type.
pub struct Dirent<'a> {
    pub name: &'a [u8],
    pub nid: u64,
    pub kind: u8,
}

/// The division of a directory into blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// The number of blocks before the last one.
    pub full_blocks: u32,
    /// The size of the last one: at least one byte, at most a block.
    pub last_bytes: usize,
}

impl Shape {
    /// The size in the directory's inode.
    pub fn size_bytes(self) -> u64 {
        u64::from(self.full_blocks) * BLOCK_BYTES as u64 + self.last_bytes as u64
    }
}

/// The shape of a directory with these names plus `.` and `..`, sorted by [`sorted`].
pub fn shape<'a>(names: impl Iterator<Item = &'a [u8]>) -> Shape {
    let mut shape = Shape { full_blocks: 0, last_bytes: 0 };
    for name in sorted(names, |name| name, b".", b"..") {
        let bytes = RECORD_BYTES + name.len();
        if shape.last_bytes + bytes > BLOCK_BYTES {
            shape.full_blocks += 1;
            shape.last_bytes = 0;
        }
        shape.last_bytes += bytes;
    }
    shape
}

/// Sorted items, with the two dot entries inserted.
pub fn sorted<'a, T>(items: impl Iterator<Item = T>, name: impl Fn(&T) -> &'a [u8], dot: T, dots: T) -> Vec<T> {
    let mut all: Vec<T> = [dot, dots].into_iter().chain(items).collect();
    all.sort_by(|a, b| name(a).cmp(name(b)));
    all
}

/// Encodes the directory: each block except the last is padded.
pub fn encode(entries: &[Dirent], output: &mut Vec<u8>) {
    let mut rest = entries;
    while !rest.is_empty() {
        let mut bytes = 0;
        let count = rest.iter().take_while(|entry| {
            bytes += RECORD_BYTES + entry.name.len();
            bytes <= BLOCK_BYTES
        });
        let (block, after) = rest.split_at(count.count());
        encode_block(block, output);
        rest = after;
        if !rest.is_empty() {
            output.resize(output.len().next_multiple_of(BLOCK_BYTES), 0);
        }
    }
}

fn encode_block(entries: &[Dirent], output: &mut Vec<u8>) {
    let mut name_offset = RECORD_BYTES * entries.len();
    for entry in entries {
        output.extend(entry.nid.to_le_bytes());
        // Offsets in a block fit into sixteen bits.
        output.extend((name_offset as u16).to_le_bytes());
        output.extend([entry.kind, 0]);
        name_offset += entry.name.len();
    }
    for entry in entries {
        output.extend(entry.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(names: &[Vec<u8>]) -> Vec<u8> {
        let entry = |name| Dirent { name, nid: 1, kind: 2 };
        let entries = sorted(names.iter().map(|name| entry(name)), |entry| entry.name, entry(b"."), entry(b".."));
        let mut bytes = Vec::new();
        encode(&entries, &mut bytes);
        bytes
    }

    #[test]
    fn the_shape_is_that_of_the_bytes() {
        for count in [0, 1, 200, 240, 255, 256, 257, 5000] {
            for len in [1, 4, 255] {
                let names: Vec<Vec<u8>> = (0..count).map(|i| format!("{i:0len$}").into_bytes()).collect();
                let bytes = encoded(&names);
                let shape = shape(names.iter().map(|name| name.as_slice()));
                assert_eq!(shape.size_bytes(), bytes.len() as u64, "{count} names of {len} bytes");
                assert!((1..=BLOCK_BYTES).contains(&shape.last_bytes));
            }
        }
    }

    #[test]
    fn dot_entries_are_sorted_bytewise() {
        let bytes = encoded(&[b"-a".to_vec(), b"a".to_vec()]);
        assert_eq!(&bytes[4 * RECORD_BYTES..], b"-a...a");
    }
}
