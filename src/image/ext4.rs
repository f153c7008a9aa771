//! Creates empty ext4 file systems by writing the few nonzero blocks to a sparse file.
//!
//! The format is described in the kernel's Documentation/filesystems/ext4/. Each group has its own bitmaps and inodes;
//! all but the first and the last one are marked as not in use yet, so that neither husk nor the guest writes anything
//! there until a file needs it. There are no copies of the superblock, and a journal only on request.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};

const BLOCK_BYTES: u64 = 4096;
const GROUP_BLOCKS: u64 = 32768;
const GROUP_INODES: u32 = 8192;
const INODE_BYTES: u64 = 256;
const DESCRIPTOR_BYTES: u64 = 64;
const TABLE_BLOCKS: u64 = GROUP_INODES as u64 * INODE_BYTES / BLOCK_BYTES;
/// Two bitmaps and the inode table.
const GROUP_OVERHEAD: u64 = 2 + TABLE_BLOCKS;

/// The minimum size with room for data.
pub const MIN_BYTES: u64 = 16 << 20;
/// The maximum size: most host file systems limit files to 16 TiB, as do 32-bit block numbers.
pub const MAX_BYTES: u64 = 8 << 40;

const ROOT_INODE: u32 = 2;
const JOURNAL_INODE: u32 = 8;
/// `lost+found`, the first inode that is not reserved.
const LAST_INODE: u32 = 11;

/// `ext_attr`, `dir_index`, `sparse_super2` (superblock copies only where specified, which is nowhere).
const COMPAT: u32 = 0x8 | 0x20 | 0x200;
const COMPAT_HAS_JOURNAL: u32 = 0x4;
/// `filetype`, `extents`, `64bit`.
const INCOMPAT: u32 = 0x2 | 0x40 | 0x80;
/// `sparse_super`, `large_file`, `huge_file`, `gdt_csum`, `dir_nlink`, `extra_isize`.
const RO_COMPAT: u32 = 0x1 | 0x2 | 0x8 | 0x10 | 0x20 | 0x40;

const INODES_UNUSED: u16 = 0x1;
const BLOCKS_UNUSED: u16 = 0x2;
/// The inode table is already zeroed, so the guest's kernel need not do that.
const INODES_ZEROED: u16 = 0x4;

/// Whether a file system has a journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    /// For file systems that may be used again after a crash.
    Yes,
    /// For file systems discarded with their guest, which then needs fewer writes for durability.
    No,
}

/// The UUID of the file system in `file`.
pub fn uuid(file: &File) -> Result<[u8; 16]> {
    const UUID_AT: u64 = 1024 + 0x68;
    let mut uuid = [0; 16];
    file.read_exact_at(&mut uuid, UUID_AT)?;
    Ok(uuid)
}

/// Creates an empty file system of about `size_bytes` in the empty `file`, with the UUID `uuid` and the timestamp
/// `seconds` in its inodes.
pub fn make(file: &File, size_bytes: u64, journal: Journal, uuid: [u8; 16], seconds: u32) -> Result<()> {
    ensure!((MIN_BYTES..=MAX_BYTES).contains(&size_bytes), "the disk size must be 16 MiB to 8 TiB");
    let shape = Shape::of(size_bytes, journal);
    file.set_len(shape.blocks * BLOCK_BYTES)?;
    let put = |block: u64, bytes: &[u8]| file.write_all_at(bytes, block * BLOCK_BYTES);
    let mut descriptors = Vec::with_capacity((shape.groups * DESCRIPTOR_BYTES) as usize);
    for group in 0..shape.groups {
        descriptors.extend(shape.descriptor(group, &uuid));
        if shape.has_bitmap(group) {
            put(shape.block_bitmap(group), &shape.bitmap(group))?;
        }
    }
    put(1, &descriptors)?;
    put(shape.inode_bitmap(0), &bitmap(u64::from(LAST_INODE), u64::from(GROUP_INODES)))?;
    let inode = |number: u32, bytes: [u8; INODE_BYTES as usize]| {
        let at = shape.inode_table(0) * BLOCK_BYTES + u64::from(number - 1) * INODE_BYTES;
        file.write_all_at(&bytes, at)
    };
    inode(ROOT_INODE, encode_inode(0o040_755, 3, shape.root_block(), 1, seconds))?;
    inode(LAST_INODE, encode_inode(0o040_700, 2, shape.root_block() + 1, 1, seconds))?;
    put(shape.root_block(), &directory(ROOT_INODE, &[(LAST_INODE, b"lost+found")]))?;
    put(shape.root_block() + 1, &directory(LAST_INODE, &[]))?;
    if shape.has_journal() {
        inode(JOURNAL_INODE, encode_inode(0o100_600, 1, shape.journal_block(), shape.journal_blocks, seconds))?;
        put(shape.journal_block(), &empty_journal(shape.journal_blocks as u32, &uuid))?;
    }
    file.write_all_at(&shape.superblock(&uuid, seconds), 1024)?;
    Ok(())
}

