//! Recognizes repeated attempts to open a TCP connection, for a peer that must not see them.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use super::unsolicited::{ETHERNET_BYTES, IPV4, IPV6, IPV6_BYTES};

/// The longest frame that may be an attempt: a SYN has no data.
pub const ATTEMPT_BYTES_MAX: u64 = 128;

/// The number of attempts that are remembered. If a guest makes more within [`LIFETIME`], the oldest ones are forgotten, and
/// a repetition of theirs passes.
const ATTEMPTS_MAX: usize = 1024;
/// How long an attempt is remembered: as long as passt waits for the other side (SYN_TIMEOUT in its tcp.c).
const LIFETIME: Duration = Duration::from_secs(10);
/// The size of an IPv4 header without options.
const IPV4_BYTES: usize = 20;
/// The version and length of such a header.
const IPV4_BEGIN: u8 = 0x45;
const TCP: u8 = 6;
// Flags of a TCP header.
const SYN: u8 = 0x02;
const FIN_RST_ACK: u8 = 0x15;

/// An attempt to open a TCP connection. All frames of one attempt are equal. Two attempts between the same ports differ in
/// the initial sequence number, which follows a clock (RFC 9293 §3.4.1), even if the first one was reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// From and to, with zeroes after IPv4 addresses.
    addresses: [u8; 32],
    /// The ports and the initial sequence number.
    numbers: [u8; 8],
}

impl Attempt {
    /// The attempt that the frame beginning with `front` belongs to, if it is one.
    pub fn of(front: &[u8]) -> Option<Attempt> {
        let (ethernet, packet) = front.split_first_chunk::<ETHERNET_BYTES>()?;
        let (protocol, from_and_to, segment) = match *ethernet.last_chunk()? {
            IPV4 if packet.first() == Some(&IPV4_BEGIN) => {
                let (header, segment) = packet.split_first_chunk::<IPV4_BYTES>()?;
                (header[9], &header[12..], segment)
            }
            IPV6 => {
                let (header, segment) = packet.split_first_chunk::<IPV6_BYTES>()?;
                (header[6], &header[8..], segment)
            }
            _ => return None,
        };
        // Ports, sequence and acknowledgment numbers, offset, flags.
        let (segment, _) = segment.split_first_chunk::<14>()?;
        if protocol != TCP || segment[13] & (SYN | FIN_RST_ACK) != SYN {
            return None;
        }
        let mut addresses = [0; 32];
        addresses.get_mut(..from_and_to.len())?.copy_from_slice(from_and_to);
        Some(Attempt { addresses, numbers: *segment.first_chunk()? })
    }
}

/// Recent attempts.
#[derive(Default)]
pub struct Attempts(VecDeque<(Attempt, Instant)>);

impl Attempts {
    /// Whether `attempt` was noted recently.
    pub fn has(&self, attempt: Attempt) -> bool {
        self.0.iter().any(|(other, noted)| *other == attempt && noted.elapsed() < LIFETIME)
    }

    /// Notes an attempt, and forgets those that are no longer recent, and the oldest one if there are many.
    pub fn note(&mut self, attempt: Attempt) {
        self.note_at(attempt, Instant::now());
    }

    fn note_at(&mut self, attempt: Attempt, now: Instant) {
        while self.0.len() == ATTEMPTS_MAX || self.0.front().is_some_and(|(_, noted)| now >= *noted + LIFETIME) {
            self.0.pop_front();
        }
        self.0.push_back((attempt, now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A TCP segment from port 1 with this sequence number and these flags.
    fn frame(is_ipv6: bool, number: u16, flags: u8) -> Vec<u8> {
        let mut ip = vec![0; if is_ipv6 { IPV6_BYTES } else { IPV4_BYTES }];
        ip[0] = if is_ipv6 { 0x60 } else { IPV4_BEGIN };
        ip[if is_ipv6 { 6 } else { 9 }] = TCP;
        ip[if is_ipv6 { 8 } else { 12 }..].fill(9);
        let [high, low] = number.to_be_bytes();
        let segment = [0, 1, 0, 80, 0, 0, high, low, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
        [&[2; 12][..], if is_ipv6 { &IPV6 } else { &IPV4 }, &ip, &segment].concat()
    }

    #[test]
    fn a_repeated_syn_is_the_same_attempt() {
        const ECN: u8 = 0xc0;
        let mut attempts = Attempts::default();
        for is_ipv6 in [false, true] {
            let of = |number, flags| Attempt::of(&frame(is_ipv6, number, flags));
            let first = of(1, SYN).unwrap();
            assert!(!attempts.has(first));
            attempts.note(first);
            // The IP header's ID, and the options, change.
            let mut again = frame(is_ipv6, 1, SYN);
            again[18] = 7;
            assert!(Attempt::of(&again).is_some_and(|again| attempts.has(again)));
            assert!(!attempts.has(of(2, SYN | ECN).unwrap()), "another connection");
            for flags in [SYN | 0x10, SYN | 1, SYN | 4, 0x10, 0] {
                assert_eq!(of(1, flags), None, "{flags:#x}");
            }
        }
    }

    #[test]
    fn a_thousand_parallel_attempts_are_remembered_and_no_more() {
        let attempt = |number| Attempt::of(&frame(true, number, SYN)).unwrap();
        let mut attempts = Attempts::default();
        (0..1024).for_each(|number| attempts.note(attempt(number)));
        assert!((0..1024).all(|number| attempts.has(attempt(number))));
        attempts.note(attempt(1024));
        assert!(!attempts.has(attempt(0)) && attempts.has(attempt(1)), "the oldest one is forgotten");
        let later = Instant::now() + LIFETIME;
        attempts.note_at(attempt(1025), later);
        assert_eq!(attempts.0.len(), 1, "old ones are forgotten");
    }

    #[test]
    fn what_is_no_whole_header_is_no_attempt() {
        for frame in [frame(false, 1, SYN), frame(true, 1, SYN)] {
            let whole = frame.len() - 6;
            assert!(whole <= super::super::FRONT_BYTES && Attempt::of(&frame[..whole]).is_some());
            assert!((0..whole).all(|len| Attempt::of(&frame[..len]).is_none()));
        }
    }
}
