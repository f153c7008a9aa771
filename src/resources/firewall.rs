//! The host's firewall rules for shared networks: masquerading for networks with external access, isolation for all,
//! and exceptions where the host drops forwarded packets by default, as it does with Docker.
//!
//! A packet traverses every chain of its hook: if one accepts it, another may still drop it. Therefore the network's
//! own table defines the policy, and rules are also added to each foreign chain that drops by default. Rules are added
//! and removed with nft and iptables, whichever the host has.

use std::fs;

use anyhow::{Context, Result};
use serde_json::Value;

use super::bridge::{Bridge, PREFIX};
use super::programs::{is_missing, output, run};

const FORWARD_PATH: &str = "/proc/sys/net/ipv4/ip_forward";
/// The chain that Docker reserves for users and evaluates first.
const DOCKER_USER: &str = "DOCKER-USER";

/// Packets of a network that must be accepted: the hook, and the match in the syntax of each program.
struct Passage {
    hook: &'static str,
    nft: String,
    iptables: String,
}

/// Bridges of other container and virtual machine managers, as interface patterns for iptables.
const OTHERS_BRIDGES: [&str; 6] = ["docker0", "br-+", "podman+", "cni+", "virbr+", "lxcbr+"];
/// Packets accepted even between networks: replies, and connections to published ports.
const IS_ANSWER_OR_PUBLISHED: &str = "--ctstate RELATED,ESTABLISHED,DNAT";
/// A table that keeps a host on which husk enabled forwarding from routing for its neighbors. IPv4 only, as is
/// forwarding.
const GUARD: &str = "husk-guard";
/// Kinds of interfaces that exist to be forwarded to, regardless of their creator; neighbors are on other kinds.
const FORWARDING_KINDS: [&str; 3] = ["bridge", "tun", "wireguard"];

/// Installs a network's rules: they accept its own packets, and isolate it from other networks and, if it is internal,
/// from everything else.
pub fn open(bridge: &Bridge) -> Result<()> {
    if !bridge.internal {
        forward()?;
    }
    let by_nft = match run("nft", &[&own_table(bridge)]) {
        Err(error) if is_missing(&error) => false,
        written => written.map(|()| true)?,
    };
    let by_iptables = pass_by_iptables(bridge)?;
    if !by_nft {
        // These rules precede the accept rules, so they are inserted after them.
        write_own_by_iptables(bridge).context("networks need nft or iptables: run `sudo apt-get install nftables`")?;
    }
    pass_by_nft(bridge, by_iptables)
}

/// Enables IPv4 forwarding. If it was disabled, forwarding for the host's neighbors remains blocked, the same as Docker
/// does.
fn forward() -> Result<()> {
    let did = fs::read_to_string(FORWARD_PATH).is_ok_and(|now| now.trim() == "1");
    if did {
        return Ok(());
    }
    let kinds = FORWARDING_KINDS.map(|kind| format!("\"{kind}\"")).join(", ");
    let guard = format!(
        "table ip {GUARD} {{\nchain routed {{\ntype filter hook forward priority filter\n\
         ct state established,related accept\nct status dnat accept\n\
         iifname \"husk-*\" accept\noifname \"husk-*\" accept\n\
         meta iifkind {{ {kinds} }} accept\nmeta oifkind {{ {kinds} }} accept\ndrop\n}}\n}}"
    );
    match run("nft", &[&guard]) {
        Err(error) if is_missing(&error) => iptables("-P", "filter FORWARD DROP")
            .context("networks need nft or iptables: run `sudo apt-get install nftables`")?,
        written => written?,
    }
    fs::write(FORWARD_PATH, "1").with_context(|| format!("write {FORWARD_PATH}"))
}

