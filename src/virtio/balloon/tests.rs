//! Tests of the balloon from the guest's and the host's side.

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress};

use super::*;
use crate::memory::GuestMemory;
use crate::test_log::logged;
use crate::virtio::mmio::register::{CONFIG, CONFIG_GENERATION, INTERRUPT_ACK, INTERRUPT_STATUS, STATUS};
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE, wait_for};

const INFLATE: u32 = 0;
const DEFLATE: u32 = 1;
const STATISTICS: u32 = 2;
/// The index according to the specification; Linux up to 6.10 uses the previous one.
const REPORTING: u32 = 4;
/// More memory than the driver's 4 MiB, so that there is something to give up.
const MEMORY_MIB: u64 = 512;
/// An area used only for pages to return: the third MiB.
const PAGES: u64 = 2 << 20;

struct Bench {
    driver: Driver,
    control: BalloonHandle,
}

fn made(target_mib: u64) -> (VirtioDevice, BalloonHandle) {
    device(Options { memory_mib: MEMORY_MIB, target_mib, deflates_on_oom: false, reports_free_pages: true }).unwrap()
}

fn bench_with(features: u64) -> Bench {
    let (device, control) = made(MEMORY_MIB);
    let mut driver = Driver::new(device);
    driver.start_with(features);
    Bench { driver, control }
}

fn bench() -> Bench {
    bench_with(!0)
}

impl Bench {
    /// Sends page numbers.
    fn send(&mut self, queue: u32, pages: &[u32]) {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        self.driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        assert_eq!(self.driver.transact(queue, &[(BUFFERS, bytes.len() as u32, 0)]), 0);
    }

    /// Writes to each of the first pages from [`PAGES`].
    fn touch(&self, count: u64) {
        (0..count)
            .for_each(|page| self.driver.memory.write_obj(1_u8, GuestAddress(PAGES + page * PAGE_BYTES)).unwrap());
    }

    /// The pages that still have that content.
    fn kept(&self, count: u64) -> Vec<u64> {
        let has = |page: &u64| self.driver.memory.read_obj::<u8>(GuestAddress(PAGES + page * PAGE_BYTES)).unwrap() != 0;
        (0..count).filter(has).collect()
    }

    /// Makes a buffer with statistics of this length available.
    fn offer_statistics(&mut self, entries: &[(u16, u64)], len: u32) -> u16 {
        let bytes: Vec<u8> =
            entries.iter().flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat()).collect();
        self.driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        let head = self.driver.chain(STATISTICS, &[(BUFFERS, len, 0)]);
        self.driver.offer(STATISTICS, head);
        self.driver.notify(STATISTICS);
        head
    }

    fn free_bytes(&self) -> Option<u64> {
        self.control.statistics().and_then(|statistics| statistics.free_bytes)
    }
}

/// The number of the page with this index from [`PAGES`].
fn number(index: u32) -> u32 {
    (PAGES / PAGE_BYTES) as u32 + index
}

#[test]
fn only_pages_in_the_balloon_are_returned_to_the_host() {
    let mut bench = bench();
    bench.touch(8);
    bench.send(INFLATE, &[number(5), number(1), number(2), number(1)]);
    assert_eq!(bench.kept(8), [0, 3, 4, 6, 7]);
    assert_eq!(bench.control.returned_bytes(), 3 * PAGE_BYTES);
    // After deflating, the guest reads zeroes and may use the pages.
    bench.send(DEFLATE, &[number(1)]);
    bench.touch(2);
    assert_eq!(bench.kept(3), [0, 1]);
}

#[test]
fn invalid_page_numbers_are_skipped() {
    let mut bench = bench();
    bench.touch(4);
    bench.send(INFLATE, &[u32::MAX, u32::MAX - 1, number(1), (4 << 20) / PAGE_BYTES as u32]);
    assert_eq!(bench.kept(4), [0, 2, 3]);
    // Requests outside of memory or ending within a number.
    for parts in [&[(1 << 40, 8, 0)][..], &[(u64::MAX - 3, 8, 0)], &[(BUFFERS, 3, 0)], &[(BUFFERS, 8, WRITE)], &[]] {
        if !parts.is_empty() {
            bench.driver.transact(INFLATE, parts);
        }
    }
    assert_eq!((bench.kept(4).len(), bench.driver.read(STATUS)), (3, 15));
}

