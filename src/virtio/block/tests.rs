//! Tests of the device with a driver, on a file or on a disk that the test controls.

mod in_flight;
mod queues;

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Mutex;

use super::*;
use crate::test_log::logged;
use crate::virtio::mmio::register::*;
use crate::virtio::test_driver::{BUFFERS, Driver, INDIRECT, NEXT, WRITE, wait_for};

const CAPACITY_BYTES: u64 = 1 << 20;
const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS_BYTE: u64 = BUFFERS + 0xf000;

/// The operations that a spied-on disk received, and whether it may execute them.
#[derive(Default)]
struct Seen {
    requests: Vec<(Operation, u64)>,
    hold: bool,
    fail: bool,
    /// How long each operation takes.
    takes: std::time::Duration,
}

/// A real disk that records operations. While held, it delays them as long as the interface allows.
struct Spy {
    disk: Blocking<PlainDisk>,
    seen: Arc<Mutex<Seen>>,
    held: Vec<Request>,
    done: UnixStream,
}

impl Spy {
    fn pass_on(&mut self) {
        for mut request in self.held.drain(..) {
            if self.seen.lock().unwrap().fail {
                request.offset_bytes = CAPACITY_BYTES * 2;
            }
            self.disk.submit(request);
        }
    }
}

impl DiskBackend for Spy {
    fn submit(&mut self, request: Request) {
        let mut seen = self.seen.lock().unwrap();
        seen.requests.push((request.operation, request.offset_bytes));
        let takes = seen.takes;
        drop(seen);
        std::thread::sleep(takes);
        self.held.push(request);
        if !self.seen.lock().unwrap().hold {
            self.pass_on();
        }
    }

    fn reap(&mut self) -> Option<Completion> {
        if !self.seen.lock().unwrap().hold {
            self.pass_on();
        }
        self.disk.reap()
    }

    fn completion_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.done.as_fd())
    }

    fn drain(&mut self) {
        self.pass_on();
    }
}

struct Bench {
    driver: Driver,
    file: File,
    seen: Arc<Mutex<Seen>>,
    done: UnixStream,
    control: DiskHandle,
}

fn bench_with(shape: DiskShape, name: &str, features: u64) -> Bench {
    let file = tempfile::tempfile().unwrap();
    file.set_len(CAPACITY_BYTES).unwrap();
    let seen = Arc::new(Mutex::new(Seen::default()));
    let (done, spy_done) = UnixStream::pair().unwrap();
    let disk = Blocking::new(PlainDisk::new(file.try_clone().unwrap(), false));
    let spy = Spy { disk, seen: seen.clone(), held: Vec::new(), done: spy_done };
    let (device, control) = device_on(vec![Box::new(spy)], shape, name, "serial", Rate::default()).unwrap();
    let mut driver = Driver::new(device);
    driver.start_with(features);
    Bench { driver, file, seen, done, control }
}

fn bench() -> Bench {
    bench_with(
        DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes: 512, physical_block_bytes: 4096 },
        "disk",
        !0,
    )
}

impl Bench {
    /// Writes a header, and a status that no device writes.
    fn prepare(&self, kind: u32, sector: u64) {
        let memory = &self.driver.memory;
        memory.write_obj([kind, 0xffff_ffff, sector as u32, (sector >> 32) as u32], GuestAddress(HEADER)).unwrap();
        memory.write_obj(0xee_u8, GuestAddress(STATUS_BYTE)).unwrap();
    }

    fn status(&self) -> u8 {
        self.driver.memory.read_obj(GuestAddress(STATUS_BYTE)).unwrap()
    }

    /// Submits a request in the layout used by Linux. Returns its status and the length in its used entry.
    fn request(&mut self, kind: u32, sector: u64, data: (u32, u16)) -> (u8, u32) {
        self.prepare(kind, sector);
        let parts = [(HEADER, 16, 0), (DATA, data.0, data.1), (STATUS_BYTE, 1, WRITE)];
        let written = self.driver.transact(0, &parts);
        (self.status(), written)
    }

    /// A discard or write zeroes request.
    fn range(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let segment = [sector as u32, (sector >> 32) as u32, sectors, flags];
        self.driver.memory.write_obj(segment, GuestAddress(DATA)).unwrap();
        self.request(kind, 0, (16, 0)).0
    }

    fn fill_data(&self, byte: u8, len: usize) {
        self.driver.memory.write_slice(&vec![byte; len], GuestAddress(DATA)).unwrap();
    }