/// Disables forwarding again when the last network is removed, if husk enabled it. Other bridges and tunnels may depend
/// on it by now.
fn stop_forwarding(bridge: &Bridge) {
    let is_own = |line: &str| line.split_whitespace().next() == Some(&bridge.interface());
    let is_unused = |kind: &&str| {
        output("ip", &["-brief", "link", "show", "type", kind]).is_ok_and(|links| links.lines().all(is_own))
    };
    let is_guarded = run("nft", &["list", "table", "ip", GUARD]).is_ok();
    if is_guarded && FORWARDING_KINDS.iter().all(is_unused) && fs::write(FORWARD_PATH, "0").is_ok() {
        let _ = run("nft", &["delete", "table", "ip", GUARD]);
    }
}

/// Removes what [`open`] installed; missing rules are ignored.
pub fn close(bridge: &Bridge) {
    stop_forwarding(bridge);
    for family in ["ip", "inet"] {
        let _ = run("nft", &["delete", "table", family, &bridge.interface()]);
    }
    for (family, table, chain, handle) in own_passages(bridge) {
        let _ = run("nft", &["delete", "rule", &family, &table, &chain, "handle", &handle]);
    }
    let passages = passages(bridge);
    let passages = passages.iter().flat_map(|passage| {
        let chains = if passage.hook == "forward" { &["FORWARD", DOCKER_USER][..] } else { &["INPUT"] };
        chains.iter().map(|chain| format!("filter {chain} {} -j ACCEPT", passage.iptables))
    });
    let own = ["FORWARD", DOCKER_USER].map(|chain| own_rules(bridge, chain));
    for rule in passages.chain(own.into_iter().flatten()) {
        if iptables("-D", &rule).is_err_and(|error| is_missing(&error)) {
            return;
        }
    }
}

/// The network's own table for nft.
fn own_table(bridge: &Bridge) -> String {
    let interface = bridge.interface();
    if bridge.internal {
        return format!(
            "table inet {interface} {{\nchain between {{\ntype filter hook forward priority filter\n\
             iifname \"{interface}\" oifname != \"{interface}\" drop\n\
             iifname != \"{interface}\" oifname \"{interface}\" drop\n}}\n}}"
        );
    }
    let ways_out: String =
        uplinks().iter().map(|uplink| format!("iifname \"{interface}\" oifname \"{uplink}\" accept\n")).collect();
    format!(
        "table ip {interface} {{\nchain between {{\ntype filter hook forward priority filter\n\
         ct state established,related accept\nct status dnat accept\n\
         iifname \"{interface}\" oifname \"{interface}\" accept\noifname \"{interface}\" drop\n\
         {ways_out}iifname \"{interface}\" meta oifkind \"bridge\" drop\n}}\n\
         chain out {{\ntype nat hook postrouting priority srcnat\n\
         ip saddr {} oifname != \"{interface}\" masquerade\n}}\n}}",
        subnet(bridge)
    )
}

/// The same rules for iptables, each as `TABLE CHAIN WORD...`, with `chain` for forwarded packets.
fn own_rules(bridge: &Bridge, chain: &str) -> Vec<String> {
    let interface = bridge.interface();
    if bridge.internal {
        return vec![
            format!("filter {chain} -i {interface} ! -o {interface} -j DROP"),
            format!("filter {chain} ! -i {interface} -o {interface} -j DROP"),
        ];
    }
    let unless = format!("-m conntrack ! {IS_ANSWER_OR_PUBLISHED} -j DROP");
    let uplinks = uplinks();
    let is_uplink = |others: &str| match others.strip_suffix('+') {
        Some(prefix) => uplinks.iter().any(|uplink| uplink.starts_with(prefix)),
        None => uplinks.iter().any(|uplink| uplink == others),
    };
    let mut rules = vec![
        format!("nat POSTROUTING -s {} ! -o {interface} -j MASQUERADE", subnet(bridge)),
        format!("filter {chain} ! -i {interface} -o {interface} {unless}"),
    ];
    let others = OTHERS_BRIDGES.into_iter().filter(|others| !is_uplink(others));
    rules.extend(others.map(|others| format!("filter {chain} -i {interface} -o {others} {unless}")));
    rules
}

