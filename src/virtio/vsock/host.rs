//! The host side of the vsock device: connections from host programs, and events of their streams.
//!
//! A program connects to the machine's socket and writes `CONNECT <port>` and a newline; after that its stream belongs
//! to a connection. All streams are watched by one epoll, which the device's worker watches in turn.

use std::collections::HashMap;
use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::resources::vsock::VsockSocket;
use crate::sys;
use crate::sys::event;
use crate::virtio::log_rate::LogRate;

/// Identifies a stream; never reused.
pub type StreamId = u64;

/// Epoll tokens other than stream IDs.
const LISTENER: u64 = u64::MAX;
const BELL: u64 = u64::MAX - 1;
/// The maximum number of programs accepted in a turn.
const ACCEPTS_PER_TURN: usize = 32;
/// Longer than any valid first line, `CONNECT PORT`.
const HANDSHAKE_BYTES_MAX: usize = 32;

/// An event of the host side.
#[derive(Debug)]
pub enum HostEvent {
    /// A program requests a connection to this port of the guest.
    Connect(StreamId, UnixStream, u32),
    /// A connection's stream is readable or writable, or was closed.
    Ready(StreamId, EventSet),
}

/// The listener, the streams' events, and the programs in their handshake.
pub struct Host {
    socket: VsockSocket,
    epoll: Epoll,
    /// Wakes up the worker.
    bell: EventFd,
    handshakes: HashMap<StreamId, Handshake>,
    next_id: StreamId,
    accept_again: bool,
    log_rate: LogRate,
}

/// A connected program and the part of its first line received so far.
struct Handshake {
    stream: UnixStream,
    line: Vec<u8>,
}

impl Host {
    /// Creates an instance without connections.
    pub fn new(socket: VsockSocket) -> io::Result<Host> {
        let (epoll, bell) = (Epoll::new()?, event::create()?);
        watch(&epoll, socket.listener.as_raw_fd(), LISTENER, EventSet::IN)?;
        watch(&epoll, bell.as_raw_fd(), BELL, EventSet::IN)?;
        let (handshakes, log_rate) = (HashMap::new(), LogRate::default());
        Ok(Host { socket, epoll, bell, handshakes, next_id: 0, accept_again: false, log_rate })
    }

    /// The guest's CID.
    pub fn guest_cid(&self) -> u64 {
        self.socket.cid.into()
    }

    /// Readable when [`Host::poll`] has events.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        sys::epoll_fd(&self.epoll)
    }

    /// Makes [`Host::wake_fd`] readable.
    pub fn ring(&self) {
        // The counter is never read and would take centuries to overflow.
        let _ = self.bell.write(1);
    }

    /// The number of programs in their handshake.
    pub fn handshakes(&self) -> usize {
        self.handshakes.len()
    }

    /// Drops all programs in their handshake.
    pub fn clear(&mut self) {
        self.handshakes.clear();
    }

    /// Connects to the program that handles the guest's connections to `port`.
    pub fn connect(&mut self, port: u32) -> io::Result<(StreamId, UnixStream)> {
        let stream = self.socket.connect(port)?;
        Ok((self.adopt(&stream)?, stream))
    }

    /// Appends the events since the last call to `host_events`; accepts at most `room` programs and rejects the rest.
    /// Returns whether there is more.
    pub fn poll(&mut self, room: usize, host_events: &mut Vec<HostEvent>) -> bool {
        let mut events = [EpollEvent::default(); 64];
        // It can only be interrupted by a signal, and is called again then.
        let Ok(count) = self.epoll.wait(0, &mut events) else { return true };
        let mut accept = std::mem::take(&mut self.accept_again);
        for event in events.iter().take(count) {
            match (event.data(), event.event_set()) {
                (LISTENER, _) => accept = true,
                (BELL, _) => {}
                (id, _) if self.handshakes.contains_key(&id) => self.handshake(id, host_events),
                (id, happened) => host_events.push(HostEvent::Ready(id, happened)),
            }
        }
        if accept {
            self.accept_again = self.accept(room);
        }
        count == events.len() || self.accept_again
    }

    /// Accepts waiting programs. Returns whether there may be more.
    fn accept(&mut self, mut room: usize) -> bool {
        for _ in 0..ACCEPTS_PER_TURN {
            let accepted = self.socket.listener.accept().and_then(|(stream, _)| {
                stream.set_nonblocking(true)?;
                Ok(stream)
            });
            let adopted = match accepted {
                Ok(_) if room == 0 => continue,
                Ok(stream) => self.adopt(&stream).map(|id| (id, stream)),
                Err(error) => Err(error),
            };
            match adopted {
                Ok((id, stream)) => {
                    room -= 1;
                    self.handshakes.insert(id, Handshake { stream, line: Vec::new() });
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return false,
                Err(error) => {
                    if self.log_rate.allows() {
                        log::warn!("vsock: a connection was not accepted: {error}");
                    }
                    return false;
                }
            }
        }
        true
    }

    /// Continues a program's handshake. A program with invalid data is disconnected.
    fn handshake(&mut self, id: StreamId, host_events: &mut Vec<HostEvent>) {
        let Some(mut handshake) = self.handshakes.remove(&id) else { return };
        match handshake.read() {
            Ok(Some(port)) => host_events.push(HostEvent::Connect(id, handshake.stream, port)),
            Ok(None) => drop(self.handshakes.insert(id, handshake)),
            Err(_) => {}
        }
    }

    /// Watches a stream until it is closed.
    fn adopt(&mut self, stream: &UnixStream) -> io::Result<StreamId> {
        let id = self.next_id;
        self.next_id += 1;
        watch(&self.epoll, stream.as_raw_fd(), id, EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP)?;
        Ok(id)
    }
}

impl Handshake {
    /// The requested port, once the line is complete. Data after the line is not read, since it is meant for the guest.
    fn read(&mut self) -> io::Result<Option<u32>> {
        let mut byte = [0];
        while self.line.len() < HANDSHAKE_BYTES_MAX {
            match self.stream.read(&mut byte) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(_) if byte == *b"\n" => return port(&self.line).map(Some).ok_or(ErrorKind::InvalidData.into()),
                Ok(_) => self.line.extend(byte),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Err(ErrorKind::InvalidData.into())
    }
}

fn port(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.trim().parse().ok()
}

/// Edge-triggered: each change is reported once.
fn watch(epoll: &Epoll, fd: RawFd, mark: u64, events: EventSet) -> io::Result<()> {
    epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, mark))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_handshake_specifies_a_port() {
        for (line, wanted) in [
            ("CONNECT 52", Some(52)),
            ("CONNECT 4294967295", Some(u32::MAX)),
            ("CONNECT 52\r", Some(52)),
            ("CONNECT 4294967296", None),
            ("CONNECT", None),
            ("CONNECT -1", None),
            ("OK 52", None),
            ("", None),
        ] {
            assert_eq!(port(line.as_bytes()), wanted, "{line:?}");
        }
        assert_eq!(port(b"CONNECT \xff"), None);
    }
}
