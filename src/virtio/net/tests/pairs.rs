//! Tests of multiple queue pairs and the control queue.

use std::sync::atomic::Ordering;

use super::*;

/// The queues of a device with two pairs.
const RX_2: u32 = 2;
const TX_2: u32 = 3;
const CONTROL: u32 = 4;
/// The address of commands and their status.
const COMMAND: u64 = BUFFERS + 0x20_0000;
const ANSWER: u64 = COMMAND + 0x1000;
const OK: u8 = 0;
const ERR: u8 = 1;

struct Pairs {
    driver: Driver,
    link: NetLink,
    peers: [UnixStream; 2],
}

fn device_of_two() -> (VirtioDevice, NetLink, [UnixStream; 2]) {
    let ends = [UnixStream::pair().unwrap(), UnixStream::pair().unwrap()];
    let (ours, peers): (Vec<_>, Vec<_>) = ends.into_iter().unzip();
    let backend = |socket| -> Box<dyn NetBackend> { Box::new(StreamNet::new(socket).unwrap()) };
    let (device, link) = device_on(ours.into_iter().map(backend).collect(), "net", MAC, None).unwrap();
    peers.iter().for_each(|peer| peer.set_read_timeout(Some(Duration::from_secs(10))).unwrap());
    (device, link, peers.try_into().unwrap())
}

fn pairs() -> Pairs {
    let (device, link, peers) = device_of_two();
    let mut driver = Driver::new(device);
    driver.start();
    Pairs { driver, link, peers }
}

/// Sends `command` in pieces of the lengths `pieces`. Returns the response's length and the status.
fn ask_in(driver: &mut Driver, control: u32, command: &[u8], pieces: &[u32]) -> (u32, u8) {
    driver.memory.write_slice(command, GuestAddress(COMMAND)).unwrap();
    driver.memory.write_obj(0xee_u8, GuestAddress(ANSWER)).unwrap();
    let (mut parts, mut at) = (Vec::new(), COMMAND);
    for piece in pieces {
        parts.push((at, *piece, 0));
        at += u64::from(*piece);
    }
    parts.push((ANSWER, 1, WRITE));
    let written = driver.transact(control, &parts);
    (written, driver.memory.read_obj(GuestAddress(ANSWER)).unwrap())
}

fn ask(driver: &mut Driver, command: &[u8]) -> u8 {
    let (written, answer) = ask_in(driver, CONTROL, command, &[command.len() as u32]);
    assert_eq!(written, 1);
    answer
}

fn use_pairs(driver: &mut Driver, count: u16) -> u8 {
    let [low, high] = count.to_le_bytes();
    ask(driver, &[4, 0, low, high])
}

fn arrive(peer: &mut UnixStream, frame: &[u8]) {
    peer.write_all(&[&(frame.len() as u32).to_be_bytes(), frame].concat()).unwrap();
}

fn read_frame(peer: &mut UnixStream) -> Vec<u8> {
    let mut length = [0; 4];
    peer.read_exact(&mut length).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(length) as usize];
    peer.read_exact(&mut frame).unwrap();
    frame
}

/// Makes a frame available in queue `queue`, and returns immediately.
fn send(driver: &mut Driver, queue: u32, frame: &[u8]) {
    driver.memory.write_slice(&[&[0; HEADER_BYTES], frame].concat(), GuestAddress(FRAME)).unwrap();
    let head = driver.chain(queue, &[(FRAME, (HEADER_BYTES + frame.len()) as u32, 0)]);
    driver.offer(queue, head);
    driver.notify(queue);
}

fn offer(driver: &mut Driver, queue: u32, count: u64) {
    for number in 0..count {
        let head = driver.chain(queue, &[(BUFFERS + 0x1000 * number, 2000, WRITE)]);
        driver.offer(queue, head);
    }
    driver.notify(queue);
}

