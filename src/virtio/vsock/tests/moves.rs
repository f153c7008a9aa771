//! A guest that is moved to another device, as when a machine is restored.

use super::*;

/// The buffers of events.
const EVENTS_AT: u64 = BUFFERS + (3 << 20) / 2;
const EVENT_BYTES: u32 = TRANSPORT_RESET.len() as u32;

impl Guest {
    fn offer_events(&mut self, count: u64) {
        for at in (EVENTS_AT..).step_by(8).take(count as usize) {
            self.memory().write_slice(&[0xff; 8], GuestAddress(at)).unwrap();
            let head = self.driver.chain(EVENTS as u32, &[(at, EVENT_BYTES, WRITE)]);
            self.driver.offer(EVENTS as u32, head);
        }
        self.driver.notify(EVENTS as u32);
    }

    /// Waits for an event in the first buffer.
    #[track_caller]
    fn expect_event(&mut self) {
        assert_eq!(self.driver.used(EVENTS as u32).1, EVENT_BYTES);
        let event: [u8; 8] = self.memory().read_obj(GuestAddress(EVENTS_AT)).unwrap();
        assert_eq!(event, [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]);
    }
}

#[test]
fn a_guest_is_told_that_its_connections_are_lost_before_anything_else() {
    let (mut guest, mut lost) = Guest::connected();
    guest.offer_events(8);
    guest.driver.transport.pause();
    // Left in the ring, for a connection that no longer exists.
    let head = guest.post(data(1), 1);
    let mut guest = guest.moved();
    assert_eq!(lost.read(&mut [0; 8]).unwrap(), 0);
    let mut client = guest.call(7);
    guest.driver.transport.resume();
    guest.expect_event();
    guest.driver.transport.pause();
    guest.driver.transport.resume();
    assert_eq!((guest.driver.used_index(RX as u32), guest.driver.used_index(TX as u32)), (1, 1));
    // It has handled the event.
    guest.offer_events(1);
    assert_eq!(guest.driver.used(TX as u32), (head, 0));
    let packets = [guest.receive().0, guest.receive().0];
    let reset = packets.iter().find(|packet| packet.op == op::RST).unwrap();
    assert_eq!((reset.dst_port, reset.src_port), PORTS);
    let request = packets.iter().find(|packet| packet.op == op::REQUEST).unwrap();
    guest.send((7, request.src_port), op::RESPONSE);
    assert_eq!(read(&mut client, 3), b"OK ");
    let listener = guest.serve(PORTS.1);
    guest.connect(PORTS, &listener);
    assert_eq!(guest.driver.used_index(EVENTS as u32), 1, "it is told once");
}

#[test]
fn a_guest_is_told_after_every_move_once_it_has_a_buffer() {
    let (mut guest, _stream) = Guest::connected();
    for _ in 0..3 {
        // Moved again before it could be told.
        guest = guest.moved().moved();
        guest.driver.transport.resume();
        guest.offer_events(1);
        guest.expect_event();
    }
    guest.offer_events(1);
    guest.expect_nothing();
}

#[test]
fn a_driver_that_starts_after_a_move_has_nothing_to_be_told() {
    let (guest, _stream) = Guest::connected();
    let mut guest = guest.moved();
    guest.driver.transport.resume();
    guest.driver.start();
    guest.offer_events(8);
    guest.offer(16);
    guest.expect_nothing();
    assert_eq!(guest.driver.used_index(EVENTS as u32), 0);
}

#[test]
fn an_event_buffer_with_no_room_needs_a_reset() {
    for part in [(EVENTS_AT, 3, WRITE), (EVENTS_AT, 4, 0), (1 << 40, 4, WRITE)] {
        let mut guest = Guest::new(1, 4096).moved();
        guest.driver.transport.resume();
        let head = guest.driver.chain(EVENTS as u32, &[part]);
        guest.driver.offer(EVENTS as u32, head);
        guest.driver.notify(EVENTS as u32);
        guest.driver.wait_for_needs_reset();
    }
}
