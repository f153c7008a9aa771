//! Tests of guest memory, both anonymous and of a file.

use vm_memory::Bytes;

use super::*;
use crate::sys::{self, mapping::APART_MAX, smaps};

#[test]
fn huge_pages_of_guest_and_host_coincide() {
    const HUGE_PAGE_BYTES: u64 = 2 << 20;
    // With odd sizes in between, which shift the following mapping.
    let memories = [33, 1, 6 << 10, 35].map(|memory_mib| reserve(memory_mib).unwrap());
    for region in memories.iter().flat_map(|memory| memory.iter()) {
        let host = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
        assert_eq!((host % HUGE_PAGE_BYTES, region.start_addr().0 % HUGE_PAGE_BYTES), (0, 0));
    }
}

#[test]
fn all_memory_is_usable_and_nothing_beyond() {
    let memory = reserve(33).unwrap();
    memory.write_obj(7_u8, GuestAddress((33 << 20) - 1)).unwrap();
    assert_eq!(memory.read_obj::<u8>(GuestAddress((33 << 20) - 1)).unwrap(), 7);
    assert!(memory.read_obj::<u8>(GuestAddress(33 << 20)).is_err());
}

/// The sizes of the pages that back `memory` (proc_pid_smaps(5)): the value of `name` in bytes.
fn backing_bytes(memory: &GuestMemory, name: &str) -> u64 {
    let region = memory.iter().next().unwrap();
    smaps::bytes_at(region.get_host_address(MemoryRegionAddress(0)).unwrap() as usize, name)
}

#[test]
fn prefaulted_memory_is_allocated_and_other_memory_is_not() {
    for (prefault, expected) in [(None, 0), (Some(&(|| false) as &dyn Fn() -> bool), 6 << 20)] {
        let memory = create(6, Pages::Small, prefault).unwrap();
        // The kernel may merge the mapping with one of another test.
        assert!(backing_bytes(&memory, "Rss:") >= expected);
        assert_eq!(backing_bytes(&memory, "AnonHugePages:"), 0);
    }
}

#[test]
fn transparent_huge_pages_back_memory_unless_the_host_has_none() {
    let enabled = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    if enabled.is_empty() || enabled.contains("[never]") {
        eprintln!("SKIPPED: this host has no transparent huge pages");
        return;
    }
    let memory = create(64, Pages::Transparent, Some(&|| false)).unwrap();
    // The host may have few contiguous pages.
    assert!(backing_bytes(&memory, "AnonHugePages:") > 0);
}

#[test]
fn a_pool_without_huge_pages_is_an_error_that_says_how_to_add_them() {
    // More than any host's pool has.
    let error = format!("{:#}", create(64 << 20, Pages::Pool(2 << 20), None).unwrap_err());
    assert!(error.starts_with("reserve 67108864 MiB of guest memory in 33554432 huge pages of 2 MiB, "), "{error}");
    assert!(error.contains("remove --hugepages: "), "{error}");
    if std::path::Path::new("/sys/kernel/mm/hugepages/hugepages-2048kB").exists() {
        assert!(error.contains("/hugepages-2048kB/nr_hugepages`, or remove"), "{error}");
    }
}

const PAGE_BYTES: u64 = 4096;

/// A file of this size with ones in these ranges.
fn file(memory_mib: u64, ranges: &[(u64, u64)]) -> File {
    let file = sys::memory_file(c"memory").unwrap();
    file.set_len(memory_mib << 20).unwrap();
    for (offset_bytes, len_bytes) in ranges {
        file.write_all_at(&vec![1; *len_bytes as usize], *offset_bytes).unwrap();
    }
    file
}

/// Anonymous memory, and memory of a file with ones in these ranges.
fn both_kinds(memory_mib: u64, ranges: &[(u64, u64)]) -> [GuestMemory; 2] {
    let file = file(memory_mib, ranges);
    [reserve(memory_mib).unwrap(), map(memory_mib, &file, Pages::Transparent, None).unwrap()]
}

/// How many mappings of this process back `memory` (proc_pid_maps(5)).
fn mappings(memory: &GuestMemory) -> usize {
    let region = memory.iter().next().unwrap();
    let start = region.get_host_address(MemoryRegionAddress(0)).unwrap() as u64;
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let is_within = |line: &&str| {
        let address = u64::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        (start..start + region.len()).contains(&address)
    };
    maps.lines().filter(is_within).count()
}