/// The layout. The first group contains, in this order: superblock, descriptors, bitmaps, inode table, two directories,
/// and the journal, if any.
struct Shape {
    blocks: u64,
    groups: u64,
    descriptor_blocks: u64,
    journal_blocks: u64,
}

impl Shape {
    fn of(size_bytes: u64, journal: Journal) -> Shape {
        let mut blocks = size_bytes / BLOCK_BYTES;
        // A last group that has no room beyond its metadata is omitted.
        if blocks > GROUP_BLOCKS && blocks % GROUP_BLOCKS < GROUP_OVERHEAD + 64 {
            blocks -= blocks % GROUP_BLOCKS;
        }
        let groups = blocks.div_ceil(GROUP_BLOCKS);
        let journal_blocks = match (journal, size_bytes >> 20) {
            (Journal::No, _) => 0,
            (Journal::Yes, ..128) => 1024,
            (Journal::Yes, 128..8192) => 4096,
            (Journal::Yes, _) => 16384,
        };
        let descriptor_blocks = (groups * DESCRIPTOR_BYTES).div_ceil(BLOCK_BYTES);
        Shape { blocks, groups, descriptor_blocks, journal_blocks }
    }

    /// The first block of a group's own metadata.
    fn start(&self, group: u64) -> u64 {
        group * GROUP_BLOCKS + if group == 0 { 1 + self.descriptor_blocks } else { 0 }
    }

    fn block_bitmap(&self, group: u64) -> u64 {
        self.start(group)
    }

    fn inode_bitmap(&self, group: u64) -> u64 {
        self.start(group) + 1
    }

    fn inode_table(&self, group: u64) -> u64 {
        self.start(group) + 2
    }

    fn root_block(&self) -> u64 {
        self.inode_table(0) + TABLE_BLOCKS
    }

    fn journal_block(&self) -> u64 {
        self.root_block() + 2
    }

    fn has_journal(&self) -> bool {
        self.journal_blocks > 0
    }

    fn blocks_of(&self, group: u64) -> u64 {
        GROUP_BLOCKS.min(self.blocks - group * GROUP_BLOCKS)
    }

    /// The number of blocks in use, which are the first ones of each group.
    fn used_blocks(&self, group: u64) -> u64 {
        if group == 0 { self.journal_block() + self.journal_blocks } else { GROUP_OVERHEAD }
    }

    fn has_bitmap(&self, group: u64) -> bool {
        group == 0 || group + 1 == self.groups
    }

    fn bitmap(&self, group: u64) -> Vec<u8> {
        bitmap(self.used_blocks(group), self.blocks_of(group))
    }

