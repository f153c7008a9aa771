//! One connection: from a guest's packets to a stream of the host's, and from the stream to packets.
//!
//! What the guest sends goes straight from its memory to the stream; what the stream does not take waits here, as much as
//! the guest was given credit for. What the stream has is read straight into the guest's buffers, as much as it has room
//! for: the rest stays in the stream, where it holds up its writer.

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

/// What tells connections of one guest apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The guest's end.
    pub guest: u32,
    /// The host's end.
    pub host: u32,
}

/// The connection cannot go on, because of the guest or of the host: the guest is to be sent a RST.
#[derive(Debug, PartialEq, Eq)]
pub struct ConnectionError;

impl From<CreditViolation> for ConnectionError {
    fn from(_: CreditViolation) -> ConnectionError {
        ConnectionError
    }
}

/// What a packet leaves of a connection.
#[derive(Debug, PartialEq, Eq)]
pub enum After {
    /// It goes on.
    Goes,
    /// The guest has ended both directions.
    Ended,
}

/// A connection and all that is known of it.
#[derive(Debug)]
pub struct Connection {
    /// Whether it waits for its turn to send to the guest. Kept by its owner.
    pub queued: bool,
    ports: Ports,
    stream: UnixStream,
    share: Share,
    credit: Credit,
    backlog: VecDeque<u8>,
    /// The packet that comes before all others.
    opening: Option<u16>,
    /// Whether both sides agreed to it.
    open: bool,
    update_owed: bool,
    /// Whether the guest was asked for room since it last had some.
    asked: bool,
    /// Whether the stream may have data, or room: until it says that it has not.
    readable: bool,
    writable: bool,
    /// Whether the stream's writer is through, and whether its reader is.
    writer_ended: bool,
    reader_ended: bool,
    /// What the guest said that it has ended, and what it was told that the host has.
    guest_ended: u32,
    told_ended: u32,
    /// The guest is through with it: only the backlog is left to be written.
    lingering: bool,
}

impl Connection {
    /// A connection that the guest asked for with `request`, to whoever is at the other end of `stream`.
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

    /// A connection that whoever is at the other end of `stream` asks for.
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

    /// What it may hold.
    pub fn share(&self) -> Share {
        self.share
    }

    /// Its two ends.
    pub fn ports(&self) -> Ports {
        self.ports
    }

    /// Something became of the stream. Fails where it ended before the guest has answered.
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

    /// Whether the guest has heard of this connection.
    pub fn is_known_to_guest(&self) -> bool {
        self.opening != Some(op::REQUEST)
    }

    /// Whether there is something to send to the guest, as far as can be told without trying.
    pub fn is_due(&self) -> bool {
        let data = self.wants_to_read() && (self.credit.room_bytes() > 0 || !self.asked);
        let open = self.open && (data || self.untold_ended() != 0 || self.update_owed || self.credit.is_update_due());
        !self.lingering && (self.opening.is_some() || open)
    }

    /// How many bytes of data the next packet to the guest may hold.
    pub fn room_bytes(&self) -> u32 {
        self.credit.room_bytes()
    }

    /// The next packet to the guest, its data already in `room`, which is empty only where there is no credit.
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

    /// A packet of the guest's, but no REQUEST and no RST. Its data lie behind the header in `chain`, and are all there.
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

    /// The guest is through with the connection. Returns whether there is something left to write, of what it sent before
    /// it said that this was all.
    pub fn linger(&mut self) -> bool {
        self.lingering = true;
        self.guest_ended & SHUTDOWN_SEND != 0 && !self.backlog.is_empty()
    }

    /// Whether nothing of it is left.
    pub fn is_over(&self) -> bool {
        self.lingering && self.backlog.is_empty()
    }

    fn wants_to_read(&self) -> bool {
        self.open && self.readable && !self.writer_ended
    }

    /// Reads as much as there is into `room`; 0 where there is nothing now, or nothing more.
    fn read(&mut self, room: &mut GuestBuffers) -> Result<u32, ConnectionError> {
        match socket::receive(&self.stream, room) {
            Ok(0) => self.writer_ended = true,
            Ok(count) => {
                // No more than the room, which is not more than a `u32` of credit.
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

    /// What the host has ended and the guest has not been told.
    fn untold_ended(&self) -> u32 {
        let send = if self.writer_ended { SHUTDOWN_SEND } else { 0 };
        let receive = if self.reader_ended { SHUTDOWN_RECEIVE } else { 0 };
        (send | receive) & !self.told_ended
    }

    /// Tells the program that asked for the connection that it has it.
    fn handshake(&mut self) -> Result<(), ConnectionError> {
        let words = format!("OK {}\n", self.ports.host);
        // The first words on a new stream have room.
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
            // Nobody will ever read it.
            self.credit.forward(rest_bytes);
            return Ok(());
        }
        let rest = queue::part(chain, HEADER_BYTES as u64 + u64::from(sent_bytes), rest_bytes.into());
        rest.into_iter().try_for_each(|range| self.keep(range, buffers))?;
        self.flush()
    }

    /// Copies `range`, which the guest had credit for, to the backlog.
    fn keep(&mut self, range: GuestRange, buffers: &GuestBuffers) -> Result<(), ConnectionError> {
        if self.backlog.is_empty() {
            // All of it at once, since one that grows takes up to twice as much.
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

    /// Writes as much of the backlog as the stream takes.
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
            // Its memory goes with it: most connections never need any.
            self.backlog = VecDeque::new();
            if self.guest_ended & SHUTDOWN_SEND != 0 {
                // It may be closed already.
                let _ = self.stream.shutdown(Shutdown::Write);
            }
        }
        Ok(())
    }

    /// One attempt to write `len_bytes`. Returns how many of them were written.
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

    /// The host reads no more: what waits for it is dropped.
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
