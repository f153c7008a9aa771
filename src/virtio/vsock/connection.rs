//! A connection between the guest and a stream on the host.
//!
//! The guest's data is written from its memory directly to the stream; what the stream does not accept is buffered
//! here, up to the guest's credit. Data from the stream is read directly into the guest's buffers, up to the guest's
//! credit: the rest stays in the stream and throttles its writer.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;

use super::budget::Share;
use super::credit::{Credit, CreditViolation};
use super::packet::{HEADER_BYTES, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use crate::memory::GuestBuffers;
use crate::sys::{self, socket};
use crate::virtio::queue::{self, GuestRange};

/// Identifies a connection of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The guest's port.
    pub guest: u32,
    /// The host's port.
    pub host: u32,
}

/// The connection failed, on either side: a RST must be sent to the guest.
#[derive(Debug, PartialEq, Eq)]
pub struct ConnectionError;

impl From<CreditViolation> for ConnectionError {
    fn from(_: CreditViolation) -> ConnectionError {
        ConnectionError
    }
}

/// The state of a connection after a packet.
#[derive(Debug, PartialEq, Eq)]
pub enum After {
    /// It remains open.
    Goes,
    /// The guest has shut down both directions.
    Ended,
}

/// A connection's state.
#[derive(Debug)]
pub struct Connection {
    /// Whether it is scheduled to send to the guest. Managed by its owner.
    pub queued: bool,
    ports: Ports,
    stream: UnixStream,
    share: Share,
    credit: Credit,
    backlog: VecDeque<u8>,
    /// The packet to send before all others.
    opening: Option<u16>,
    /// Whether it is established.
    open: bool,
    update_owed: bool,
    /// Whether a credit request was sent since the guest last had space.
    asked: bool,
    /// Whether the stream may be readable or writable: true until it reports otherwise.
    readable: bool,
    writable: bool,
    /// Whether the stream's writer has finished, and whether its reader has.
    writer_ended: bool,
    reader_ended: bool,
    /// The directions that the guest has shut down, and those whose shutdown by the host it was notified of.
    guest_ended: u32,
    told_ended: u32,
    /// Whether the guest has closed it, and only the backlog is left to be written.
    lingering: bool,
}

impl Connection {
    /// Creates a connection for the guest's `request`, to the peer of `stream`.
    pub fn from_guest(
        stream: UnixStream,
        ports: Ports,
        share: Share,
        request: &Header,
    ) -> Result<Connection, ConnectionError> {
        let mut connection = Connection::new(stream, ports, share, op::RESPONSE)?;
        connection.open = true;
        connection.credit.hear(request.buf_alloc, request.fwd_cnt)?;
        Ok(connection)
    }

    /// Creates a connection requested by the peer of `stream`.
    pub fn from_host(stream: UnixStream, ports: Ports, share: Share) -> Result<Connection, ConnectionError> {
        Connection::new(stream, ports, share, op::REQUEST)
    }

    fn new(stream: UnixStream, ports: Ports, share: Share, opening: u16) -> Result<Connection, ConnectionError> {
        sys::net::set_send_buffer(&stream, share.send_buffer_bytes).map_err(|_| ConnectionError)?;
        Ok(Connection {
            queued: false,
            ports,
            stream,
            share,
            credit: Credit::new(share.backlog_bytes),
            backlog: VecDeque::new(),
            opening: Some(opening),
            open: false,
            update_owed: false,
            asked: false,
            readable: true,
            writable: true,
            writer_ended: false,
            reader_ended: false,
            guest_ended: 0,
            told_ended: 0,
            lingering: false,
        })
    }

    /// Its share of the budget.
    pub fn share(&self) -> Share {
        self.share
    }

    /// Its ports.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Handles events of the stream. Fails if it was closed before the guest responded.
    pub fn on_event(&mut self, events: EventSet) -> Result<(), ConnectionError> {
        self.readable |= events.intersects(EventSet::IN | EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR);
        self.writable |= events.intersects(EventSet::OUT | EventSet::HANG_UP | EventSet::ERROR);
        if events.contains(EventSet::HANG_UP) {
            if !self.open {
                return Err(ConnectionError);
            }
            self.end_reader();
        }
        self.flush()
    }

    /// Whether the guest knows this connection.
    pub fn is_known_to_guest(&self) -> bool {
        self.opening != Some(op::REQUEST)
    }

