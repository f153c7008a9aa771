//! Limits on data in flight, scheduling, and misbehaving guests.

use super::*;

/// Fills a connection whose reader does not read, up to its credit. Returns what was sent, and how much of it has left
/// the device.
fn fill(guest: &mut Guest, ports: (u32, u32)) -> (Vec<u8>, u32) {
    const CHUNK: usize = 32 << 10;
    let mut sent = Vec::new();
    loop {
        guest.send(ports, op::CREDIT_REQUEST);
        let (update, _) = guest.settle().pop().unwrap();
        assert_eq!(update.op, op::CREDIT_UPDATE);
        let room = (update.buf_alloc - (sent.len() as u32 - update.fwd_cnt)) as usize;
        if room == 0 {
            return (sent, update.fwd_cnt);
        }
        let chunk = bytes(sent.len() as u64, room.min(CHUNK));
        guest.send_raw(Header { len_bytes: chunk.len() as u32, ..packet(ports, op::RW) }, &chunk);
        sent.extend(chunk);
    }
}

/// This process's anonymous memory, in bytes (proc(5), status: RssAnon).
fn anonymous_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() << 10
}

#[test]
fn a_guest_that_fills_every_connection_stays_within_the_budget() {
    const NAME: &str = "virtio::vsock::tests::flow::a_guest_that_fills_every_connection_stays_within_the_budget";
    const ALONE: &str = "HUSK_TEST_ALONE";
    // In a separate process, since other tests allocate memory too.
    if std::env::var_os(ALONE).is_none() {
        let mut alone = std::process::Command::new(std::env::current_exe().unwrap());
        let output = alone.args([NAME, "--exact", "--nocapture"]).env(ALONE, "1").output().unwrap();
        return assert!(output.status.success(), "{output:?}");
    }
    crate::sys::allow_many_files().unwrap();
    let mut guest = Guest::new(16, 4096);
    guest.memory().write_slice(&[0; 1 << 20], GuestAddress(OUTBOX)).unwrap();
    let listener = guest.serve(PORTS.1);
    let before = anonymous_bytes();
    let (mut sent_bytes, mut kept_bytes, mut streams) = (0, 0, Vec::new());
    for port in 0..CONNECTIONS_MAX as u32 {
        streams.push(guest.connect((port, PORTS.1), &listener));
        let (sent, forwarded) = fill(&mut guest, (port, PORTS.1));
        sent_bytes += sent.len() as u64;
        kept_bytes += sent.len() as u64 - u64::from(forwarded);
    }
    let taken_bytes = anonymous_bytes().saturating_sub(before);
    // The kernel holds at least as many bytes as were forwarded.
    let held_bytes = taken_bytes + sent_bytes - kept_bytes;
    println!("{kept_bytes} bytes kept, {taken_bytes} taken; {sent_bytes} sent; the budget is {BUDGET_BYTES}");
    assert!(kept_bytes > BUDGET_BYTES / 4, "{kept_bytes}: the guest did not fill them");
    assert!(held_bytes <= BUDGET_BYTES, "{held_bytes} of {BUDGET_BYTES}");
    // All of it arrives.
    for stream in &mut streams {
        stream.set_nonblocking(true).unwrap();
    }
    let mut arrived_bytes = 0;
    let started = std::time::Instant::now();
    while arrived_bytes < sent_bytes {
        assert!(started.elapsed() < Duration::from_secs(30), "{arrived_bytes} of {sent_bytes}");
        for stream in &mut streams {
            arrived_bytes += stream.read(&mut [0; 64 << 10]).unwrap_or(0) as u64;
        }
    }
}

#[test]
fn a_program_that_does_not_read_throttles_the_guest() {
    let (mut guest, mut stream) = Guest::connected();
    let (mut sent, forwarded) = fill(&mut guest, PORTS);
    assert_eq!(sent.len() as u32 - forwarded, BUFFER_BYTES);
    assert!(read(&mut stream, sent.len()) == sent);
    // Unsolicited, in steps large enough for a packet.
    let mut announced = forwarded;
    while sent.len() as u32 - announced >= BUFFER_BYTES / 4 {
        let (update, _) = guest.expect(PORTS, op::CREDIT_UPDATE);
        assert!(update.fwd_cnt - announced >= BUFFER_BYTES / 4);
        announced = update.fwd_cnt;
    }
    guest.send_raw(data(4), b"more");
    sent.extend(b"more");
    assert_eq!(read(&mut stream, 4), b"more");
    guest.send(PORTS, op::CREDIT_REQUEST);
    assert_eq!(guest.settle().pop().unwrap().0.fwd_cnt, sent.len() as u32);
}

