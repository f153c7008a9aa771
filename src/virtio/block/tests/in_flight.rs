//! Requests that take time: those in flight at a reset or a pause, and those delayed by a limit.

use super::*;

#[test]
fn the_status_is_written_last_and_only_once_the_disk_is_done() {
    let mut bench = bench();
    bench.seen.lock().unwrap().hold = true;
    bench.prepare(0, 0);
    let head = bench.driver.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)]);
    bench.driver.offer(0, head);
    bench.driver.notify(0);
    wait_for(|| !bench.seen.lock().unwrap().requests.is_empty());
    // The header has been read, so the driver may overwrite it.
    bench.prepare(77, u64::MAX);
    assert_eq!((bench.status(), bench.driver.used_index(0)), (0xee, 0));
    bench.seen.lock().unwrap().hold = false;
    bench.done.write_all(&[1]).unwrap();
    assert_eq!(bench.driver.used(0), (head, 513));
    assert_eq!(bench.status(), 0);
}

#[test]
fn nothing_is_completed_after_a_reset() {
    let mut bench = bench();
    bench.fill_data(0x33, 512);
    assert_eq!(bench.request(1, 0, (512, 0)).0, 0);
    bench.seen.lock().unwrap().hold = true;
    bench.prepare(0, 0);
    let head = bench.driver.chain(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS_BYTE, 1, WRITE)]);
    bench.driver.offer(0, head);
    bench.driver.notify(0);
    wait_for(|| bench.seen.lock().unwrap().requests.len() == 2);
    bench.driver.write(STATUS, 0);
    assert_eq!((bench.status(), bench.driver.used_index(0)), (0, 2), "drained before the reset was complete");
    bench.fill_data(0, 512);
    bench.prepare(0, 0);
    bench.seen.lock().unwrap().hold = false;
    bench.driver.start();
    bench.done.write_all(&[1]).unwrap();
    bench.driver.transport.pause();
    assert_eq!((bench.status(), bench.data(512), bench.driver.used_index(0)), (0xee, vec![0; 512], 0));
}

