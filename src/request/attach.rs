//! Attaches this terminal to a machine in the background.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::client::{self, PendingRequest};
use super::detach::DetachKeys;
use super::{Reply, Request};
use crate::console::stream_log::{HEAD_BYTES, Head, Stream};
use crate::console::terminal::{self, RawTerminal};
use crate::guest::{signal, streams};
use crate::sandbox;
use crate::sys::SignalFd;
use crate::sys::event;

/// How a terminal is attached.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Whether standard input is forwarded to the process.
    pub input: bool,
    /// Whether the machine has a terminal, for which every key is meant.
    pub terminal: bool,
    /// Whether signals end this process instead of being forwarded.
    pub keeps_signals: bool,
    /// The keys that detach.
    pub detach_keys: DetachKeys,
}

/// How soon after the end of its streams the machine's end must be reported.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// Event sources.
const PRINTED: u64 = 0;
const SIGNAL: u64 = 1;
const DETACHED: u64 = 2;
const END: u64 = 3;

/// How the session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The machine exited with this code.
    Ended(u8),
    /// The user detached.
    Detached,
}

/// Connects this process's streams to those of the machine with the control socket `control`, until the machine ends or
/// the user detaches.
pub fn attach(control: &Path, signals: &SignalFd, options: Options) -> Result<End> {
    let Options { input, terminal, keeps_signals, detach_keys } = options;
    let end = client::begin(control, &Request::Wait)?;
    let stream = match client::begin(control, &Request::Attach)?.reply()? {
        (Reply::Done, stream) => stream,
        (Reply::Refused(why), _) => bail!(why),
        (other, _) => bail!("unexpected response from the machine: {other:?}"),
    };
    let raw = if input && terminal { RawTerminal::enter().context("set up the terminal")? } else { None };
    let stop = Arc::new(event::create().context("watch standard input")?);
    let detached = Arc::new(event::create().context("watch standard input")?);
    let feeder = input.then(|| -> Result<_> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().context("use standard input")?);
        let socket = stream.try_clone().context("use the connection")?;
        let (stop, detached, on_terminal) = (stop.clone(), detached.clone(), raw.is_some());
        sandbox::spawn("stdin", move || feed(stdin, socket, &stop, &detached, on_terminal.then_some(detach_keys)))
            .context("start a thread")
    });
    feeder.transpose()?;
    send_size(control);
    let printed = Arc::new(event::create().context("watch the machine")?);
    let (from, event) = (stream.try_clone().context("use the connection")?, printed.clone());
    let printer = sandbox::spawn("stdout", move || {
        let outcome = print_all(&from);
        let _ = event.write(1);
        outcome
    });
    let printer = printer.context("start a thread")?;
    let session = AttachedSession {
        printer: Some(printer),
        printed: &printed,
        end: &end,
        control,
        signals,
        on_terminal: terminal,
        keeps_signals,
        detached: &detached,
    };
    let result = session.run();
    // Neither thread is joined: one may be writing to a process that never reads.
    let _ = (stop.write(1), stream.shutdown(Shutdown::Both));
    drop(raw);
    if result? { Ok(End::Detached) } else { code(end).map(End::Ended) }
}

/// Makes standard input that of the process of the machine with the control socket `control`, and returns when it has ended, or
/// the process takes no more.
pub fn feed_process(control: &Path) -> Result<()> {
    let mut stream = match client::begin(control, &Request::Feed)?.reply()? {
        (Reply::Done, stream) => stream,
        (Reply::Refused(why), _) => bail!(why),
        (other, _) => bail!("unexpected response from the machine: {other:?}"),
    };
    if io::copy(&mut io::stdin().lock(), &mut stream).is_ok() {
        stream.shutdown(Shutdown::Write).context("end the input")?;
        // The machine has read everything when it closes the connection.
        let _ = stream.read(&mut [0]);
    }
    Ok(())
}

/// Waits for the machine's exit code.
pub fn code(end: PendingRequest) -> Result<u8> {
    match end.reply()? {
        (Reply::Ended(code), _) => Ok(code),
        (Reply::Refused(why), _) => bail!(why),
        (other, _) => bail!("unexpected response from the machine: {other:?}"),
    }
}

fn send_size(control: &Path) {
    if let Some(size) = terminal::window_size() {
        // A machine that is ending has no use for the size.
        let _ = client::send(control, &Request::resize(size));
    }
}

/// An attached session. A separate thread prints the machine's streams, because it may have to wait for their reader.
struct AttachedSession<'a> {
    /// The thread that prints the streams, and an event that is readable when it has printed everything.
    printer: Option<JoinHandle<Result<ReadOutcome>>>,
    printed: &'a EventFd,
    /// Readable when the machine has ended.
    end: &'a PendingRequest,
    control: &'a Path,
    signals: &'a SignalFd,
    /// Whether the machine has a terminal, which is resized along with this one.
    on_terminal: bool,
    /// Whether a termination signal ends this process and is not forwarded.
    keeps_signals: bool,
    /// Readable when the user has detached.
    detached: &'a EventFd,
}

