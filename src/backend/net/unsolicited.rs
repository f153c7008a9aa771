//! Recognizes the frames that a guest sends by itself when an interface comes up, and that need no response: whether its
//! network is needed depends on all others.

/// The part of a frame that is sufficient to classify it: all headers of a TCP segment over IPv6, up to the flags.
pub const FRONT_BYTES: usize = 68;

/// The size of an Ethernet header, which ends with the EtherType.
pub(super) const ETHERNET_BYTES: usize = 14;
const ARP: [u8; 2] = [0x08, 0x06];
pub(super) const IPV4: [u8; 2] = [0x08, 0x00];
pub(super) const IPV6: [u8; 2] = [0x86, 0xdd];
/// An ARP request for an IPv4 address on Ethernet (RFC 826), up to the addresses.
const ARP_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 1];
/// The sizes of an IPv6 header, and of a hop-by-hop options header with a router alert (RFC 2711).
pub(super) const IPV6_BYTES: usize = 40;
const ROUTER_ALERT_BYTES: usize = 8;
// Protocol numbers.
const HOP_BY_HOP: u8 = 0;
const IGMP: u8 = 2;
const ICMPV6: u8 = 58;
// ICMPv6 types: multicast listener discovery (RFC 3810), neighbor discovery (RFC 4861).
const LISTENER_REPORT: u8 = 131;
const LISTENER_DONE: u8 = 132;
const NEIGHBOR_SOLICITATION: u8 = 135;
const NEIGHBOR_ADVERTISEMENT: u8 = 136;
const LISTENER_REPORT_V2: u8 = 143;

/// Whether somebody in the guest may wait for a response to the frame that begins with `front`, on a network of IPv4
/// and possibly IPv6. That excludes reports of multicast groups, announcements and probes of the guest's own addresses,
/// and protocols other than IP. A router solicitation is a question: a guest that configures itself needs the router.
pub fn expects_response(front: &[u8], has_ipv6: bool) -> bool {
    let Some((ethernet, packet)) = front.split_first_chunk::<ETHERNET_BYTES>() else { return false };
    match ethernet.last_chunk() {
        Some(&ARP) => is_arp_question(packet),
        Some(&IPV4) => packet.get(9).is_some_and(|protocol| *protocol != IGMP),
        Some(&IPV6) => has_ipv6 && is_ipv6_question(packet),
        _ => false,
    }
}

/// Whether it is a request that is neither a probe (RFC 5227), from no address, nor an announcement, for the own one.
fn is_arp_question(packet: &[u8]) -> bool {
    let (Some(sender), Some(target)) = (packet.get(14..18), packet.get(24..28)) else { return false };
    packet.starts_with(&ARP_REQUEST) && sender != [0; 4] && sender != target
}

fn is_ipv6_question(packet: &[u8]) -> bool {
    let Some((header, mut payload)) = packet.split_first_chunk::<IPV6_BYTES>() else { return false };
    let (mut protocol, source) = (header[6], &header[8..24]);
    if protocol == HOP_BY_HOP
        && let Some((&[next, 0, ..], rest)) = payload.split_first_chunk::<ROUTER_ALERT_BYTES>()
    {
        (protocol, payload) = (next, rest);
    }
    if protocol != ICMPV6 {
        return true;
    }
    match payload.first() {
        Some(&(LISTENER_REPORT | LISTENER_DONE | LISTENER_REPORT_V2 | NEIGHBOR_ADVERTISEMENT)) => false,
        // Without a source it detects a duplicate of the guest's own address (RFC 4862).
        Some(&NEIGHBOR_SOLICITATION) => source != [0; 16],
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: [u8; 2], packet: &[u8]) -> Vec<u8> {
        [&[0xff; 6][..], &[2, 0, 0, 0, 0, 1], &kind, packet].concat()
    }

    fn arp(operation: u8, sender: [u8; 4], target: [u8; 4]) -> Vec<u8> {
        let begin = [0, 1, 8, 0, 6, 4, 0, operation, 2, 0, 0, 0, 0, 1];
        frame(ARP, &[&begin[..], &sender, &[0; 6], &target].concat())
    }

    fn ipv4(protocol: u8) -> Vec<u8> {
        let mut packet = [0; 28];
        (packet[0], packet[9]) = (0x45, protocol);
        frame(IPV4, &packet)
    }

    fn ipv6(protocol: u8, source: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; IPV6_BYTES];
        (packet[0], packet[6], packet[8]) = (0x60, protocol, source);
        frame(IPV6, &[&packet, payload].concat())
    }

    #[test]
    fn what_a_kernel_sends_by_itself_expects_no_response() {
        const OWN: [u8; 4] = [10, 0, 2, 15];
        for (name, frame) in [
            ("a gratuitous ARP request", arp(1, OWN, OWN)),
            ("an ARP probe", arp(1, [0; 4], OWN)),
            ("an ARP reply", arp(2, OWN, [10, 0, 2, 2])),
            ("a report of IPv4 groups", ipv4(IGMP)),
            (
                "a report of IPv6 groups",
                ipv6(HOP_BY_HOP, 0, &[ICMPV6, 0, 5, 2, 0, 0, 1, 0, LISTENER_REPORT_V2, 0, 0, 0]),
            ),
            ("an old report of IPv6 groups", ipv6(HOP_BY_HOP, 0xfe, &[ICMPV6, 0, 5, 2, 0, 0, 1, 0, LISTENER_REPORT])),
            ("duplicate address detection", ipv6(ICMPV6, 0, &[NEIGHBOR_SOLICITATION, 0])),
            ("an unsolicited advertisement", ipv6(ICMPV6, 0xfe, &[NEIGHBOR_ADVERTISEMENT, 0])),
            ("link layer discovery", frame([0x88, 0xcc], &[0; 50])),
            ("a short frame", vec![0xff; 13]),
        ] {
            assert!(!expects_response(&frame, true), "{name}");
        }
    }

    #[test]
    fn a_request_expects_a_response() {
        const ROUTER_SOLICITATION: u8 = 133;
        let (udp, tcp) = (17, 6);
        for (name, frame) in [
            ("an ARP request", arp(1, [10, 0, 2, 15], [10, 0, 2, 2])),
            ("DHCP", ipv4(udp)),
            ("TCP", ipv4(tcp)),
            ("ping", ipv4(1)),
            ("a neighbor solicitation", ipv6(ICMPV6, 0xfd, &[NEIGHBOR_SOLICITATION, 0])),
            ("a router solicitation", ipv6(ICMPV6, 0, &[ROUTER_SOLICITATION, 0])),
            ("UDP to a port like a report's type", ipv6(udp, 0xfd, &[LISTENER_REPORT_V2, 0])),
            ("unknown options", ipv6(HOP_BY_HOP, 0xfd, &[ICMPV6, 1, 0, 0, 0, 0, 0, 0, LISTENER_REPORT_V2])),
        ] {
            assert!(expects_response(&frame, true), "{name}");
            let is_ipv6 = frame[12..14] == IPV6;
            assert_eq!(expects_response(&frame, false), !is_ipv6, "{name} on a host without IPv6");
        }
    }

    #[test]
    fn the_front_of_a_frame_is_sufficient() {
        let report = ipv6(HOP_BY_HOP, 0, &[ICMPV6, 0, 5, 2, 0, 0, 1, 0, LISTENER_REPORT_V2]);
        assert!(report.len() <= FRONT_BYTES);
        for frame in [report, arp(1, [1; 4], [2; 4]), ipv4(6)] {
            // However it is cut off.
            (0..frame.len()).for_each(|len| _ = expects_response(&frame[..len], true));
        }
    }
}