    fn data(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.driver.memory.read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        bytes
    }

    fn seen(&self) -> Vec<(Operation, u64)> {
        std::mem::take(&mut self.seen.lock().unwrap().requests)
    }
}

#[test]
fn the_device_shows_its_disk() {
    let bench = bench();
    let config = [(0, 2048), (4, 0), (8, 256 << 10), (12, 254), (20, 512), (24, 0x0008_0003), (40, 1), (52, 1)];
    for (offset, value) in config {
        assert_eq!(bench.driver.read(CONFIG + offset), value, "at {offset}");
    }
    let writable = F_DISCARD | F_WRITE_ZEROES;
    assert_eq!(bench.driver.offered() & (F_FLUSH | F_RO | writable), F_FLUSH | writable);
    let shape =
        DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: true, block_bytes: 512, physical_block_bytes: 4096 };
    let readonly = bench_with(shape, "disk", !0);
    assert_eq!(readonly.driver.offered() & (F_FLUSH | F_RO | writable), F_FLUSH | F_RO);
}

#[test]
fn writes_reach_the_disk_and_are_read_back() {
    let mut bench = bench();
    bench.fill_data(0x5a, 4096);
    assert_eq!(bench.request(1, 3, (4096, 0)), (0, 1));
    let mut on_disk = [0; 4098];
    bench.file.read_exact_at(&mut on_disk, 3 * 512 - 1).unwrap();
    assert_eq!((on_disk[0], on_disk[4097]), (0, 0));
    assert!(on_disk[1..4097].iter().all(|byte| *byte == 0x5a));
    bench.fill_data(0, 4096);
    assert_eq!(bench.request(0, 3, (4096, WRITE)), (0, 4097));
    assert_eq!(bench.data(4096), [0x5a; 4096]);
    // The last sector and an empty range are valid.
    assert_eq!(bench.request(0, 2047, (512, WRITE)), (0, 513));
    assert_eq!(bench.request(0, 2048, (0, WRITE)), (0, 1));
}

#[test]
fn any_legal_layout_is_accepted() {
    let mut bench = bench();
    bench.file.write_all_at(&[0x77; 1024], 512).unwrap();
    let check = |bench: &mut Bench, name: &str, written: u32| {
        assert_eq!((bench.status(), written), (0, 1025), "{name}");
        assert_eq!(bench.data(1024), [0x77; 1024], "{name}");
        bench.fill_data(0, 1024);
        bench.prepare(0, 1);
    };
    bench.prepare(0, 1);
    let split = [(HEADER, 3, 0), (HEADER + 3, 10, 0), (HEADER + 13, 3, 0), (DATA, 1, WRITE), (DATA + 1, 1023, WRITE)];
    let written = bench.driver.transact(0, &[&split[..], &[(STATUS_BYTE, 1, WRITE)]].concat());
    check(&mut bench, "everything split", written);

    let empty = [(HEADER, 16, 0), (HEADER, 0, 0), (DATA, 1024, WRITE), (STATUS_BYTE, 1, WRITE), (DATA, 0, WRITE)];
    let written = bench.driver.transact(0, &empty);
    check(&mut bench, "empty parts", written);

    let written = bench.driver.transact(0, &[(HEADER, 16, 0), (DATA, 1025, WRITE)]);
    let status = bench.driver.memory.read_obj::<u8>(GuestAddress(DATA + 1024)).unwrap();
    bench.driver.memory.write_obj(status, GuestAddress(STATUS_BYTE)).unwrap();
    check(&mut bench, "data and status in one", written);

    let table = BUFFERS + 0x8000;
    bench.driver.descriptor_at(table, HEADER, 16, NEXT, 2);
    bench.driver.descriptor_at(table + 32, DATA, 1024, NEXT | WRITE, 1);
    bench.driver.descriptor_at(table + 16, STATUS_BYTE, 1, WRITE, 0);
    let written = bench.driver.transact(0, &[(table, 48, INDIRECT)]);
    check(&mut bench, "indirect", written);
}

