//! What the guest of `do=journal` writes: records, each of them flushed before the guest says so.

use std::fs;
use std::path::Path;

/// The bytes that the guest writes before each flush.
pub const RECORD_BYTES: usize = 16 << 10;

/// Record `number`, as the guest writes it.
fn record(number: u64) -> Vec<u8> {
    let mut sector = [number as u8; 512];
    sector[..8].copy_from_slice(&number.to_le_bytes());
    sector[504..].copy_from_slice(&(!number).to_le_bytes());
    sector.repeat(RECORD_BYTES / 512)
}

/// The number of records that the guest was told to be durable, from what it has printed.
pub fn durable(printed: &str) -> u64 {
    // The last line may be incomplete.
    let complete = &printed[..printed.rfind('\n').unwrap_or(0)];
    complete.rsplit_once("durable ").map_or(0, |(_, rest)| rest.lines().next().unwrap_or_default().parse().unwrap())
}

/// The first of `count` records that is not in the raw image `disk`.
pub fn first_lost(disk: &Path, count: u64) -> Option<u64> {
    let found = fs::read(disk).unwrap();
    let mut records = found.chunks(RECORD_BYTES);
    (1..=count).find(|number| records.next() != Some(&record(*number)))
}
