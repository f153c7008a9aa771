//! Keeps track of the ranges of a file mapping that anonymous memory has replaced, and limits what they cost the kernel.

use std::collections::BTreeMap;

/// The most ranges that are replaced apart from others. Each adds two to the kernel's list of mappings, which has 65,530 at
/// most for a process (vm.max_map_count); a machine has two mappings of a file.
pub const APART_MAX: usize = 8192;

/// Ranges from a start to an end (exclusive), disjoint and not adjacent.
#[derive(Debug, Default)]
pub struct Replaced {
    ends: BTreeMap<usize, usize>,
    /// How many were apart when they were added. This does not decrease when ranges become one, because the kernel may not
    /// merge memory on both sides of a gap that is filled.
    apart: usize,
}

impl Replaced {
    /// Whether all of `start..end` has been replaced.
    pub fn contains(&self, start: usize, end: usize) -> bool {
        self.touching(start, end).any(|(first, last)| first <= start && end <= last)
    }

    /// Whether `start..end` may be replaced: it is next to a range, which the kernel extends, or there are few.
    pub fn has_room(&self, start: usize, end: usize) -> bool {
        self.apart < APART_MAX || self.touching(start, end).next().is_some()
    }

    /// Adds `start..end`, which is not empty.
    pub fn insert(&mut self, mut start: usize, mut end: usize) {
        let touching: Vec<_> = self.touching(start, end).collect();
        self.apart += usize::from(touching.is_empty());
        for (first, last) in touching {
            (start, end) = (start.min(first), end.max(last));
            self.ends.remove(&first);
        }
        self.ends.insert(start, end);
    }

    /// The ranges that overlap `start..end` or are adjacent to it, from the last one.
    fn touching(&self, start: usize, end: usize) -> impl Iterator<Item = (usize, usize)> {
        let before_end = self.ends.range(..=end).rev().map(|(first, last)| (*first, *last));
        before_end.take_while(move |(_, last)| *last >= start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_equal_a_set_of_pages() {
        const PAGES: usize = 64;
        for seed in 0..300 {
            let mut random = fastrand::Rng::with_seed(seed);
            let (mut replaced, mut model) = (Replaced::default(), [false; PAGES]);
            for _ in 0..20 {
                let start = random.usize(..PAGES);
                let end = random.usize(start + 1..=PAGES.min(start + 12));
                assert_eq!(replaced.contains(start, end), model[start..end].iter().all(|page| *page), "seed {seed}");
                replaced.insert(start, end);
                model[start..end].fill(true);
                let runs = model.chunk_by(|page, next| page == next).filter(|run| run[0]).count();
                assert_eq!(replaced.ends.len(), runs, "seed {seed}");
            }
        }
    }

    #[test]
    fn ranges_apart_are_limited_and_others_are_not() {
        let mut replaced = Replaced::default();
        for at in 0..APART_MAX {
            assert!(replaced.has_room(at * 4, at * 4 + 1));
            replaced.insert(at * 4, at * 4 + 1);
        }
        let behind = APART_MAX * 4;
        assert!(!replaced.has_room(behind, behind + 1) && !replaced.has_room(2, 3));
        assert!(replaced.has_room(1, 2) && replaced.has_room(3, 4) && replaced.has_room(0, behind));
        replaced.insert(0, behind);
        assert!(!replaced.has_room(behind + 1, behind + 2), "the kernel may still have them");
    }
}
