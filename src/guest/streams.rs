//! Copies between this process's standard streams and the guest's, with one thread per stream so that none blocks
//! another; `Output` does it for one output. In the background, output goes to a hub and input comes from attached clients.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result};
use husk_protocol::Role;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::console::hub::{Copied, Hub, HubStream};
use crate::console::stream_log::Stream;
use crate::guest::output::Output;
use crate::sandbox;
use crate::snapshot::Received;
use crate::sys::event;

const BUFFER_BYTES: usize = 64 << 10;
const STDIN: u64 = 0;
const STOP: u64 = 1;

/// Which of this process's standard streams the guest's are connected to. The guest's process has the others as well: its input stays
/// open, and its output is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attached {
    /// Standard input.
    pub stdin: bool,
    /// Standard output.
    pub stdout: bool,
    /// Standard error.
    pub stderr: bool,
    /// Whether the guest's process goes on when nobody reads its output here any more.
    pub outlived: bool,
}

impl Default for Attached {
    fn default() -> Attached {
        Attached { stdin: true, stdout: true, stderr: true, outlived: false }
    }
}

/// What the guest's streams are connected to.
#[derive(Debug, Clone)]
pub enum Endpoints {
    /// This process's standard streams.
    Stdio(Attached),
    /// The same, with a copy of the output in a hub.
    Logged(Arc<Hub>, Attached),
    /// A hub for output, and attached clients for input.
    Hub(Arc<Hub>),
}

/// The threads' shared state and the event that stops them.
pub struct Streams {
    endpoints: Endpoints,
    open_outputs: Arc<AtomicUsize>,
    /// Signaled when an output has ended.
    closed: Arc<EventFd>,
    /// Signaled when input is no longer wanted.
    stop: Arc<EventFd>,
    input: Option<UnixStream>,
    outputs: Vec<(Stream, Arc<Output>)>,
    /// Of a restored machine: what has arrived before.
    before: Option<Received>,
}

impl Streams {
    /// Creates an instance without streams.
    pub fn new(endpoints: Endpoints) -> io::Result<Streams> {
        Ok(Streams {
            endpoints,
            open_outputs: Arc::default(),
            closed: Arc::new(event::create()?),
            stop: Arc::new(event::create()?),
            input: None,
            outputs: Vec::new(),
            before: None,
        })
    }

    /// Expects the outputs of a restored machine, of which `received` has arrived before. To be called before the first one starts.
    pub fn expect_again(&mut self, received: Received) {
        self.before = Some(received);
    }

    /// Readable after an output has ended, until [`Streams::clear`].
    pub fn closed(&self) -> &EventFd {
        &self.closed
    }

    /// Clears [`Streams::closed`].
    pub fn clear(&self) {
        let _ = self.closed.read();
    }

    /// Whether all output of the guest has been written.
    pub fn outputs_are_closed(&self) -> bool {
        self.open_outputs.load(Ordering::Acquire) == 0
    }

    /// How much of each output has arrived.
    pub fn received(&self) -> Received {
        let of = |stream| self.outputs.iter().find(|(of, _)| *of == stream).map(|(_, output)| output.received());
        let Received { stdout, stderr } = self.before.unwrap_or_default();
        Received { stdout: of(Stream::Output).unwrap_or(stdout), stderr: of(Stream::Errors).unwrap_or(stderr) }
    }

    /// Connects a stream according to its role.
    pub fn start(&mut self, role: Role, socket: UnixStream) -> Result<()> {
        match role {
            Role::Stdin => {
                socket.set_nonblocking(false).context("set up a stream")?;
                self.input = Some(socket.try_clone().context("set up a stream")?);
                let is_attached = match &self.endpoints {
                    Endpoints::Stdio(attached) | Endpoints::Logged(_, attached) => attached.stdin,
                    Endpoints::Hub(_) => false,
                };
                if is_attached {
                    let stdin = io::stdin().as_fd().try_clone_to_owned().context("use standard input")?;
                    self.start_input(File::from(stdin), socket, true)?;
                }
            }
            Role::Stderr => self.start_output("stderr", socket, Stream::Errors)?,
            Role::Stdout | Role::Control => self.start_output("stdout", socket, Stream::Output)?,
        }
        Ok(())
    }