    /// Whether there may be something to send to the guest.
    pub fn is_due(&self) -> bool {
        let data = self.wants_to_read() && (self.credit.room_bytes() > 0 || !self.asked);
        let open = self.open && (data || self.untold_ended() != 0 || self.update_owed || self.credit.is_update_due());
        !self.lingering && (self.opening.is_some() || open)
    }

    /// The maximum data size of the next packet to the guest.
    pub fn room_bytes(&self) -> u32 {
        self.credit.room_bytes()
    }

    /// The next packet to the guest, with its data already in `room`, which is empty only without credit.
    pub fn next(&mut self, room: &mut GuestBuffers) -> Result<Option<Header>, ConnectionError> {
        if let Some(op) = self.opening.take() {
            return Ok(Some(self.packet(op)));
        }
        if self.wants_to_read() && room.len_bytes() > 0 {
            let len_bytes = self.read(room)?;
            if len_bytes > 0 {
                return Ok(Some(Header { len_bytes, ..self.packet(op::RW) }));
            }
        }
        if self.untold_ended() != 0 {
            self.told_ended |= self.untold_ended();
            return Ok(Some(Header { flags: self.told_ended, ..self.packet(op::SHUTDOWN) }));
        }
        if self.update_owed || self.credit.is_update_due() {
            return Ok(Some(self.packet(op::CREDIT_UPDATE)));
        }
        if self.wants_to_read() && self.credit.room_bytes() == 0 && !self.asked {
            self.asked = true;
            return Ok(Some(self.packet(op::CREDIT_REQUEST)));
        }
        Ok(None)
    }

    /// Processes a packet of the guest other than REQUEST and RST. Its data follows the header in `chain`, and is
    /// complete.
    pub fn on_packet(
        &mut self,
        header: &Header,
        chain: &[GuestRange],
        buffers: &mut GuestBuffers,
    ) -> Result<After, ConnectionError> {
        self.credit.hear(header.buf_alloc, header.fwd_cnt)?;
        self.asked &= self.credit.room_bytes() == 0;
        match header.op {
            op::RESPONSE if !self.open && self.opening.is_none() => {
                self.open = true;
                self.handshake()?;
            }
            _ if !self.open => return Err(ConnectionError),
            op::RW if self.guest_ended & SHUTDOWN_SEND == 0 => self.on_data(header.len_bytes, chain, buffers)?,
            op::SHUTDOWN => return Ok(self.on_shutdown(header.flags)),
            op::CREDIT_UPDATE => {}
            op::CREDIT_REQUEST => self.update_owed = true,
            _ => return Err(ConnectionError),
        }
        Ok(After::Goes)
    }

    /// Handles the close by the guest. Returns whether there is data left to write, which the guest sent before it shut
    /// down that direction.
    pub fn linger(&mut self) -> bool {
        self.lingering = true;
        self.guest_ended & SHUTDOWN_SEND != 0 && !self.backlog.is_empty()
    }

    /// Whether nothing is left to do.
    pub fn is_over(&self) -> bool {
        self.lingering && self.backlog.is_empty()
    }

    fn wants_to_read(&self) -> bool {
        self.open && self.readable && !self.writer_ended
    }

