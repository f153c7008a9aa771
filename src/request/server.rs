//! The server side of the control socket. It never blocks.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context, Result};
use husk_protocol::frame::{self, Reader};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::{Reply, Request, VERSION, Versioned};
use crate::sys::socket;

/// Only the owner of the machine can connect.
const MODE: u32 = 0o600;
/// The maximum number of open connections; further ones wait in the backlog.
const CONNECTIONS_MAX: usize = 128;
const LISTENER: u64 = u64::MAX;

/// Identifies the connection of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller(u64);

/// The socket and its connections. Its descriptor is readable when there are events to handle.
#[derive(Debug)]
pub struct Server {
    epoll: Epoll,
    listener: UnixListener,
    listening: bool,
    connections: Vec<Connection>,
    next: u64,
}

#[derive(Debug)]
struct Connection {
    caller: Caller,
    stream: UnixStream,
    reader: Reader,
    /// Whether the request was received.
    asked: bool,
    /// Whether the reply is sent when the machine has ended.
    waits: bool,
}

impl Server {
    /// Listens at `path`.
    pub fn listen(path: &Path) -> Result<Server> {
        let listener = socket::listen(path, MODE).with_context(|| format!("listen on {}", path.display()))?;
        let server = Server { epoll: Epoll::new()?, listener, listening: true, connections: Vec::new(), next: 0 };
        server.watch(server.listener.as_raw_fd(), LISTENER)?;
        Ok(server)
    }