#[test]
fn requests_beyond_the_limit_in_flight_wait() {
    let mut bench = bench();
    bench.seen.lock().unwrap().hold = true;
    bench.prepare(0, 0);
    bench.driver.descriptor(0, 0, HEADER, 16, NEXT, 1);
    bench.driver.descriptor(0, 1, STATUS_BYTE, 1, WRITE, 0);
    // The same chain is made available more often than requests can be in flight.
    for _ in 0..256 {
        bench.driver.offer(0, 0);
    }
    bench.driver.notify(0);
    wait_for(|| bench.seen.lock().unwrap().requests.len() == 256);
    for _ in 0..100 {
        bench.driver.offer(0, 0);
    }
    bench.driver.notify(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(bench.driver.used_index(0), 0);
    bench.seen.lock().unwrap().hold = false;
    bench.done.write_all(&[1]).unwrap();
    wait_for(|| bench.driver.used_index(0) == 356);
    assert_eq!(bench.driver.read(STATUS), 15);
}

/// Offers requests of 1 MiB to a disk that holds them: 32 MiB are in flight at a time.
#[track_caller]
fn offer_a_hundred_of_a_mebibyte(mut bench: Bench, kind: u32, data: (u32, u16)) {
    bench.seen.lock().unwrap().hold = true;
    offer_many(&mut bench, kind, data, 100);
    wait_for(|| bench.seen.lock().unwrap().requests.len() == 32);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!((bench.seen.lock().unwrap().requests.len(), bench.driver.used_index(0)), (32, 0));
    bench.seen.lock().unwrap().hold = false;
    bench.done.write_all(&[1]).unwrap();
    wait_for(|| bench.driver.used_index(0) == 100);
}

#[test]
fn large_requests_beyond_the_limit_in_flight_wait() {
    let bench = bench();
    // The memory of the driver, and a disk that is as large: 1 MiB each.
    offer_a_hundred_of_a_mebibyte(bench, 0, (1 << 20, WRITE));
}

#[test]
fn ranges_to_zero_beyond_the_limit_in_flight_wait() {
    const WRITE_ZEROES: u32 = 13;
    let bench = bench();
    // The whole disk of 1 MiB: from sector 0, 2048 sectors, without unmapping.
    bench.driver.memory.write_obj([0_u32, 0, 2048, 0], GuestAddress(DATA)).unwrap();
    offer_a_hundred_of_a_mebibyte(bench, WRITE_ZEROES, (16, 0));
}

/// A device whose disk is a pipe: its reads are in flight until something is written to the other end.
fn pipe_bench() -> (Driver, std::io::PipeWriter) {
    let (read_end, write_end) = std::io::pipe().unwrap();
    let plain = PlainDisk::new(File::from(OwnedFd::from(read_end)), false);
    let disk = Box::new(UringDisk::new(plain, Shortcuts::Never).unwrap());
    let shape =
        DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
    let (device, _) = device_on(vec![disk], shape, "pipe", "", Rate::default()).unwrap();
    let mut driver = Driver::new(device);
    driver.start();
    (driver, write_end)
}

#[test]
fn a_ring_is_drained_at_a_pause_a_reset_and_a_drop() {
    type End = (&'static str, fn(&mut Option<Driver>));
    let ends: [End; 3] = [
        ("pause", |driver| driver.as_ref().unwrap().transport.pause()),
        ("reset", |driver| driver.as_ref().unwrap().write(STATUS, 0)),
        ("drop", |driver| *driver = None),
    ];
    for (name, end) in ends {
        let (mut driver, mut write_end) = pipe_bench();
        let memory = driver.memory.clone();
        memory.write_obj([0_u32; 4], GuestAddress(HEADER)).unwrap();
        write_end.write_all(&[0x11; 512]).unwrap();
        for request in 0..2 {
            memory.write_obj(0xee_u8, GuestAddress(STATUS_BYTE + request)).unwrap();
            let parts = [(HEADER, 16, 0), (DATA + 512 * request, 512, WRITE), (STATUS_BYTE + request, 1, WRITE)];
            let head = driver.chain(0, &parts);
            driver.offer(0, head);
        }
        driver.notify(0);
        // Usually both are taken in the same turn. A worker that was polling has taken the first one alone, and soon takes the
        // second one, which then is in flight.
        wait_for(|| driver.used_index(0) == 1);
        std::thread::sleep(std::time::Duration::from_millis(20));
        let status = || memory.read_obj::<u8>(GuestAddress(STATUS_BYTE + 1)).unwrap();
        let data = || memory.read_obj::<u8>(GuestAddress(DATA + 512)).unwrap();
        assert_eq!((status(), data()), (0xee, 0), "{name}");
        let writer = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            write_end.write_all(&[0x22; 512]).unwrap();
        });
        let mut driver = Some(driver);
        end(&mut driver);
        assert_eq!((status(), data()), (0, 0x22), "{name}");
        writer.join().unwrap();
    }
}

#[test]
fn only_completed_requests_are_counted() {
    let mut bench = bench();
    bench.request(0, 0, (1024, WRITE));
    bench.request(1, 0, (512, 0));
    bench.request(1, 0, (512, 0));
    bench.request(4, 0, (0, 0));
    bench.range(11, 8, 8, 0);
    bench.range(13, 8, 8, 0);
    bench.request(8, 0, (20, WRITE));
    bench.request(0, u64::MAX, (512, WRITE));
    bench.seen.lock().unwrap().fail = true;
    bench.request(0, 0, (512, WRITE));
    let Counters { reads, read_bytes, writes, written_bytes, flushes, discards, .. } = &*bench.control.counters;
    let counted = [reads, read_bytes, writes, written_bytes, flushes, discards];
    assert_eq!(counted.map(|counter| counter.load(Ordering::Relaxed)), [1, 1024, 2, 1024, 1, 2]);
}