/// The host's uplink interfaces, which may be bridges on virtualization hosts.
fn uplinks() -> Vec<String> {
    let routes = fs::read_to_string("/proc/thread-self/net/route").unwrap_or_default();
    let of_default = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let is_default = words.get(1) == Some(&"00000000") && words.get(7) == Some(&"00000000");
        words.first().filter(|_| is_default).map(|name| (*name).to_owned())
    };
    routes.lines().filter_map(of_default).collect()
}

fn write_own_by_iptables(bridge: &Bridge) -> Result<()> {
    let chain = if has_docker() { DOCKER_USER } else { "FORWARD" };
    own_rules(bridge, chain).iter().try_for_each(|rule| iptables("-I", rule))
}

fn has_docker() -> bool {
    output("iptables", &["-w", "-S", DOCKER_USER]).is_ok()
}

fn subnet(bridge: &Bridge) -> String {
    format!("{}/{PREFIX}", bridge.subnet)
}

/// The packets to accept: DHCP and DNS requests; packets between machines, which are forwarded if bridges use the
/// firewall (br_netfilter); and, with external access, outgoing packets and their replies.
fn passages(bridge: &Bridge) -> Vec<Passage> {
    let interface = bridge.interface();
    let input = |(protocol, port)| Passage {
        hook: "input",
        nft: format!("iifname \"{interface}\" {protocol} dport {port}"),
        iptables: format!("-i {interface} -p {protocol} --dport {port}"),
    };
    let mut all: Vec<Passage> = [("udp", 67), ("udp", 53), ("tcp", 53)].map(input).into();
    let mut forward = |nft: String, iptables: String| all.push(Passage { hook: "forward", nft, iptables });
    if bridge.internal {
        forward(format!("iifname \"{interface}\" oifname \"{interface}\""), format!("-i {interface} -o {interface}"));
    } else {
        forward(format!("iifname \"{interface}\""), format!("-i {interface}"));
        forward(
            format!("oifname \"{interface}\" ct state established,related"),
            format!("-o {interface} -m conntrack --ctstate RELATED,ESTABLISHED"),
        );
        forward(
            format!("oifname \"{interface}\" ct status dnat"),
            format!("-o {interface} -m conntrack --ctstate DNAT"),
        );
    }
    all
}

/// Adds accept rules with iptables. Returns whether the host has an iptables firewall; if so, the network's packets are
/// accepted regardless of its default policy, now and later.
fn pass_by_iptables(bridge: &Bridge) -> Result<bool> {
    if output("iptables", &["-w", "-S", "FORWARD"]).is_err() {
        return Ok(false);
    }
    let has_docker = has_docker();
    for Passage { hook, iptables: words, .. } in passages(bridge) {
        let chain = match hook {
            "forward" if has_docker => DOCKER_USER,
            "forward" => "FORWARD",
            _ => "INPUT",
        };
        iptables("-I", &format!("filter {chain} {words} -j ACCEPT"))?;
    }
    Ok(true)
}

fn iptables(what: &str, rule: &str) -> Result<()> {
    let mut words = rule.split(' ');
    let table = words.next().unwrap_or_default();
    let arguments: Vec<&str> = ["-w", "-t", table, what].into_iter().chain(words).collect();
    run("iptables", &arguments)
}

/// Adds accept rules to nft chains that drop by default, except those of iptables if they were already handled.
fn pass_by_nft(bridge: &Bridge, by_iptables: bool) -> Result<()> {
    let passages = passages(bridge);
    let comment = format!("\"{}\"", bridge.interface());
    let ruleset = listed("ruleset");
    for chain in ruleset.iter().filter_map(|object| object.get("chain")) {
        let word = |key: &str| chain[key].as_str().unwrap_or_default();
        let (family, table) = (word("family"), word("table"));
        let is_theirs = by_iptables && family == "ip" && table == "filter";
        let refuses = word("policy") == "drop" || ends_in_refusal(&ruleset, chain);
        if !refuses || !matches!(family, "ip" | "inet") || is_theirs {
            continue;
        }
        for passage in passages.iter().filter(|passage| passage.hook == word("hook")) {
            let rule = format!("{} accept comment {comment}", passage.nft);
            run("nft", &["insert", "rule", family, table, word("name"), &rule])?;
        }
    }
    Ok(())
}

