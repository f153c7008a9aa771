//! What connects a device in the monitor with the server of its folder: memory for requests and replies in slots, and a socket
//! that tells of them.
//!
//! ```text
//! device:  chain ─ copy ─> slot ─ Message ─> socket ─> server ─ system calls on the slot ─ Message ─> socket ─> slot ─ copy ─> chain
//! ```
//!
//! The server has no access to the guest's memory, and the device parses no request. Neither trusts what the other
//! writes: lengths are checked, and what is checked was copied before.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory, VolatileSlice};

use crate::sys::violation::Report;
use crate::sys::{IoVecs, socket};

/// The most data of a read or a write.
pub const DATA_BYTES_MAX: usize = 1 << 20;
/// The size of a slot: the data and what precedes it, in whole pages.
pub const SLOT_BYTES: usize = DATA_BYTES_MAX + (8 << 10);
/// The number of requests that are with the server at once. Only the slots in use take memory, and those used last are
/// used again first.
pub const SLOTS: usize = 8;
/// The size of an encoded [`Message`].
const MESSAGE_BYTES: usize = 12;

/// Tells the other side of a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Its index.
    pub slot: u32,
    /// The length of the request, or of the reply, in the slot.
    pub len_bytes: u32,
    /// The room that the guest has for the reply. 0 in a reply.
    pub room_bytes: u32,
}

impl Message {
    fn encode(self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        let fields = [self.slot, self.len_bytes, self.room_bytes];
        bytes.chunks_exact_mut(4).zip(fields).for_each(|(to, field)| to.copy_from_slice(&field.to_le_bytes()));
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Message> {
        let field = |at: usize| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let message = Message { slot: field(0)?, len_bytes: field(4)?, room_bytes: field(8)? };
        let is_valid = (message.slot as usize) < SLOTS && message.len_bytes as usize <= SLOT_BYTES;
        (bytes.len() == MESSAGE_BYTES && is_valid).then_some(message)
    }
}

/// A side of the connection. Any thread.
#[derive(Debug)]
pub struct Link {
    socket: UnixDatagram,
    memory: MmapRegion,
}

/// The descriptors of a side, before its memory is mapped.
#[derive(Debug)]
pub struct Ends {
    /// The socket.
    pub socket: UnixDatagram,
    /// The memory.
    pub memory: OwnedFd,
}

/// Memory of two processes, whose size neither can change. A side that could shrink it would end the other one with SIGBUS.
pub fn sealed_memory(name: &CStr, len_bytes: u64) -> io::Result<OwnedFd> {
    let memory = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&memory, len_bytes)?;
    rustix::fs::fcntl_add_seals(&memory, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(memory)
}

impl Ends {
    /// Both sides of a new connection.
    pub fn pair() -> io::Result<(Ends, Ends)> {
        let memory = sealed_memory(c"husk-share", (SLOTS * SLOT_BYTES) as u64)?;
        let (ours, theirs) = socket::message_pair()?;
        Ok((Ends { socket: ours, memory: memory.try_clone()? }, Ends { socket: theirs, memory }))
    }

    /// All descriptors.
    pub fn fds(&self) -> [RawFd; 2] {
        [self.socket.as_raw_fd(), self.memory.as_raw_fd()]
    }

    /// Maps the memory.
    pub fn connect(self) -> io::Result<Link> {
        let file = FileOffset::new(File::from(self.memory), 0);
        let memory = MmapRegion::from_file(file, SLOTS * SLOT_BYTES).map_err(io::Error::other)?;
        Ok(Link { socket: self.socket, memory })
    }
}

impl Link {
    /// The memory of slot `index`.
    pub fn slot(&self, index: u32) -> io::Result<VolatileSlice<'_>> {
        let at = (index as usize).saturating_mul(SLOT_BYTES);
        self.memory.get_slice(at, SLOT_BYTES).map_err(io::Error::other)
    }

    /// Part of slot `index`, for system calls: `len_bytes` from `offset_bytes`, or as much as there is.
    pub fn part(&self, index: u32, offset_bytes: usize, len_bytes: usize) -> io::Result<Part<'_>> {
        let len_bytes = len_bytes.min(SLOT_BYTES.saturating_sub(offset_bytes));
        let slice = self.slot(index)?.subslice(offset_bytes.min(SLOT_BYTES), len_bytes).map_err(io::Error::other)?;
        let iovec = libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
        Ok(Part { iovecs: [iovec], _link: self })
    }

    /// Sends a message. It never waits: there is room for one of each slot.
    pub fn send(&self, message: Message) -> io::Result<()> {
        socket::send_now(&self.socket, &message.encode())
    }

    /// Waits for the next message. Fails if the other side is gone or keeps to no rules.
    pub fn receive(&self) -> io::Result<Message> {
        loop {
            match self.receive_with(|packet| self.socket.recv(packet)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                received => return received,
            }
        }
    }

    /// The next message, if there is one: fails with `WouldBlock` otherwise.
    pub fn receive_now(&self) -> io::Result<Message> {
        self.receive_with(|packet| socket::receive_now(&self.socket, packet))
    }

    fn receive_with(&self, receive: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<Message> {
        let mut packet = [0; 64];
        let len = receive(&mut packet)?;
        let packet = packet.get(..len).unwrap_or_default();
        if let Some(Report { call, thread }) = Report::parse(packet) {
            let what = format!("the sandbox stopped it: thread {thread} made system call {call}");
            return Err(io::Error::other(what));
        }
        match Message::decode(packet) {
            Some(message) => Ok(message),
            None if len == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            None => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// The socket, for messages before the first request.
    pub fn socket(&self) -> &UnixDatagram {
        &self.socket
    }
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Part of a slot, as system calls take it.
#[derive(Debug)]
pub struct Part<'a> {
    iovecs: [libc::iovec; 1],
    _link: &'a Link,
}

// SAFETY: the part is within the mapping that the link keeps alive, which is readable and writable, cannot shrink, and to
// which Rust has no references.
unsafe impl IoVecs for Part<'_> {
    fn iovecs(&self) -> &[libc::iovec] {
        &self.iovecs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_sides_have_the_same_slots_and_messages() {
        let (ours, theirs) = Ends::pair().unwrap();
        let (ours, theirs) = (ours.connect().unwrap(), theirs.connect().unwrap());
        ours.slot(7).unwrap().copy_from(b"request");
        let message = Message { slot: 7, len_bytes: 7, room_bytes: 100 };
        ours.send(message).unwrap();
        assert_eq!(theirs.receive().unwrap(), message);
        let mut bytes = [0; 7];
        theirs.slot(7).unwrap().copy_to(&mut bytes);
        assert_eq!(&bytes, b"request");
        assert!(theirs.slot(8).is_err());
        assert_eq!(theirs.receive_now().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        drop(ours);
        assert_eq!(theirs.receive().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_message_outside_of_the_slots_is_refused() {
        let (ours, theirs) = Ends::pair().unwrap();
        let link = ours.connect().unwrap();
        for (slot, len_bytes) in [(8, 0), (u32::MAX - 1, 0), (0, SLOT_BYTES as u32 + 1), (0, u32::MAX)] {
            theirs.socket.send(&Message { slot, len_bytes, room_bytes: 0 }.encode()).unwrap();
            assert_eq!(link.receive_now().unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        theirs.socket.send(&[0; 13]).unwrap();
        assert_eq!(link.receive_now().unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn the_memory_cannot_be_shrunk() {
        let (ours, _theirs) = Ends::pair().unwrap();
        assert!(rustix::fs::ftruncate(&ours.memory, 4096).is_err());
    }
}
