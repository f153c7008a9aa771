//! One more process in a machine that runs: from its description to connections through the machine's socket, and to
//! its end.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use husk_protocol::frame::{self, Reader};
use husk_protocol::{Hello, PORT, Process, Role, ToGuest, ToHost};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::session::Session;
use crate::console::terminal::RawTerminal;
use crate::exit_latch::{ExitLatch, ExitReason};
use crate::sys::{self, SignalFd};
use crate::timings::Timings;

/// How long a guest may take to take a connection; it may be busy, and it may be gone.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long it may take to have room for one more process: others have to end for that.
const TURN_PATIENCE: Duration = Duration::from_secs(120);
/// Before a connection that was refused is tried again; doubled each time, up to the other.
const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_LAST: Duration = Duration::from_millis(320);
/// No answer to a request for a connection is longer.
const ANSWER_MAX_BYTES: usize = 32;

/// How a process that was added to a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// As its guest says.
    Told(ToHost),
    /// A signal to husk ended the session; the process may go on.
    Left(i32),
}

/// A process that is to start, for which the guest has room. One with streams starts when they are connected.
#[derive(Debug)]
pub struct Admitted<'a> {
    vsock: &'a Path,
    id: u64,
    control: UnixStream,
    reader: Reader,
    roles: Vec<Role>,
    on_terminal: bool,
}

/// The connections of a process that is to start: one for each of its streams, and one to talk about it.
#[derive(Debug)]
pub struct Connections {
    id: u64,
    control: UnixStream,
    reader: Reader,
    streams: Vec<(Role, UnixStream)>,
    on_terminal: bool,
}

/// Describes `process` to the guest whose sockets are at `vsock`, and waits for its turn: a guest runs so many at a
/// time, and a socket device has so many connections.
pub fn ask<'a>(vsock: &'a Path, process: &Process) -> Result<Admitted<'a>> {
    let deadline = Instant::now() + PATIENCE;
    let mut id = [0; 8];
    sys::getrandom(&mut id).context("generate a session ID")?;
    // Never the machine's own.
    let id = u64::from_le_bytes(id) | 1;
    let mut control = connect(vsock, Hello { session: id, role: Role::Control }, deadline)?;
    let mut start = Vec::new();
    frame::write(&ToGuest::Start(process.clone()), &mut start).context("describe the process")?;
    control.write_all(&start).context("send the process to the guest")?;
    let reader = await_turn(&mut control, Instant::now() + TURN_PATIENCE)?;
    let mut roles = Vec::new();
    if !process.detached {
        roles.push(Role::Stdout);
        roles.extend(process.stdin.then_some(Role::Stdin));
        roles.extend(process.terminal.is_none().then_some(Role::Stderr));
    }
    Ok(Admitted { vsock, id, control, reader, roles, on_terminal: process.terminal.is_some() })
}

impl Admitted<'_> {
    /// Connects the streams, which has the process start.
    pub fn connect(self) -> Result<Connections> {
        let Admitted { vsock, id, control, reader, roles, on_terminal } = self;
        let deadline = Instant::now() + PATIENCE;
        let connected = |role| Ok((role, connect(vsock, Hello { session: id, role }, deadline)?));
        let streams = roles.into_iter().map(connected).collect::<Result<Vec<_>>>()?;
        Ok(Connections { id, control, reader, streams, on_terminal })
    }
}

impl Connections {
    /// The connection of a stream, to be used instead of a stream of this process.
    pub fn take(&mut self, role: Role) -> Result<UnixStream> {
        let place =
            self.streams.iter().position(|(other, _)| *other == role).context("the process has no such stream")?;
        Ok(self.streams.swap_remove(place).1)
    }

    /// Waits for the end of a process whose streams were all taken.
    pub fn end(self) -> Result<ToHost> {
        self.hear(|said| !matches!(said, ToHost::Admitted | ToHost::Started(_) | ToHost::AskTime))
    }

    /// Waits until a process without streams runs, or has failed to.
    pub fn started(self) -> Result<ToHost> {
        self.hear(|said| !matches!(said, ToHost::Admitted | ToHost::AskTime))
    }

    fn hear(mut self, is_it: impl Fn(&ToHost) -> bool) -> Result<ToHost> {
        hear(&mut self.control, &mut self.reader, is_it)
    }
}

