//! Compresses files in clusters of 64 KiB, and writes the cluster table after an inode (linux, fs/erofs/erofs_fs.h:
//! `z_erofs_map_header`, `z_erofs_lcluster_index`).
//!
//! Clusters have a fixed input size: each starts at a multiple of 64 KiB and is independent of the previous ones. 64
//! KiB is also the guest's readahead size and LZ4's window.

use super::BLOCK_BYTES;
use super::content::{Cluster, Content};

/// The input size of a cluster.
pub const CLUSTER_BYTES: usize = 64 << 10;
/// The maximum number of blocks of a compressed cluster.
pub const MAX_CLUSTER_BLOCKS: u16 = (CLUSTER_BYTES / BLOCK_BYTES) as u16;

/// `di_advise`: an uncompressed block; the first block of a cluster; a further block.
const PLAIN: u16 = 0;
const HEAD: u16 = 1;
const NONHEAD: u16 = 2;
/// In place of the distance to the first block: the number of compressed blocks.
const BLOCK_COUNT: u16 = 1 << 11;
/// `h_advise`: a cluster may have more than one block.
const BIG_CLUSTERS: u16 = 0x2;

/// Buffers for compression.
pub struct Compressor {
    input: Vec<u8>,
    packed: Vec<u8>,
    padded: Vec<u8>,
}

impl Default for Compressor {
    fn default() -> Compressor {
        let packed_max = lz4_flex::block::get_maximum_output_size(CLUSTER_BYTES);
        Compressor {
            input: vec![0; CLUSTER_BYTES],
            packed: vec![0; packed_max],
            padded: Vec::with_capacity(CLUSTER_BYTES),
        }
    }
}

impl Compressor {
    /// The buffer for the next cluster's input.
    pub fn input(&mut self) -> &mut [u8] {
        &mut self.input
    }

    /// The blocks for the first `len` bytes of the input, and whether they are compressed, which they are only if that
    /// saves a block.
    pub fn pack(&mut self, len: usize) -> (&[u8], bool) {
        let plain_blocks = len.div_ceil(BLOCK_BYTES);
        let packed_len = lz4_flex::block::compress_into(&self.input[..len], &mut self.packed).unwrap_or(usize::MAX);
        let packed = packed_len.div_ceil(BLOCK_BYTES) < plain_blocks;
        self.padded.clear();
        if packed {
            // Padding precedes the data: no LZ4 block starts with a zero.
            self.padded.resize(packed_len.next_multiple_of(BLOCK_BYTES) - packed_len, 0);
            self.padded.extend_from_slice(&self.packed[..packed_len]);
        } else {
            self.padded.extend_from_slice(&self.input[..len]);
            self.padded.resize(plain_blocks * BLOCK_BYTES, 0);
        }
        (&self.padded, packed)
    }
}

/// The size of the table after an inode that ends at a multiple of eight.
pub fn table_bytes(size_bytes: u64) -> u64 {
    16 + 8 * size_bytes.div_ceil(BLOCK_BYTES as u64)
}

/// The total number of blocks.
pub fn blocks(clusters: &[Cluster]) -> u32 {
    clusters.iter().map(|cluster| u32::from(cluster.blocks)).sum()
}

/// Appends the table: a header, eight reserved bytes, and a record for each block of the file.
pub fn encode_table(content: &Content, clusters: &[Cluster], output: &mut Vec<u8>) {
    output.extend([0; 4]);
    output.extend(BIG_CLUSTERS.to_le_bytes());
    // LZ4, with lclusters of one block.
    output.extend([0, 0]);
    output.extend([0; 8]);
    let mut rest = content.size_bytes;
    for cluster in clusters {
        let len = rest.min(CLUSTER_BYTES as u64);
        rest -= len;
        let count = len.div_ceil(BLOCK_BYTES as u64) as u16;
        let last_bytes = (len % BLOCK_BYTES as u64) as u16;
        for index in 0..count {
            let record = match index {
                _ if !cluster.packed => head(PLAIN, 0, cluster.block + u32::from(index)),
                0 => head(HEAD, 0, cluster.block),
                // The file ends within this block, where an empty cluster starts.
                _ if index + 1 == count && last_bytes != 0 => head(PLAIN, last_bytes, 0),
                1 => nonhead(BLOCK_COUNT | u16::from(cluster.blocks), count - 1),
                _ => nonhead(index, count - index),
            };
            output.extend(record);
        }
    }
}

fn head(kind: u16, offset: u16, block: u32) -> [u8; 8] {
    record(kind, offset, block)
}

fn nonhead(back: u16, ahead: u16) -> [u8; 8] {
    record(NONHEAD, 0, u32::from(back) | u32::from(ahead) << 16)
}

fn record(kind: u16, offset: u16, last: u32) -> [u8; 8] {
    let mut record = [0; 8];
    record[..2].copy_from_slice(&kind.to_le_bytes());
    record[2..4].copy_from_slice(&offset.to_le_bytes());
    record[4..].copy_from_slice(&last.to_le_bytes());
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_compressed_if_that_saves_a_block() {
        let mut compressor = Compressor::default();
        compressor.input().fill(7);
        for (len, expected) in [(1, false), (BLOCK_BYTES, false), (BLOCK_BYTES + 1, true), (CLUSTER_BYTES, true)] {
            let (blocks, packed) = compressor.pack(len);
            assert_eq!((packed, blocks.len() % BLOCK_BYTES), (expected, 0), "{len}");
        }
        crate::sys::getrandom(compressor.input()).unwrap();
        let (blocks, packed) = compressor.pack(CLUSTER_BYTES);
        assert_eq!((packed, blocks.len()), (false, CLUSTER_BYTES));
    }

    #[test]
    fn a_compressed_cluster_follows_its_padding() {
        let mut compressor = Compressor::default();
        let text: Vec<u8> = (0..CLUSTER_BYTES as u32).flat_map(|i| (i / 7).to_le_bytes()).take(50_000).collect();
        compressor.input()[..text.len()].copy_from_slice(&text);
        let (blocks, packed) = compressor.pack(text.len());
        let start = blocks.iter().position(|&byte| byte != 0).unwrap();
        assert!(packed && start < BLOCK_BYTES);
        assert!(lz4_flex::block::decompress(&blocks[start..], text.len()).unwrap() == text);
    }
}
