//! Resets the TCP connections of all processes to others, after the machine has become another one or its network has
//! forgotten them: nobody would answer, and nobody would tell.
//!
//! The kernel can end a connection of somebody else's (SOCK_DESTROY), but not every kernel is built with that. A connection that is
//! disconnected through a duplicate of its descriptor ends in the same way.

use std::collections::HashSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown};
use std::os::fd::{AsFd, OwnedFd};

use nix::unistd::Pid;

use crate::{report, sys};

/// The connections of this network namespace (proc(5)). Those of others, in containers of the guest, go through its NAT.
const TABLES: [&str; 2] = ["/proc/self/net/tcp", "/proc/self/net/tcp6"];
/// TCP_LISTEN (net/tcp_states.h)
const LISTENING: &str = "0A";

/// Resets all connections except those within the machine: of the loopback interface, and of the machine with itself under one of
/// `addresses`, which it has.
pub fn reset(addresses: &[IpAddr]) {
    let mut lost: HashSet<u64> = TABLES
        .iter()
        .flat_map(|path| {
            fs::read_to_string(path).unwrap_or_default().lines().filter_map(connection).collect::<Vec<_>>()
        })
        .filter(|connection| !connection.is_within(addresses))
        .map(|connection| connection.inode)
        .collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for pid in processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok()) {
        if lost.is_empty() {
            return;
        }
        reset_of(pid, &mut lost);
    }
}

/// Resets those of `lost` that process `pid` has, and removes them there.
fn reset_of(pid: i32, lost: &mut HashSet<u64>) {
    // It may have ended.
    for entry in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let target = fs::read_link(entry.path()).unwrap_or_default();
        let inode = target.to_str().and_then(|name| name.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
        let Some(inode) = inode.filter(|inode| lost.contains(inode)) else { continue };
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        match sys::descriptor_of(Pid::from_raw(pid), fd) {
            Ok(socket) => {
                end(socket);
                lost.remove(&inode);
            }
            Err(error) => report::say(&format!("reset a connection of process {pid}: {error}")),
        }
    }
}

fn end(socket: OwnedFd) {
    // Some kernels do not disconnect a socket for which a thread waits, but shut it down.
    if sys::disconnect(socket.as_fd()).is_err() {
        let _ = std::net::TcpStream::from(socket).shutdown(Shutdown::Both);
    }
}

/// A line of [`TABLES`].
#[derive(Debug, PartialEq, Eq)]
struct Connection {
    local: IpAddr,
    remote: IpAddr,
    inode: u64,
}

impl Connection {
    fn is_within(&self, addresses: &[IpAddr]) -> bool {
        self.remote.is_loopback() || self.remote == self.local && addresses.contains(&self.local)
    }
}

/// Parses a line, unless it is the heading, a listening socket or one that no process has.
fn connection(line: &str) -> Option<Connection> {
    let mut words = line.split_whitespace().skip(1);
    let (local, remote, state) = (words.next()?, words.next()?, words.next()?);
    let inode = words.nth(5)?.parse().ok().filter(|inode| *inode != 0)?;
    (state != LISTENING).then_some(Connection { local: address(local)?, remote: address(remote)?, inode })
}

/// Parses `ADDRESS:PORT`: words of 32 bits as the processor reads them, in hexadecimal. An IPv4 address within IPv6 is one of IPv4.
fn address(text: &str) -> Option<IpAddr> {
    let (address, _) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(address.get(8 * at..8 * at + 8)?, 16).ok().map(u32::to_ne_bytes);
    match address.len() {
        8 => Some(Ipv4Addr::from(word(0)?).into()),
        32 => {
            let bytes = [word(0)?, word(1)?, word(2)?, word(3)?].concat();
            Some(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).to_canonical())
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::{ErrorKind, Read};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsRawFd;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn only_connections_to_others_are_lost() {
        let line = "   1: 0F02000A:A1B2 0101A8C0:0050 01 00000000:00000000 00:00000000 00000000  1000        0 4711 1 0 20 4 30 10 -1";
        let (local, remote) = ("10.0.2.15".parse().unwrap(), "192.168.1.1".parse().unwrap());
        let parsed = connection(line).unwrap();
        assert_eq!(parsed, Connection { local, remote, inode: 4711 });
        assert!(!parsed.is_within(&[local]));
        assert_eq!(connection(&line.replace(" 01 ", " 0A ")), None, "it listens");
        assert_eq!(connection(&line.replace("4711", "0")), None, "no process has it");
        for text in ["", "  sl  local_address rem_address   st tx_queue", "1: x y 01 z z z z z 7 1"] {
            assert_eq!(connection(text), None, "{text}");
        }
        assert!(connection(&line.replace("0101A8C0", "0100007F")).unwrap().is_within(&[]));
        let own = connection(&line.replace("0101A8C0", "0F02000A")).unwrap();
        assert!(own.is_within(&[local]) && !own.is_within(&[remote]));
        let mapped = "0000000000000000FFFF00000F02000A:0016";
        assert_eq!(address(mapped), Some(local));
        assert_eq!(address("B80D0120000000000000000001000000:1"), Some("2001:db8::1".parse().unwrap()));
        assert_eq!((address("0F02000:1"), address("0F02000A")), (None, None));
    }

    #[test]
    fn a_read_that_waits_fails_when_its_connection_is_reset() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let _other_end = listener.accept().unwrap();
        let Ok(duplicate) = sys::descriptor_of(Pid::this(), stream.as_raw_fd()) else {
            eprintln!("SKIPPED: the kernel does not duplicate descriptors of processes");
            return;
        };
        let reader = thread::spawn(move || stream.read(&mut [0; 8]));
        thread::sleep(Duration::from_millis(100));
        end(duplicate);
        match reader.join().unwrap() {
            Ok(count) => assert_eq!(count, 0, "shut down"),
            Err(error) => assert!(
                matches!(error.kind(), ErrorKind::ConnectionReset | ErrorKind::BrokenPipe | ErrorKind::NotConnected),
                "{error}"
            ),
        }
    }
}