#[test]
fn a_number_may_be_split_between_buffers() {
    let mut bench = bench();
    bench.touch(3);
    bench.driver.memory.write_obj([number(1), number(2)], GuestAddress(BUFFERS)).unwrap();
    let parts = [(BUFFERS, 3, 0), (BUFFERS + 3, 2, 0), (BUFFERS + 5, 3, 0)];
    bench.driver.transact(INFLATE, &parts);
    assert_eq!(bench.kept(3), [0]);
}

#[test]
fn a_request_with_too_many_pages_is_truncated() {
    let mut bench = bench();
    // All of memory, many times over: processing ends, and the stop event is noticed soon.
    for _ in 0..20 {
        let head = bench.driver.chain(INFLATE, &[(0, u32::MAX, 0); 3]);
        bench.driver.offer(INFLATE, head);
    }
    bench.driver.notify(INFLATE);
    bench.driver.transport.pause();
    assert!(bench.control.returned_bytes() <= 20 * REQUEST_PAGES_MAX * PAGE_BYTES);
}

#[test]
fn reported_memory_is_returned_on_either_queue_index() {
    for (features, queue) in [(!0, REPORTING), (!0, REPORTING - 1), (!F_STATS_VQ, 2), (!F_STATS_VQ, REPORTING)] {
        let mut bench = bench_with(features);
        bench.touch(8);
        let parts =
            [(PAGES + PAGE_BYTES, 8192, WRITE), (PAGES + 4 * PAGE_BYTES + 1, 4096, WRITE), (1 << 40, 4096, WRITE)];
        assert_eq!(bench.driver.transact(queue, &parts), 0);
        assert_eq!(bench.kept(8), [0, 3, 4, 5, 6, 7]);
        // Device-readable parts are not given up by the driver.
        bench.driver.transact(queue, &[(PAGES, 8192, 0)]);
        assert_eq!(bench.kept(1), [0]);
    }
}

#[test]
fn a_report_of_all_memory_is_truncated() {
    let mut bench = bench();
    for _ in 0..20 {
        let head = bench.driver.chain(REPORTING, &[(BUFFERS, u32::MAX, WRITE); 3]);
        bench.driver.offer(REPORTING, head);
    }
    bench.driver.notify(REPORTING);
    bench.driver.transport.pause();
    assert!(bench.control.returned_bytes() <= 20 * REPORT_BYTES_MAX);
}

#[test]
fn queues_of_unaccepted_features_are_inactive() {
    let mut bench = bench_with(0);
    bench.touch(2);
    for queue in STATISTICS..=REPORTING {
        let head = bench.driver.chain(queue, &[(PAGES, 8192, WRITE)]);
        bench.driver.offer(queue, head);
        bench.driver.notify(queue);
    }
    bench.driver.transport.pause();
    assert_eq!(
        (bench.kept(2).len(), bench.driver.used_index(STATISTICS), bench.driver.used_index(REPORTING)),
        (2, 0, 0)
    );
}

#[test]
fn a_target_is_set_in_the_configuration_with_an_interrupt() {
    let (device, control) = made(MEMORY_MIB - 128);
    let mut driver = Driver::new(device);
    assert_eq!((driver.read(CONFIG), control.target_mib(), control.present_mib()), (128 * 256, 384, MEMORY_MIB));
    // Without a driver there is no notification.
    control.set_target_mib(MEMORY_MIB).unwrap();
    assert_eq!((driver.read(INTERRUPT_STATUS), driver.read(CONFIG)), (0, 0));
    driver.start();
    let generation = driver.read(CONFIG_GENERATION);
    control.set_target_mib(256).unwrap();
    assert_eq!((driver.read(INTERRUPT_STATUS), driver.read(CONFIG)), (2, 256 * 256));
    assert_ne!(driver.read(CONFIG_GENERATION), generation);
    driver.write(INTERRUPT_ACK, 2);
    // The driver reports its progress; values beyond all memory are clipped.
    driver.write(CONFIG + 4, 100 * 256);
    assert_eq!((control.present_mib(), control.target_mib()), (MEMORY_MIB - 100, 256));
    driver.write(CONFIG + 4, u32::MAX);
    assert_eq!(control.present_mib(), 0);
    for wrong in [0, MIN_MEMORY_MIB - 1, MEMORY_MIB + 1, u64::MAX] {
        let error = control.set_target_mib(wrong).unwrap_err().to_string();
        assert_eq!(error, format!("{wrong} MiB of memory: this machine can have 32 to 512 MiB"));
    }
    assert_eq!((driver.read(INTERRUPT_STATUS), control.target_mib()), (0, 256));
    // A reset empties the balloon and keeps the target.
    driver.write(STATUS, 0);
    control.set_target_mib(300).unwrap();
    assert_eq!((control.present_mib(), driver.read(CONFIG), driver.read(INTERRUPT_STATUS)), (512, 212 * 256, 0));
}

