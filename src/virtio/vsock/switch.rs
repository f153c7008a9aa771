//! Routes packets between the rings and the connections, and schedules the connections.

use std::collections::{HashMap, VecDeque};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use super::budget::{CONNECTIONS_MAX, Share};
use super::connection::{After, Connection, ConnectionError, Ports};
use super::host::{Host, HostEvent, StreamId};
use super::packet::{HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op};
use crate::memory::GuestBuffers;
use crate::virtio::RingError;
use crate::virtio::queue::{self, GuestRange};

/// With this many RSTs pending, no more packets are taken from the guest (virtio 1.2 §5.10.6.1).
const RESETS_MAX: usize = 256;
/// The first host port assigned to programs that connect to the guest.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// All connections of a guest.
pub struct Switch {
    host: Host,
    connections: HashMap<StreamId, Connection>,
    /// Connections by their ports, excluding those that the guest has closed.
    by_ports: HashMap<Ports, StreamId>,
    /// Connections with data for the guest, each at most once, in scheduling order.
    due: VecDeque<StreamId>,
    /// Pending RSTs: the guest's ports and the ports that it addressed.
    resets: VecDeque<Ports>,
    next_host_port: u32,
    events: Vec<HostEvent>,
}

impl Switch {
    /// Creates a switch without connections.
    pub fn new(host: Host) -> Switch {
        Switch {
            host,
            connections: HashMap::new(),
            by_ports: HashMap::new(),
            due: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: FIRST_HOST_PORT,
            events: Vec::new(),
        }
    }

