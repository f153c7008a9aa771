//! From the buffer that a guest fills about its memory to what can be shown of it (virtio 1.2 §5.5.6.3).

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// An entry: a tag of 16 bits and a value of 64, without a gap.
const ENTRY_BYTES: usize = 10;
/// Far more than there are tags.
pub const BYTES_MAX: u64 = 64 * ENTRY_BYTES as u64;

/// What a guest says of its memory. It may say anything: to be shown, not to be reckoned with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Statistics {
    /// When it came.
    pub at: Instant,
    /// Memory that is not used at all, in bytes.
    pub free_bytes: Option<u64>,
    /// All of its memory, less what is in the balloon, in bytes.
    pub total_bytes: Option<u64>,
    /// What programs could yet have without swapping, in bytes.
    pub available_bytes: Option<u64>,
    /// What can be given up at once, such as copies of files, in bytes.
    pub caches_bytes: Option<u64>,
    /// Swapped in so far, in bytes.
    pub swapped_in_bytes: Option<u64>,
    /// Swapped out so far, in bytes.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults so far that waited for a disk.
    pub major_faults: Option<u64>,
    /// Page faults so far that did not.
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

    /// Parses a whole buffer. `None` where that is no row of entries; a tag that is not known is passed over.
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

/// Where the last statistics are left by the device's thread, for others to read.
#[derive(Debug, Default)]
pub struct Board(Mutex<Option<Statistics>>);

impl Board {
    /// Puts up what is in a guest's buffer. Returns whether that made sense; if not, what was there before stays.
    pub fn write(&self, bytes: &[u8]) -> bool {
        let statistics = Statistics::parse(bytes, Instant::now());
        let in_order = statistics.is_some();
        if in_order {
            *self.lock() = statistics;
        }
        in_order
    }

    /// What was put up last.
    pub fn read(&self) -> Option<Statistics> {
        *self.lock()
    }

    /// Takes it down.
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
    fn known_tags_are_read_and_others_are_passed_over() {
        let at = Instant::now();
        let bytes = [entry(5, 500), entry(4, u64::MAX), entry(0xffff, 7), entry(16, 8), entry(5, 600)].concat();
        let found = Statistics::parse(&bytes, at).unwrap();
        let wanted = Statistics { total_bytes: Some(600), free_bytes: Some(u64::MAX), ..Statistics::new(at) };
        assert_eq!(found, wanted);
        assert_eq!(Statistics::parse(&[], at), Some(Statistics::new(at)));
    }

    #[test]
    fn a_buffer_of_an_odd_length_changes_nothing() {
        let board = Board::default();
        assert!(board.write(&entry(4, 1)));
        for len in (0..30).filter(|len| len % ENTRY_BYTES != 0) {
            assert!(!board.write(&vec![4; len]), "{len}");
        }
        assert_eq!(board.read().unwrap().free_bytes, Some(1));
    }
}