#[test]
fn statistics_arrive_on_request() {
    let mut bench = bench();
    assert_eq!(bench.control.statistics(), None);
    // The first statistics arrive without a request.
    let head = bench.offer_statistics(&[(4, 100), (5, 1000), (77, 1)], 30);
    wait_for(|| bench.free_bytes() == Some(100));
    assert_eq!(bench.control.statistics().unwrap().total_bytes, Some(1000));
    assert_eq!(bench.driver.used_index(STATISTICS), 0, "it waits until new ones are wanted");
    for round in 0..5 {
        bench.control.ask_for_statistics();
        assert_eq!(bench.driver.used(STATISTICS), ((head + round) % 16, 0));
        bench.offer_statistics(&[(4, 200 + u64::from(round))], 10);
        wait_for(|| bench.free_bytes() == Some(200 + u64::from(round)));
    }
}

#[test]
fn statistics_of_any_length_are_handled() {
    for len in [0, 1, 9, 11, 4095, 1 << 20, u32::MAX] {
        let mut bench = bench();
        bench.offer_statistics(&[(4, 100)], len);
        bench.control.ask_for_statistics();
        bench.driver.used(STATISTICS);
        bench.offer_statistics(&[(4, 300)], 10);
        wait_for(|| bench.free_bytes() == Some(300));
        assert_eq!(bench.driver.read(STATUS), 15, "{len}");
    }
    let mut bench = bench();
    bench.offer_statistics(&[(4, 100)], 11);
    wait_for(|| !logged("virtio-balloon: statistics of 11 bytes").is_empty());
}

#[test]
fn a_restored_balloon_keeps_its_size_and_works() {
    let mut bench = bench();
    bench.touch(4);
    bench.send(INFLATE, &[number(1)]);
    bench.driver.write(CONFIG + 4, 1);
    let head = bench.offer_statistics(&[(4, 100)], 10);
    wait_for(|| bench.free_bytes() == Some(100));
    bench.driver.transport.pause();
    // Simulates a new machine with a different target.
    let (device, control) = made(MEMORY_MIB);
    let mut bench = Bench { driver: bench.driver.moved_to(device), control };
    bench.driver.transport.resume();
    assert_eq!(bench.driver.read(CONFIG + 4), 1);
    // The buffer from before the save is still known.
    wait_for(|| bench.free_bytes() == Some(100));
    bench.control.ask_for_statistics();
    assert_eq!(bench.driver.used(STATISTICS), (head, 0));
    bench.send(INFLATE, &[number(2)]);
    bench.send(DEFLATE, &[number(1), number(2)]);
    assert_eq!(bench.kept(4), [0, 3]);
    // The driver is running and is notified.
    bench.driver.write(INTERRUPT_ACK, 3);
    bench.control.set_target_mib(64).unwrap();
    assert_eq!(bench.driver.read(INTERRUPT_STATUS) & 2, 2);
}

#[test]
fn returned_memory_is_not_resident() {
    // MiB 3 of 4; nothing else in this process is mapped there.
    let mut bench = bench();
    bench.touch(256);
    let resident = |memory: &GuestMemory| {
        let region = memory.iter().next().unwrap();
        let start = region.get_host_address(MemoryRegionAddress(PAGES)).unwrap() as u64;
        resident_pages(start, 256)
    };
    // Huge pages may have added more.
    assert!(resident(&bench.driver.memory) >= 256);
    bench.driver.transact(REPORTING, &[(PAGES, 1 << 20, WRITE)]);
    assert_eq!(resident(&bench.driver.memory), 0);
}

/// Counts the pages at `start` that are backed by memory (/proc/self/pagemap, bit 63 of each entry).
fn resident_pages(start: u64, count: u64) -> usize {
    use std::os::unix::fs::FileExt;
    let mut entries = vec![0; 8 * count as usize];
    let map = std::fs::File::open("/proc/self/pagemap").unwrap();
    map.read_exact_at(&mut entries, start / PAGE_BYTES * 8).unwrap();
    entries.as_chunks::<8>().0.iter().filter(|entry| u64::from_le_bytes(**entry) >> 63 == 1).count()
}
