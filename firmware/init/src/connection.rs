//! Connections to and from the host, and messages on them.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use husk_protocol::frame::{self, Message, Reader};
use husk_protocol::{HELLO_BYTES, Hello, MAIN_SESSION, PORT, Role, ToGuest, ToHost};
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
/// How long the host of a restored machine may take to listen.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an attempt to connect may take meanwhile: if the machine is saved and restored again, its request is lost.
const ATTEMPT_TIMEOUT: Duration = Duration::from_secs(1);
const ATTEMPT_INTERVAL: Duration = Duration::from_millis(5);
/// As many as the host side supports: the kernel resets connections beyond the backlog.
const BACKLOG: i32 = 512;

fn vsock() -> Result<OwnedFd, Failure> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    socket(AddressFamily::Vsock, SockType::Stream, flags, None).context("create a vsock socket")
}

/// Connections of the main session to the host that are being established.
pub struct Connecting {
    sockets: Vec<(Role, OwnedFd)>,
    timeout: Duration,
}

impl Connecting {
    /// Starts a connection for each role.
    pub fn start(roles: impl IntoIterator<Item = Role>) -> Result<Connecting, Failure> {
        Connecting::within(CONNECT_TIMEOUT, roles)
    }

    fn within(timeout: Duration, roles: impl IntoIterator<Item = Role>) -> Result<Connecting, Failure> {
        let sockets = roles.into_iter().map(|role| Ok((role, connect(timeout)?))).collect::<Result<_, Failure>>()?;
        Ok(Connecting { sockets, timeout })
    }

    /// Waits until all of them are established, and sends their hellos.
    pub fn complete(self) -> Result<Vec<(Role, OwnedFd)>, Failure> {
        // The host takes each role once, so that it must not be told of any before all are there.
        self.sockets.iter().try_for_each(|(_, socket)| await_connection(socket, self.timeout))?;
        self.sockets.iter().try_for_each(|(role, socket)| greet(socket, *role))?;
        Ok(self.sockets)
    }
}

/// Connects after the machine was restored, to a host that may not listen yet. This may block for as long as that takes:
/// everything that init does goes through the host.
pub fn connect_again(roles: &[Role]) -> Result<Vec<(Role, OwnedFd)>, Failure> {
    let started = Instant::now();
    loop {
        let connected = Connecting::within(ATTEMPT_TIMEOUT, roles.iter().copied()).and_then(Connecting::complete);
        if connected.is_ok() || started.elapsed() > RECONNECT_TIMEOUT {
            return connected;
        }
        std::thread::sleep(ATTEMPT_INTERVAL);
    }
}

/// Starts a nonblocking connection to the host.
fn connect(timeout: Duration) -> Result<OwnedFd, Failure> {
    let socket = vsock()?;
    sys::set_connect_timeout(socket.as_fd(), timeout).context("set up a vsock socket")?;
    match connect_call(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, PORT)) {
        Ok(()) | Err(Errno::EINPROGRESS) => Ok(socket),
        Err(error) => Err(error).context("connect to the host"),
    }
}

fn await_connection(socket: &OwnedFd, timeout: Duration) -> Result<(), Failure> {
    let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
    let answers = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], timeout).context("wait for the host")?;
    match if answers == 0 { libc::ETIMEDOUT } else { getsockopt(socket, sockopt::SocketError).unwrap_or(0) } {
        0 => Ok(()),
        error => Err(Errno::from_raw(error)).context("connect to the host"),
    }
}

fn greet(socket: &OwnedFd, role: Role) -> Result<(), Failure> {
    match write(socket, &Hello { session: MAIN_SESSION, role }.to_bytes()) {
        Ok(HELLO_BYTES) => Ok(()),
        Ok(_) => Err(Failure::new("the host does not listen")),
        Err(error) => Err(error).context("send the handshake to the host"),
    }
}

/// Whether `error` of a connection means that the machine was restored, and its connections lost. The end of a connection by
/// the host is another error, or none.
pub fn is_cut(error: Errno) -> bool {
    matches!(error, Errno::ECONNRESET | Errno::ENOTCONN)
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
#[derive(Default)]
pub struct ControlConnection {
    socket: Option<OwnedFd>,
    is_cut: bool,
    reader: Reader,
    out: Vec<u8>,
}

impl ControlConnection {
    pub fn new(socket: OwnedFd) -> ControlConnection {
        ControlConnection { socket: Some(socket), ..ControlConnection::default() }
    }

    /// Whether the host is still connected.
    pub fn is_open(&self) -> bool {
        self.socket.is_some()
    }

    /// Whether the connection was lost because the machine was restored.
    pub fn is_cut(&self) -> bool {
        self.is_cut
    }

    /// The events to wait for when [`ControlConnection::next`] has returned `None`.
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

    /// Sends queued messages, and returns the next message received.
    pub fn next(&mut self) -> Option<ToGuest> {
        self.flush();
        loop {
            match self.reader.take() {
                Ok(None) if self.receive() => {}
                Ok(message) => return message,
                Err(_) => {
                    self.socket = None;
                    return None;
                }
            }
        }
    }

    /// Returns whether data was received.
    fn receive(&mut self) -> bool {
        let mut buffer = [0; 4096];
        loop {
            let Some(socket) = &self.socket else { return false };
            match read(socket, &mut buffer) {
                Ok(count) if count > 0 => {
                    self.reader.push(buffer.get(..count).unwrap_or_default());
                    return true;
                }
                Err(Errno::EAGAIN) => return false,
                Err(Errno::EINTR) => {}
                ended => self.close(ended.err()),
            }
        }
    }

    fn close(&mut self, error: Option<Errno>) {
        self.is_cut = error.is_some_and(is_cut);
        self.socket = None;
    }

    fn flush(&mut self) {
        while let Some(socket) = self.socket.as_ref().filter(|_| !self.out.is_empty()) {
            match write(socket, &self.out) {
                Ok(count) => drop(self.out.drain(..count)),
                Err(Errno::EAGAIN) => return,
                Err(Errno::EINTR) => {}
                Err(error) => self.close(Some(error)),
            }
        }
    }
}

/// Truncates `text` to fit into a message.
pub fn shortened(text: &str) -> String {
    text.chars().take(ToHost::MAX_BYTES / 8).collect()
}
