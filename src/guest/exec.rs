//! One more process in a machine that runs: from its description to connections through the machine's socket, and to its end.

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
use crate::machine::outcome::{Ending, Outcome};
use crate::machine::timings::Timings;
use crate::sys::{self, SignalFd};

/// How long a guest may take to take a connection; it may be busy, and it may be gone.
const PATIENCE: Duration = Duration::from_secs(30);
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

/// The connections of a process that is to start: one for each of its streams, and one to talk about it.
#[derive(Debug)]
pub struct Connections {
    id: u64,
    control: UnixStream,
    streams: Vec<(Role, UnixStream)>,
    on_terminal: bool,
}

/// Connects to the guest whose sockets are at `vsock`, and has it start `process`.
pub fn start(vsock: &Path, process: &Process) -> Result<Connections> {
    let mut id = [0; 8];
    sys::getrandom(&mut id).context("choose a number for the session")?;
    // Never the machine's own.
    let id = u64::from_le_bytes(id) | 1;
    let mut control = connect(vsock, Hello { session: id, role: Role::Control })?;
    let mut start = Vec::new();
    frame::write(&ToGuest::Start(process.clone()), &mut start).context("describe the process")?;
    control.write_all(&start).context("tell the guest what to start")?;
    let mut roles = Vec::new();
    if !process.detached {
        roles.push(Role::Stdout);
        roles.extend(process.stdin.then_some(Role::Stdin));
        roles.extend(process.terminal.is_none().then_some(Role::Stderr));
    }
    let connected = |role| Ok((role, connect(vsock, Hello { session: id, role })?));
    let streams = roles.into_iter().map(connected).collect::<Result<Vec<_>>>()?;
    Ok(Connections { id, control, streams, on_terminal: process.terminal.is_some() })
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
        self.hear(|said| !matches!(said, ToHost::Started(_)))
    }

    /// Waits until a process without streams runs, or has failed to.
    pub fn started(self) -> Result<ToHost> {
        self.hear(|_| true)
    }

    fn hear(mut self, is_it: impl Fn(&ToHost) -> bool) -> Result<ToHost> {
        let mut reader = Reader::default();
        let mut buffer = [0; 4096];
        loop {
            match reader.take::<ToHost>()? {
                Some(said) if is_it(&said) => return Ok(said),
                Some(_) => continue,
                None => {}
            }
            match self.control.read(&mut buffer) {
                Ok(0) => bail!("the machine has ended, and the process with it"),
                Ok(count) => reader.push(buffer.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("hear the guest"),
            }
        }
    }
}

/// Connects to the guest's init as Firecracker's clients do, and says what for.
fn connect(vsock: &Path, hello: Hello) -> Result<UnixStream> {
    let connect = || -> Result<UnixStream> {
        let mut stream = UnixStream::connect(vsock)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.write_all(format!("CONNECT {PORT}\n").as_bytes())?;
        if !read_line(&mut stream)?.starts_with(b"OK ") {
            bail!("it refused");
        }
        stream.write_all(&hello.to_bytes())?;
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)?;
        Ok(stream)
    };
    connect().map_err(|error| match error.downcast_ref::<io::Error>().map(io::Error::kind) {
        Some(io::ErrorKind::WouldBlock) => anyhow::anyhow!("connect to the guest: it does not answer"),
        _ => error.context("connect to the guest"),
    })
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

/// Stays with the process to its end, with this process's streams and `signals`. With `takes_keys` all keys of this terminal
/// are the process's.
pub fn stay(connections: Connections, signals: &SignalFd, takes_keys: bool) -> Result<End> {
    let Connections { id, control, streams, on_terminal } = connections;
    // Before the streams have threads.
    let terminal = if takes_keys { RawTerminal::enter().context("set up the terminal")? } else { None };
    let mut session = Session::over(id, control, streams, on_terminal, Arc::new(Timings::new(Instant::now())))?;
    let epoll = Epoll::new().context("epoll")?;
    for fd in [session.as_raw_fd(), signals.as_raw_fd()] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0)).context("watch the session")?;
    }
    // There is no machine of ours that it could end.
    let ending = Ending::new()?;
    let end = loop {
        session.on_ready(&ending)?;
        if let Some(end) = session.end().filter(|_| session.is_over()) {
            break Ok(End::Told(end.clone()));
        }
        match ending.outcome() {
            Some(Outcome::Killed(signal)) => break Ok(End::Left(signal)),
            Some(outcome) => break Err(anyhow::anyhow!("{outcome}")),
            None if session.is_lost() => break Err(anyhow::anyhow!("the machine has ended, and the process with it")),
            None => {}
        }
        match epoll.wait(-1, &mut [EpollEvent::default(); 2]) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error).context("wait for events"),
            _ => {}
        }
        while let Some(signal) = signals.read().context("read a signal")? {
            session.on_signal(signal, &ending);
        }
    };
    session.close();
    drop(terminal);
    end
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    fn guest(answer: &'static str) -> (tempfile::TempDir, std::path::PathBuf, thread::JoinHandle<Vec<u8>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let guest = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut said = vec![0; "CONNECT 1024\n".len()];
            stream.read_exact(&mut said).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            stream.read_to_end(&mut said).unwrap();
            said
        });
        (folder, path, guest)
    }

    #[test]
    fn a_connection_is_asked_for_and_says_what_for() {
        let hello = Hello { session: 77, role: Role::Stdout };
        let (_folder, path, guest) = guest("OK 1073741824\n");
        drop(connect(&path, hello).unwrap());
        assert_eq!(guest.join().unwrap(), [b"CONNECT 1024\n", &hello.to_bytes()[..]].concat());
    }

    #[test]
    fn a_guest_that_refuses_or_is_gone_is_one_line() {
        let hello = Hello { session: 77, role: Role::Stdout };
        for answer in ["", "NO\n", "OK", &"O".repeat(64)] {
            let answer: &'static str = String::from(answer).leak();
            let (_folder, path, guest) = guest(answer);
            let error = format!("{:#}", connect(&path, hello).unwrap_err());
            assert!(error.starts_with("connect to the guest: ") && !error.contains('\n'), "{error}");
            let _ = guest.join();
        }
    }
}