    /// Forwards input from `from` until it ends. Other clients may provide input after that, unless it `is_only` input.
    pub fn attach_input(&mut self, from: UnixStream, is_only: bool) -> Result<()> {
        let Some(input) = &self.input else { return Ok(()) };
        let socket = input.try_clone().context("set up a stream")?;
        self.start_input(File::from(OwnedFd::from(from)), socket, is_only)
    }

    fn start_input(&mut self, from: File, socket: UnixStream, is_only: bool) -> Result<()> {
        let stop = self.stop.clone();
        let feed = move || feed(from, &socket, &stop, is_only);
        sandbox::spawn("stdin", feed).context("start a stream's thread")?;
        Ok(())
    }

    fn output(&self, stream: Stream) -> io::Result<Box<dyn Write + Send>> {
        let own = |attached: &Attached| -> io::Result<Box<dyn Write + Send>> {
            let own = match stream {
                Stream::Output if attached.stdout => io::stdout().as_fd().try_clone_to_owned(),
                Stream::Errors if attached.stderr => io::stderr().as_fd().try_clone_to_owned(),
                Stream::Output | Stream::Errors => return Ok(Box::new(io::sink())),
            };
            let own = File::from(own?);
            Ok(if attached.outlived { Box::new(Outlived(Some(own))) } else { Box::new(own) })
        };
        match &self.endpoints {
            Endpoints::Hub(hub) => Ok(Box::new(HubStream(hub.clone(), stream))),
            Endpoints::Logged(hub, attached) => Ok(Box::new(Copied(HubStream(hub.clone(), stream), own(attached)?))),
            Endpoints::Stdio(attached) => own(attached),
        }
    }

    fn start_output(&mut self, name: &str, socket: UnixStream, stream: Stream) -> Result<()> {
        let to = self.output(stream).context("use an output of ours")?;
        let before = self.before.map(|before| if stream == Stream::Output { before.stdout } else { before.stderr });
        let output = Arc::new(Output::new(socket, before).context("set up a stream")?);
        self.outputs.push((stream, output.clone()));
        let (open, closed) = (self.open_outputs.clone(), self.closed.clone());
        open.fetch_add(1, Ordering::AcqRel);
        let print = move || {
            output.print(to);
            open.fetch_sub(1, Ordering::AcqRel);
            let _ = closed.write(1);
        };
        sandbox::spawn(name, print).context("start a stream's thread")?;
        Ok(())
    }

    /// Stops reading input. The threads are not joined: one may be writing to a process that never reads.
    pub fn end_input(&mut self) {
        let _ = self.stop.write(1);
        if let Some(input) = self.input.take() {
            let _ = input.shutdown(Shutdown::Both);
        }
    }
}

/// An output that takes everything, also when what it was written to is gone.
struct Outlived(Option<File>);

impl Write for Outlived {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.take_if(|file| file.write_all(bytes).is_err());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.end_input();
    }
}

/// Reads input to its end, or until it is no longer wanted. If it `is_only` input, its end is also the end of the
/// process's input.
fn feed(mut stdin: File, mut socket: &UnixStream, stop: &EventFd, is_only: bool) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let Ok(epoll) = watch(&stdin, stop) else { return };
    loop {
        if !wait(&epoll) {
            return;
        }
        match stdin.read(&mut buffer) {
            Ok(count) if count > 0 => {
                if socket.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
                    return;
                }
            }
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
            // A terminal that hung up reads as an error.
            _ => break,
        }
    }
    if is_only {
        let _ = socket.shutdown(Shutdown::Write);
    }
}

/// Watches for input and for `stop`. Returns `None` for a regular file, which never blocks and which epoll rejects.
pub fn watch(stdin: &File, stop: &EventFd) -> io::Result<Option<Epoll>> {
    let epoll = Epoll::new()?;
    epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
    match epoll.ctl(ControlOperation::Add, stdin.as_raw_fd(), EpollEvent::new(EventSet::IN, STDIN)) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(None),
        watched => watched.map(|()| Some(epoll)),
    }
}

/// Waits for input. Returns false when input is no longer wanted.
pub fn wait(epoll: &Option<Epoll>) -> bool {
    let Some(epoll) = epoll else { return true };
    let mut events = [EpollEvent::default(); 2];
    loop {
        match epoll.wait(-1, &mut events) {
            Ok(count) => return !events.iter().take(count).any(|event| event.data() == STOP),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}
