//! The control connection of a session: messages in both directions, and the hello before them.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::Result;
use husk_protocol::frame::{self, Reader};
use husk_protocol::{HELLO_BYTES, Hello, ToGuest, ToHost};

/// The maximum size of messages queued for a guest that does not read them.
pub const UNSENT_MAX_BYTES: usize = 16 << 10;

/// A connection, whose stream does not block.
pub struct ControlConnection {
    stream: UnixStream,
    reader: Reader,
    unsent: Vec<u8>,
    has_ended: bool,
}

impl ControlConnection {
    /// Creates a connection over `stream`.
    pub fn new(stream: UnixStream) -> ControlConnection {
        ControlConnection { stream, reader: Reader::default(), unsent: Vec::new(), has_ended: false }
    }

    /// Whether the guest has disconnected.
    pub fn has_ended(&self) -> bool {
        self.has_ended
    }

    /// The size of queued messages in bytes.
    #[cfg(test)]
    pub fn unsent_bytes(&self) -> usize {
        self.unsent.len()
    }

    /// The messages that have arrived. One read per call bounds the memory and time that a guest that keeps sending can use:
    /// the stream stays readable while there is more.
    pub fn receive(&mut self) -> Result<Vec<ToHost>> {
        let mut messages = Vec::new();
        let mut buffer = [0; 4096];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.has_ended = true,
            Ok(count) => {
                self.reader.push(buffer.get(..count).unwrap_or_default());
                while let Some(message) = self.reader.take::<ToHost>()? {
                    messages.push(message);
                }
            }
            Err(error) => self.has_ended = !matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
        Ok(messages)
    }

    /// Queues a message, unless too much is queued already.
    pub fn queue(&mut self, message: &ToGuest) {
        if self.unsent.len() < UNSENT_MAX_BYTES {
            // All messages to the guest are short, except for a run, which was checked.
            let _ = frame::write(message, &mut self.unsent);
        }
    }

    /// Sends queued messages. Returns whether all are sent; the others are sent when there is room.
    pub fn flush(&mut self) -> bool {
        while !self.unsent.is_empty() {
            match self.stream.write(&self.unsent) {
                Ok(count) => drop(self.unsent.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // A disconnect is detected by reading.
                Err(_) => return false,
            }
        }
        true
    }
}

impl AsRawFd for ControlConnection {
    fn as_raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
}

/// Returns the hello once it is complete, or `None` for a connection that is invalid.
pub fn read_hello(stream: &mut impl Read, received: &mut Vec<u8>) -> Option<Option<Hello>> {
    let mut buffer = [0; HELLO_BYTES];
    loop {
        if let Some(bytes) = received.first_chunk::<HELLO_BYTES>() {
            return Hello::from_bytes(*bytes).ok().map(Some);
        }
        let rest = buffer.get_mut(received.len()..)?;
        match stream.read(rest) {
            Ok(0) => return None,
            Ok(count) => received.extend_from_slice(rest.get(..count)?),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Some(None),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}