    /// Reads available data into `room`; returns 0 if there is none now, or if the stream has ended.
    fn read(&mut self, room: &mut GuestBuffers) -> Result<u32, ConnectionError> {
        match socket::receive(&self.stream, room) {
            Ok(0) => self.writer_ended = true,
            Ok(count) => {
                // Limited by the room, which is at most a `u32` of credit.
                let count = count as u32;
                self.credit.send(count);
                return Ok(count);
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return Err(ConnectionError),
        }
        Ok(0)
    }

    fn packet(&mut self, op: u16) -> Header {
        self.update_owed = false;
        Header { op, buf_alloc: self.credit.buffer_bytes(), fwd_cnt: self.credit.tell(), ..Header::default() }
    }

    /// The directions shut down by the host that the guest was not notified of.
    fn untold_ended(&self) -> u32 {
        let send = if self.writer_ended { SHUTDOWN_SEND } else { 0 };
        let receive = if self.reader_ended { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told_ended
    }

    /// Confirms the connection to the program that requested it.
    fn handshake(&mut self) -> Result<(), ConnectionError> {
        let words = format!("OK {}\n", self.ports.host);
        // A new stream always has room for this.
        let written = (&self.stream).write(words.as_bytes()).map_err(|_| ConnectionError)?;
        if written == words.len() { Ok(()) } else { Err(ConnectionError) }
    }

    fn on_data(
        &mut self,
        len_bytes: u32,
        chain: &[GuestRange],
        buffers: &mut GuestBuffers,
    ) -> Result<(), ConnectionError> {
        self.credit.receive(len_bytes)?;
        let mut sent_bytes = 0;
        if self.backlog.is_empty() && self.writable && !self.reader_ended && len_bytes > 0 {
            buffers.clear();
            for range in queue::part(chain, HEADER_BYTES as u64, len_bytes.into()) {
                buffers.push(range.address, range.len_bytes).map_err(|_| ConnectionError)?;
            }
            sent_bytes = self.write(len_bytes as usize, |stream| socket::send(stream, buffers))? as u32;
            self.credit.forward(sent_bytes);
        }
        let rest_bytes = len_bytes.saturating_sub(sent_bytes);
        if self.reader_ended {
            // It will never be read.
            self.credit.forward(rest_bytes);
            return Ok(());
        }
        let rest = queue::part(chain, HEADER_BYTES as u64 + u64::from(sent_bytes), rest_bytes.into());
        rest.into_iter().try_for_each(|range| self.keep(range, buffers))?;
        self.flush()
    }

    /// Copies `range`, which is within the guest's credit, to the backlog.
    fn keep(&mut self, range: GuestRange, buffers: &GuestBuffers) -> Result<(), ConnectionError> {
        if self.backlog.is_empty() {
            // Allocated at once, since growing takes up to twice as much memory.
            self.backlog = VecDeque::with_capacity(self.share.backlog_bytes as usize);
        }
        let mut bytes = [0; 4096];
        let mut done = 0;
        while done < range.len_bytes {
            let len = (range.len_bytes - done).min(bytes.len() as u32);
            let piece = &mut bytes[..len as usize];
            let address = GuestAddress(range.address.0.saturating_add(done.into()));
            buffers.memory().read_slice(piece, address).map_err(|_| ConnectionError)?;
            self.backlog.extend(&*piece);
            done += len;
        }
        Ok(())
    }

    /// Writes as much of the backlog as the stream accepts.
    fn flush(&mut self) -> Result<(), ConnectionError> {
        if self.backlog.is_empty() {
            return Ok(());
        }
        while self.writable && !self.backlog.is_empty() {
            let mut backlog = std::mem::take(&mut self.backlog);
            let front = backlog.as_slices().0;
            let written = self.write(front.len(), |mut stream| stream.write(front));
            let count = if self.reader_ended { backlog.len() } else { written? };
            backlog.drain(..count);
            self.credit.forward(count as u32);
            self.backlog = backlog;
        }
        if self.backlog.is_empty() {
            // Frees its memory: most connections never need a backlog.
            self.backlog = VecDeque::new();
            if self.guest_ended & SHUTDOWN_SEND != 0 {
                // It may be closed already.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        Ok(())
    }

    /// Tries once to write `len_bytes`. Returns the number of bytes written.
    fn write(
        &mut self,
        len_bytes: usize,
        attempt: impl FnOnce(&UnixStream) -> io::Result<usize>,
    ) -> Result<usize, ConnectionError> {
        let count = match attempt(&self.stream) {
            Ok(count) => count,
            Err(error) => match error.kind() {
                ErrorKind::WouldBlock => 0,
                ErrorKind::Interrupted => return Ok(0),
                ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => {
                    self.end_reader();
                    return Ok(0);
                }
                _ => return Err(ConnectionError),
            },
        };
        self.writable = count >= len_bytes;
        Ok(count)
    }

    /// The host no longer reads: pending data is dropped.
    fn end_reader(&mut self) {
        self.reader_ended = true;
        self.credit.forward(self.backlog.len() as u32);
        self.backlog = VecDeque::new();
    }

    fn on_shutdown(&mut self, flags: u32) -> After {
        self.guest_ended |= flags & SHUTDOWN_BOTH;
        if self.guest_ended & SHUTDOWN_RECEIVE != 0 {
            let _ = self.stream.shutdown(Shutdown::Read);
            self.writer_ended = true;
        }
        if self.guest_ended & SHUTDOWN_SEND != 0 && self.backlog.is_empty() {
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        if self.guest_ended == SHUTDOWN_BOTH { After::Ended } else { After::Goes }
    }
}
