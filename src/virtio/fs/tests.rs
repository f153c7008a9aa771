use std::fs;
use std::path::Path;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::config::ShareConfig;
use crate::fs::link::Ends;
use crate::fs::process::{FILES_MAX, Process};
use crate::resources::share;
use crate::test_log::logged;
use crate::virtio::contract::contract;
use crate::virtio::test_driver::{BUFFERS, Driver, WRITE, wait_for};

const REPLIES: u64 = BUFFERS + 0x10_0000;
const HIPRIO: u32 = 0;
const REQUESTS: u32 = 1;

fn served(dir: &Path) -> (VirtioDevice, Process) {
    let config = ShareConfig::of(dir.to_owned(), "work".into());
    let (folder, process) = share::open(&config, None, FILES_MAX, true).unwrap().finish().unwrap();
    (device(folder).unwrap(), process)
}

/// A device whose server is the test.
fn held() -> (VirtioDevice, Link) {
    let (ends, theirs) = Ends::pair().unwrap();
    (device(SharedFolder { tag: "t".into(), ends }).unwrap(), theirs.connect().unwrap())
}

/// A request with a header (linux/fuse.h).
fn request(opcode: u32, unique: u64, node: u64, arguments: &[u8]) -> Vec<u8> {
    let len = 40 + arguments.len() as u32;
    let mut bytes = [len.to_le_bytes(), opcode.to_le_bytes()].concat();
    bytes.extend([unique, node].iter().flat_map(|field| field.to_le_bytes()));
    bytes.extend([0; 16]);
    bytes.extend(arguments);
    bytes
}

/// Submits a request in two parts, with room in two parts. Returns the reply.
fn transact(driver: &mut Driver, bytes: &[u8], room: u32) -> Vec<u8> {
    driver.memory.write_slice(bytes, GuestAddress(BUFFERS)).unwrap();
    let len = driver.transact(
        REQUESTS,
        &[
            (BUFFERS, 30, 0),
            (BUFFERS + 30, bytes.len() as u32 - 30, 0),
            (REPLIES, 16, WRITE),
            (REPLIES + 16, room - 16, WRITE),
        ],
    );
    let mut reply = vec![0; len as usize];
    driver.memory.read_slice(&mut reply, GuestAddress(REPLIES)).unwrap();
    reply
}

#[test]
fn the_file_system_device_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let processes = std::cell::RefCell::new(Vec::new());
    contract(|| {
        let (device, process) = served(dir.path());
        // The servers of dropped devices end by themselves.
        processes.borrow_mut().truncate(4);
        processes.borrow_mut().insert(0, process);
        device
    });
}

#[test]
fn a_file_of_the_host_is_read_through_the_queue() {
    let dir = tempfile::tempdir().unwrap();
    let data: Vec<u8> = (0..200_000_u32).map(|at| (at / 3) as u8).collect();
    fs::write(dir.path().join("f"), &data).unwrap();
    let (device, _process) = served(dir.path());
    let mut driver = Driver::new(device);
    driver.start();
    let found = transact(&mut driver, &request(1, 5, 1, b"f\0"), 200);
    assert_eq!((found.len(), &found[8..16]), (16 + 128, &5_u64.to_le_bytes()[..]));
    let node = u64::from_le_bytes(found[16..24].try_into().unwrap());
    let opened = transact(&mut driver, &request(14, 6, node, &[0; 8]), 64);
    let mut read = opened[16..24].to_vec();
    read.extend(0_u64.to_le_bytes());
    read.extend(200_000_u32.to_le_bytes());
    read.resize(40, 0);
    let reply = transact(&mut driver, &request(15, 7, node, &read), 16 + 200_000);
    assert!(reply[16..] == data);
    // A request without room for a reply is done when the server has it.
    driver.memory.write_slice(&request(2, 8, node, &1_u64.to_le_bytes()), GuestAddress(BUFFERS)).unwrap();
    assert_eq!(driver.transact(HIPRIO, &[(BUFFERS, 48, 0)]), 0);
    let gone = transact(&mut driver, &request(3, 9, node, &[0; 16]), 200);
    assert_eq!(gone[4..8], (-libc::ESTALE).to_le_bytes());
}

#[test]
fn a_pause_waits_for_requests_in_flight_and_completes_them() {
    let (device, server) = held();
    let mut driver = Driver::new(device);
    driver.start();
    let bytes = request(3, 1, 1, &[0; 16]);
    driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    for _ in 0..3 {
        let head = driver.chain(REQUESTS, &[(BUFFERS, bytes.len() as u32, 0), (REPLIES, 100, WRITE)]);
        driver.offer(REQUESTS, head);
    }
    driver.notify(REQUESTS);
    let received: Vec<Message> = (0..3).map(|_| server.receive().unwrap()).collect();
    let replier = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(50));
        for message in received.into_iter().rev() {
            server.send(Message { len_bytes: 20, room_bytes: 0, ..message }).unwrap();
        }
        server
    });
    driver.transport.pause();
    assert_eq!(driver.used_index(REQUESTS), 3);
    let server = replier.join().unwrap();
    driver.transport.resume();
    let head = driver.chain(REQUESTS, &[(BUFFERS, 40, 0), (REPLIES, 100, WRITE)]);
    driver.offer(REQUESTS, head);
    driver.notify(REQUESTS);
    assert_eq!(server.receive().unwrap().len_bytes, 40);
    server.send(Message { slot: 0, len_bytes: 0, room_bytes: 0 }).ok();
}