/// Which of the first `pages` are not zero: those that were not returned.
fn kept(memory: &GuestMemory, pages: u64) -> usize {
    let is_kept = |page: &u64| memory.read_obj::<u8>(GuestAddress(page * PAGE_BYTES)).unwrap() != 0;
    (0..pages).filter(is_kept).count()
}

#[test]
fn returned_memory_is_whole_pages_and_reads_as_zeroes() {
    for memory in both_kinds(1, &[(0, 1 << 20)]) {
        for page in 0..16 {
            memory.write_obj(1_u8, GuestAddress(page * 4096)).unwrap();
        }
        assert_eq!(give_back(&memory, GuestAddress(4096), 2 * 4096).unwrap(), 2 * 4096);
        assert_eq!(kept(&memory, 16), 14);
        // Partial pages stay.
        assert_eq!(give_back(&memory, GuestAddress(4 * 4096 + 1), 4095).unwrap(), 0);
        assert_eq!(give_back(&memory, GuestAddress(4 * 4096), 4095).unwrap(), 0);
        assert_eq!(give_back(&memory, GuestAddress(4 * 4096 + 1), 2 * 4096 - 2).unwrap(), 0);
        assert_eq!(kept(&memory, 16), 14);
        assert_eq!(give_back(&memory, GuestAddress(4 * 4096 + 1), 2 * 4096 - 1).unwrap(), 4096);
        assert_eq!(kept(&memory, 16), 13);
    }
}

#[test]
fn addresses_outside_of_memory_are_not_returned() {
    for memory in both_kinds(1, &[]) {
        memory.write_obj(1_u8, GuestAddress((1 << 20) - 4096)).unwrap();
        for (address, len_bytes) in
            [(1 << 20, 4096), (u64::MAX, u64::MAX), (u64::MAX - 4095, 4096), (0, 0), (1 << 19, 0)]
        {
            assert_eq!(give_back(&memory, GuestAddress(address), len_bytes).unwrap(), 0);
        }
        assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 20) - 4096)).unwrap(), 1);
        give_back(&memory, GuestAddress((1 << 20) - 4096), u64::MAX).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 20) - 4096)).unwrap(), 0);
    }
}

#[test]
fn a_range_across_the_hole_is_returned_on_both_sides() {
    const HOLE: (u64, u64) = (layout::MMIO_HOLE_START, layout::MMIO_HOLE_END);
    for memory in both_kinds(3073, &[(HOLE.0 - 8192, 16384)]) {
        let places = [HOLE.0 - 8192, HOLE.0 - 4096, HOLE.1, HOLE.1 + 4096].map(GuestAddress);
        places.iter().for_each(|place| memory.write_obj(1_u8, *place).unwrap());
        give_back(&memory, places[1], HOLE.1 + 4096 - places[1].0).unwrap();
        assert_eq!(places.map(|place| memory.read_obj::<u8>(place).unwrap()), [1, 0, 0, 1]);
    }
}

#[test]
fn any_range_returns_the_whole_pages_within_it_and_no_others() {
    const HOLE: (u64, u64) = (layout::MMIO_HOLE_START, layout::MMIO_HOLE_END);
    // On both sides of the hole.
    let pages: Vec<u64> =
        (1..=8).map(|n| HOLE.0 - n * PAGE_BYTES).chain((0..8).map(|n| HOLE.1 + n * PAGE_BYTES)).collect();
    let content = file(3073, &[(HOLE.0 - 8 * PAGE_BYTES, 16 * PAGE_BYTES)]);
    let mapped = || map(3073, &content, Pages::Transparent, None).unwrap();
    for (mut memory, is_of_file) in [(reserve(3073).unwrap(), false), (mapped(), true)] {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            if is_of_file && seed % 8 == 0 {
                // As it is after a restore: nothing has been written.
                memory = mapped();
            } else {
                let fill = |page: &u64| memory.write_slice(&[1; PAGE_BYTES as usize], GuestAddress(*page)).unwrap();
                pages.iter().for_each(fill);
            }
            let mut place = || {
                let page = random.choice(&pages).copied().unwrap() + PAGE_BYTES * random.u64(..2);
                page.saturating_add_signed(random.i64(-2..3))
            };
            let (start, end) = (place(), place());
            let (start, end) = (start.min(end), if random.u8(..8) == 0 { u64::MAX } else { start.max(end) });
            give_back(&memory, GuestAddress(start), end - start).unwrap();
            for page in &pages {
                let is_within = start <= *page && page + PAGE_BYTES <= end;
                let mut bytes = [0; PAGE_BYTES as usize];
                memory.read_slice(&mut bytes, GuestAddress(*page)).unwrap();
                let expected = if is_within { 0 } else { 1 };
                assert!(bytes == [expected; PAGE_BYTES as usize], "seed {seed}: {page:#x} of {start:#x}..{end:#x}");
            }
        }
    }
    let mut bytes = [0; 16 * PAGE_BYTES as usize];
    content.read_exact_at(&mut bytes, HOLE.0 - 8 * PAGE_BYTES).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 1), "the file is unchanged");
}

