//! Ports of the host that lead to a machine on a shared network: rules of nftables in the network's own table, which go with the
//! machine.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::OwnedFd;

use anyhow::{Result, bail, ensure};

use super::bridge::{Bridge, PREFIX};
use super::firewall::listed;
use super::ports::{self, Turn};
use super::programs::{is_missing, run};
use crate::config::PortForward;

/// Chains of the network's table: for packets from elsewhere, for those of the host itself, and for their way back.
const CHAINS: [(&str, &str); 3] = [
    ("published", "type nat hook prerouting priority dstnat"),
    ("published-local", "type nat hook output priority -100"),
    ("published-back", "type nat hook postrouting priority srcnat"),
];

/// Ports that are taken on the host, so that no other program gets connections that are the machine's.
pub type Reserved = Vec<OwnedFd>;

/// Publishes `ports` of the machine with this address. The result keeps them from others.
pub fn open(bridge: &Bridge, address: Ipv4Addr, ports: &[PortForward]) -> Result<Reserved> {
    ensure!(!bridge.internal, "network {} is internal: no port of its machines can be published", bridge.name);
    let _turn = Turn::take(ports);
    ports.iter().try_for_each(ports::check_free)?;
    let reserved = ports.iter().map(ports::reserve).collect::<Result<Vec<Reserved>>>()?;
    let rules = rules(bridge, address, ports)?;
    // The host's own connections come from a loopback address, which is otherwise not routed.
    let _ = std::fs::write(format!("/proc/sys/net/ipv4/conf/{}/route_localnet", bridge.interface()), "1");
    run("nft", &[&rules]).map_err(|error| match is_missing(&error) {
        true => error.context("ports on networks need nftables: run `sudo apt-get install nftables`"),
        false => error.context("publish the ports"),
    })?;
    Ok(reserved.into_iter().flatten().collect())
}

/// Removes what [`open`] has made for the machine with this address from the table of the network.
pub fn close(table: &str, address: Ipv4Addr) {
    for object in listed(&format!("table ip {table}")) {
        let rule = &object["rule"];
        if rule["comment"] != address.to_string() {
            continue;
        }
        if let Some(chain) = rule["chain"].as_str() {
            let _ = run("nft", &["delete", "rule", "ip", table, chain, "handle", &rule["handle"].to_string()]);
        }
    }
}

/// The commands for nft.
fn rules(bridge: &Bridge, address: Ipv4Addr, ports: &[PortForward]) -> Result<String> {
    let table = bridge.interface();
    let mut text = String::new();
    for (chain, kind) in CHAINS {
        text += &format!("add chain ip {table} {chain} {{ {kind}; }}\n");
    }
    let comment = format!("comment \"{address}\"");
    for port in ports {
        let to = match port.host_ip {
            None => "fib daddr type local".to_owned(),
            Some(IpAddr::V4(ip)) => format!("ip daddr {ip}"),
            Some(ip) => bail!("cannot publish a port on {ip}: networks have IPv4 addresses only"),
        };
        let destination = destination(address, port);
        for (chain, _) in CHAINS.iter().take(2) {
            let range = range(port.host_port, port.count);
            text +=
                &format!("add rule ip {table} {chain} {to} {} dport {range} {destination} {comment}\n", port.protocol);
        }
    }
    let subnet = format!("{}/{PREFIX}", bridge.subnet);
    for from in ["127.0.0.0/8", &subnet] {
        text += &format!(
            "add rule ip {table} published-back ip saddr {from} ip daddr {address} ct status dnat masquerade {comment}\n"
        );
    }
    Ok(text)
}

fn range(first: u16, count: u16) -> String {
    match count {
        1 => first.to_string(),
        _ => format!("{first}-{}", first.saturating_add(count - 1)),
    }
}