#[test]
fn no_request_is_lost_by_a_pause_at_any_moment() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "").unwrap();
    let (device, process) = served(dir.path());
    let mut driver = Driver::new(device);
    driver.start();
    let bytes = request(1, 1, 1, b"f\0");
    driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    // More than there are slots, so that some wait in the queue.
    const AT_ONCE: u16 = SLOTS as u16 + 4;
    for round in 1..=200_u16 {
        for _ in 0..AT_ONCE {
            let head = driver.chain(REQUESTS, &[(BUFFERS, bytes.len() as u32, 0), (REPLIES, 200, WRITE)]);
            driver.offer(REQUESTS, head);
        }
        driver.notify(REQUESTS);
        std::thread::sleep(Duration::from_micros(u64::from(round) * 7 % 400));
        driver.transport.pause();
        let before = driver.used_index(REQUESTS);
        process.save().unwrap();
        assert_eq!(driver.used_index(REQUESTS), before, "nothing happens to a paused guest");
        driver.transport.resume();
        wait_for(|| driver.used_index(REQUESTS) == round * AT_ONCE);
    }
}

#[test]
fn a_pause_does_not_wait_for_a_server_that_hangs_and_its_replies_are_not_lost() {
    let (device, server) = held();
    let mut driver = Driver::new(device);
    driver.start();
    let offer = |driver: &mut Driver| {
        driver.memory.write_slice(&request(3, 1, 1, &[0; 16]), GuestAddress(BUFFERS)).unwrap();
        let head = driver.chain(REQUESTS, &[(BUFFERS, 56, 0), (REPLIES, 100, WRITE)]);
        driver.offer(REQUESTS, head);
        driver.notify(REQUESTS);
        server.receive().unwrap()
    };
    let message = offer(&mut driver);
    driver.transport.pause();
    assert_eq!(driver.used_index(REQUESTS), 0);
    assert_eq!(logged("share t: the host's").len(), 1);
    server.send(Message { len_bytes: 20, room_bytes: 0, ..message }).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(driver.used_index(REQUESTS), 0, "nothing happens to a paused guest");
    driver.transport.resume();
    wait_for(|| driver.used_index(REQUESTS) == 1);
    // A guest that resets the device gets no reply to what it has asked before.
    let abandoned = offer(&mut driver);
    driver.start();
    let next = offer(&mut driver);
    assert_ne!(next.slot, abandoned.slot);
    for message in [abandoned, next] {
        server.send(Message { len_bytes: 20, room_bytes: 0, ..message }).unwrap();
    }
    wait_for(|| driver.used_index(REQUESTS) == 1);
}

#[test]
fn more_requests_than_slots_wait_for_each_other() {
    let (device, server) = held();
    let mut driver = Driver::new(device);
    driver.start();
    for _ in 0..20 {
        let head = driver.chain(REQUESTS, &[(BUFFERS, 40, 0), (REPLIES, 100, WRITE)]);
        driver.offer(REQUESTS, head);
    }
    driver.notify(REQUESTS);
    for _ in 0..20 {
        let message = server.receive().unwrap();
        server.send(Message { len_bytes: 16, room_bytes: 0, ..message }).unwrap();
    }
    wait_for(|| driver.used_index(REQUESTS) == 20);
}

#[test]
fn requests_fail_when_the_server_is_gone_or_breaks_rules() {
    for breaks in [false, true] {
        let (device, server) = held();
        let mut driver = Driver::new(device);
        driver.start();
        let bytes = request(3, 0x1122_3344, 1, &[0; 16]);
        driver.memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
        let head = driver.chain(REQUESTS, &[(BUFFERS, bytes.len() as u32, 0), (REPLIES, 100, WRITE)]);
        driver.offer(REQUESTS, head);
        driver.notify(REQUESTS);
        let message = server.receive().unwrap();
        if breaks {
            server.send(Message { len_bytes: 101, room_bytes: 0, ..message }).unwrap();
        } else {
            drop(server);
        }
        assert_eq!(driver.used(REQUESTS), (head, 16));
        let reply: [u8; 16] = driver.memory.read_obj(GuestAddress(REPLIES)).unwrap();
        assert_eq!(reply[4..8], (-libc::ENOTCONN).to_le_bytes());
        assert_eq!(reply[8..], 0x1122_3344_u64.to_le_bytes());
        assert_eq!(transact(&mut driver, &bytes, 100), reply, "and later ones");
        driver.transport.pause();
    }
}

#[test]
fn the_end_of_a_server_without_requests_is_logged_once() {
    let (ends, server) = Ends::pair().unwrap();
    let mut driver = Driver::new(device(SharedFolder { tag: "idle".into(), ends }).unwrap());
    driver.start();
    let lines = || logged("share idle: ");
    assert!(lines().is_empty());
    drop(server);
    wait_for(|| !lines().is_empty());
    for unique in 0..3 {
        transact(&mut driver, &request(3, unique, 1, &[0; 16]), 100);
    }
    assert_eq!(lines(), ["share idle: the folder is served no more: its process has ended"]);
}

#[test]
fn a_request_that_is_no_memory_or_too_large_is_refused() {
    let (device, _server) = held();
    let mut driver = Driver::new(device);
    driver.start();
    for (address, len) in [(1 << 40, 100), (BUFFERS, SLOT_BYTES as u32 + 1)] {
        assert_eq!(driver.transact(REQUESTS, &[(address, len, 0), (REPLIES, 100, WRITE)]), 16);
        let reply: [u8; 8] = driver.memory.read_obj(GuestAddress(REPLIES)).unwrap();
        assert_eq!(reply[4..], (-libc::EIO).to_le_bytes());
        assert_eq!(driver.transact(REQUESTS, &[(address, len, 0)]), 0);
    }
}
