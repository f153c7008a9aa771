//! Flow control of a connection by credit (virtio 1.2 §5.10.6.3). All counts are modulo 2^32.

/// The maximum buffer space for data from the guest that its reader has not taken yet.
pub const BUFFER_BYTES: u32 = 256 << 10;
// A restored machine's init sends again what may have been on its way.
const _: () = assert!(BUFFER_BYTES as usize <= husk_protocol::IN_FLIGHT_BYTES_MAX);
/// The guest is updated when this fraction of the buffer is free without its knowledge.
const UPDATE_PART: u32 = 4;
/// Counts that differ by more than this are in the wrong order.
const SPAN_MAX: u32 = i32::MAX as u32;

/// The guest exceeded its credit or sent invalid counts.
#[derive(Debug, PartialEq, Eq)]
pub struct CreditViolation;

/// The state of both directions of a connection.
#[derive(Debug, Default)]
pub struct Credit {
    /// The buffer space for data from the guest, as advertised to it.
    buffer_bytes: u32,
    /// From the guest: received, forwarded to the reader, and forwarded as known to the guest.
    received: u32,
    forwarded: u32,
    announced: u32,
    /// To the guest: sent, and the guest's counts of forwarded bytes and buffer space.
    sent: u32,
    peer_forwarded: u32,
    peer_room: u32,
}

impl Credit {
    /// The initial state; the guest may send `buffer_bytes`.
    pub fn new(buffer_bytes: u32) -> Credit {
        Credit { buffer_bytes, ..Credit::default() }
    }

    /// The advertised buffer space.
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// Records `len_bytes` sent by the guest. Fails if they exceed its credit.
    pub fn receive(&mut self, len_bytes: u32) -> Result<(), CreditViolation> {
        let room = self.buffer_bytes.saturating_sub(self.received.wrapping_sub(self.announced));
        if len_bytes > room {
            return Err(CreditViolation);
        }
        self.received = self.received.wrapping_add(len_bytes);
        Ok(())
    }

    /// Records that `len_bytes` more of the received data have left the buffer.
    pub fn forward(&mut self, len_bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(len_bytes);
    }

    /// The forwarded count for the next packet to the guest, which is then known to it.
    pub fn tell(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.announced
    }