fn destination(address: Ipv4Addr, port: &PortForward) -> String {
    if port.host_port == port.guest_port {
        return format!("dnat to {address}");
    }
    if port.count == 1 {
        return format!("dnat to {address}:{}", port.guest_port);
    }
    let pair = |step| format!("{} : {}", port.host_port.saturating_add(step), port.guest_port.saturating_add(step));
    let pairs: Vec<String> = (0..port.count).map(pair).collect();
    format!("dnat to {address} : {} dport map {{ {} }}", port.protocol, pairs.join(", "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
    use std::time::Duration;

    use super::*;
    use crate::resources::bridge::tests::alone;
    use crate::resources::bridge::{create_in, remove_in};
    use crate::resources::firewall::tests::{elsewhere, shell};

    const TIMEOUT: Duration = Duration::from_secs(3);
    const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 86, 7, 9);

    #[test]
    fn a_published_port_leads_to_the_machine_until_it_is_closed() {
        alone(|base| {
            let bridge = create_in(base, "web", Some(Ipv4Addr::new(10, 86, 7, 0)), false, BTreeMap::new()).unwrap();
            let (done, is_done) = std::sync::mpsc::channel::<()>();
            let (listening, is_listening) = std::sync::mpsc::channel();
            std::thread::scope(|scope| {
                let gateway = bridge.gateway();
                let set_up = format!("ip addr add {MACHINE}/24 dev eth0; ip route add default via {gateway}");
                let machine = elsewhere(scope, "port", set_up, move || {
                    let tcp = TcpListener::bind((MACHINE, 80)).unwrap();
                    let udp = UdpSocket::bind((MACHINE, 53)).unwrap();
                    udp.set_read_timeout(Some(TIMEOUT)).unwrap();
                    listening.send(()).unwrap();
                    is_done.recv().unwrap();
                    tcp.set_nonblocking(true).unwrap();
                    (std::iter::from_fn(|| tcp.accept().ok()).count(), udp.recv(&mut [0; 9]).is_ok())
                });
                shell("ip link set port master husk-web up");
                is_listening.recv().unwrap();
                let ports = ["8080:80", "8053:53/udp", "9000-9001:79-80"].map(|text| text.parse().unwrap());
                let reserved = open(&bridge, MACHINE, &ports).unwrap();
                let at = |ip: [u8; 4], port: u16| SocketAddr::from((ip, port));
                let reaches = |address| TcpStream::connect_timeout(&address, TIMEOUT).is_ok();
                assert!(reaches(at([127, 0, 0, 1], 8080)) && reaches(at(gateway.octets(), 8080)));
                assert!(reaches(at([127, 0, 0, 1], 9001)));
                UdpSocket::bind("127.0.0.1:0").unwrap().send_to(b"x", "127.0.0.1:8053").unwrap();
                assert!(open(&bridge, MACHINE, &ports[..1]).unwrap_err().to_string().contains("already in use"));
                done.send(()).unwrap();
                assert_eq!(machine.join().unwrap(), (3, true));
                drop(reserved);
                close("husk-web", MACHINE);
                assert!(!reaches(at([127, 0, 0, 1], 8080)));
            });
            remove_in(base, "web").unwrap();
        });
    }

    #[test]
    fn what_cannot_be_published_is_refused() {
        let mut bridge =
            Bridge { name: "web".into(), subnet: Ipv4Addr::new(10, 86, 7, 0), internal: true, labels: BTreeMap::new() };
        let refusal = open(&bridge, MACHINE, &["8080:80".parse().unwrap()]).unwrap_err().to_string();
        assert!(refusal.contains("internal"), "{refusal}");
        bridge.internal = false;
        let refusal = rules(&bridge, MACHINE, &["[::1]:8080:80".parse().unwrap()]).unwrap_err().to_string();
        assert!(refusal.contains("IPv4"), "{refusal}");
        let text = rules(&bridge, MACHINE, &["127.0.0.1:8080:80".parse().unwrap()]).unwrap();
        assert!(text.contains("ip daddr 127.0.0.1 tcp dport 8080 dnat to 10.86.7.9:80 comment"), "{text}");
    }
}
