//! Runs an additional process in a running machine: sends its description, connects its streams through the machine's
//! vsock socket and waits for its exit. It may be the first of a container.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use husk_protocol::frame::{self, Reader};
use husk_protocol::{Container, Hello, PORT, Process, Role, ToGuest, ToHost};

use crate::sys;

mod run;

pub use run::{End, Moments, run_contained, run_session};

/// How long the guest may take to accept a connection. It may be busy or gone.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// How long the guest may take to admit another process, which may require others to exit first.
const ADMISSION_TIMEOUT: Duration = Duration::from_secs(120);
/// The delay before the first retry of a refused connection. It doubles up to the maximum.
const RETRY_FIRST: Duration = Duration::from_millis(5);
const RETRY_LAST: Duration = Duration::from_millis(320);
/// The maximum length of the reply to a connection request.
const ANSWER_MAX_BYTES: usize = 32;

/// A process that the guest has admitted. A process with streams starts once they are connected.
#[derive(Debug)]
pub struct Admitted<'a> {
    vsock: &'a Path,
    id: u64,
    control: UnixStream,
    reader: Reader,
    roles: Vec<Role>,
    on_terminal: bool,
    connect_timeout: Duration,
}

/// The connections of a process: one per stream and a control connection.
#[derive(Debug)]
pub struct Connections {
    id: u64,
    control: UnixStream,
    reader: Reader,
    streams: Vec<(Role, UnixStream)>,
    on_terminal: bool,
}

/// Sends the description of `process` to the guest whose vsock socket is at `vsock`, and waits for admission: the guest
/// limits the number of processes, and the vsock device the number of connections.
pub fn request_start<'a>(vsock: &'a Path, process: &Process) -> Result<Admitted<'a>> {
    request_start_within(vsock, process, CONNECT_TIMEOUT + ADMISSION_TIMEOUT)
}

/// The same for a guest that has to accept each connection, and to admit the process, within `timeout`.
pub fn request_start_within<'a>(vsock: &'a Path, process: &Process, timeout: Duration) -> Result<Admitted<'a>> {
    request(vsock, process, &ToGuest::Start(Box::new(process.clone())), timeout)
}

/// The same for a container and its first process.
pub fn request_creation<'a>(vsock: &'a Path, container: Container, process: &Process) -> Result<Admitted<'a>> {
    let message = ToGuest::Create(Box::new(container), Box::new(process.clone()));
    request(vsock, process, &message, CONNECT_TIMEOUT + ADMISSION_TIMEOUT)
}

fn request<'a>(vsock: &'a Path, process: &Process, message: &ToGuest, timeout: Duration) -> Result<Admitted<'a>> {
    let connect_timeout = CONNECT_TIMEOUT.min(timeout);
    let deadline = Instant::now() + connect_timeout;
    let mut id = [0; 8];
    sys::getrandom(&mut id).context("generate a session ID")?;
    // Never the ID of the machine's main session.
    let id = u64::from_le_bytes(id) | 1;
    let mut control = connect(vsock, Hello { session: id, role: Role::Control }, deadline)?;
    let mut start = Vec::new();
    frame::write(message, &mut start).context("describe the process")?;
    control.write_all(&start).context("send the process to the guest")?;
    let reader = await_admission(&mut control, Instant::now() + ADMISSION_TIMEOUT.min(timeout))?;
    let mut roles = Vec::new();
    if !process.detached {
        roles.push(Role::Stdout);
        roles.extend(process.stdin.then_some(Role::Stdin));
        roles.extend(process.terminal.is_none().then_some(Role::Stderr));
    }
    Ok(Admitted { vsock, id, control, reader, roles, on_terminal: process.terminal.is_some(), connect_timeout })
}

impl Admitted<'_> {
    /// Connects the streams, which starts the process.
    pub fn connect(self) -> Result<Connections> {
        let Admitted { vsock, id, control, reader, roles, on_terminal, connect_timeout } = self;
        let deadline = Instant::now() + connect_timeout;
        let connected = |role| Ok((role, connect(vsock, Hello { session: id, role }, deadline)?));
        let streams = roles.into_iter().map(connected).collect::<Result<Vec<_>>>()?;
        Ok(Connections { id, control, reader, streams, on_terminal })
    }
}

impl Connections {
    /// Removes the connection of a stream so that the caller can use it in place of this process's own stream.
    pub fn take(&mut self, role: Role) -> Result<UnixStream> {
        let place =
            self.streams.iter().position(|(other, _)| *other == role).context("the process has no such stream")?;
        Ok(self.streams.swap_remove(place).1)
    }

    /// Waits for the exit of a process whose streams have all been taken.
    pub fn end(mut self) -> Result<ToHost> {
        self.end_by(None)
    }

    /// Waits until a process without streams has started or failed to start.
    pub fn started(self) -> Result<ToHost> {
        self.await_message(|message| !matches!(message, ToHost::Admitted | ToHost::AskTime))
    }

    /// The same as [`Connections::end`] with a deadline, after which the error is that of a read that would block.
    pub fn end_by(&mut self, deadline: Option<Instant>) -> Result<ToHost> {
        let is_end = |message: &ToHost| {
            !matches!(message, ToHost::Admitted | ToHost::Created(_) | ToHost::Started(_) | ToHost::AskTime)
        };
        await_message(&mut self.control, &mut self.reader, deadline, is_end)
    }

    /// Sends the process a signal.
    pub fn signal(&mut self, number: u8) -> Result<()> {
        let mut message = Vec::new();
        frame::write(&ToGuest::Signal(number), &mut message).context("describe a signal")?;
        self.control.write_all(&message).context("send a signal to the guest")
    }