/// Waits until the guest says what is waited for. Returns what it has said beyond that.
fn await_turn(control: &mut UnixStream, deadline: Instant) -> Result<Reader> {
    let mut reader = Reader::default();
    let heard = set_timeouts(control, Some(deadline)).map_err(anyhow::Error::from);
    let heard = heard.and_then(|()| hear(control, &mut reader, |said| *said == ToHost::Admitted));
    heard.map_err(|error| {
        if is_timeout(&error) {
            anyhow::anyhow!(
                "start a process in the guest: it is not responding, or is running too many processes: try again later"
            )
        } else {
            error
        }
    })?;
    set_timeouts(control, None).context("set up the session")?;
    Ok(reader)
}

fn hear(control: &mut UnixStream, reader: &mut Reader, is_it: impl Fn(&ToHost) -> bool) -> Result<ToHost> {
    let mut buffer = [0; 4096];
    loop {
        match reader.take::<ToHost>()? {
            Some(said) if is_it(&said) => return Ok(said),
            Some(_) => continue,
            None => {}
        }
        match control.read(&mut buffer) {
            Ok(0) => bail!("the machine has exited, and the process with it"),
            Ok(count) => reader.push(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read from the guest"),
        }
    }
}

/// Has reads and writes fail when `deadline` has passed; without one they wait for ever.
fn set_timeouts(stream: &UnixStream, deadline: Option<Instant>) -> io::Result<()> {
    // None at all would be no limit.
    let left = deadline.map(|by| by.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    stream.set_read_timeout(left)?;
    stream.set_write_timeout(left)
}

fn is_timeout(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Connects to the guest's init as Firecracker's clients do, and says what for. What is refused is tried again until
/// `deadline`: it may be that all connections are in use.
fn connect(vsock: &Path, hello: Hello, deadline: Instant) -> Result<UnixStream> {
    let mut wait = RETRY_FIRST;
    loop {
        let error = match try_connect(vsock, hello, deadline) {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let refused = error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == REFUSED);
        if !refused || Instant::now() + wait > deadline {
            let error = if is_timeout(&error) { anyhow::anyhow!("it does not respond") } else { error };
            return Err(error.context("connect to the guest"));
        }
        std::thread::sleep(wait);
        wait = (2 * wait).min(RETRY_LAST);
    }
}

/// How it looks when a connection is closed before it is one. That the machine's socket itself is not there is another
/// error.
const REFUSED: io::ErrorKind = io::ErrorKind::UnexpectedEof;

fn try_connect(vsock: &Path, hello: Hello, deadline: Instant) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(vsock)?;
    set_timeouts(&stream, Some(deadline))?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).map_err(as_refused)?;
    if !read_line(&mut stream).map_err(as_refused)?.starts_with(b"OK ") {
        bail!("it refused the connection");
    }
    stream.write_all(&hello.to_bytes())?;
    set_timeouts(&stream, None)?;
    Ok(stream)
}

/// A connection that was closed at once may have been so before it was written to, or before all was read.
fn as_refused(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => REFUSED.into(),
        _ => error,
    }
}