    fn descriptor(&self, group: u64, uuid: &[u8; 16]) -> [u8; DESCRIPTOR_BYTES as usize] {
        let mut descriptor = [0; DESCRIPTOR_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| descriptor[at..at + bytes.len()].copy_from_slice(bytes);
        for (at, block) in [(0, self.block_bitmap(group)), (4, self.inode_bitmap(group)), (8, self.inode_table(group))]
        {
            put(at, &(block as u32).to_le_bytes());
        }
        let is_first = group == 0;
        let free_inodes = GROUP_INODES - if is_first { LAST_INODE } else { 0 };
        let inodes = INODES_ZEROED | if is_first { 0 } else { INODES_UNUSED };
        let flags = inodes | if self.has_bitmap(group) { 0 } else { BLOCKS_UNUSED };
        put(0xc, &((self.blocks_of(group) - self.used_blocks(group)) as u16).to_le_bytes());
        put(0xe, &(free_inodes as u16).to_le_bytes());
        put(0x10, &(if is_first { 2u16 } else { 0 }).to_le_bytes());
        put(0x12, &flags.to_le_bytes());
        put(0x1c, &(free_inodes as u16).to_le_bytes());
        let parts: [&[u8]; 4] = [uuid, &(group as u32).to_le_bytes(), &descriptor[..0x1e], &descriptor[0x20..]];
        let checksum = parts.iter().fold(!0, |crc, part| crc16(crc, part));
        descriptor[0x1e..0x20].copy_from_slice(&checksum.to_le_bytes());
        descriptor
    }

    fn superblock(&self, uuid: &[u8; 16], seconds: u32) -> [u8; 1024] {
        let mut bytes = [0; 1024];
        let used: u64 = (0..self.groups).map(|group| self.used_blocks(group)).sum();
        let inodes = self.groups as u32 * GROUP_INODES;
        let mut word = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        word(0x0, inodes);
        word(0x4, self.blocks as u32);
        word(0xc, (self.blocks - used) as u32);
        word(0x10, inodes - LAST_INODE);
        // A block size of 2^(10+2) bytes, and clusters of one block.
        word(0x18, 2);
        word(0x1c, 2);
        word(0x20, GROUP_BLOCKS as u32);
        word(0x24, GROUP_BLOCKS as u32);
        word(0x28, GROUP_INODES);
        word(0x30, seconds);
        // No maximum mount count; the magic number; clean, and continue on errors.
        word(0x34, 0xffff_0000);
        word(0x38, 0x0001_ef53);
        word(0x3c, 1);
        word(0x40, seconds);
        word(0x4c, 1);
        word(0x54, LAST_INODE);
        word(0x58, INODE_BYTES as u32);
        word(0x5c, COMPAT | if self.has_journal() { COMPAT_HAS_JOURNAL } else { 0 });
        word(0x60, INCOMPAT);
        word(0x64, RO_COMPAT);
        word(0xe0, if self.has_journal() { JOURNAL_INODE } else { 0 });
        // Directories are hashed with half MD4 and signed characters; descriptors have 64 bytes.
        word(0xfc, 1 | (DESCRIPTOR_BYTES as u32) << 16);
        word(0x160, 1);
        // Default mount options: user extended attributes and ACLs.
        word(0x100, 0xc);
        word(0x108, seconds);
        word(0x15c, 32 | 32 << 16);
        for (at, part) in (0xec..).step_by(4).zip(uuid.as_chunks::<4>().0) {
            word(at, u32::from_le_bytes(*part));
        }
        bytes[0x68..0x78].copy_from_slice(uuid);
        bytes
    }
}

/// A bitmap with the first `used` bits set, and the padding after `total`.
fn bitmap(used: u64, total: u64) -> Vec<u8> {
    let is_set = |bit: u64| bit < used || bit >= total;
    let byte = |at: u64| (0..8).fold(0, |byte, bit| byte | u8::from(is_set(at * 8 + bit)) << bit);
    (0..BLOCK_BYTES).map(byte).collect()
}

fn encode_inode(mode: u16, links: u16, block: u64, blocks: u64, seconds: u32) -> [u8; INODE_BYTES as usize] {
    const EXTENTS: u32 = 0x8_0000;
    let mut bytes = [0; INODE_BYTES as usize];
    let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
    put(0x0, &mode.to_le_bytes());
    put(0x4, &((blocks * BLOCK_BYTES) as u32).to_le_bytes());
    for at in [0x8, 0xc, 0x10, 0x90] {
        put(at, &seconds.to_le_bytes());
    }
    put(0x1a, &links.to_le_bytes());
    put(0x1c, &((blocks * BLOCK_BYTES / 512) as u32).to_le_bytes());
    put(0x20, &EXTENTS.to_le_bytes());
    // An extent tree of depth zero, with one of four entries in use.
    put(0x28, &0x0001_f30a_u32.to_le_bytes());
    put(0x2c, &4u32.to_le_bytes());
    put(0x38, &(blocks as u32).to_le_bytes());
    put(0x3c, &(block as u32).to_le_bytes());
    // Fields after the first 128 bytes.
    put(0x80, &32u16.to_le_bytes());
    bytes
}

/// The single block of a directory below the root.
fn directory(own: u32, others: &[(u32, &[u8])]) -> [u8; BLOCK_BYTES as usize] {
    const DIRECTORY: u8 = 2;
    let mut block = [0; BLOCK_BYTES as usize];
    let mut at = 0;
    let dots: [(u32, &[u8]); 2] = [(own, b"."), (ROOT_INODE, b"..")];
    let count = 2 + others.len();
    for (index, (inode, name)) in dots.iter().chain(others).enumerate() {
        let len = (8 + name.len()).next_multiple_of(4);
        // The last entry spans the rest.
        let len = if index + 1 == count { block.len() - at } else { len };
        block[at..at + 4].copy_from_slice(&inode.to_le_bytes());
        block[at + 4..at + 6].copy_from_slice(&(len as u16).to_le_bytes());
        block[at + 6..at + 8].copy_from_slice(&[name.len() as u8, DIRECTORY]);
        block[at + 8..at + 8 + name.len()].copy_from_slice(name);
        at += len;
    }
    block
}

/// The superblock of an empty journal, which is big-endian.
fn empty_journal(blocks: u32, uuid: &[u8; 16]) -> [u8; 1024] {
    let mut bytes = [0; 1024];
    // Magic number, superblock version 2, no transaction; block size, length, first block, first transaction.
    let words = [0xc03b_3998, 4, 0, BLOCK_BYTES as u32, blocks, 1, 1];
    for (at, word) in (0..).step_by(4).zip(words) {
        bytes[at..at + 4].copy_from_slice(&u32::to_be_bytes(word));
    }
    bytes[0x30..0x40].copy_from_slice(uuid);
    bytes[0x40..0x44].copy_from_slice(&1u32.to_be_bytes());
    bytes
}

fn crc16(crc: u16, bytes: &[u8]) -> u16 {
    bytes.iter().fold(crc, |crc, &byte| {
        (0..8).fold(crc ^ u16::from(byte), |crc, _| (crc >> 1) ^ (0xa001 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    use super::*;

    fn e2fsck(path: &std::path::Path) -> std::process::Output {
        let path_variable = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap());
        Command::new("e2fsck").arg("-fn").arg(path).env("PATH", path_variable).output().expect("e2fsck is installed")
    }

    #[test]
    fn e2fsck_finds_nothing_wrong_at_any_size() {
        const MIB: u64 = 1 << 20;
        for size in [
            MIN_BYTES,
            64 * MIB,
            128 * MIB,
            // The last group is tiny, about its overhead, or slightly larger.
            128 * MIB + 4096,
            130 * MIB,
            131 * MIB,
            1 << 30,
            (10 << 30) + 12345,
            1 << 40,
        ] {
            for journal in [Journal::Yes, Journal::No] {
                let file = tempfile::NamedTempFile::new().unwrap();
                make(file.as_file(), size, journal, [7; 16], 1_700_000_000).unwrap();
                let taken = file.as_file().metadata().unwrap().blocks() * 512;
                assert!(taken <= 200_000 + size / (1 << 20) * 2, "{size} bytes take {taken}");
                let output = e2fsck(file.path());
                assert!(output.status.success(), "{size}, {journal:?}: {output:?}");
            }
        }
    }

    #[test]
    fn e2fsck_detects_damage() {
        let file = tempfile::NamedTempFile::new().unwrap();
        make(file.as_file(), MIN_BYTES, Journal::Yes, [7; 16], 1_700_000_000).unwrap();
        file.as_file().write_all_at(&[1], BLOCK_BYTES + 0xc).unwrap();
        assert!(!e2fsck(file.path()).status.success());
    }

    #[test]
    fn invalid_sizes_are_rejected() {
        let file = tempfile::tempfile().unwrap();
        for size in [0, MIN_BYTES - 1, MAX_BYTES + 1, u64::MAX] {
            assert!(make(&file, size, Journal::Yes, [0; 16], 0).is_err(), "{size}");
        }
    }
}
