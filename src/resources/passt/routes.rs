//! The host's default routes, which passt depends on.

use std::fs;
use std::sync::OnceLock;

/// Which default routes a host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Routes {
    /// Whether there is one for IPv4.
    pub ipv4: bool,
    /// Whether there is one for IPv6, which passt then provides to the guest as well.
    pub ipv6: bool,
}

impl Routes {
    /// The host's routes when this process first asked. The guest's addresses and passt's arguments depend on them, and must
    /// not differ.
    pub fn at_start() -> Routes {
        static AT_START: OnceLock<Routes> = OnceLock::new();
        *AT_START.get_or_init(Routes::of_host)
    }

    /// The host's routes now.
    pub fn of_host() -> Routes {
        let read = |path| fs::read_to_string(path).unwrap_or_default();
        Routes { ipv4: has_ipv4(&read("/proc/net/route")), ipv6: has_ipv6(&read("/proc/net/ipv6_route")) }
    }

    /// Whether there is any, without which passt does not start.
    pub fn is_any(self) -> bool {
        self.ipv4 || self.ipv6
    }
}

fn has_ipv4(table: &str) -> bool {
    // Interface, destination, gateway, flags, …, and the mask in the eighth column.
    table.lines().any(|line| {
        let mut words = line.split_whitespace().skip(1);
        words.next() == Some("00000000") && words.nth(5) == Some("00000000")
    })
}

fn has_ipv6(table: &str) -> bool {
    // Destination, prefix length, …, interface; an unreachable default route is on `lo`.
    table.lines().any(|line| {
        let mut words = line.split_whitespace();
        let to_all = words.next().is_some_and(|to| to.bytes().all(|digit| digit == b'0')) && words.next() == Some("00");
        to_all && words.next_back().is_some_and(|interface| interface != "lo")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_default_route_is_one_to_every_address_and_not_on_lo() {
        const HEAD: &str = "Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT\n";
        let ipv4 = |to, mask| has_ipv4(&format!("{HEAD}eth0 {to} 0100A8C0 0003 0 0 0 {mask} 0 0 0\n"));
        assert!(ipv4("00000000", "00000000"));
        assert!(!ipv4("0000A8C0", "00FFFFFF") && !ipv4("00000000", "00000080") && !has_ipv4(HEAD));
        let zero = "0".repeat(32);
        let ipv6 = |to: &str, prefix, interface| {
            has_ipv6(&format!("{to} {prefix} {zero} 00 {zero} 00000400 00000001 00000000 00000003 {interface}\n"))
        };
        assert!(ipv6(&zero, "00", "eth0"));
        assert!(!ipv6(&zero, "00", "lo") && !ipv6(&zero, "7f", "eth0") && !has_ipv6(""));
        assert!(!ipv6(&format!("fd{}", &zero[2..]), "00", "eth0"));
    }
}