/// A line, byte by byte: what follows it is the guest's.
fn read_line(stream: &mut UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < ANSWER_MAX_BYTES {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => line.extend(byte),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(line)
}

/// Stays with the process to its end, with this process's streams and `signals`. With `takes_keys` all keys of this
/// terminal are the process's.
pub fn stay(connections: Connections, signals: &SignalFd, takes_keys: bool) -> Result<End> {
    let Connections { id, control, reader: _, streams, on_terminal } = connections;
    // Before the streams have threads.
    let terminal = if takes_keys { RawTerminal::enter().context("set up the terminal")? } else { None };
    let mut session = Session::over(id, control, streams, on_terminal, Arc::new(Timings::new(Instant::now())))?;
    let epoll = Epoll::new().context("epoll")?;
    for fd in [session.as_raw_fd(), signals.as_raw_fd()] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).context("watch the session")?;
    }
    // There is no machine of ours that it could end.
    let exit_latch = ExitLatch::new()?;
    let end = loop {
        session.on_ready(&exit_latch)?;
        if let Some(end) = session.end().filter(|_| session.is_over()) {
            break Ok(End::Told(end.clone()));
        }
        match exit_latch.reason() {
            Some(ExitReason::Killed(signal)) => break Ok(End::Left(signal)),
            Some(reason) => break Err(anyhow::anyhow!("{reason}")),
            None if session.is_lost() && session.outputs_are_closed() => {
                break Err(anyhow::anyhow!("the machine has exited, and the process with it"));
            }
            None => {}
        }
        match epoll.wait(-1, &mut [EpollEvent::default(); 2]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error).context("wait for events"),
            _ => {}
        }
        while let Some(signal) = signals.read().context("read a signal")? {
            session.on_signal(signal, &exit_latch);
        }
    };
    session.disconnect();
    drop(terminal);
    end
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn guest(answer: &'static str) -> (tempfile::TempDir, std::path::PathBuf, thread::JoinHandle<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut said = vec![0; "CONNECT 1024\n".len()];
            stream.read_exact(&mut said).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            stream.read_to_end(&mut said).unwrap();
            said
        });
        (dir, path, guest)
    }

    fn soon() -> Instant {
        Instant::now() + PATIENCE
    }

    #[test]
    fn a_connection_is_asked_for_and_says_what_for() {
        let hello = Hello { session: 77, role: Role::Stdout };
        let (_dir, path, guest) = guest("OK 1073741824\n");
        drop(connect(&path, hello, soon()).unwrap());
        assert_eq!(guest.join().unwrap(), [b"CONNECT 1024\n", &hello.to_bytes()[..]].concat());
    }

    #[test]
    fn a_guest_that_refuses_or_is_gone_is_one_line() {
        let hello = Hello { session: 77, role: Role::Stdout };
        for answer in ["", "NO\n", "OK", &"O".repeat(64)] {
            let answer: &'static str = String::from(answer).leak();
            let (_dir, path, guest) = guest(answer);
            let error =
                format!("{:#}", connect(&path, hello, Instant::now() + Duration::from_millis(200)).unwrap_err());
            assert!(error.starts_with("connect to the guest: ") && !error.contains('\n'), "{error}");
            let _ = guest.join();
        }
    }

    #[test]
    fn what_is_refused_is_tried_again_and_not_for_ever() {
        let hello = Hello { session: 77, role: Role::Control };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = thread::spawn(move || {
            // Closed at once, closed when it has spoken, and then taken.
            drop(listener.accept().unwrap());
            listener.accept().unwrap().0.read_exact(&mut [0; 13]).unwrap();
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(b"OK 1\n").unwrap();
            stream.read_to_end(&mut Vec::new()).unwrap();
            listener
        });
        drop(connect(&path, hello, soon()).unwrap());
        let listener = guest.join().unwrap();
        let guest = thread::spawn(move || {
            while listener.accept().is_ok_and(|(mut stream, _)| stream.read(&mut [0]).is_ok_and(|count| count > 0)) {}
        });
        let error = connect(&path, hello, Instant::now() + Duration::from_millis(100)).unwrap_err();
        assert!(format!("{error:#}").starts_with("connect to the guest: "), "{error:#}");
        // Its last visitor says nothing.
        drop(UnixStream::connect(&path).unwrap());
        guest.join().unwrap();
    }

    #[test]
    fn a_process_has_its_streams_connected_when_it_has_its_turn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let accept = move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut hello = [0; husk_protocol::HELLO_BYTES];
            stream.read_exact(&mut [0; 13]).unwrap();
            stream.write_all(b"OK 1\n").unwrap();
            stream.read_exact(&mut hello).unwrap();
            (stream, Hello::from_bytes(hello).unwrap())
        };
        let guest = thread::spawn(move || {
            let (mut control, first) = accept();
            let mut said = Vec::new();
            for message in [ToHost::Admitted, ToHost::Started(7), ToHost::Signaled(34)] {
                frame::write(&message, &mut said).unwrap();
            }
            control.write_all(&said).unwrap();
            let roles: Vec<Role> = (0..3)
                .map(|_| accept())
                .map(|(_, hello)| hello)
                .map(|hello| {
                    assert_eq!(hello.session, first.session);
                    hello.role
                })
                .collect();
            (first.role, roles)
        });
        let process = Process { stdin: true, ..Process::default() };
        let connections = ask(&path, &process).unwrap().connect().unwrap();
        assert_eq!(guest.join().unwrap(), (Role::Control, vec![Role::Stdout, Role::Stdin, Role::Stderr]));
        assert_eq!(connections.end().unwrap(), ToHost::Signaled(34));
    }
}
