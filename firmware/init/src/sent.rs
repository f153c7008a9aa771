//! What a stream has sent last, to be sent again when its connection is lost with what was on its way.

use std::collections::VecDeque;

use husk_protocol::{IN_FLIGHT_BYTES_MAX, POSITION_BYTES};

/// The end of what was sent, as much as can be on its way.
#[derive(Default)]
pub struct Sent {
    last: VecDeque<u8>,
    /// The number of bytes of the stream that were sent, including those before `last`.
    total: u64,
    /// How much of a position is still to be sent.
    position_left: usize,
}

impl Sent {
    /// Notes that `bytes` were sent, beginning with what is left of a position.
    pub fn note(&mut self, bytes: &[u8]) {
        let position = self.position_left.min(bytes.len());
        self.position_left -= position;
        let bytes = bytes.get(position..).unwrap_or_default();
        self.total += bytes.len() as u64;
        let kept = bytes.get(bytes.len().saturating_sub(IN_FLIGHT_BYTES_MAX)..).unwrap_or_default();
        let excess = (self.last.len() + kept.len()).saturating_sub(IN_FLIGHT_BYTES_MAX);
        self.last.drain(..excess);
        self.last.extend(kept);
    }

    /// What another connection sends: the position in the stream where it begins, and what may have been lost from there on. In
    /// `unsent`, which follows, what is left of the position of the connection before is not part of the stream.
    pub fn again(&mut self, unsent: &[u8]) -> Vec<u8> {
        self.total -= self.last.len() as u64;
        let rest = unsent.get(self.position_left..).unwrap_or_default();
        self.position_left = POSITION_BYTES;
        let (front, back) = self.last.as_slices();
        let again = [&self.total.to_le_bytes(), front, back, rest].concat();
        self.last.clear();
        again
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the host knows after `connection`, when it had `before`.
    fn received(mut before: Vec<u8>, connection: &[u8]) -> Vec<u8> {
        let Some((position, bytes)) = connection.split_first_chunk() else { return before };
        let known = before.len() - usize::try_from(u64::from_le_bytes(*position)).unwrap();
        before.extend(bytes.get(known..).unwrap_or_default());
        before
    }

    #[test]
    fn a_stream_arrives_whole_however_often_its_connection_is_lost() {
        let mut state = 88_172_645_463_325_252_u64;
        let mut random = |bound: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            usize::try_from(state >> 11).unwrap() % bound
        };
        let (mut written, mut unsent, mut sent, mut known) = (Vec::new(), Vec::new(), Sent::default(), Vec::new());
        // The first connection begins without a position.
        let mut connection = 0_u64.to_le_bytes().to_vec();
        for _ in 0..100 {
            for _ in 0..random(20) {
                if unsent.is_empty() {
                    unsent = (0..random(64 << 10)).map(|_| u8::try_from(random(256)).unwrap()).collect();
                    written.extend(&unsent);
                }
                let part: Vec<u8> = unsent.drain(..random(unsent.len() + 1)).collect();
                sent.note(&part);
                connection.extend(part);
            }
            let on_its_way = random(IN_FLIGHT_BYTES_MAX).min(connection.len());
            connection.truncate(connection.len() - on_its_way);
            known = received(known, &connection);
            assert!(known == written[..known.len()]);
            (unsent, connection) = (sent.again(&unsent), Vec::new());
        }
        connection.extend(&unsent);
        assert!(received(known, &connection) == written);
    }
}
