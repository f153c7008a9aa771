//! How connections are established, transfer data, and are closed in one or both directions.

use super::*;

#[test]
fn a_guest_connects_to_a_program() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(data(5), b"hello");
    assert_eq!(read(&mut stream, 5), b"hello");
    stream.write_all(b"good day").unwrap();
    let (header, data) = guest.expect(PORTS, op::RW);
    assert_eq!((&*data, header.fwd_cnt, header.buf_alloc), (&b"good day"[..], 5, BUFFER_BYTES));
}

#[test]
fn a_program_connects_to_the_guest() {
    let mut guest = Guest::new(16, 4096);
    let mut client = guest.call(7);
    // It does not wait for the response.
    client.write_all(b"early").unwrap();
    let (request, _) = guest.receive();
    let ports = (7, request.src_port);
    assert_eq!((request.op, request.dst_port, request.buf_alloc), (op::REQUEST, 7, BUFFER_BYTES));
    guest.expect_nothing();
    guest.send(ports, op::RESPONSE);
    let ok = format!("OK {}\n", request.src_port);
    assert_eq!(read(&mut client, ok.len()), ok.as_bytes());
    assert_eq!(guest.expect(ports, op::RW).1, b"early");
    let other = guest.call(7);
    assert_ne!(guest.receive().0.src_port, request.src_port, "each has a port of its own");
    drop(other);
}

#[test]
fn a_program_refused_by_the_guest_is_disconnected() {
    let mut guest = Guest::new(16, 4096);
    let mut client = guest.call(7);
    let (request, _) = guest.receive();
    guest.send((7, request.src_port), op::RST);
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
    guest.expect_nothing();
}

#[test]
fn a_program_with_an_invalid_handshake_is_disconnected() {
    let guest = Guest::new(16, 4096);
    for line in ["GET / HTTP/1.1\n", "CONNECT none\n", &"C".repeat(100)] {
        let mut client = patient(UnixStream::connect(guest.path("")).unwrap());
        client.write_all(line.as_bytes()).unwrap();
        let ended = client.read(&mut [0; 8]);
        assert!(matches!(&ended, Ok(0)) || ended.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset), "{line:?}");
    }
}

#[test]
fn a_program_that_disconnects_early_leaves_no_state() {
    let mut guest = Guest::new(16, 4096);
    let client = guest.call(7);
    let ports = (7, guest.receive().0.src_port);
    drop(client);
    guest.expect(ports, op::RST);
    guest.send(ports, op::RESPONSE);
    guest.expect(ports, op::RST);
    // A program that disconnects during its handshake.
    drop(guest.call(8));
    let (request, _) = guest.receive();
    guest.send((8, request.src_port), op::RESPONSE);
    guest.expect((8, request.src_port), op::RST);
}

#[test]
fn a_port_without_a_listener_is_refused() {
    let mut guest = Guest::new(16, 4096);
    guest.send(PORTS, op::REQUEST);
    guest.expect(PORTS, op::RST);
    // Nor a stale socket, whose program has exited.
    drop(guest.serve(PORTS.1));
    guest.send(PORTS, op::REQUEST);
    guest.expect(PORTS, op::RST);
}

#[test]
fn packets_without_a_connection_are_reset_except_resets() {
    let mut guest = Guest::new(16, 4096);
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 8, u16::MAX] {
        guest.send(PORTS, op);
        guest.expect(PORTS, op::RST);
    }
    guest.send(PORTS, op::RST);
    guest.send_raw(Header { dst_cid: 9, ..packet(PORTS, op::RST) }, &[]);
    guest.expect_nothing();
}

#[test]
fn only_streams_between_this_guest_and_the_host_are_supported() {
    let (mut guest, mut stream) = Guest::connected();
    for wrong in [
        Header { kind: 2, ..packet(PORTS, op::REQUEST) },
        Header { kind: 0, ..data(1) },
        Header { dst_cid: CID, ..data(1) },
        Header { dst_cid: HOST_CID | 1 << 32, ..packet((1, 52), op::REQUEST) },
    ] {
        guest.send_raw(wrong, b"x");
        guest.expect((wrong.src_port, PORTS.1), op::RST);
    }
    guest.send_raw(Header { src_cid: CID + 1, ..data(1) }, b"x");
    guest.expect_nothing();
    // None of these belonged to this connection.
    guest.send_raw(data(2), b"ok");
    assert_eq!(read(&mut stream, 2), b"ok");
}

#[test]
fn a_guest_can_receive_after_shutting_down_sending() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(data(3), b"end");
    guest.send_raw(shutdown(SHUTDOWN_SEND), &[]);
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"end");
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(PORTS, op::RW).1, b"answer");
    drop(stream);
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_program_can_receive_after_shutting_down_sending() {
    let (mut guest, mut stream) = Guest::connected();
    stream.write_all(b"end").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(PORTS, op::RW).1, b"end");
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    guest.send_raw(data(6), b"answer");
    assert_eq!(read(&mut stream, 6), b"answer");
    guest.expect_nothing();
}

#[test]
fn a_guest_can_send_after_shutting_down_receiving() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(shutdown(SHUTDOWN_RECEIVE), &[]);
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_SEND);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.send_raw(data(5), b"still");
    assert_eq!(read(&mut stream, 5), b"still");
}

#[test]
fn a_program_can_send_after_shutting_down_receiving() {
    let (mut guest, mut stream) = Guest::connected();
    stream.shutdown(Shutdown::Read).unwrap();
    guest.send_raw(data(4), b"lost");
    assert_eq!(guest.expect(PORTS, op::SHUTDOWN).0.flags, SHUTDOWN_RECEIVE);
    stream.write_all(b"still").unwrap();
    let (header, data) = guest.expect(PORTS, op::RW);
    assert_eq!((&*data, header.fwd_cnt), (&b"still"[..], 4), "what nobody reads takes no room");
}

#[test]
fn a_guest_can_reuse_the_ports_of_a_closed_connection() {
    let mut guest = Guest::new(16, 4096);
    let listener = guest.serve(PORTS.1);
    for word in [b"first", b"again"] {
        let mut stream = guest.connect(PORTS, &listener);
        guest.send_raw(data(5), word);
        guest.send_raw(shutdown(SHUTDOWN_BOTH), &[]);
        guest.expect(PORTS, op::RST);
        assert_eq!(read(&mut stream, 5), word);
        assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
    }
    guest.send_raw(data(1), b"x");
    guest.expect(PORTS, op::RST);
}

#[test]
fn data_sent_before_a_program_closed_is_delivered() {
    let (mut guest, mut stream) = Guest::connected();
    let sent = bytes(1, 100_000);
    stream.write_all(&sent).unwrap();
    drop(stream);
    let mut received = Vec::new();
    let flags = loop {
        let (header, data) = guest.receive();
        match header.op {
            op::RW => received.extend(data),
            op::SHUTDOWN if header.flags != SHUTDOWN_RECEIVE => break header.flags,
            _ => {}
        }
    };
    assert!(received == sent, "{} of {} bytes", received.len(), sent.len());
    assert_eq!(flags, SHUTDOWN_BOTH);
    guest.send(PORTS, op::RST);
    guest.send(PORTS, op::CREDIT_REQUEST);
    guest.expect(PORTS, op::RST);
}