#[test]
fn data_sent_before_a_guest_closed_is_delivered_to_late_readers() {
    for end in [shutdown(SHUTDOWN_BOTH), packet(PORTS, op::RST)] {
        let (mut guest, mut stream) = Guest::connected();
        let (sent, _) = fill(&mut guest, PORTS);
        guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
        guest.send_raw(end, &[]);
        if end.op == op::SHUTDOWN {
            guest.expect(PORTS, op::RST);
        }
        // Its ports can be reused while the old data is still pending.
        let next = guest.serve(77);
        drop(guest.connect((PORTS.0, 77), &next));
        let mut all = Vec::new();
        stream.read_to_end(&mut all).unwrap();
        assert!(all == sent, "{} of {} bytes", all.len(), sent.len());
    }
}

#[test]
fn a_reset_by_the_guest_drops_pending_data() {
    let (mut guest, mut stream) = Guest::connected();
    let (sent, forwarded) = fill(&mut guest, PORTS);
    guest.send(PORTS, op::RST);
    guest.expect_nothing();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, sent[..forwarded as usize]);
}

#[test]
fn a_guest_without_credit_is_asked_once() {
    let (mut guest, mut stream) = Guest::connected();
    let tell = |buf_alloc, fwd_cnt| Header { buf_alloc, fwd_cnt, ..packet(PORTS, op::CREDIT_UPDATE) };
    guest.send_raw(tell(1000, 0), &[]);
    stream.write_all(&bytes(3, 2500)).unwrap();
    let mut received = guest.expect(PORTS, op::RW).1;
    assert_eq!(received.len(), 1000);
    guest.expect(PORTS, op::CREDIT_REQUEST);
    guest.send_raw(tell(1000, 0), &[]);
    guest.expect_nothing();
    guest.send_raw(tell(1000, 400), &[]);
    received.extend(guest.expect(PORTS, op::RW).1);
    assert_eq!(received.len(), 1400);
    guest.expect(PORTS, op::CREDIT_REQUEST);
    guest.send_raw(tell(5000, 1400), &[]);
    received.extend(guest.expect(PORTS, op::RW).1);
    assert!(received == bytes(3, 2500));
    guest.expect_nothing();
}

#[test]
fn a_guest_that_does_not_read_throttles_the_program() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(Header { buf_alloc: 0, ..packet(PORTS, op::CREDIT_UPDATE) }, &[]);
    stream.set_nonblocking(true).unwrap();
    let chunk = [0; 4096];
    let mut written = 0;
    while let Ok(count) = stream.write(&chunk) {
        written += count;
    }
    assert!(written < 1 << 20, "{written} bytes are held somewhere");
    guest.expect(PORTS, op::CREDIT_REQUEST);
    guest.send(PORTS, op::CREDIT_UPDATE);
    let mut received = 0;
    while received < written {
        received += guest.expect(PORTS, op::RW).1.len();
    }
    assert_eq!(received, written);
}