    fn await_message(mut self, is_it: impl Fn(&ToHost) -> bool) -> Result<ToHost> {
        await_message(&mut self.control, &mut self.reader, None, is_it)
    }
}

/// Waits for the guest to admit the process. Returns the reader with any bytes received after that message.
fn await_admission(control: &mut UnixStream, deadline: Instant) -> Result<Reader> {
    let mut reader = Reader::default();
    let message = await_message(control, &mut reader, Some(deadline), |message| *message == ToHost::Admitted);
    message.map_err(|error| {
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

/// Waits for a message, until `deadline` if there is one, whatever else the guest sends in the meantime.
fn await_message(
    control: &mut UnixStream,
    reader: &mut Reader,
    deadline: Option<Instant>,
    is_it: impl Fn(&ToHost) -> bool,
) -> Result<ToHost> {
    let mut buffer = [0; 4096];
    loop {
        match reader.take::<ToHost>()? {
            Some(message) if is_it(&message) => return Ok(message),
            Some(_) => continue,
            None => {}
        }
        if deadline.is_some() {
            set_timeouts(control, deadline)?;
        }
        match control.read(&mut buffer) {
            Ok(0) => bail!("the machine has exited, and the process with it"),
            Ok(count) => reader.push(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error).context("read from the guest"),
        }
    }
}

/// Makes reads and writes fail after `deadline`. Without a deadline they block indefinitely.
fn set_timeouts(stream: &UnixStream, deadline: Option<Instant>) -> io::Result<()> {
    // A zero timeout would mean no timeout.
    let left = deadline.map(|by| by.saturating_duration_since(Instant::now()).max(Duration::from_millis(1)));
    stream.set_read_timeout(left)?;
    stream.set_write_timeout(left)
}

/// Whether the guest did not answer in time.
pub(super) fn is_timeout(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// Connects to the guest's init with Firecracker's vsock handshake and sends `hello`. Refused connections are retried
/// until `deadline`, because all connections may be in use.
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

/// The error for a connection that is closed before it is established. A missing vsock socket is a different error.
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

/// A connection that is closed immediately may fail while it is written to or before everything is read.
fn as_refused(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => REFUSED.into(),
        _ => error,
    }
}

/// Reads a line byte by byte, because the bytes after it belong to the guest's stream.
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
            let mut message = vec![0; "CONNECT 1024\n".len()];
            stream.read_exact(&mut message).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            stream.read_to_end(&mut message).unwrap();
            message
        });
        (dir, path, guest)
    }

    fn soon() -> Instant {
        Instant::now() + CONNECT_TIMEOUT
    }

    #[test]
    fn a_connection_is_requested_and_sends_its_hello() {
        let hello = Hello { session: 77, role: Role::Stdout };
        let (_dir, path, guest) = guest("OK 1073741824\n");
        drop(connect(&path, hello, soon()).unwrap());
        assert_eq!(guest.join().unwrap(), [b"CONNECT 1024\n", &hello.to_bytes()[..]].concat());
    }

    #[test]
    fn a_guest_that_refuses_or_is_gone_is_reported_in_one_line() {
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
    fn a_refused_connection_is_retried_until_the_deadline() {
        let hello = Hello { session: 77, role: Role::Control };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = thread::spawn(move || {
            // Closed immediately, closed after its reply, and then accepted.
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
        // The last connection receives no reply.
        drop(UnixStream::connect(&path).unwrap());
        guest.join().unwrap();
    }

    #[test]
    fn streams_are_connected_after_admission() {
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
            let mut bytes = Vec::new();
            for message in [ToHost::Admitted, ToHost::Started(7), ToHost::Signaled(34)] {
                frame::write(&message, &mut bytes).unwrap();
            }
            control.write_all(&bytes).unwrap();
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
        let connections = request_start(&path, &process).unwrap().connect().unwrap();
        assert_eq!(guest.join().unwrap(), (Role::Control, vec![Role::Stdout, Role::Stdin, Role::Stderr]));
        assert_eq!(connections.end().unwrap(), ToHost::Signaled(34));
    }

    /// A guest that admits every connection, and sends these messages on the first one, again and again.
    fn talker(path: &Path, message: ToHost) -> thread::JoinHandle<()> {
        let listener = UnixListener::bind(path).unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 13]).unwrap();
            stream.write_all(b"OK 1\n").unwrap();
            let mut bytes = Vec::new();
            frame::write(&message, &mut bytes).unwrap();
            while stream.write_all(&bytes).is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        })
    }

    #[test]
    fn a_guest_that_keeps_talking_does_not_put_admission_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vsock");
        let guest = talker(&path, ToHost::AskTime);
        let mut control = connect(&path, Hello { session: 77, role: Role::Control }, soon()).unwrap();
        let begun = Instant::now();
        let error = await_admission(&mut control, begun + Duration::from_millis(300)).unwrap_err();
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert!(format!("{error:#}").contains("it is not responding"), "{error:#}");
        drop(control);
        guest.join().unwrap();
    }

    #[test]
    fn an_end_before_admission_is_no_admission() {
        let dir = tempfile::tempdir().unwrap();
        let others = [ToHost::Exited(0), ToHost::Started(1), ToHost::Failed { message: "x".repeat(8000), code: 0 }];
        for (index, message) in others.into_iter().enumerate() {
            let path = dir.path().join(index.to_string());
            let guest = talker(&path, message);
            let mut control = connect(&path, Hello { session: 77, role: Role::Control }, soon()).unwrap();
            let error = await_admission(&mut control, Instant::now() + Duration::from_millis(100)).unwrap_err();
            assert!(format!("{error:#}").contains("it is not responding"), "{error:#}");
            drop(control);
            guest.join().unwrap();
        }
    }
}
