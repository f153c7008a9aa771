//! The host's DNS configuration, as far as a guest can use it.

use std::fs;
use std::net::IpAddr;

/// The resolver configuration.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The upstream servers of systemd-resolved, which itself can be reached only from the host.
const BEHIND_SYSTEMD: &str = "/run/systemd/resolve/resolv.conf";
/// Resolvers ignore further search domains.
const SEARCH_MAX: usize = 32;
/// More than there are defined options.
const OPTIONS_MAX: usize = 32;

/// DNS servers, best first, and search domains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Resolver {
    /// The servers, none of which is the host itself.
    pub servers: Vec<IpAddr>,
    /// Search domains.
    pub search: Vec<String>,
    /// Options, such as `ndots:5`.
    pub options: Vec<String>,
}

/// The current configuration of the host.
pub fn of_host() -> Resolver {
    let read = |path| parse(&fs::read_to_string(path).unwrap_or_default());
    let first = read(RESOLV_CONF);
    if first.servers.is_empty() { Resolver { servers: read(BEHIND_SYSTEMD).servers, ..first } } else { first }
}

/// Parses resolv.conf(5). Servers on the host itself or with an interface scope are omitted.
fn parse(text: &str) -> Resolver {
    let mut found = Resolver::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => {
                let server = words.next().and_then(|word| word.parse::<IpAddr>().ok());
                found.servers.extend(server.filter(|ip| !ip.is_loopback() && !ip.is_unspecified()));
            }
            Some("search" | "domain") => found.search = words.take(SEARCH_MAX).map(str::to_owned).collect(),
            // Options accumulate over several lines.
            Some("options") => found.options.extend(words.map(str::to_owned)),
            _ => {}
        }
    }
    found.options.truncate(OPTIONS_MAX);
    found
}

impl Resolver {
    /// The content of a guest's /etc/resolv.conf.
    pub fn resolv_conf(&self) -> Vec<u8> {
        let mut text = String::new();
        if !self.search.is_empty() {
            text += &format!("search {}\n", self.search.join(" "));
        }
        if !self.options.is_empty() {
            text += &format!("options {}\n", self.options.join(" "));
        }
        for server in &self.servers {
            text += &format!("nameserver {server}\n");
        }
        text.into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreachable_servers_are_omitted_and_options_kept() {
        let text = "# a word\nnameserver 127.0.0.53\nnameserver 192.0.2.1\nnameserver ::1\nnameserver fe80::1%eth0\n\
            nameserver\t2001:db8::53\nsearch one.example\nsearch a.example b.example\nnameserver x\n\
            options edns0\noptions ndots:5 timeout:1\n";
        let resolver = parse(text);
        assert_eq!(resolver.servers, ["192.0.2.1", "2001:db8::53"].map(|s| s.parse::<IpAddr>().unwrap()));
        let written = String::from_utf8(resolver.resolv_conf()).unwrap();
        let (search, options) = ("search a.example b.example", "options edns0 ndots:5 timeout:1");
        assert_eq!(written, format!("{search}\n{options}\nnameserver 192.0.2.1\nnameserver 2001:db8::53\n"));
        assert_eq!(parse(&written), resolver);
    }
}
