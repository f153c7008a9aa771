//! Memory statistics provided by the guest (virtio 1.2 §5.5.6.3).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// An entry: a 16-bit tag and a 64-bit value, packed.
const ENTRY_BYTES: usize = 10;
/// Far larger than all defined tags together.
pub const BYTES_MAX: u64 = 64 * ENTRY_BYTES as u64;

/// A guest's memory statistics. They are untrusted: for display only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// When they arrived.
    pub at: Instant,
    /// Unused memory, in bytes.
    pub free_bytes: Option<u64>,
    /// All of its memory excluding the balloon, in bytes.
    pub total_bytes: Option<u64>,
    /// Memory available to applications without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// Memory that can be reclaimed quickly, such as the page cache, in bytes.
    pub caches_bytes: Option<u64>,
    /// Memory swapped in so far, in bytes.
    pub swapped_in_bytes: Option<u64>,
    /// Memory swapped out so far, in bytes.
    pub swapped_out_bytes: Option<u64>,
    /// Major page faults so far.
    pub major_faults: Option<u64>,
    /// Minor page faults so far.
    pub minor_faults: Option<u64>,
}

impl Statistics {
    fn new(at: Instant) -> Statistics {
        Statistics {
            at,
            free_bytes: None,
            total_bytes: None,
            available_bytes: None,
            caches_bytes: None,
            swapped_in_bytes: None,
            swapped_out_bytes: None,
            major_faults: None,
            minor_faults: None,
        }
    }

    /// Parses a buffer. `None` if it does not consist of whole entries; unknown tags are skipped.
    fn parse(bytes: &[u8], at: Instant) -> Option<Statistics> {
        let (entries, rest) = bytes.as_chunks::<ENTRY_BYTES>();
        if !rest.is_empty() {
            return None;
        }
        let mut statistics = Statistics::new(at);
        for [tag_low, tag_high, value @ ..] in entries {
            // virtio 1.2 §5.5.6.4.
            let field = match u16::from_le_bytes([*tag_low, *tag_high]) {
                0 => &mut statistics.swapped_in_bytes,
                1 => &mut statistics.swapped_out_bytes,
                2 => &mut statistics.major_faults,
                3 => &mut statistics.minor_faults,
                4 => &mut statistics.free_bytes,
                5 => &mut statistics.total_bytes,
                6 => &mut statistics.available_bytes,
                7 => &mut statistics.caches_bytes,
                _ => continue,
            };
            *field = Some(u64::from_le_bytes(*value));
        }
        Some(statistics)
    }
}

/// The latest statistics, written by the device's thread.
#[derive(Debug, Default)]
pub struct Board(Mutex<Option<Statistics>>);

impl Board {
    /// Stores the statistics in a guest's buffer. Returns whether they are valid; if not, the previous ones are kept.
    pub fn write(&self, bytes: &[u8]) -> bool {
        let statistics = Statistics::parse(bytes, Instant::now());
        let in_order = statistics.is_some();
        if in_order {
            *self.lock() = statistics;
        }
        in_order
    }

    /// The latest statistics.
    pub fn read(&self) -> Option<Statistics> {
        *self.lock()
    }

    /// Discards the statistics.
    pub fn clear(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> MutexGuard<'_, Option<Statistics>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(tag: u16, value: u64) -> Vec<u8> {
        [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()
    }

    #[test]
    fn known_tags_are_read_and_others_skipped() {
        let at = Instant::now();
        let bytes = [entry(5, 500), entry(4, u64::MAX), entry(0xffff, 7), entry(16, 8), entry(5, 600)].concat();
        let found = Statistics::parse(&bytes, at).unwrap();
        let wanted = Statistics { total_bytes: Some(600), free_bytes: Some(u64::MAX), ..Statistics::new(at) };
        assert_eq!(found, wanted);
        assert_eq!(Statistics::parse(&[], at), Some(Statistics::new(at)));
    }

    #[test]
    fn a_buffer_of_invalid_length_is_ignored() {
        let board = Board::default();
        assert!(board.write(&entry(4, 1)));
        for len in (0..30).filter(|len| len % ENTRY_BYTES != 0) {
            assert!(!board.write(&vec![4; len]), "{len}");
        }
        assert_eq!(board.read().unwrap().free_bytes, Some(1));
    }
}