#[test]
fn requests_beyond_the_disk_are_rejected() {
    let mut bench = bench();
    let beyond = [2048, 2047, 1 << 31, u64::MAX / 512, u64::MAX / 512 + 1, u64::MAX - 1, u64::MAX];
    for sector in beyond {
        assert_eq!(bench.request(0, sector, (1024, WRITE)), (1, 1), "read at {sector}");
        assert_eq!(bench.request(1, sector, (1024, 0)), (1, 1), "write at {sector}");
        assert_eq!(bench.range(13, sector, 2, 0), 1, "zeroes at {sector}");
        assert_eq!(bench.range(11, sector, 2, 0), 1, "discard at {sector}");
    }
    for len in [1, 511, 513, 1023] {
        assert_eq!(bench.request(0, 0, (len, WRITE)).0, 1, "{len} bytes read");
        assert_eq!(bench.request(1, 0, (len, 0)).0, 1, "{len} bytes written");
    }
    assert_eq!(bench.seen(), []);
}

#[test]
fn a_larger_block_size_is_reported_and_enforced() {
    for block_bytes in [512_u32, 1024, 4096] {
        let shape =
            DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes, physical_block_bytes: 4096 };
        let bytes = config(&shape, 1);
        let u32_at = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        assert_eq!((u32_at(0), u32_at(20)), ((CAPACITY_BYTES / 512) as u32, block_bytes), "sectors, and blk_size");
        let min_io_blocks = u32::from(u16::from_le_bytes(*bytes[26..].first_chunk().unwrap()));
        assert_eq!((block_bytes << bytes[24], block_bytes * min_io_blocks), (4096, 4096));
        let mut bench = bench_with(shape, "disk", !0);
        let sectors = u64::from(block_bytes / 512);
        // Positions and lengths are in sectors, regardless of the block size.
        assert_eq!(bench.request(1, 3 * sectors, (2 * block_bytes, 0)).0, 0);
        assert_eq!(bench.request(0, 3 * sectors, (block_bytes, WRITE)).0, 0);
        assert_eq!([bench.range(11, sectors, sectors as u32, 0), bench.range(13, 0, sectors as u32, 1)], [0, 0]);
        assert_eq!(bench.seen().len(), 4);
        if sectors > 1 {
            for (sector, len) in [(1, block_bytes), (0, 512), (sectors, block_bytes + 512), (sectors - 1, 512)] {
                assert_eq!(bench.request(0, sector, (len, WRITE)), (1, 1), "{len} bytes read at {sector}");
                assert_eq!(bench.request(1, sector, (len, 0)), (1, 1), "{len} bytes written at {sector}");
                assert_eq!(bench.range(11, sector, len / 512, 0), 1, "{len} bytes discarded at {sector}");
                assert_eq!(bench.range(13, sector, len / 512, 0), 1, "{len} bytes zeroed at {sector}");
            }
        }
        assert_eq!(bench.seen(), []);
    }
}

#[test]
fn buffers_outside_of_memory_are_rejected() {
    let mut bench = bench();
    for address in [1 << 40, (4 << 20) - 8, u64::MAX - 8, u64::MAX] {
        for (kind, flags) in [(0, WRITE), (1, 0), (8, WRITE)] {
            bench.prepare(kind, 0);
            bench.driver.transact(0, &[(HEADER, 16, 0), (address, 512, flags), (STATUS_BYTE, 1, WRITE)]);
            assert_eq!(bench.status(), 1, "type {kind} at {address:#x}");
        }
        bench.driver.transact(0, &[(address, 16, 0), (STATUS_BYTE, 1, WRITE)]);
        assert_eq!(bench.status(), 1, "header at {address:#x}");
    }
    assert_eq!(bench.seen(), []);
}

#[test]
fn requests_beyond_the_segment_limits_are_rejected() {
    let mut bench = bench();
    bench.prepare(0, 0);
    // The same 3 MiB, repeatedly.
    let mut parts = vec![(HEADER, 16, 0)];
    parts.extend([(BUFFERS, 3 << 20 >> 1, WRITE); 100]);
    parts.push((STATUS_BYTE, 1, WRITE));
    bench.driver.transact(0, &parts);
    assert_eq!((bench.status(), bench.seen().len()), (1, 0));
}

#[test]
fn a_short_request_is_rejected_and_one_without_a_status_needs_a_reset() {
    let mut bench = bench();
    bench.prepare(0, 0);
    for parts in [&[(HEADER, 15, 0), (STATUS_BYTE, 1, WRITE)][..], &[(STATUS_BYTE, 1, WRITE)]] {
        bench.prepare(0, 0);
        assert_eq!(bench.driver.transact(0, parts), 1);
        assert_eq!(bench.status(), 1);
    }
    for parts in [&[(HEADER, 16, 0)][..], &[(HEADER, 16, 0), (1 << 40, 1, WRITE)]] {
        let head = bench.driver.chain(0, parts);
        bench.driver.offer(0, head);
        bench.driver.notify(0);
        bench.driver.wait_for_needs_reset();
        bench.driver.start();
    }
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut bench = bench();
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(bench.request(kind, 0, (512, WRITE)), (2, 1), "type {kind}");
    }
}