/// Lets the device process everything, and stops it.
fn settle(driver: &Driver) {
    driver.transport.pause();
    driver.transport.resume();
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn a_driver_uses_as_many_pairs_as_it_asks_for() {
    let Pairs { mut driver, link, mut peers } = pairs();
    let wanted = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    assert_eq!(driver.offered() & wanted, wanted);
    let mut most = [0xff; 2];
    driver.transport.read(CONFIG + 8, &mut most);
    assert_eq!((u16::from_le_bytes(most), driver.transport.doorbells().len()), (2, 5));
    // One pair at first.
    offer(&mut driver, RX_2, 4);
    arrive(&mut peers[1], &frame(61));
    send(&mut driver, TX_2, &frame(62));
    settle(&driver);
    assert_eq!((driver.used_index(RX_2), driver.used_index(TX_2)), (0, 0));
    // Waiting frames are found without another doorbell.
    assert_eq!(use_pairs(&mut driver, 2), OK);
    assert_eq!((driver.used(RX_2).1, driver.used(TX_2).1), (12 + 61, 0));
    assert_eq!(read_frame(&mut peers[1]), frame(62));
    offer(&mut driver, RX_QUEUE, 4);
    for (peer, rx) in peers.iter_mut().zip([RX_QUEUE, RX_2]) {
        arrive(peer, &frame(70 + rx as usize));
        assert_eq!(driver.used(rx).1, 12 + 70 + rx);
    }
    let counts = link.counts();
    assert_eq!((counts.rx_packets, counts.rx_bytes, counts.tx_packets), (3, 61 + 70 + 72, 1));
    assert_eq!(use_pairs(&mut driver, 1), OK);
    arrive(&mut peers[1], &frame(80));
    send(&mut driver, TX_2, &frame(81));
    send(&mut driver, TX_QUEUE, &frame(82));
    assert_eq!(read_frame(&mut peers[0]), frame(82));
    settle(&driver);
    assert_eq!((driver.used_index(RX_2), driver.used_index(TX_2)), (2, 1));
}

#[test]
fn other_commands_are_rejected() {
    let Pairs { mut driver, peers: _peers, .. } = pairs();
    for count in [0, 3, 8, 0x8000, 0xffff] {
        assert_eq!(use_pairs(&mut driver, count), ERR, "{count}");
    }
    for command in [&[][..], &[4], &[4, 0], &[4, 0, 2], &[4, 0, 2, 0, 0], &[0; 3000], &[4, 1, 2, 0], &[0, 0, 1, 0]] {
        assert_eq!(ask(&mut driver, command), ERR, "{command:?}");
    }
    assert_eq!(ask_in(&mut driver, CONTROL, &[4, 0, 2, 0], &[2, 1, 1]), (1, OK), "however it is split");
    // No room for a status, and nothing but that.
    assert_eq!(driver.transact(CONTROL, &[(COMMAND, 4, 0)]), 0);
    assert_eq!(driver.transact(CONTROL, &[(1 << 50, 4, 0), (ANSWER, 1, WRITE)]), 1);
    assert_eq!(driver.memory.read_obj::<u8>(GuestAddress(ANSWER)).unwrap(), ERR);
    assert_eq!(driver.read(STATUS), 15);
    let head = driver.chain(CONTROL, &[(COMMAND, 4, 0), (1 << 50, 1, WRITE)]);
    driver.offer(CONTROL, head);
    driver.notify(CONTROL);
    driver.wait_for_needs_reset();
}

#[test]
fn the_control_queue_is_the_third_of_a_driver_of_one_pair() {
    let (device, _link, _peers) = device_of_two();
    let mut driver = Driver::new(device);
    driver.start_with(!(1 << VIRTIO_NET_F_MQ));
    assert_eq!(ask_in(&mut driver, 2, &[4, 0, 1, 0], &[4]), (1, ERR));
    assert_eq!(ask_in(&mut driver, 2, &[4, 0, 2, 0], &[4]), (1, ERR));
    // A driver that did not accept the control queue has none, and only one pair.
    driver.start_with(!(1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ));
    for queue in [2, CONTROL] {
        let head = driver.chain(queue, &[(COMMAND, 4, 0), (ANSWER, 1, WRITE)]);
        driver.offer(queue, head);
        driver.notify(queue);
    }
    settle(&driver);
    assert_eq!((driver.used_index(2), driver.used_index(CONTROL), driver.read(STATUS)), (0, 0, 15));
}

#[test]
fn a_device_of_one_pair_has_no_control_queue() {
    let bench = bench();
    let several = 1 << VIRTIO_NET_F_MQ | 1 << VIRTIO_NET_F_CTRL_VQ;
    assert_eq!((bench.driver.offered() & several, bench.driver.transport.doorbells().len()), (0, 2));
}

#[test]
fn a_limit_holds_over_all_pairs_and_each_has_its_share() {
    let Pairs { mut driver, link, mut peers } = pairs();
    assert_eq!(use_pairs(&mut driver, 2), OK);
    // Five at once, and then one every 20 ms.
    link.set_rate(Rate { ops_per_second: Some(50), ..Rate::default() });
    let started = Instant::now();
    for _ in 0..30 {
        peers.iter_mut().for_each(|peer| arrive(peer, &frame(100)));
    }
    for rx in [RX_QUEUE, RX_2] {
        offer(&mut driver, rx, 30);
    }
    let total = |driver: &Driver| driver.used_index(RX_QUEUE) + driver.used_index(RX_2);
    wait_for(|| total(&driver) >= 25);
    let took = started.elapsed();
    driver.transport.pause();
    assert!((Duration::from_millis(375)..Duration::from_secs(3)).contains(&took), "{took:?}");
    let each = [driver.used_index(RX_QUEUE), driver.used_index(RX_2)];
    assert!(each.iter().all(|count| *count >= 5), "{each:?}");
}

#[test]
fn frequent_changes_of_pairs_are_rate_limited() {
    let Pairs { mut driver, peers: _peers, .. } = pairs();
    let started = Instant::now();
    for count in [2, 1, 2, 1, 2, 1] {
        assert_eq!(use_pairs(&mut driver, count), OK);
    }
    // Three at once, and then one every 50 ms.
    assert!(started.elapsed() >= Duration::from_millis(140), "{:?}", started.elapsed());
    let started = Instant::now();
    for _ in 0..100 {
        assert_eq!(use_pairs(&mut driver, 1), OK);
    }
    assert!(started.elapsed() < Duration::from_secs(2), "what changes nothing does not wait");
}

#[test]
fn the_number_of_pairs_is_saved_and_reset() {
    let Pairs { mut driver, peers: _peers, .. } = pairs();
    let mut one = driver.transport.save();
    assert_eq!(use_pairs(&mut driver, 2), OK);
    driver.transport.pause();
    let mut two = driver.transport.save();
    assert_ne!(one.session().handlers, two.session().handlers);
    let (device, _link, mut peers) = device_of_two();
    let mut driver = driver.moved_to(device);
    driver.transport.resume();
    send(&mut driver, TX_2, &frame(90));
    assert_eq!(read_frame(&mut peers[1]), frame(90));
    // No other device accepts it.
    let (ours, _peer) = UnixStream::pair().unwrap();
    let single = device_on(vec![Box::new(StreamNet::new(ours).unwrap())], "net", MAC, None).unwrap().0;
    let single = Driver::new(single);
    let mut foreign = single.transport.save();
    for state in [vec![], vec![0, 0], vec![2, 0], vec![1], vec![1, 0, 0]] {
        foreign.session().handlers = vec![state];
        assert!(single.transport.restore(&foreign).is_err(), "{foreign:?}");
    }
    driver.start();
    assert_eq!(driver.transport.save().session().handlers, one.session().handlers);
    send(&mut driver, TX_2, &frame(91));
    settle(&driver);
    assert_eq!(driver.used_index(TX_2), 0);
}

#[test]
fn a_host_error_keeps_the_previous_pairs() {
    let witnesses: [Witness; 3] = std::array::from_fn(|_| Witness::new(0));
    let backends = witnesses.iter().map(|witness| -> Box<dyn NetBackend> { Box::new(witness.clone()) });
    let device = device_on(backends.collect(), "net-stubborn", MAC, None).unwrap().0;
    let enabled = || witnesses.each_ref().map(|witness| witness.enabled.load(Ordering::SeqCst));
    let mut driver = Driver::new(device);
    driver.start();
    assert_eq!(enabled(), [true, false, false]);
    witnesses[2].refuses.store(true, Ordering::SeqCst);
    let control = 6;
    assert_eq!(ask_in(&mut driver, control, &[4, 0, 3, 0], &[4]), (1, ERR));
    assert_eq!(enabled(), [true, false, false]);
    assert_eq!(ask_in(&mut driver, control, &[4, 0, 2, 0], &[4]), (1, OK));
    assert_eq!(enabled(), [true, true, false]);
    assert_eq!(logged("net-stubborn: the host does not support 3 queue pairs: ").len(), 1);
    driver.write(STATUS, 0);
    assert_eq!(enabled(), [true, false, false]);
}