    fn watch(&self, fd: RawFd, mark: u64) -> io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN | EventSet::READ_HANG_UP, mark))
    }

    /// Returns the received requests. Each must be answered with one of the other methods.
    pub fn requests(&mut self) -> Vec<(Caller, Request)> {
        self.accept();
        let mut requests = Vec::new();
        let mut index = 0;
        while let Some(connection) = self.connections.get_mut(index) {
            match connection.advance() {
                Progress::Nothing => index += 1,
                Progress::PendingRequest(request) => {
                    requests.push((connection.caller, request));
                    index += 1;
                }
                Progress::Gone => drop(self.connections.swap_remove(index)),
                Progress::Wrong(why) => {
                    let caller = connection.caller;
                    self.answer(caller, &Reply::Refused(why));
                }
            }
        }
        self.listen_again();
        requests
    }

    fn accept(&mut self) {
        while self.connections.len() < CONNECTIONS_MAX {
            match self.listener.accept() {
                Ok((stream, _)) => {
                    let caller = Caller(self.next);
                    self.next += 1;
                    if stream.set_nonblocking(true).and_then(|()| self.watch(stream.as_raw_fd(), caller.0)).is_ok() {
                        let reader = Reader::default();
                        self.connections.push(Connection { caller, stream, reader, asked: false, waits: false });
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
        // New connections wait in the backlog and must not wake this thread in the meantime.
        if self.listening {
            let _ = self.epoll.ctl(ControlOperation::Delete, self.listener.as_raw_fd(), EpollEvent::default());
            self.listening = false;
        }
    }

    fn listen_again(&mut self) {
        if !self.listening && self.connections.len() < CONNECTIONS_MAX {
            self.listening = self.watch(self.listener.as_raw_fd(), LISTENER).is_ok();
        }
    }

    /// Sends the reply and closes the connection.
    pub fn answer(&mut self, caller: Caller, reply: &Reply) {
        if let Some(stream) = self.take(caller) {
            say(&stream, reply);
        }
    }

    /// Defers the reply until the machine has ended.
    pub fn answer_at_end(&mut self, caller: Caller) {
        let asked = self.connections.iter_mut().filter(|connection| connection.caller == caller);
        asked.for_each(|connection| connection.waits = true);
    }

    /// Confirms the request and hands the connection to the caller of this method.
    pub fn hand_over(&mut self, caller: Caller) -> Option<UnixStream> {
        let stream = self.take(caller)?;
        say(&stream, &Reply::Done);
        Some(stream)
    }

    /// Notifies all waiting clients that the machine has ended with `code`.
    pub fn notify_end(&mut self, code: u8) {
        self.requests().into_iter().for_each(|(caller, request)| match request {
            Request::Wait => self.answer_at_end(caller),
            _ => self.answer(caller, &Reply::Refused("the machine has just exited".into())),
        });
        for connection in self.connections.drain(..).filter(|connection| connection.waits) {
            say(&connection.stream, &Reply::Ended(code));
        }
    }

    fn take(&mut self, caller: Caller) -> Option<UnixStream> {
        let index = self.connections.iter().position(|connection| connection.caller == caller)?;
        let stream = self.connections.swap_remove(index).stream;
        let _ = self.epoll.ctl(ControlOperation::Delete, stream.as_raw_fd(), EpollEvent::default());
        Some(stream)
    }
}

impl AsRawFd for Server {
    fn as_raw_fd(&self) -> RawFd {
        self.epoll.as_raw_fd()
    }
}

enum Progress {
    Nothing,
    PendingRequest(Request),
    Gone,
    Wrong(String),
}

impl Connection {
    fn advance(&mut self) -> Progress {
        let mut buffer = [0; 1024];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => return Progress::Gone,
                // A connection carries one request; further data is ignored.
                Ok(_) if self.asked => continue,
                Ok(count) => self.reader.push(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Progress::Nothing,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return Progress::Gone,
            }
            match self.reader.take::<Versioned>() {
                Ok(None) => {}
                Ok(Some(Versioned { version: VERSION, request })) => {
                    self.asked = true;
                    return Progress::PendingRequest(request);
                }
                Ok(Some(_)) | Err(_) => {
                    return Progress::Wrong(
                        "the machine was started by a different version of husk: use that version".into(),
                    );
                }
            }
        }
    }
}

/// Replies fit into any socket buffer; a client that leaves no room for one does not get it.
fn say(mut stream: &UnixStream, reply: &Reply) {
    let mut bytes = Vec::new();
    if frame::write(reply, &mut bytes).is_ok() {
        let _ = stream.write_all(&bytes);
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::super::client;
    use super::*;

    fn server() -> (tempfile::TempDir, std::path::PathBuf, Server) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("control");
        let server = Server::listen(&path).unwrap();
        (dir, path, server)
    }

    fn next(server: &mut Server) -> (Caller, Request) {
        loop {
            let mut requests = server.requests();
            if let Some(request) = requests.pop() {
                assert!(requests.is_empty());
                return request;
            }
            let mut events = [EpollEvent::default()];
            server.epoll.wait(-1, &mut events).unwrap();
        }
    }

    #[test]
    fn a_request_is_answered_on_its_own_connection() {
        let (_dir, path, mut server) = server();
        let asking = thread::spawn(move || {
            [Request::Stats, Request::Pause].map(|request| client::send(&path, &request).unwrap())
        });
        let (caller, request) = next(&mut server);
        assert_eq!(request, Request::Stats);
        server.answer(caller, &Reply::Stats(Stats::default()));
        let (caller, request) = next(&mut server);
        assert_eq!(request, Request::Pause);
        server.answer(caller, &Reply::Refused("no".into()));
        assert_eq!(asking.join().unwrap(), [Reply::Stats(Stats::default()), Reply::Refused("no".into())]);
    }
    use super::super::Stats;

    #[test]
    fn waiting_clients_are_notified_of_the_end_and_disconnected_ones_dropped() {
        let (_dir, path, mut server) = server();
        let waiting: Vec<_> = (0..3)
            .map(|_| {
                let path = path.clone();
                thread::spawn(move || client::send(&path, &Request::Wait).unwrap())
            })
            .collect();
        drop(UnixStream::connect(&path).unwrap());
        let mut waiters = 0;
        while waiters < 3 {
            for (caller, _) in server.requests() {
                server.answer_at_end(caller);
                waiters += 1;
            }
            thread::sleep(Duration::from_millis(1));
        }
        server.notify_end(7);
        waiting.into_iter().for_each(|waiter| assert_eq!(waiter.join().unwrap(), Reply::Ended(7)));
        assert!(server.connections.is_empty());
    }

    #[test]
    fn invalid_requests_and_other_versions_are_rejected() {
        let (_dir, path, mut server) = server();
        let mut other = Vec::new();
        frame::write(&Versioned { version: 9, request: Request::Wait }, &mut other).unwrap();
        for bytes in [&other[..], &[0xff; 64], &[1, 0, 0, 0, 99]] {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(bytes).unwrap();
            while !server.requests().is_empty() || server.connections.is_empty() && server.next == 0 {}
            server.requests();
            let mut answer = Vec::new();
            stream.read_to_end(&mut answer).unwrap();
            assert!(String::from_utf8_lossy(&answer).contains("a different version"));
        }
    }

    #[test]
    fn connections_beyond_the_limit_wait() {
        let (_dir, path, mut server) = server();
        let idle: Vec<_> = (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        server.requests();
        assert_eq!(server.connections.len(), CONNECTIONS_MAX);
        let late = thread::spawn(move || client::send(&path, &Request::Pause).unwrap());
        thread::sleep(Duration::from_millis(20));
        assert!(server.requests().is_empty());
        drop(idle);
        let (caller, _) = next(&mut server);
        server.answer(caller, &Reply::Done);
        assert_eq!(late.join().unwrap(), Reply::Done);
    }
}