#[test]
fn a_read_only_disk_rejects_writes() {
    let shape =
        DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: true, block_bytes: 512, physical_block_bytes: 4096 };
    let mut bench = bench_with(shape, "disk", !0);
    assert_eq!(bench.request(1, 0, (512, 0)).0, 1);
    assert_eq!([bench.range(11, 0, 1, 0), bench.range(13, 0, 1, 0)], [1, 1]);
    assert_eq!(bench.seen(), []);
    assert_eq!([bench.request(0, 0, (512, WRITE)).0, bench.request(4, 0, (0, 0)).0], [0, 0]);
}

#[test]
fn the_serial_number_is_twenty_bytes_padded_with_zeroes() {
    let mut bench = bench();
    for (room, written) in [(20, 21), (512, 21), (5, 6)] {
        bench.fill_data(0xff, 512);
        assert_eq!(bench.request(8, 0, (room, WRITE)), (0, written));
        let expected = b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0\xff";
        assert_eq!(bench.data(written as usize)[..written as usize - 1], expected[..written as usize - 1]);
        assert_eq!(bench.data(512)[written as usize - 1], 0xff);
    }
}

#[test]
fn a_flush_reaches_the_disk_before_it_is_completed() {
    let mut bench = bench();
    assert_eq!(bench.request(1, 0, (512, 0)).0, 0);
    assert_eq!(bench.request(4, 0, (0, 0)).0, 0);
    assert_eq!(bench.seen(), [(Operation::Write, 0), (Operation::Flush, 0)]);
}

#[test]
fn without_a_flush_each_write_is_durable_before_it_is_completed() {
    let shape =
        DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
    let mut bench = bench_with(shape, "disk", !F_FLUSH);
    assert_eq!(bench.request(1, 8, (512, 0)).0, 0);
    assert_eq!(bench.seen(), [(Operation::Write, 4096), (Operation::Flush, 0)]);
    assert_eq!(bench.range(13, 0, 8, 0), 0);
    let zeroes = Operation::WriteZeroes { len_bytes: 4096, unmap: false };
    assert_eq!(bench.seen(), [(zeroes, 0), (Operation::Flush, 0)]);
    assert_eq!(bench.request(0, 8, (512, WRITE)).0, 0);
    assert_eq!(bench.seen(), [(Operation::Read, 4096)]);
}

#[test]
fn only_the_requested_ranges_are_discarded_and_zeroed() {
    let mut bench = bench();
    bench.file.write_all_at(&[0x11; 8192], 0).unwrap();
    assert_eq!(bench.range(13, 1, 2, 1), 0);
    let mut bytes = [0; 2048];
    bench.file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!([bytes[511], bytes[512], bytes[1535], bytes[1536]], [0x11, 0, 0, 0x11]);
    assert_eq!([bench.range(11, 8, 8, 0), bench.range(13, 8, 0, 0)], [0, 0]);
    assert_eq!(bench.seen()[1].0, Operation::Discard { len_bytes: 4096 });
    // Invalid or unknown flags; too many sectors; two segments, and half a segment.
    assert_eq!([bench.range(11, 0, 1, 1), bench.range(13, 0, 1, 2), bench.range(11, 0, 1, 4)], [2, 2, 2]);
    assert_eq!([bench.range(11, 0, u32::MAX, 0), bench.range(13, 0, WRITE_ZEROES_SECTORS_MAX + 1, 0)], [1, 1]);
    bench.fill_data(0, 32);
    assert_eq!([bench.request(11, 0, (32, 0)).0, bench.request(13, 0, (8, 0)).0], [1, 1]);
    assert_eq!(bench.seen(), []);
}

#[test]
fn a_host_error_is_reported_to_the_guest_and_logged_once() {
    let shape =
        DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
    let mut bench = bench_with(shape, "failing disk", !0);
    bench.seen.lock().unwrap().fail = true;
    for _ in 0..3 {
        assert_eq!(bench.request(0, 2, (512, WRITE)), (1, 1));
    }
    let lines = logged("failing disk: ");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].starts_with("failing disk: Read at byte "), "{lines:?}");
}