    /// Whether enough space is free without the guest's knowledge to send an unsolicited update.
    pub fn is_update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= self.buffer_bytes / UPDATE_PART
    }

    /// Processes the guest's counts. Fails if it claims to have forwarded data that was never sent.
    ///
    /// Counts of packets that were reordered in the guest are outdated and have no effect.
    pub fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), CreditViolation> {
        if self.sent.wrapping_sub(fwd_cnt) > SPAN_MAX {
            return Err(CreditViolation);
        }
        if fwd_cnt.wrapping_sub(self.peer_forwarded) <= SPAN_MAX {
            self.peer_forwarded = fwd_cnt;
        }
        self.peer_room = buf_alloc.min(SPAN_MAX);
        Ok(())
    }

    /// The number of bytes that may be sent to the guest.
    pub fn room_bytes(&self) -> u32 {
        // A guest may reduce its buffer space.
        self.peer_room.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Records `len_bytes` as sent; at most [`Credit::room_bytes`].
    pub fn send(&mut self, len_bytes: u32) {
        self.sent = self.sent.wrapping_add(len_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_may_fill_the_buffer_and_not_a_byte_more() {
        let mut credit = Credit::new(BUFFER_BYTES);
        assert_eq!(credit.receive(BUFFER_BYTES), Ok(()));
        assert_eq!(credit.receive(1), Err(CreditViolation));
        credit.forward(10);
        assert_eq!(credit.receive(1), Err(CreditViolation), "it has not been announced yet");
        assert_eq!(credit.tell(), 10);
        assert_eq!(credit.receive(10), Ok(()));
        assert_eq!(credit.receive(1), Err(CreditViolation));
    }

    #[test]
    fn an_update_is_due_once_a_quarter_is_free_unknown_to_the_guest() {
        let mut credit = Credit::new(BUFFER_BYTES);
        credit.receive(BUFFER_BYTES).unwrap();
        credit.forward(BUFFER_BYTES / 4 - 1);
        assert!(!credit.is_update_due());
        credit.forward(1);
        assert!(credit.is_update_due());
        credit.tell();
        assert!(!credit.is_update_due());
    }

    #[test]
    fn a_guest_is_sent_what_it_has_room_for() {
        let mut credit = Credit::new(BUFFER_BYTES);
        assert_eq!(credit.room_bytes(), 0);
        credit.hear(100, 0).unwrap();
        credit.send(60);
        assert_eq!(credit.room_bytes(), 40);
        credit.hear(50, 0).unwrap();
        assert_eq!(credit.room_bytes(), 0, "it took room back");
        credit.hear(50, 60).unwrap();
        credit.hear(50, 20).unwrap();
        assert_eq!(credit.room_bytes(), 50, "an old count changes nothing");
        assert_eq!(credit.hear(50, 61), Err(CreditViolation));
        assert_eq!(credit.hear(50, u32::MAX - 5), Ok(()), "older than the first count");
        assert_eq!(credit.room_bytes(), 50);
    }

    #[test]
    fn counts_wrap_at_four_gib() {
        let mut credit = Credit::new(BUFFER_BYTES);
        let mut total: u64 = 0;
        while total < 10 << 32 {
            credit.hear(u32::MAX, total as u32).unwrap();
            let step = credit.room_bytes();
            assert_eq!(step, i32::MAX as u32);
            credit.send(step);
            assert_eq!(credit.room_bytes(), 0);
            total += u64::from(step);
        }
        for _ in 0..5 * (1 << 32) / u64::from(BUFFER_BYTES) {
            credit.receive(BUFFER_BYTES).unwrap();
            credit.forward(BUFFER_BYTES);
            credit.tell();
        }
    }

    /// The same as [`Credit`] without wrapping: counts start at 2^32, shortly before or after a multiple of it.
    struct Model {
        buffer_bytes: u64,
        received: u64,
        forwarded: u64,
        announced: u64,
        sent: u64,
        peer_forwarded: u64,
        peer_room: u64,
    }

    impl Model {
        fn new(buffer_bytes: u32, start: u64) -> (Model, Credit) {
            let [received, forwarded, announced, sent, peer_forwarded] = [start as u32; 5];
            let credit = Credit { buffer_bytes, received, forwarded, announced, sent, peer_forwarded, peer_room: 0 };
            let [received, forwarded, announced, sent, peer_forwarded] = [start; 5];
            let buffer_bytes = buffer_bytes.into();
            (Model { buffer_bytes, received, forwarded, announced, sent, peer_forwarded, peer_room: 0 }, credit)
        }

        fn room_bytes(&self) -> u64 {
            self.peer_room.saturating_sub(self.sent - self.peer_forwarded)
        }

        fn step(&mut self, credit: &mut Credit, random: &mut fastrand::Rng) {
            const SPAN: i64 = SPAN_MAX as i64;
            match random.u8(..5) {
                0 => {
                    let len = random.u64(..=self.buffer_bytes + 1);
                    let fits = self.received + len - self.announced <= self.buffer_bytes;
                    assert_eq!(credit.receive(len as u32).is_ok(), fits);
                    self.received += if fits { len } else { 0 };
                }
                1 => {
                    let len = random.u64(..=self.received - self.forwarded);
                    credit.forward(len as u32);
                    self.forwarded += len;
                }
                2 => {
                    self.announced = self.forwarded;
                    assert_eq!(credit.tell(), self.announced as u32);
                }
                3 => {
                    let near = [random.i64(-3..4), random.i64(-100_000..100_000), random.i64(-SPAN..SPAN)];
                    let claim = self.sent.wrapping_add_signed(random.choice(near).unwrap());
                    let alloc = random.u32(..) >> random.u32(..32);
                    let is_true = claim <= self.sent;
                    assert_eq!(credit.hear(alloc, claim as u32).is_ok(), is_true);
                    if is_true {
                        self.peer_forwarded = self.peer_forwarded.max(claim);
                        self.peer_room = u64::from(alloc.min(SPAN_MAX));
                    }
                }
                _ => {
                    let len = random.u64(..=self.room_bytes()) >> random.u32(..32);
                    credit.send(len as u32);
                    self.sent += len;
                }
            }
        }
    }

    #[test]
    fn counts_are_as_if_they_did_not_wrap() {
        for seed in 0..500 {
            let mut random = fastrand::Rng::with_seed(seed);
            let start = (2_u64 << 32).wrapping_add_signed(random.i64(-1_000_000..1000));
            let (mut model, mut credit) = Model::new(1 << random.u32(10..19), start);
            for _ in 0..500 {
                model.step(&mut credit, &mut random);
                assert_eq!(u64::from(credit.room_bytes()), model.room_bytes(), "seed {seed}");
                let unannounced = model.forwarded - model.announced;
                assert_eq!(credit.is_update_due(), unannounced >= model.buffer_bytes / 4, "seed {seed}");
            }
        }
    }
}
