//! Tests of frames that leave together, or stay in flight because the host is slow.

use super::*;
use crate::sys;

/// Offers `count` frames of `len` bytes, the same ones each time, without ringing. Returns their heads.
fn offer_frames(driver: &mut Driver, count: u64, len: usize) -> Vec<u16> {
    let offer = |number: u64| {
        let address = FRAME + number * (HEADER_BYTES + len) as u64;
        driver.memory.write_slice(&[0; HEADER_BYTES], GuestAddress(address)).unwrap();
        driver.memory.write_slice(&numbered(number, len), GuestAddress(address + HEADER_BYTES as u64)).unwrap();
        let head = driver.chain(TX_QUEUE, &[(address, (HEADER_BYTES + len) as u32, 0)]);
        driver.offer(TX_QUEUE, head);
        head
    };
    (0..count).map(offer).collect()
}

/// The frame with this number.
fn numbered(number: u64, len: usize) -> Vec<u8> {
    vec![number as u8; len]
}

#[test]
fn frames_of_one_doorbell_leave_in_one_call() {
    let (ours, mut peer) = sys::net::packet_pair().unwrap();
    peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let (device, link) = device_on(vec![Box::new(StreamNet::new(ours).unwrap())], "net", MAC, None).unwrap();
    let mut driver = Driver::new(device);
    driver.start();
    // Ensures that the worker does not look at the queue before all are there.
    driver.transport.pause();
    let mut heads = offer_frames(&mut driver, 20, 100);
    // One in between is invalid: only that one is dropped.
    let invalid = driver.chain(TX_QUEUE, &[(FRAME, 20, 0)]);
    driver.offer(TX_QUEUE, invalid);
    heads.extend(offer_frames(&mut driver, 20, 100));
    driver.transport.resume();
    let mut packet = vec![0; 10_000];
    let len = peer.read(&mut packet).unwrap();
    let framed = |number| [vec![0, 0, 0, 100], numbered(number, 100)].concat();
    let wanted: Vec<u8> = (0..20).chain(0..20).flat_map(framed).collect();
    assert!(packet[..len] == wanted, "{len} of {} bytes in the first call", wanted.len());
    let mut used: Vec<u16> = (0..41).map(|_| driver.used(TX_QUEUE).0).collect();
    used.retain(|head| *head != invalid);
    assert_eq!(used, heads);
    assert_eq!((link.counts().tx_packets, link.counts().tx_dropped), (40, 1));
}

#[test]
fn buffers_of_a_slow_host_return_when_it_takes_their_frames_or_at_a_pause() {
    const LEN: usize = 60_000;
    for is_paused in [false, true] {
        let mut bench = bench();
        let heads = offer_frames(&mut bench.driver, 20, LEN);
        bench.driver.notify(TX_QUEUE);
        wait_for(|| bench.driver.used_index(TX_QUEUE) > 0);
        if is_paused {
            bench.driver.transport.pause();
            let used = bench.driver.used_index(TX_QUEUE);
            assert_eq!(bench.link.counts().tx_packets, u64::from(used), "an accepted frame's buffer is not returned");
            assert!(used < 20, "the socket is full");
            // The driver may reuse them.
            bench.driver.memory.write_slice(&vec![0xff; usize::from(used) * LEN], GuestAddress(FRAME)).unwrap();
            bench.driver.transport.resume();
        }
        for number in 0..20 {
            let content = bench.read_frame();
            let is_kept = content == numbered(number, LEN);
            assert!(is_kept, "frame {number}: {:?}", &content[..20]);
        }
        let used: Vec<u16> = heads.iter().map(|_| bench.driver.used(TX_QUEUE).0).collect();
        assert_eq!(used, heads);
        assert_eq!(bench.link.counts().tx_packets, 20);
    }
}

#[test]
fn a_host_that_leaves_with_frames_in_flight_gets_no_more() {
    let mut bench = bench();
    offer_frames(&mut bench.driver, 20, 60_000);
    bench.driver.notify(TX_QUEUE);
    wait_for(|| bench.driver.used_index(TX_QUEUE) > 0);
    bench.peer = UnixStream::pair().unwrap().0;
    // The driver gets all of its buffers back.
    wait_for(|| bench.driver.used_index(TX_QUEUE) == 20 && bench.status() == 0);
}