impl AttachedSession<'_> {
    /// Forwards signals until the machine has ended. Returns true if the user detached or stopped reading before that.
    fn run(mut self) -> Result<bool> {
        let epoll = Epoll::new().context("epoll")?;
        let watch = |fd, mark| {
            let event = EpollEvent::new(EventSet::IN, mark);
            epoll.ctl(ControlOperation::Add, fd, event).context("watch the machine")
        };
        watch(self.printed.as_raw_fd(), PRINTED)?;
        watch(self.signals.as_raw_fd(), SIGNAL)?;
        watch(self.detached.as_raw_fd(), DETACHED)?;
        loop {
            let timeout_ms = if self.printer.is_some() { -1 } else { END_TIMEOUT.as_millis() as i32 };
            let mut events = [EpollEvent::default(); 3];
            let count = match epoll.wait(timeout_ms, &mut events) {
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                count => count.context("wait for the machine")?,
            };
            if count == 0 {
                bail!("detached, because the output is read too slowly: the machine keeps running (see `husk logs`)");
            }
            for event in events.iter().take(count) {
                match event.data() {
                    PRINTED => {
                        let _ = self.printed.read();
                        if let Some(Ok(outcome)) = self.printer.take().map(JoinHandle::join)
                            && matches!(outcome?, ReadOutcome::OutputClosed)
                        {
                            return Ok(true);
                        }
                        watch(self.end.as_raw_fd(), END)?;
                    }
                    SIGNAL if self.forward_signals()? => {}
                    END => return Ok(false),
                    _ => return Ok(true),
                }
            }
        }
    }

    /// Forwards signals to the machine. Returns false if one applies to this process: because the machine no longer exists, or
    /// because it keeps its signals.
    fn forward_signals(&self) -> Result<bool> {
        while let Some(number) = self.signals.read().context("read a signal")? {
            match u8::try_from(number) {
                Ok(_) if number == libc::SIGWINCH && self.on_terminal => send_size(self.control),
                Ok(_) if self.keeps_signals => {
                    if signal::is_termination(number) {
                        return Ok(false);
                    }
                }
                Ok(signal) => {
                    if client::send(self.control, &Request::Kill { signal }).is_err() && signal::is_termination(number)
                    {
                        return Ok(false);
                    }
                }
                Err(_) => {}
            }
        }
        Ok(true)
    }
}

/// Prints everything that the machine writes.
fn print_all(stream: &UnixStream) -> Result<ReadOutcome> {
    loop {
        match print(stream)? {
            ReadOutcome::More => {}
            outcome => return Ok(outcome),
        }
    }
}

/// The result of reading a record.
#[derive(Debug)]
enum ReadOutcome {
    More,
    End,
    OutputClosed,
}

/// Prints one record.
fn print(mut stream: &UnixStream) -> Result<ReadOutcome> {
    let mut head = [0; HEAD_BYTES];
    if stream.read_exact(&mut head).is_err() {
        return Ok(ReadOutcome::End);
    }
    let head = Head::from_bytes(head).context("the machine sent invalid data")?;
    let mut content = vec![0; head.len_bytes as usize];
    if stream.read_exact(&mut content).is_err() {
        return Ok(ReadOutcome::End);
    }
    Ok(if write(head.stream, &content)? { ReadOutcome::More } else { ReadOutcome::OutputClosed })
}

/// Writes to the local stream that corresponds to the machine's stream. Returns false if the reader has closed it.
pub fn write(stream: Stream, content: &[u8]) -> Result<bool> {
    let (written, name) = match stream {
        Stream::Output => {
            let mut output = io::stdout().lock();
            (output.write_all(content).and_then(|()| output.flush()), "output")
        }
        Stream::Errors => (io::stderr().write_all(content), "error"),
    };
    match written {
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).with_context(|| format!("write to standard {name}")),
    }
}

/// Forwards standard input. On a terminal, the keys `detach_keys` detach.
fn feed(
    mut stdin: File,
    mut socket: UnixStream,
    stop: &EventFd,
    detached: &EventFd,
    mut detach_keys: Option<DetachKeys>,
) {
    let mut buffer = vec![0; 64 << 10];
    let Ok(epoll) = streams::watch(&stdin, stop) else { return };
    while streams::wait(&epoll) {
        let count = match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => continue,
            Err(_) => break,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        if detach_keys.as_mut().is_some_and(|keys| keys.are_in(bytes)) {
            let _ = detached.write(1);
            return;
        }
        if socket.write_all(bytes).is_err() {
            return;
        }
    }
    // There is no more input; output is still wanted.
    let _ = socket.shutdown(Shutdown::Write);
}
