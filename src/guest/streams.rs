//! From this process's standard streams to the guest's and back: a thread each, so that none waits for another. In the
//! background the outputs go to a hub, and input comes from whoever is attached.

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
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::console::hub::{Hub, HubStream};
use crate::console::stream_log::Stream;
use crate::sandbox;

const BUFFER_BYTES: usize = 64 << 10;
const STDIN: u64 = 0;
const STOP: u64 = 1;

/// What the guest's streams are joined with.
#[derive(Debug, Clone)]
pub enum Ends {
    /// This process's standard streams.
    Ours,
    /// A hub's, and input from whoever is attached.
    Hub(Arc<Hub>),
}

/// What the threads say, and what stops them.
pub struct Streams {
    ends: Ends,
    open_outputs: Arc<AtomicUsize>,
    /// Written to when an output has come to its end.
    closed: Arc<EventFd>,
    /// Written to when no more input is wanted.
    stop: Arc<EventFd>,
    input: Option<UnixStream>,
}

impl Streams {
    /// No streams yet.
    pub fn new(ends: Ends) -> io::Result<Streams> {
        Ok(Streams {
            ends,
            open_outputs: Arc::default(),
            closed: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            stop: Arc::new(EventFd::new(EFD_NONBLOCK)?),
            input: None,
        })
    }

    /// Readable since an output came to its end, until [`Streams::clear`].
    pub fn closed(&self) -> &EventFd {
        &self.closed
    }

    /// Takes note of what [`Streams::closed`] says.
    pub fn clear(&self) {
        let _ = self.closed.read();
    }

    /// Whether all that the outputs of the guest held has been written.
    pub fn outputs_are_closed(&self) -> bool {
        self.open_outputs.load(Ordering::Acquire) == 0
    }

    /// Joins a connection with the stream that it is for.
    pub fn start(&mut self, role: Role, socket: UnixStream) -> Result<()> {
        socket.set_nonblocking(false).context("set up a stream")?;
        match role {
            Role::Stdin => {
                self.input = Some(socket.try_clone().context("set up a stream")?);
                if let Ends::Ours = self.ends {
                    let stdin = io::stdin().as_fd().try_clone_to_owned().context("use standard input")?;
                    self.start_input(File::from(stdin), socket, true)?;
                }
            }
            Role::Stderr => self.start_output("stderr", socket, Stream::Errors)?,
            Role::Stdout | Role::Control => self.start_output("stdout", socket, Stream::Output)?,
        }
        Ok(())
    }

    /// Feeds the process what `from` says, until that has nothing more to say; others may say more then.
    pub fn attach_input(&mut self, from: UnixStream) -> Result<()> {
        let Some(input) = &self.input else { return Ok(()) };
        let socket = input.try_clone().context("set up a stream")?;
        self.start_input(File::from(OwnedFd::from(from)), socket, false)
    }

    fn start_input(&mut self, from: File, socket: UnixStream, is_only: bool) -> Result<()> {
        let stop = self.stop.clone();
        let feed = move || feed(from, &socket, &stop, is_only);
        sandbox::spawn("stdin", feed).context("start a stream's thread")?;
        Ok(())
    }

    fn output(&self, stream: Stream) -> io::Result<Box<dyn Write + Send>> {
        Ok(match (&self.ends, stream) {
            (Ends::Hub(hub), stream) => Box::new(HubStream(hub.clone(), stream)),
            (Ends::Ours, Stream::Output) => Box::new(File::from(io::stdout().as_fd().try_clone_to_owned()?)),
            (Ends::Ours, Stream::Errors) => Box::new(File::from(io::stderr().as_fd().try_clone_to_owned()?)),
        })
    }

    fn start_output(&mut self, name: &str, socket: UnixStream, stream: Stream) -> Result<()> {
        let output = self.output(stream).context("use an output of ours")?;
        let (open, closed) = (self.open_outputs.clone(), self.closed.clone());
        open.fetch_add(1, Ordering::AcqRel);
        let print = move || {
            print(socket, output);
            open.fetch_sub(1, Ordering::AcqRel);
            let _ = closed.write(1);
        };
        sandbox::spawn(name, print).context("start a stream's thread")?;
        Ok(())
    }

    /// Stops reading input. Nobody waits for the threads: one may be writing to who never reads.
    pub fn end_input(&mut self) {
        let _ = self.stop.write(1);
        if let Some(input) = self.input.take() {
            let _ = input.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.end_input();
    }
}

/// Writes all that comes from the guest. When nobody takes it any more, the guest's process is told so.
fn print(mut socket: UnixStream, mut output: impl Write) {
    // Not by splice, which `io::copy` would use: while that waits for the guest it holds the pipe, and who reads the pipe
    // does not even get what is in it.
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if output.write_all(buffer.get(..count).unwrap_or_default()).is_err() {
                    let _ = socket.shutdown(Shutdown::Both);
                    return;
                }
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Reads input to its end, or until nobody wants it. If it `is_only` input that there will be, its end is the process's too.
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

/// What tells of input and of the end of it; nothing for a file, which makes no reader wait and which epoll refuses.
pub fn watch(stdin: &File, stop: &EventFd) -> io::Result<Option<Epoll>> {
    let epoll = Epoll::new()?;
    epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), EpollEvent::new(EventSet::IN, STOP))?;
    match epoll.ctl(ControlOperation::Add, stdin.as_raw_fd(), EpollEvent::new(EventSet::IN, STDIN)) {
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => Ok(None),
        watched => watched.map(|()| Some(epoll)),
    }
}

/// Waits for input; false when no more is wanted.
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

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_reads_our_output_has_it_while_the_guest_is_silent() {
        let ((mut reader, writer), (mut guest, ours)) = (io::pipe().unwrap(), UnixStream::pair().unwrap());
        let printer = thread::spawn(move || print(ours, File::from(std::os::fd::OwnedFd::from(writer))));
        guest.write_all(b"ready").unwrap();
        // Long enough for it to wait for more.
        thread::sleep(Duration::from_millis(50));
        let (said, heard) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 5];
            let _ = said.send(reader.read_exact(&mut bytes).map(|()| bytes));
        });
        let bytes = heard.recv_timeout(Duration::from_secs(10)).expect("it is held back").unwrap();
        assert_eq!(&bytes, b"ready");
        drop(guest);
        printer.join().unwrap();
    }
}
