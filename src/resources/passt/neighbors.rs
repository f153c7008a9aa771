//! ARP and neighbor discovery frames. They find out whether passt responds, and tell a guest the link-layer address of its
//! gateways before passt can, so that its first packets do not time out while passt starts on a busy host: a guest that
//! asks three times in vain gives up.

use std::net::Ipv4Addr;

use super::{DNS, GATEWAY, GATEWAY_MAC, GATEWAY_V6, GUEST};
use crate::config::MacAddress;

const GATEWAY_BYTES: [u8; 6] = GATEWAY_MAC.0;
/// ARP frames for IPv4 on Ethernet (RFC 826), from the EtherType to the operation.
const ARP_REQUEST: [u8; 10] = [8, 6, 0, 1, 8, 0, 6, 4, 0, 1];
const ARP_REPLY: [u8; 10] = [8, 6, 0, 1, 8, 0, 6, 4, 0, 2];
const BROADCAST: [u8; 6] = [0xff; 6];
/// The addresses of all nodes of a link.
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
const ALL_NODES: [u8; 16] = [0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// The length of a neighbor advertisement with one option.
const ADVERTISEMENT_BYTES: u8 = 32;
const ICMPV6: u8 = 58;

/// Frames for the guest with the address `mac`, in the socket's framing. Guests ignore those about addresses that they
/// are not looking for.
pub(super) fn announcements(mac: MacAddress) -> Vec<u8> {
    let frames = [arp_reply(GATEWAY, mac), arp_reply(DNS, mac), advertisement()];
    frames.iter().flat_map(|frame| framed(frame)).collect()
}

/// An ARP request of the guest for the gateway's address, in the socket's framing. passt replies after it has opened all
/// ports that it can.
pub(super) fn arp_request(mac: MacAddress) -> Vec<u8> {
    let addresses = [&mac.0[..], &GUEST.octets(), &[0; 6], &GATEWAY.octets()].concat();
    framed(&[&BROADCAST[..], &mac.0, &ARP_REQUEST, &addresses].concat())
}

/// A frame after its length, as in passt's socket.
fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

fn arp_reply(address: Ipv4Addr, to: MacAddress) -> Vec<u8> {
    let sender = [&GATEWAY_BYTES[..], &address.octets()].concat();
    [&to.0[..], &GATEWAY_BYTES, &ARP_REPLY, &sender, &to.0, &GUEST.octets()].concat()
}

/// An unsolicited neighbor advertisement of the IPv6 gateway (RFC 4861).
fn advertisement() -> Vec<u8> {
    let gateway = GATEWAY_V6.octets();
    // The type, a router that overrides what was known, its address, and the option with its link-layer address.
    let begin = [136, 0, 0, 0, 0xa0, 0, 0, 0];
    let mut message = [&begin[..], &gateway, &[2, 1], &GATEWAY_BYTES].concat();
    let pseudo_header = [&gateway[..], &ALL_NODES, &[0, 0, 0, ADVERTISEMENT_BYTES, 0, 0, 0, ICMPV6]].concat();
    let sum = checksum(&[&pseudo_header[..], &message].concat());
    message[2..4].copy_from_slice(&sum.to_be_bytes());
    let header = [0x60, 0, 0, 0, 0, ADVERTISEMENT_BYTES, ICMPV6, 255];
    [&ALL_NODES_MAC[..], &GATEWAY_BYTES, &[0x86, 0xdd], &header, &gateway, &ALL_NODES, &message].concat()
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.as_chunks::<2>().0.iter();
    let sum: u32 = words.map(|word| u32::from(u16::from_be_bytes(*word))).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_advertisement_has_a_valid_length_and_checksum() {
        let frame = advertisement();
        let packet = &frame[14..];
        assert_eq!(packet.len(), 40 + usize::from(ADVERTISEMENT_BYTES));
        let pseudo_header = [&packet[8..40], &[0, 0, 0, ADVERTISEMENT_BYTES, 0, 0, 0, ICMPV6]].concat();
        assert_eq!(checksum(&[&pseudo_header[..], &packet[40..]].concat()), 0);
        assert_eq!(checksum(&[0, 1, 0xf2, 3, 0xf4, 0xf5, 0xf6, 0xf7]), !0xddf2, "the example of RFC 1071");
    }
}
