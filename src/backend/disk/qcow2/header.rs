//! From a qcow2 file's first bytes to its layout as plain numbers, checked to be one that can be used at all
//! (docs/interop/qcow2 in QEMU's sources).

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::Refusal;
use super::packed::Compression;

const HEADER_BYTES: usize = 112;
/// The header of version 2, which ends sooner; what then follows has these values.
const VERSION_2_BYTES: usize = 72;
const VERSION_2_REFCOUNT_ORDER: u32 = 4;
const MAGIC: u32 = 0x5146_49fb;

/// Where the place of the table of counts stands: its offset, 8 bytes, and its clusters, 4.
pub const COUNTS_AT: u64 = 48;
/// Where `incompatible_features` stands.
pub const FEATURES_AT: u64 = 72;
/// Where `autoclear_features` stands.
pub const AUTOCLEAR_AT: u64 = 88;

// Bits of `incompatible_features`: an image that has one of them is not what it seems to who does not know it.
pub const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// As large as QEMU makes them (32 MiB).
pub const TABLE_BYTES_MAX: u64 = 32 << 20;
/// The file is at most 4 TiB of the usual 64 KiB clusters.
pub const CLUSTERS_MAX: u64 = 1 << 26;

/// What the header says.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// A cluster has `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Offset and bytes of the first level's table.
    pub first_level: (u64, u64),
    /// Offset and bytes of the table of blocks of counts.
    pub counts: (u64, u64),
    /// A count has `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// How compressed clusters are.
    pub compression: Compression,
    /// `incompatible_features`.
    pub features: u64,
    /// Whether snapshots hold clusters as well, which nobody here counts.
    pub snapshots: bool,
    /// Whether it has what a writer that does not know it is to take away.
    pub autoclear: bool,
}

impl Header {
    /// Reads it.
    pub fn read(file: &File) -> Result<Header, Refusal> {
        let mut bytes = [0; HEADER_BYTES];
        // A small image of version 2 may be shorter.
        let len = file.read_at(&mut bytes, 0)?;
        let u32_at = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let u64_at = |at: usize| bytes[at..].first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        if len < VERSION_2_BYTES || u32_at(0) != MAGIC {
            return Err(Refusal::NotQcow2);
        }
        let version_2 = match u32_at(4) {
            2 => true,
            3 => false,
            other => return Err(Refusal::Version(other)),
        };
        if u64_at(8) != 0 {
            return Err(Refusal::BackingFile);
        }
        if u32_at(32) != 0 {
            return Err(Refusal::Encrypted);
        }
        let features = if version_2 { 0 } else { u64_at(72) };
        check_features(features)?;
        let header = Header {
            cluster_bits: u32_at(20),
            size_bytes: u64_at(24),
            first_level: (u64_at(40), 8 * u64::from(u32_at(36))),
            counts: (u64_at(48), u64::from(u32_at(56)) << u32_at(20).min(21)),
            refcount_order: if version_2 { VERSION_2_REFCOUNT_ORDER } else { u32_at(96) },
            compression: match (features & COMPRESSION_TYPE != 0, bytes[104]) {
                (false, _) | (true, 0) => Compression::Deflate,
                (true, 1) => Compression::Zstd,
                (true, other) => return Err(Refusal::Compression(other)),
            },
            features,
            snapshots: u32_at(60) != 0,
            autoclear: !version_2 && u64_at(88) != 0,
        };
        header.check()?;
        Ok(header)
    }

    fn check(&self) -> Result<(), Refusal> {
        if !(9..=21).contains(&self.cluster_bits) || self.refcount_order > 6 || self.counts.1 == 0 {
            return Err(Refusal::Damaged("its header is invalid"));
        }
        if self.first_level.1 > TABLE_BYTES_MAX || self.counts.1 > TABLE_BYTES_MAX {
            return Err(Refusal::TooLarge);
        }
        // At most 2^22 entries for 2^39 bytes each.
        if self.size_bytes > (self.first_level.1 / 8) << (2 * self.cluster_bits - 3) {
            return Err(Refusal::Damaged("its L1 table is too small for its size"));
        }
        Ok(())
    }

    /// Bytes of a cluster.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// How many clusters one block of counts counts.
    pub fn counts_per_block(&self) -> u64 {
        self.cluster_bytes() << 3 >> self.refcount_order
    }
}

fn check_features(features: u64) -> Result<(), Refusal> {
    const KNOWN: u64 = DIRTY | COMPRESSION_TYPE;
    match features {
        _ if features & CORRUPT != 0 => Err(Refusal::Damaged("it is marked as corrupt")),
        _ if features & EXTERNAL_DATA != 0 => Err(Refusal::ExternalData),
        _ if features & EXTENDED_L2 != 0 => Err(Refusal::ExtendedL2),
        _ if features & !KNOWN != 0 => Err(Refusal::Feature(features & !KNOWN)),
        _ => Ok(()),
    }
}
