//! Encodes the superblock (linux, fs/erofs/erofs_fs.h: `erofs_super_block`, `z_erofs_lz4_cfgs`).

use super::BLOCK_BYTES;

const OFFSET: usize = 1024;
const MAGIC: u32 = 0xe0f5_e1e2;
const BLOCK_BITS: u8 = 12;

const COMPAT_CHECKSUM: u32 = 0x1;
/// The timestamp of an inode is its mtime.
const COMPAT_MTIME: u32 = 0x2;

/// LZ4 data is at the end of its blocks.
const INCOMPAT_ZERO_PADDING: u32 = 0x1;
/// The superblock is followed by compression parameters, and clusters may have more than one block.
const INCOMPAT_BIG_CLUSTERS: u32 = 0x2;
const INCOMPAT_CHUNKED: u32 = 0x4;

const ALGORITHM_LZ4: u16 = 1;
/// The maximum LZ4 window.
const LZ4_MAX_DISTANCE: u16 = 65535;

/// The variable contents of the superblock.
pub struct Superblock {
    pub root_nid: u16,
    pub inodes: u64,
    pub blocks: u32,
    pub meta_block: u32,
    pub uuid: [u8; 16],
    /// Whether files are compressed, and the maximum number of blocks of a cluster.
    pub cluster_blocks: Option<u16>,
    pub chunked: bool,
}

impl Superblock {
    /// Encodes the first block of the image.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        let mut put = |at: usize, bytes: &[u8]| block[OFFSET + at..][..bytes.len()].copy_from_slice(bytes);
        let mut incompat = 0;
        if let Some(cluster_blocks) = self.cluster_blocks {
            incompat |= INCOMPAT_ZERO_PADDING | INCOMPAT_BIG_CLUSTERS;
            put(84, &ALGORITHM_LZ4.to_le_bytes());
            // After the superblock: the size of LZ4's parameters, and the parameters.
            put(128, &14u16.to_le_bytes());
            put(130, &LZ4_MAX_DISTANCE.to_le_bytes());
            put(132, &cluster_blocks.to_le_bytes());
        }
        if self.chunked {
            incompat |= INCOMPAT_CHUNKED;
        }
        put(0, &MAGIC.to_le_bytes());
        put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
        put(12, &[BLOCK_BITS]);
        put(14, &self.root_nid.to_le_bytes());
        put(16, &self.inodes.to_le_bytes());
        put(36, &self.blocks.to_le_bytes());
        put(40, &self.meta_block.to_le_bytes());
        put(48, &self.uuid);
        put(80, &incompat.to_le_bytes());
        // Covers the rest of the block, with the checksum set to zero.
        let checksum = crc32c(&block[OFFSET..]);
        block[OFFSET + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
        block
    }
}

/// The kernel's `crc32c(~0, ...)`, without the usual final inversion.
fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & (crc & 1).wrapping_neg()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_crc32c_without_the_final_inversion() {
        // The check value of CRC-32C, for these nine digits.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }
}