/// Makes the same request available `count` times.
fn offer_many(bench: &mut Bench, kind: u32, data: (u32, u16), count: u16) {
    bench.prepare(kind, 0);
    bench.driver.descriptor(0, 0, HEADER, 16, NEXT, 1);
    bench.driver.descriptor(0, 1, DATA, data.0, NEXT | data.1, 2);
    bench.driver.descriptor(0, 2, STATUS_BYTE, 1, WRITE, 0);
    (0..count).for_each(|_| bench.driver.offer(0, 0));
    bench.driver.notify(0);
}

/// Makes `count` reads of a sector available.
fn offer_reads(bench: &mut Bench, count: u16) {
    offer_many(bench, 0, (512, WRITE), count);
}

#[test]
fn a_rate_limit_delays_requests_without_loss() {
    for rate in [
        Rate { ops_per_second: Some(200), burst_ops: Some(1), ..Rate::default() },
        Rate { bytes_per_second: Some(200 * 512), burst_bytes: Some(512), ..Rate::default() },
    ] {
        let mut bench = bench();
        bench.control.rate.set(rate);
        let started = std::time::Instant::now();
        offer_reads(&mut bench, 100);
        wait_for(|| bench.driver.used_index(0) == 100);
        let took_s = started.elapsed().as_secs_f64();
        // Half a second expected; a busy host may be late.
        assert!((0.47..1.0).contains(&took_s), "{took_s} s");
        assert_eq!(bench.driver.read(STATUS), 15);
    }
}

#[test]
fn discards_count_like_writes() {
    let mut bench = bench();
    bench.control.rate.set(Rate { bytes_per_second: Some(1 << 20), burst_bytes: Some(512), ..Rate::default() });
    bench.driver.memory.write_obj([0, 0, (CAPACITY_BYTES / SECTOR_BYTES) as u32, 0], GuestAddress(DATA)).unwrap();
    offer_many(&mut bench, 11, (16, 0), 2);
    wait_for(|| bench.driver.used_index(0) == 1);
    std::thread::sleep(std::time::Duration::from_millis(100));
    assert_eq!(bench.driver.used_index(0), 1, "a second's worth was discarded");
    bench.control.rate.set(Rate::default());
    wait_for(|| bench.driver.used_index(0) == 2);
}

#[test]
fn a_reset_waits_only_for_requests_in_flight() {
    // Discards, zeroes, flushes, and writes with write-through.
    for (kind, data_bytes, features) in [(11, 16, !0), (13, 16, !0), (4, 0, !0), (1, 512, !F_FLUSH)] {
        let shape =
            DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
        let mut bench = bench_with(shape, "disk", features);
        bench.seen.lock().unwrap().takes = std::time::Duration::from_millis(30);
        bench.driver.memory.write_obj([0, 0, 8, 0], GuestAddress(DATA)).unwrap();
        offer_many(&mut bench, kind, (data_bytes, 0), 80);
        wait_for(|| !bench.seen.lock().unwrap().requests.is_empty());
        let before = bench.seen.lock().unwrap().requests.len();
        bench.driver.write(STATUS, 0);
        let after = bench.seen.lock().unwrap().requests.len();
        // The one in flight, one that started in the meantime, and their flushes.
        assert!(after - before <= 4, "type {kind}: {before} requests before the reset, {after} after it");
    }
}

#[test]
fn delayed_requests_survive_a_pause_but_not_a_reset() {
    let never = Rate { ops_per_second: Some(1), burst_ops: Some(1), ..Rate::default() };
    let mut bench = bench();
    bench.control.rate.set(never);
    offer_reads(&mut bench, 20);
    wait_for(|| bench.driver.used_index(0) > 0);
    let started = std::time::Instant::now();
    bench.driver.transport.pause();
    assert!(started.elapsed() < std::time::Duration::from_millis(500), "a pause waits for no limit");
    assert!(bench.driver.used_index(0) < 5);
    bench.driver.transport.resume();
    bench.control.rate.set(Rate::default());
    wait_for(|| bench.driver.used_index(0) == 20);

    bench.control.rate.set(never);
    offer_reads(&mut bench, 20);
    wait_for(|| bench.driver.used_index(0) > 20);
    // A reset drops requests but keeps the limit.
    bench.driver.start();
    offer_reads(&mut bench, 20);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(bench.driver.used_index(0) < 5);
}
