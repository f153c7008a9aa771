//! A disk with several queues.

use super::*;

/// A device with three queues on one file.
fn device() -> (VirtioDevice, DiskHandle, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(CAPACITY_BYTES).unwrap();
    let plain = PlainDisk::new(file.try_clone().unwrap(), false);
    let disk = |_| Box::new(UringDisk::new(plain.clone(), Shortcuts::Never).unwrap()) as Box<dyn DiskBackend>;
    let shape =
        DiskShape { capacity_bytes: CAPACITY_BYTES, readonly: false, block_bytes: 512, physical_block_bytes: 4096 };
    let (device, handle) = device_on((0..3).map(disk).collect(), shape, "disk", "", Rate::default()).unwrap();
    (device, handle, file)
}

/// The addresses of the header, data and status of a request in a queue.
fn places(queue: u32) -> [u64; 3] {
    [HEADER, DATA, STATUS_BYTE].map(|address| address + 0x2_0000 * u64::from(queue))
}

/// Makes a request of one sector available, and returns without waiting for it.
fn offer(driver: &mut Driver, queue: u32, kind: u32, sector: u32) {
    let [header, data, status] = places(queue);
    driver.memory.write_obj([kind, 0, sector, 0], GuestAddress(header)).unwrap();
    driver.memory.write_obj(0xee_u8, GuestAddress(status)).unwrap();
    let flags = if kind == 0 { WRITE } else { 0 };
    let head = driver.chain(queue, &[(header, 16, 0), (data, 512, flags), (status, 1, WRITE)]);
    driver.offer(queue, head);
    driver.notify(queue);
}

#[test]
fn a_driver_is_offered_all_queues_and_each_serves_the_same_disk() {
    let (device, handle, file) = device();
    let mut driver = Driver::new(device);
    driver.start();
    assert_eq!((driver.offered() & F_MQ, driver.read(CONFIG + 34) & 0xffff), (F_MQ, 3));
    for queue in 0..3 {
        driver.memory.write_slice(&[queue as u8 + 1; 512], GuestAddress(places(queue)[1])).unwrap();
        offer(&mut driver, queue, 1, queue);
    }
    for queue in 0..3 {
        driver.used(queue);
        let mut sector = [0; 512];
        file.read_exact_at(&mut sector, 512 * u64::from(queue)).unwrap();
        assert_eq!(sector, [queue as u8 + 1; 512]);
    }
    for queue in 0..3 {
        // What was written by another queue.
        offer(&mut driver, queue, 0, (queue + 1) % 3);
        driver.used(queue);
    }
    for queue in 0..3 {
        let read: u8 = driver.memory.read_obj(GuestAddress(places(queue)[1])).unwrap();
        assert_eq!(u32::from(read), (queue + 1) % 3 + 1);
    }
    let Counters { reads, writes, .. } = &*handle.counters;
    assert_eq!([reads, writes].map(|count| count.load(Ordering::Relaxed)), [3, 3]);
}

#[test]
fn a_limit_holds_over_all_queues() {
    let (device, handle, _file) = device();
    let mut driver = Driver::new(device);
    driver.start();
    handle.rate.set(Rate { ops_per_second: Some(1), burst_ops: Some(1), ..Rate::default() });
    for round in 0..3 {
        (0..3).for_each(|queue| offer(&mut driver, queue, 0, round));
    }
    let done = |driver: &Driver| (0..3).map(|queue| driver.used_index(queue)).sum::<u16>();
    wait_for(|| done(&driver) >= 2);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(done(&driver) < 5, "one of the burst, one ahead, and one a second");
    handle.rate.set(Rate::default());
    wait_for(|| done(&driver) == 9);
}

#[test]
fn a_disabled_queue_does_not_stop_the_others() {
    let mut driver = Driver::new(device().0);
    driver.start();
    driver.write(QUEUE_SEL, 1);
    driver.write(QUEUE_READY, 0);
    offer(&mut driver, 1, 0, 0);
    for queue in [0, 2] {
        offer(&mut driver, queue, 0, 0);
        driver.used(queue);
    }
    driver.transport.pause();
    assert_eq!(driver.used_index(1), 0);
}