    /// Readable when [`Switch::poll`] has events.
    pub fn wake_fd(&self) -> BorrowedFd<'_> {
        self.host.wake_fd()
    }

    /// Makes [`Switch::wake_fd`] readable.
    pub fn ring(&self) {
        self.host.ring();
    }

    /// Closes all connections without notifying the guest.
    pub fn clear(&mut self) {
        self.host.clear();
        self.connections.clear();
        self.by_ports.clear();
        self.due.clear();
        self.resets.clear();
    }

    /// Handles events of the host side. Returns whether there are more.
    pub fn poll(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        let more = self.host.poll(self.room(), &mut events);
        for events in events.drain(..) {
            match events {
                HostEvent::Connect(id, stream, port) => self.request(id, stream, port),
                HostEvent::Ready(id, events) => {
                    let Some(connection) = self.connections.get_mut(&id) else { continue };
                    match connection.on_event(events) {
                        Ok(()) if connection.is_over() => drop(self.remove(id)),
                        Ok(()) => self.queue(id),
                        Err(_) => self.reset(id),
                    }
                }
            }
        }
        self.events = events;
        more
    }

    /// Whether the guest must take packets before more are accepted from it.
    pub fn is_full(&self) -> bool {
        self.resets.len() >= RESETS_MAX
    }

    /// Processes a packet from the guest in `chain`. An invalid packet affects only its connection.
    pub fn receive(&mut self, header: &Header, chain: &[GuestRange], buffers: &mut GuestBuffers) {
        if header.src_cid != self.host.guest_cid() {
            // There is no peer to notify.
            return;
        }
        let ports = Ports { guest: header.src_port, host: header.dst_port };
        let all_there = queue::len_bytes(chain) >= HEADER_BYTES as u64 + u64::from(header.len_bytes);
        let to_host = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let id = self.by_ports.get(&ports).copied().filter(|_| to_host);
        match (id, header.op) {
            (None, op::RST) => {}
            (None, op::REQUEST) if to_host && all_there => self.accept(ports, header),
            (None, _) => self.resets.push_back(ports),
            (Some(id), op::RST) => self.end(id),
            (Some(id), _) => {
                let Some(connection) = self.connections.get_mut(&id).filter(|_| all_there) else {
                    return self.reset(id);
                };
                match connection.on_packet(header, chain, buffers) {
                    Ok(After::Goes) => self.queue(id),
                    Ok(After::Ended) => {
                        self.end(id);
                        self.resets.push_back(ports);
                    }
                    Err(ConnectionError) => self.reset(id),
                }
            }
        }
    }

    /// Whether there may be packets for the guest.
    pub fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.due.is_empty()
    }

    /// The next packet for the guest, with its data already written after the space for the header in `chain`. `None`
    /// if there is none. Fails if the chain is too small for a packet.
    pub fn next(&mut self, chain: &[GuestRange], buffers: &mut GuestBuffers) -> Result<Option<Header>, RingError> {
        if queue::len_bytes(chain) <= HEADER_BYTES as u64 {
            return Err(RingError::Chain("a receive buffer with no room for data"));
        }
        if let Some(ports) = self.resets.pop_front() {
            return Ok(Some(self.address(Header { op: op::RST, ..Header::default() }, ports)));
        }
        let Some(id) = self.due.pop_front() else { return Ok(None) };
        let Some(connection) = self.connections.get_mut(&id) else { return Ok(None) };
        connection.queued = false;
        buffers.clear();
        for range in queue::part(chain, HEADER_BYTES as u64, connection.room_bytes().into()) {
            let pushed = buffers.push(range.address, range.len_bytes);
            pushed.map_err(|_| RingError::Chain("a receive buffer outside of memory"))?;
        }
        let Ok(header) = connection.next(buffers) else {
            self.reset(id);
            return Ok(None);
        };
        let ports = connection.ports();
        self.queue(id);
        Ok(header.map(|header| self.address(header, ports)))
    }

    fn address(&self, header: Header, ports: Ports) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.host.guest_cid(),
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            ..header
        }
    }

    /// The number of additional connections allowed.
    fn room(&self) -> usize {
        CONNECTIONS_MAX.saturating_sub(self.connections.len() + self.host.handshakes())
    }

    /// The share of the budget for the next connection.
    fn share(&self) -> Share {
        Share::beside(self.connections.values().map(Connection::share))
    }

    /// Handles a connection request of the guest.
    fn accept(&mut self, ports: Ports, request: &Header) {
        let connection = match self.room() {
            0 => None,
            _ => self.host.connect(ports.host).ok(),
        };
        let connection = connection
            .and_then(|(id, stream)| Some((id, Connection::from_guest(stream, ports, self.share(), request).ok()?)));
        match connection {
            Some((id, connection)) => self.insert(id, connection),
            None => self.resets.push_back(ports),
        }
    }

    /// Handles a connection request of a host program to the guest's `port`.
    fn request(&mut self, id: StreamId, stream: UnixStream, port: u32) {
        let mut ports = Ports { guest: port, host: self.next_host_port };
        // There are far more ports than connections.
        while self.by_ports.contains_key(&ports) {
            ports.host = following(ports.host);
        }
        self.next_host_port = following(ports.host);
        if let Ok(connection) = Connection::from_host(stream, ports, self.share()) {
            self.insert(id, connection);
        }
    }

    fn insert(&mut self, id: StreamId, connection: Connection) {
        self.by_ports.insert(connection.ports(), id);
        self.connections.insert(id, connection);
        self.queue(id);
    }

    /// Schedules a connection if it has data for the guest.
    fn queue(&mut self, id: StreamId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if !connection.queued && connection.is_due() {
            connection.queued = true;
            self.due.push_back(id);
        }
    }

    /// Removes a connection and its queue entry: otherwise a guest that takes no packets could accumulate entries
    /// without limit.
    fn remove(&mut self, id: StreamId) -> Option<Connection> {
        let connection = self.connections.remove(&id)?;
        if connection.queued {
            self.due.retain(|other| *other != id);
        }
        Some(connection)
    }

    /// Resets a failed connection and notifies the guest if it knows the connection.
    fn reset(&mut self, id: StreamId) {
        let Some(connection) = self.remove(id) else { return };
        let ports = connection.ports();
        // If the guest closed it earlier, its ports may already be reused.
        if self.by_ports.get(&ports) == Some(&id) {
            self.by_ports.remove(&ports);
            if connection.is_known_to_guest() {
                self.resets.push_back(ports);
            }
        }
    }

    /// Handles the end of a connection by the guest: its ports can be reused, but data it sent is still delivered.
    fn end(&mut self, id: StreamId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        self.by_ports.remove(&connection.ports());
        if !connection.linger() {
            self.remove(id);
        }
    }
}

fn following(port: u32) -> u32 {
    port.checked_add(1).unwrap_or(FIRST_HOST_PORT)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::sync::Arc;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::config::VsockConfig;
    use crate::{memory, resources};

    #[test]
    fn repeated_connections_leave_no_state() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("v.sock");
        let listener = UnixListener::bind(dir.path().join("v.sock_52")).unwrap();
        let mut switch =
            Switch::new(Host::new(resources::vsock::open(&VsockConfig { socket, cid: 3 }).unwrap()).unwrap());
        let mut buffers = GuestBuffers::new(Arc::new(memory::reserve(1).unwrap()));
        let chain = [GuestRange { address: GuestAddress(0), len_bytes: HEADER_BYTES as u32 }];
        for src_port in 0..1000 {
            for op in [op::REQUEST, op::RST] {
                let header = Header {
                    src_cid: 3,
                    dst_cid: HOST_CID,
                    src_port,
                    dst_port: 52,
                    kind: TYPE_STREAM,
                    op,
                    ..Header::default()
                };
                switch.receive(&header, &chain, &mut buffers);
            }
            listener.accept().unwrap();
        }
        assert_eq!((switch.connections.len(), switch.by_ports.len(), switch.resets.len()), (0, 0, 0));
        assert_eq!(switch.due.len(), 0, "turns of nobody");
    }
}