/// Whether the last rule of `chain` rejects everything else, as in firewalld's chains, whose policy is accept.
fn ends_in_refusal(ruleset: &[Value], chain: &Value) -> bool {
    let mut rules = ruleset.iter().filter_map(|object| object.get("rule"));
    let is_of_chain = |rule: &&Value| {
        (&rule["family"], &rule["table"], &rule["chain"]) == (&chain["family"], &chain["table"], &chain["name"])
    };
    let last = rules.rfind(is_of_chain).and_then(|rule| rule["expr"].as_array());
    let Some((verdict, before)) = last.and_then(|expressions| expressions.split_last()) else { return false };
    let is_any = |expression: &Value, words: [&str; 2]| words.iter().any(|word| expression.get(word).is_some());
    is_any(verdict, ["reject", "drop"]) && before.iter().all(|expression| is_any(expression, ["counter", "log"]))
}

/// Rules added to foreign chains for the network: family, table, chain and handle.
fn own_passages(bridge: &Bridge) -> Vec<(String, String, String, String)> {
    let of_rule = |object: Value| {
        let rule = &object["rule"];
        let word = |key: &str| rule[key].as_str().map(str::to_owned);
        let is_own = rule["comment"] == bridge.interface();
        is_own.then_some((word("family")?, word("table")?, word("chain")?, rule["handle"].to_string()))
    };
    listed("ruleset").into_iter().filter_map(of_rule).collect()
}