#[test]
fn a_guest_that_returns_memory_piecemeal_gets_a_limited_number_of_mappings() {
    const MIB: u64 = 256;
    const PAGES: u64 = (MIB << 20) / PAGE_BYTES;
    let content = file(MIB, &[(0, MIB << 20)]);
    for pages in [Pages::Transparent, Pages::Small] {
        let memory = map(MIB, &content, pages, None).unwrap();
        let touch = |page| memory.write_obj(1_u8, GuestAddress(page * PAGE_BYTES)).unwrap();
        let return_page = |page| assert!(give_back(&memory, GuestAddress(page * PAGE_BYTES), PAGE_BYTES).is_ok());
        // Each page becomes a mapping, and after it was used, the kernel does not merge what is on both sides of a page that
        // was in between.
        for part in 0..4 {
            let range = part * PAGES / 4..(part + 1) * PAGES / 4;
            for page in range.clone().step_by(2) {
                return_page(page);
                touch(page);
            }
            range.skip(1).step_by(2).for_each(return_page);
        }
        let found = mappings(&memory);
        assert!(found > APART_MAX / 2 && found <= 2 * APART_MAX + 1, "{found} mappings");
        let mut random = fastrand::Rng::with_seed(7);
        for _ in 0..20_000 {
            let page = random.u64(..PAGES);
            touch(page);
            let pages = random.u64(1..4);
            give_back(&memory, GuestAddress(page * PAGE_BYTES), pages * PAGE_BYTES).unwrap();
        }
        let found = mappings(&memory);
        assert!(found <= 2 * APART_MAX + 1, "{found} mappings");
    }
}

#[test]
fn memory_of_a_file_is_as_it_was_written_in_pages_of_each_kind() {
    let before = reserve(5).unwrap();
    let text = |at: u64| at.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let places = [0, 4096, (1 << 20) - 8, 3 << 20, (5 << 20) - 8];
    places.iter().for_each(|at| before.write_obj(text(*at), GuestAddress(*at)).unwrap());
    let content = sys::memory_file(c"memory").unwrap();
    write_to(&before, &content, None).unwrap();
    for pages in [Pages::Transparent, Pages::Small, Pages::Pool(2 << 20)] {
        for prefault in [None, Some(&(|| false) as &dyn Fn() -> bool)] {
            let memory = match map(5, &content, pages, prefault) {
                Err(error) if matches!(pages, Pages::Pool(_)) => {
                    assert!(format!("{error:#}").contains("remove --hugepages"), "{error:#}");
                    continue;
                }
                memory => memory.unwrap(),
            };
            let found = places.map(|at| memory.read_obj::<u64>(GuestAddress(at)).unwrap());
            assert_eq!(found, places.map(text), "{pages:?}");
            if prefault.is_some() && pages == Pages::Small {
                assert!(backing_bytes(&memory, "Anonymous:") >= 5 << 20, "it is allocated");
            }
        }
    }
}

#[test]
fn pages_of_a_pool_are_read_from_the_file() {
    // As they would be, on a host that need not have a pool.
    let content = file(3, &[(4096, 10), (2 << 20, 1 << 20)]);
    let memory = reserve(3).unwrap();
    read_from(&memory, &content).unwrap();
    let read = |at| memory.read_obj::<u8>(GuestAddress(at)).unwrap();
    assert_eq!([0, 4095, 4096, 4105, 4106, (2 << 20) - 1, 2 << 20, (3 << 20) - 1].map(read), [0, 0, 1, 1, 0, 0, 1, 1]);
}