#[test]
fn a_guest_that_violates_credit_loses_only_that_connection() {
    let more_than_room = Header { len_bytes: BUFFER_BYTES + 1, ..packet(PORTS, op::RW) };
    let more_than_there_is = Header { len_bytes: 11, ..packet(PORTS, op::RW) };
    let far_more = Header { len_bytes: u32::MAX, ..packet(PORTS, op::RW) };
    let took_what_was_not_sent = Header { fwd_cnt: 1, ..packet(PORTS, op::CREDIT_UPDATE) };
    let second = packet(PORTS, op::REQUEST);
    let answer = packet(PORTS, op::RESPONSE);
    let unknown = packet(PORTS, 99);
    let mut guest = Guest::new(16, 4096);
    let listener = guest.serve(PORTS.1);
    let mut other = guest.connect((1, PORTS.1), &listener);
    for lie in [more_than_there_is, far_more, took_what_was_not_sent, second, answer, unknown] {
        let mut stream = guest.connect(PORTS, &listener);
        guest.send_raw(lie, &[0; 10]);
        guest.expect(PORTS, op::RST);
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0, "{lie:?}");
    }
    let mut stream = guest.connect(PORTS, &listener);
    guest.send_raw(more_than_room, &vec![0; BUFFER_BYTES as usize + 1]);
    guest.expect(PORTS, op::RST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    let mut stream = guest.connect(PORTS, &listener);
    guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
    guest.send_raw(data(1), b"x");
    guest.expect(PORTS, op::RST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    other.write_all(b"fine").unwrap();
    assert_eq!(guest.expect((1, PORTS.1), op::RW).1, b"fine");
}

#[test]
fn data_outside_of_memory_ends_the_connection() {
    let (mut guest, mut stream) = Guest::connected();
    assert!(data(100).write(guest.memory(), &range(OUTBOX, HEADER_BYTES as u32)));
    let parts = [(OUTBOX, HEADER_BYTES as u32, 0), (OUTBOX + 64, 50, 0), (1 << 40, 50, 0)];
    assert_eq!(guest.driver.transact(TX as u32, &parts), 0);
    guest.expect(PORTS, op::RST);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_packet_with_no_header_and_a_buffer_with_no_room_need_a_reset() {
    for (queue, parts) in [
        (TX, vec![(OUTBOX, 43, 0)]),
        (TX, vec![(OUTBOX, 44, WRITE)]),
        (TX, vec![(1 << 40, 44, 0)]),
        (RX, vec![(BUFFERS, 44, WRITE)]),
        (RX, vec![(BUFFERS, 4096, 0)]),
        (RX, vec![(1 << 40, 4096, WRITE)]),
    ] {
        let mut guest = Guest::new(0, 4096);
        let head = guest.driver.chain(queue as u32, &parts);
        guest.driver.offer(queue as u32, head);
        guest.driver.notify(queue as u32);
        if queue == RX {
            guest.send(PORTS, op::RW);
        }
        guest.driver.wait_for_needs_reset();
    }
}

#[test]
fn connections_are_limited() {
    crate::sys::allow_many_files().unwrap();
    let mut guest = Guest::new(16, 4096);
    let listener = guest.serve(PORTS.1);
    let mut streams: Vec<_> =
        (0..CONNECTIONS_MAX as u32).map(|port| guest.connect((port, PORTS.1), &listener)).collect();
    guest.send((9999, PORTS.1), op::REQUEST);
    guest.expect((9999, PORTS.1), op::RST);
    let mut client = patient(UnixStream::connect(guest.path("")).unwrap());
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    for (port, stream) in (0..).zip(&mut streams) {
        stream.write_all(&[port as u8]).unwrap();
        assert_eq!(guest.expect((port, PORTS.1), op::RW).1, [port as u8]);
    }
    streams.pop();
    let last = (CONNECTIONS_MAX as u32 - 1, PORTS.1);
    guest.expect(last, op::SHUTDOWN);
    guest.send(last, op::RST);
    guest.connect((9999, PORTS.1), &listener);
}

#[test]
fn a_guest_that_takes_no_responses_is_throttled() {
    let mut guest = Guest::new(0, 64);
    for port in 0..400 {
        let at = OUTBOX + 64 * u64::from(port);
        assert!(packet((port, 9), op::RW).write(guest.memory(), &range(at, 64)));
        let head = guest.driver.chain(TX as u32, &[(at, HEADER_BYTES as u32, 0)]);
        guest.driver.offer(TX as u32, head);
        guest.driver.notify(TX as u32);
        if port < 256 {
            assert_eq!(guest.driver.used(TX as u32), (head, 0));
        }
    }
    guest.driver.transport.pause();
    assert_eq!(guest.driver.used_index(TX as u32), 256, "answers that are kept for the guest have a limit");
    guest.driver.transport.resume();
    guest.offer(100);
    let answered: Vec<u32> = (0..400).map(|_| guest.receive().0.dst_port).collect();
    assert!(answered.iter().copied().eq(0..400), "{answered:?}");
}

#[test]
fn connections_are_scheduled_fairly() {
    let mut guest = Guest::new(4, 1000);
    let listener = guest.serve(PORTS.1);
    let mut streams: Vec<_> = (0..3).map(|port| guest.connect((port, PORTS.1), &listener)).collect();
    guest.driver.transport.pause();
    for stream in &mut streams {
        stream.write_all(&[1; 50_000]).unwrap();
    }
    guest.driver.transport.resume();
    let order: Vec<u32> = (0..150).map(|_| guest.receive().0.dst_port).collect();
    for three in order.chunks(3) {
        let mut three = three.to_vec();
        three.sort_unstable();
        assert_eq!(three, [0, 1, 2], "{order:?}");
    }
}

#[test]
fn a_pause_keeps_connections_and_a_reset_of_the_device_ends_them() {
    let (mut guest, mut stream) = Guest::connected();
    let mut early = patient(UnixStream::connect(guest.path("")).unwrap());
    guest.driver.transport.pause();
    stream.write_all(b"in the meantime").unwrap();
    guest.driver.transport.resume();
    assert_eq!(guest.expect(PORTS, op::RW).1, b"in the meantime");
    guest.driver.write(STATUS, 0);
    assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    guest.driver.start();
    guest.offer(16);
    guest.send_raw(data(1), b"x");
    guest.expect(PORTS, op::RST);
    // A handshake may have been accepted before the reset or after it.
    let _ = early.write_all(
        b"CONNECT 7
",
    );
    let mut client = guest.call(8);
    let request = loop {
        let (request, _) = guest.receive();
        if request.dst_port == 8 {
            break request;
        }
    };
    guest.send((8, request.src_port), op::RESPONSE);
    assert_eq!(read(&mut client, 3), b"OK ");
}

#[test]
fn megabytes_arrive_unchanged_in_both_directions() {
    const TOTAL: usize = 4 << 20;
    for room in [100, 4096, 65536 - 64] {
        let mut guest = Guest::new(8, room);
        let listener = guest.serve(PORTS.1);
        let stream = guest.connect(PORTS, &listener);
        let total = TOTAL.min(room as usize * 10_000);
        let (out, back) = (bytes(1, total), bytes(2, total));
        let (mut writer, expected) = (stream.try_clone().unwrap(), out.clone());
        let writing = std::thread::spawn({
            let back = back.clone();
            move || {
                let mut sizes = pattern(3).map(|x| 1 + x as usize % 100_000);
                let mut rest = &back[..];
                while !rest.is_empty() {
                    let (piece, behind) = rest.split_at(rest.len().min(sizes.next().unwrap()));
                    writer.write_all(piece).unwrap();
                    rest = behind;
                }
                writer.shutdown(Shutdown::Write).unwrap();
            }
        });
        let reading = std::thread::spawn(move || {
            let (mut stream, mut all) = (stream, Vec::<u8>::new());
            let mut sizes = pattern(4).map(|x| 1 + x as usize % 50_000);
            let mut piece = vec![0; 50_000];
            loop {
                let size = sizes.next().unwrap();
                match stream.read(&mut piece[..size]).unwrap() {
                    0 => return all == expected,
                    count => all.extend(&piece[..count]),
                }
            }
        });
        let received = exchange(&mut guest, &out);
        assert!(received == back, "{room}: {} of {} bytes", received.len(), back.len());
        guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
        assert!(reading.join().unwrap(), "{room}");
        writing.join().unwrap();
    }
}

/// Sends `out` within the device's credit, and receives until the host has sent everything.
fn exchange(guest: &mut Guest, out: &[u8]) -> Vec<u8> {
    // Space for a few packets, credited as they are read.
    const ROOM: u32 = 40_000;
    let (mut received, mut sent, mut forwarded, mut announced, mut ended) = (Vec::new(), 0, 0, 0, false);
    let mut sizes = pattern(5).map(|x| 1 + x as u32 % 60_000);
    let says = |header: Header, received: usize| Header { buf_alloc: ROOM, fwd_cnt: received as u32, ..header };
    guest.send_raw(says(packet(PORTS, op::CREDIT_UPDATE), 0), &[]);
    while !ended || sent < out.len() {
        let room = BUFFER_BYTES - (sent as u32 - forwarded);
        let len = (room.min(sizes.next().unwrap()) as usize).min(out.len() - sent);
        if len > 0 {
            guest.send_raw(says(data(len), received.len()), &out[sent..sent + len]);
            (sent, announced) = (sent + len, received.len());
        }
        if ended && room > 0 {
            continue;
        }
        let (header, data) = guest.receive();
        forwarded = header.fwd_cnt;
        ended |= header.op == op::SHUTDOWN;
        received.extend(data);
        if header.op == op::CREDIT_REQUEST || received.len() - announced > ROOM as usize / 2 {
            guest.send_raw(says(packet(PORTS, op::CREDIT_UPDATE), received.len()), &[]);
            announced = received.len();
        }
    }
    received
}