/// The output of `nft list`; empty without nft.
pub(super) fn listed(what: &str) -> Vec<Value> {
    let words: Vec<&str> = ["-j", "list"].into_iter().chain(what.split(' ')).collect();
    let listed = output("nft", &words).ok().and_then(|json| serde_json::from_str::<Value>(&json).ok());
    match listed.map(|mut listed| listed["nftables"].take()) {
        Some(Value::Array(objects)) => objects,
        _ => Vec::new(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::collections::BTreeMap;
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
    use std::path::Path;
    use std::sync::mpsc;
    use std::thread::{self, ScopedJoinHandle};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::resources::bridge::tests::alone;
    use crate::resources::bridge::{create_in, remove_in};
    use crate::sys;

    const HOST: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
    const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(198, 51, 100, 1)), 80);
    const MACHINE: &str = "10.86.7.9";
    const TIMEOUT: Duration = Duration::from_secs(3);

    pub(crate) fn shell(script: &str) {
        run("sh", &["-ec", script]).unwrap();
    }

    /// Runs `job` in a new network namespace connected through a veth pair, whose end here is called `near`, after
    /// running `script` there.
    pub(crate) fn elsewhere<'scope, T: Send + 'scope>(
        scope: &'scope thread::Scope<'scope, '_>,
        near: &str,
        script: String,
        job: impl FnOnce() -> T + Send + 'scope,
    ) -> ScopedJoinHandle<'scope, T> {
        shell(&format!("ip link add {near} type veth peer name far-{near}"));
        let (ready, is_ready) = mpsc::channel();
        let (connected, is_connected) = mpsc::channel::<()>();
        let far = format!("far-{near}");
        let thread = scope.spawn(move || {
            sys::net::leave_network().unwrap();
            // PID/task/TID
            ready.send(fs::read_link("/proc/thread-self").unwrap()).unwrap();
            is_connected.recv().unwrap();
            shell(&format!("ip link set {far} name eth0; ip link set eth0 up; {script}"));
            job()
        });
        let task = is_ready.recv().unwrap();
        shell(&format!("ip link set far-{near} netns {}", task.file_name().unwrap().display()));
        connected.send(()).unwrap();
        thread
    }

    /// The source address that a server beyond the host's uplink sees when a machine of the network connects to it.
    fn seen_by_the_server(bridge: &Bridge) -> Option<IpAddr> {
        thread::scope(|scope| {
            let (listening, is_listening) = mpsc::channel();
            let server = elsewhere(scope, "uplink", format!("ip addr add {}/24 dev eth0", SERVER.ip()), move || {
                // The return route, which real routers do not have.
                shell(&format!("ip route add 10.86.7.0/24 via {HOST}"));
                let listener = TcpListener::bind(SERVER).unwrap();
                listener.set_nonblocking(true).unwrap();
                listening.send(()).unwrap();
                let started = Instant::now();
                loop {
                    match listener.accept() {
                        Ok((_, from)) => return Some(from.ip()),
                        Err(_) if started.elapsed() > TIMEOUT => return None,
                        Err(_) => thread::sleep(Duration::from_millis(5)),
                    }
                }
            });
            shell(&format!("ip addr add {HOST}/24 dev uplink; ip link set uplink up"));
            is_listening.recv().unwrap();
            let gateway = bridge.gateway();
            let set_up = format!("ip addr add {MACHINE}/24 dev eth0; ip route add default via {gateway}");
            let machine = elsewhere(scope, "port", set_up, || TcpStream::connect_timeout(&SERVER, TIMEOUT).is_ok());
            shell(&format!("ip link set port master {} up", bridge.interface()));
            let (reached, seen) = (machine.join().unwrap(), server.join().unwrap());
            assert_eq!(reached, seen.is_some());
            seen
        })
    }

    fn ruleset() -> String {
        output("nft", &["--stateless", "list", "ruleset"]).unwrap()
    }

    fn create(base: &Path, internal: bool) -> Bridge {
        create_in(base, "web", Some(Ipv4Addr::new(10, 86, 7, 0)), internal, BTreeMap::new()).unwrap()
    }

    const DROP_BY_NFT: &str = "nft 'table inet guard {
        chain in { type filter hook input priority 0; policy drop; }
        chain through { type filter hook forward priority 0; policy drop; }
        }'";
    /// The same as firewalld: a later hook priority, and a reject rule preceded by a log and a counter.
    const REJECT_BY_NFT: &str = "nft 'table inet guard {
        chain in { type filter hook input priority 10; policy accept;
            ct state established,related accept; log counter reject with icmpx admin-prohibited; }
        chain through { type filter hook forward priority 10; policy accept;
            ct state established,related accept; iifname lo accept; reject with icmpx admin-prohibited; }
        }'";
    const DROP_BY_IPTABLES: &str = "iptables -P FORWARD DROP; iptables -P INPUT DROP";
    const DOCKER: &str = "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A DOCKER-USER -j RETURN
        iptables -A FORWARD -j DOCKER-USER";

    #[test]
    fn masquerading_works_with_any_firewall_and_leaves_nothing_behind() {
        for firewall in ["true", DROP_BY_NFT, REJECT_BY_NFT, DROP_BY_IPTABLES, DOCKER] {
            alone(|base| {
                if run("iptables", &["-S"]).is_err() && firewall.contains("iptables") {
                    eprintln!("SKIPPED: no iptables");
                    return;
                }
                // Chains created by iptables remain, but must be empty.
                for chain in ["INPUT", "FORWARD"] {
                    let _ = run("iptables", &["-P", chain, "ACCEPT"]);
                }
                shell(firewall);
                let before = ruleset();
                let bridge = create(base, false);
                assert_eq!(seen_by_the_server(&bridge), Some(HOST.into()), "{firewall}");
                remove_in(base, "web").unwrap();
                assert_eq!(ruleset(), before);
            });
        }
    }

    #[test]
    fn iptables_alone_is_sufficient() {
        alone(|base| {
            if run("iptables", &["-P", "FORWARD", "DROP"]).is_err() {
                eprintln!("SKIPPED: no iptables");
                return;
            }
            let _ = run("iptables", &["-P", "INPUT", "ACCEPT"]);
            let _ = run("iptables", &["-t", "nat", "-P", "POSTROUTING", "ACCEPT"]);
            for internal in [false, true] {
                let before = ruleset();
                let bridge = create(base, internal);
                let family = if internal { "inet" } else { "ip" };
                run("nft", &["delete", "table", family, &bridge.interface()]).unwrap();
                write_own_by_iptables(&bridge).unwrap();
                assert_eq!(seen_by_the_server(&bridge), (!internal).then_some(HOST.into()));
                remove_in(base, "web").unwrap();
                assert_eq!(ruleset(), before);
                let _ = run("ip", &["link", "del", "uplink"]);
            }
        });
    }

    #[test]
    fn an_internal_network_is_isolated_even_if_the_host_forwards() {
        alone(|base| {
            fs::write(FORWARD_PATH, "1").unwrap();
            let bridge = create(base, true);
            assert_eq!(seen_by_the_server(&bridge), None);
            remove_in(base, "web").unwrap();
        });
    }

    /// A peer on one of the host's networks: on a bridge, or behind a separate interface.
    struct Someone {
        bridge: Option<&'static str>,
        gateway: &'static str,
        address: IpAddr,
    }

    const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    }

    const WEB: Someone = Someone { bridge: Some("husk-web"), gateway: "10.86.7.1", address: v4(10, 86, 7, 9) };
    const OTHER: Someone = Someone { bridge: Some("husk-other"), gateway: "10.86.8.1", address: v4(10, 86, 8, 9) };
    const CONTAINER: Someone = Someone { bridge: Some("docker0"), gateway: "172.17.0.1", address: v4(172, 17, 0, 9) };
    const NEIGHBOUR: Someone = Someone { bridge: None, gateway: "198.51.100.1", address: v4(198, 51, 100, 9) };
    const BEYOND: Someone = Someone { bridge: None, gateway: "203.0.113.1", address: v4(203, 0, 113, 9) };

    /// Long enough for a retransmission after one second.
    const REFUSAL_TIMEOUT: Duration = Duration::from_millis(1500);
    /// Long enough for a retransmission after neighbor discovery, which IPv6 does not start while a link is coming up.
    const IPV6_TIMEOUT: Duration = Duration::from_secs(15);

    /// An argument for `ip addr add` in a /24 network, usable immediately.
    fn of_24(address: IpAddr) -> String {
        format!("{address}/24{}", if address.is_ipv6() { " nodad" } else { "" })
    }

    /// Whether `from`, in its own network namespace, can connect to `to`.
    fn reaches(from: &Someone, to: &Someone) -> bool {
        let set_up = |host: &Someone| {
            format!("ip addr add {} dev eth0; ip route add default via {}", of_24(host.address), host.gateway)
        };
        let connect = |near: &str, host: &Someone| {
            shell(&match host.bridge {
                Some(bridge) => format!("ip link set {near} master {bridge} up"),
                None => {
                    format!("ip addr add {} dev {near}; ip link set {near} up", of_24(host.gateway.parse().unwrap()))
                }
            });
        };
        thread::scope(|scope| {
            let (listening, is_listening) = mpsc::channel();
            let (ended, has_ended) = mpsc::channel::<()>();
            let server = elsewhere(scope, "server", set_up(to), move || {
                let listener = TcpListener::bind("[::]:80").unwrap();
                listening.send(()).unwrap();
                let _ = has_ended.recv();
                drop(listener);
            });
            connect("server", to);
            is_listening.recv().unwrap();
            let at = SocketAddr::from((to.address, 80));
            let timeout = if at.is_ipv6() { IPV6_TIMEOUT } else { REFUSAL_TIMEOUT };
            let client =
                elsewhere(scope, "client", set_up(from), move || TcpStream::connect_timeout(&at, timeout).is_ok());
            connect("client", from);
            let reached = client.join().unwrap();
            drop(ended);
            server.join().unwrap();
            for near in ["server", "client"] {
                let _ = run("ip", &["link", "del", near]);
            }
            reached
        })
    }

    #[test]
    fn a_tunnel_created_meanwhile_stays_forwarded_without_networks() {
        alone(|base| {
            fs::write(FORWARD_PATH, "0").unwrap();
            create(base, false);
            assert!(ruleset().contains("wireguard"), "{}", ruleset());
            shell("ip tuntap add vpn0 mode tun");
            remove_in(base, "web").unwrap();
            assert_eq!(fs::read_to_string(FORWARD_PATH).unwrap().trim(), "1");
            assert!(ruleset().contains(GUARD), "neighbours are not forwarded: {}", ruleset());
        });
    }

    #[test]
    fn ipv6_forwarding_of_the_host_is_not_affected() {
        let someone = |gateway, last| Someone { bridge: None, gateway, address: IpAddr::V6(last) };
        alone(|base| {
            fs::write(FORWARD_PATH, "0").unwrap();
            if fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").is_err() {
                eprintln!("SKIPPED: no IPv6");
                return;
            }
            let _web = create(base, false);
            let neighbour = someone("fd01::1", Ipv6Addr::new(0xfd01, 0, 0, 0, 0, 0, 0, 9));
            let beyond = someone("fd02::1", Ipv6Addr::new(0xfd02, 0, 0, 0, 0, 0, 0, 9));
            assert!(reaches(&neighbour, &beyond), "{}", ruleset());
            assert!(!reaches(&NEIGHBOUR, &BEYOND), "as before");
            remove_in(base, "web").unwrap();
        });
    }

    /// Rules of Docker's default network without published ports.
    const CONTAINERS: &str = "iptables -A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
        iptables -A FORWARD -i docker0 -j ACCEPT";

    #[test]
    fn networks_containers_and_neighbors_are_isolated() {
        for (docker, with_nft) in [(false, true), (true, true), (true, false)] {
            alone(|base| {
                if docker && run("iptables", &["-S"]).is_err() {
                    eprintln!("SKIPPED: no iptables");
                    return;
                }
                fs::write(FORWARD_PATH, "0").unwrap();
                shell("ip link add docker0 type bridge; ip addr add 172.17.0.1/24 dev docker0; ip link set docker0 up");
                if docker {
                    shell(&format!("{DOCKER}\n{CONTAINERS}"));
                }
                let web = create(base, false);
                let other =
                    create_in(base, "other", Some(Ipv4Addr::new(10, 86, 8, 0)), false, BTreeMap::new()).unwrap();
                if !with_nft {
                    for bridge in [&web, &other] {
                        run("nft", &["delete", "table", "ip", &bridge.interface()]).unwrap();
                        write_own_by_iptables(bridge).unwrap();
                    }
                }
                let apart = [
                    (&WEB, &OTHER, "another network"),
                    (&WEB, &CONTAINER, "a container"),
                    (&CONTAINER, &WEB, "a machine from a container"),
                    (&NEIGHBOUR, &WEB, "a machine from a neighbour"),
                    (&NEIGHBOUR, &BEYOND, "a neighbour from another"),
                ];
                for (from, to, what) in apart {
                    assert!(!reaches(from, to), "{what} is reached: docker {docker}, nft {with_nft}");
                }
                for (from, to, what) in [(&WEB, &BEYOND, "the way out"), (&CONTAINER, &BEYOND, "a container's")] {
                    assert!(reaches(from, to), "{what}: docker {docker}, nft {with_nft}");
                }
                remove_in(base, "web").unwrap();
                run("ip", &["link", "del", "docker0"]).unwrap();
                remove_in(base, "other").unwrap();
                assert!(!ruleset().contains("husk"), "{}", ruleset());
                assert_eq!(fs::read_to_string(FORWARD_PATH).unwrap().trim(), "0", "as it was");
            });
        }
    }
}
