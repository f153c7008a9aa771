//! Connections to and from the host, and messages on them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use husk_protocol::frame::{self, Message, Reader};
use husk_protocol::{HELLO_BYTES, Hello, PORT, ToGuest, ToHost};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, connect as connect_call, getpeername, getsockopt,
    listen as listen_call, socket, sockopt,
};
use nix::unistd::{read, write};

use crate::errors::{Context, Failure};
use crate::sys;

/// The host's CID.
const HOST_CID: u32 = 2;
/// This machine's own CID.
const ANY_CID: u32 = u32::MAX;
/// How long a busy host may take to respond.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// As many as the host side supports: the kernel resets connections beyond the backlog.
const BACKLOG: i32 = 512;

fn vsock() -> Result<OwnedFd, Failure> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Vsock, SockType::Stream, flags, None).context("create a vsock socket")
}

/// Starts a nonblocking connection to the host.
pub fn connect() -> Result<OwnedFd, Failure> {
    let socket = vsock()?;
    sys::set_connect_timeout(socket.as_fd(), CONNECT_TIMEOUT).context("set up a vsock socket")?;
    match connect_call(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, PORT)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error).context("connect to the host"),
    }
}

/// Waits until the connection is established, and sends its hello.
pub fn complete(socket: &OwnedFd, hello: Hello) -> Result<(), Failure> {
    let timeout = PollTimeout::try_from(CONNECT_TIMEOUT).unwrap_or(PollTimeout::MAX);
    let answers = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], timeout).context("wait for the host")?;
    let error = if answers == 0 { libc::ETIMEDOUT } else { getsockopt(socket, sockopt::SocketError).unwrap_or(0) };
    if error != 0 {
        return Err(Errno::from_raw(error)).context("connect to the host");
    }
    match write(socket, &hello.to_bytes()) {
        Ok(HELLO_BYTES) => Ok(()),
        Ok(_) => Err(Failure::new("the host does not listen")),
        Err(error) => Err(error).context("send the handshake to the host"),
    }
}

/// Listens for connections from the host.
pub fn listen() -> Result<OwnedFd, Failure> {
    let socket = vsock()?;
    bind(socket.as_raw_fd(), &VsockAddr::new(ANY_CID, PORT)).context("bind to the vsock port")?;
    listen_call(&socket, Backlog::new(BACKLOG).unwrap_or(Backlog::MAXCONN)).context("listen to the host")?;
    Ok(socket)
}

/// Accepts a pending connection of the host. Connections from programs in this machine are rejected.
pub fn accept(listener: &OwnedFd) -> Option<OwnedFd> {
    loop {
        match sys::accept(listener.as_fd()) {
            Ok(socket) => {
                let peer = getpeername::<VsockAddr>(socket.as_raw_fd());
                if peer.is_ok_and(|peer| peer.cid() == HOST_CID) {
                    return Some(socket);
                }
            }
            Err(Errno::EINTR | Errno::ECONNABORTED) => {}
            Err(_) => return None,
        }
    }
}

/// A connection from the host that has not sent its complete hello.
pub struct PendingConnection {
    pub socket: OwnedFd,
    bytes: [u8; HELLO_BYTES],
    have: usize,
}

impl PendingConnection {
    pub fn new(socket: OwnedFd) -> PendingConnection {
        PendingConnection { socket, bytes: [0; HELLO_BYTES], have: 0 }
    }

    /// Returns the hello once it is complete; `Err` for an invalid connection.
    pub fn advance(&mut self) -> Result<Option<Hello>, ()> {
        while let Some(rest) = self.bytes.get_mut(self.have..).filter(|rest| !rest.is_empty()) {
            match read(&self.socket, rest) {
                Ok(count) if count > 0 => self.have += count,
                Err(Errno::EAGAIN) => return Ok(None),
                Err(Errno::EINTR) => {}
                _ => return Err(()),
            }
        }
        Hello::from_bytes(self.bytes).map(Some).map_err(|_| ())
    }
}

/// A control connection.
pub struct ControlConnection {
    socket: Option<OwnedFd>,
    reader: Reader,
    out: Vec<u8>,
}

impl ControlConnection {
    pub fn new(socket: OwnedFd) -> ControlConnection {
        ControlConnection { socket: Some(socket), reader: Reader::default(), out: Vec::new() }
    }

    /// Waits until the connection is established, if it is not yet.
    pub fn complete(&self, hello: Hello) -> Result<(), Failure> {
        self.socket.as_ref().map_or(Ok(()), |socket| complete(socket, hello))
    }

    /// Whether the host is still connected.
    pub fn is_open(&self) -> bool {
        self.socket.is_some()
    }

    /// The events to wait for before the next [`ControlConnection::advance`].
    pub fn awaits(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let events = if self.out.is_empty() { PollFlags::POLLIN } else { PollFlags::POLLIN | PollFlags::POLLOUT };
        self.socket.as_ref().map(|socket| (socket.as_fd(), events))
    }

    /// Sends a message to the host, or queues it.
    pub fn say(&mut self, message: &ToHost) {
        // Only texts can be too long, and those are truncated where they are created.
        let _ = frame::write(message, &mut self.out);
        self.flush();
    }

    /// Sends queued messages, and returns the messages received.
    pub fn advance(&mut self) -> Vec<ToGuest> {
        self.flush();
        let mut messages = Vec::new();
        let mut buffer = [0; 4096];
        while let Some(socket) = &self.socket {
            match read(socket, &mut buffer) {
                Ok(count) if count > 0 => self.reader.push(buffer.get(..count).unwrap_or_default()),
                Err(Errno::EAGAIN) => break,
                Err(Errno::EINTR) => continue,
                _ => self.socket = None,
            }
            loop {
                match self.reader.take() {
                    Ok(Some(message)) => messages.push(message),
                    Ok(None) => break,
                    Err(_) => {
                        self.socket = None;
                        break;
                    }
                }
            }
        }
        messages
    }

    fn flush(&mut self) {
        while let Some(socket) = self.socket.as_ref().filter(|_| !self.out.is_empty()) {
            match write(socket, &self.out) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(_) => self.socket = None,
            }
        }
    }
}

/// Truncates `text` to fit into a message.
pub fn shortened(text: &str) -> String {
    text.chars().take(ToHost::MAX_BYTES / 8).collect()
}
