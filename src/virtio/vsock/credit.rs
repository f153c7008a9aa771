//! How much data each side of a connection may send (virtio 1.2 §5.10.6.3). All counts are modulo 2^32.

/// The most room for data from the guest that its reader has not taken yet.
pub const BUFFER_BYTES: u32 = 256 << 10;
/// The guest is told of room when so large a part of all is free that it does not know of.
const UPDATE_PART: u32 = 4;
/// Counts that are further apart than this are the wrong way round.
const SPAN_MAX: u32 = i32::MAX as u32;

/// The guest's word against its deeds.
#[derive(Debug, PartialEq, Eq)]
pub struct CreditViolation;

/// Both directions of one connection.
#[derive(Debug, Default)]
pub struct Credit {
    /// Room for data from the guest. It is told of it and keeps to it.
    buffer_bytes: u32,
    /// From the guest: taken, passed on to the reader, and passed on as far as the guest knows.
    received: u32,
    forwarded: u32,
    told: u32,
    /// To the guest: sent, and what the guest says of what it took and of its room.
    sent: u32,
    peer_forwarded: u32,
    peer_room: u32,
}

impl Credit {
    /// Nothing is sent yet; the guest may send `buffer_bytes`.
    pub fn new(buffer_bytes: u32) -> Credit {
        Credit { buffer_bytes, ..Credit::default() }
    }

    /// How much room the guest is told that there is.
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// The guest sends `len_bytes`: a lie where that is more than it was told that there is room for.
    pub fn receive(&mut self, len_bytes: u32) -> Result<(), CreditViolation> {
        let room = self.buffer_bytes.saturating_sub(self.received.wrapping_sub(self.told));
        if len_bytes > room {
            return Err(CreditViolation);
        }
        self.received = self.received.wrapping_add(len_bytes);
        Ok(())
    }

    /// Of what was received, `len_bytes` more have left our buffer.
    pub fn forward(&mut self, len_bytes: u32) {
        self.forwarded = self.forwarded.wrapping_add(len_bytes);
    }

    /// What the next packet tells the guest: how much has left our buffer so far.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told
    }

    /// Whether there is so much room that the guest does not know of that it is to be told without being asked.
    pub fn is_update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= self.buffer_bytes / UPDATE_PART
    }

    /// The guest tells of its room: a lie where it says to have taken what was never sent.
    ///
    /// Packets that overtook each other in the guest tell old counts, which change nothing.
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

    /// How many bytes may be sent to the guest.
    pub fn room_bytes(&self) -> u32 {
        // A guest may take back room that it had given.
        self.peer_room.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// Counts `len_bytes` as sent; not more than [`Credit::room_bytes`].
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
        assert_eq!(credit.receive(1), Err(CreditViolation), "it has not been told yet");
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
    fn counts_go_on_beyond_four_gib() {
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
}
