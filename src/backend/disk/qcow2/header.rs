//! Parses and validates a qcow2 header (docs/interop/qcow2 in QEMU's sources).

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::packed::Compression;
use super::{BackingName, Refusal};

const HEADER_BYTES: usize = 112;
/// The header size of version 2; later fields have these default values.
const VERSION_2_BYTES: usize = 72;
const VERSION_2_REFCOUNT_ORDER: u32 = 4;
const MAGIC: u32 = 0x5146_49fb;

/// The offset of the refcount table's position: its offset, 8 bytes, and its clusters, 4.
pub const COUNTS_AT: u64 = 48;
/// The offset of `incompatible_features`.
pub const FEATURES_AT: u64 = 72;
/// The offset of `autoclear_features`.
pub const AUTOCLEAR_AT: u64 = 88;

// Bits of `incompatible_features`: software that does not support one must not open the image.
pub const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;

/// The maximum length of a backing file's name.
const NAME_BYTES_MAX: usize = 1023;
/// The header extension with the format of the backing file.
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// Where header extensions are searched: they and the backing file's name are within the first cluster.
const EXTENSIONS_BYTES: usize = 4096;

/// The same limit as QEMU's (32 MiB).
pub const TABLE_BYTES_MAX: u64 = 32 << 20;
/// The file is at most 4 TiB with the default cluster size of 64 KiB.
pub const CLUSTERS_MAX: u64 = 1 << 26;

/// The header's content.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    /// Whether it is version 2, in which an entry cannot read as zeroes where there is a backing file.
    pub version_2: bool,
    /// The cluster size is `1 << cluster_bits`.
    pub cluster_bits: u32,
    /// The disk's capacity.
    pub size_bytes: u64,
    /// The offset and size of the L1 table.
    pub first_level: (u64, u64),
    /// The offset and size of the refcount table.
    pub counts: (u64, u64),
    /// A refcount has `1 << refcount_order` bits.
    pub refcount_order: u32,
    /// The compression type.
    pub compression: Compression,
    /// `incompatible_features`.
    pub features: u64,
    /// Whether there are snapshots, which also use clusters and are not checked.
    pub snapshots: bool,
    /// Whether there are autoclear features, which a writer without support for them must clear.
    pub autoclear: bool,
}

impl Header {
    /// Reads the header of an image that is used with a backing file if `has_backing`.
    pub fn read(file: &File, has_backing: bool) -> Result<Header, Refusal> {
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
        if u32_at(32) != 0 {
            return Err(Refusal::Encrypted);
        }
        let features = if version_2 { 0 } else { u64_at(72) };
        check_features(features)?;
        match (u64_at(8), has_backing) {
            (0, false) | (1.., true) => {}
            (0, true) => return Err(Refusal::NoBackingFile),
            (name_at, false) => {
                let extensions_at = if version_2 { VERSION_2_BYTES } else { u32_at(100) as usize };
                return Err(Refusal::BackingFile(read_backing_name(file, name_at, u32_at(16), extensions_at)?));
            }
        }
        let header = Header {
            version_2,
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

    /// The cluster size.
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// The number of refcounts per block.
    pub fn counts_per_block(&self) -> u64 {
        self.cluster_bytes() << 3 >> self.refcount_order
    }
}

/// Reads the name of the backing file, and its format from the header extensions.
fn read_backing_name(file: &File, at: u64, len_bytes: u32, extensions_at: usize) -> Result<BackingName, Refusal> {
    let mut name = vec![0; NAME_BYTES_MAX.min(len_bytes as usize)];
    let len = file.read_at(&mut name, at)?;
    name.truncate(len);
    let mut head = vec![0; EXTENSIONS_BYTES];
    let len = file.read_at(&mut head, 0)?;
    let mut rest = head.get(extensions_at..len).unwrap_or_default();
    let mut format = Vec::new();
    // Each is its type, its length, and that many bytes, padded to a multiple of 8. Type 0 is the end.
    while let Some(([a, b, c, d, len @ ..], data)) = rest.split_first_chunk::<8>() {
        let (kind, len) = (u32::from_be_bytes([*a, *b, *c, *d]), u32::from_be_bytes(*len) as usize);
        match kind {
            0 => break,
            BACKING_FORMAT => format = data.get(..len).unwrap_or_default().to_vec(),
            _ => {}
        }
        rest = data.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(BackingName { name, format })
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
