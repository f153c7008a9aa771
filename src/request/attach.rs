//! From a machine in the background to this terminal and back, for as long as somebody wants to look.

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
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::client::{self, Asked};
use super::{Reply, Request};
use crate::console::stream_log::{HEAD_BYTES, Head, Stream};
use crate::console::terminal::{self, RawTerminal};
use crate::guest::{signal, streams};
use crate::sandbox;
use crate::sys::SignalFd;

/// Ctrl-P Ctrl-Q leaves the machine to itself, as in Docker.
const LEAVE: [u8; 2] = [0x10, 0x11];

/// How soon behind the end of its streams the machine's own is told.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// What is waited for.
const SHOWN: u64 = 0;
const SIGNAL: u64 = 1;
const LEFT: u64 = 2;
const END: u64 = 3;

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The machine did, with this code.
    Ended(u8),
    /// Whoever looked on has left.
    Left,
}

/// Joins this process's streams with those of the machine whose requests go to `control`, until either has enough. With
/// `input` the process is told what is typed here; with `terminal` every key of it.
pub fn attach(control: &Path, signals: &SignalFd, input: bool, terminal: bool) -> Result<End> {
    let end = client::begin(control, &Request::Wait)?;
    let stream = match client::begin(control, &Request::Attach)?.reply()? {
        (Reply::Done, stream) => stream,
        (Reply::Refused(why), _) => bail!(why),
        (other, _) => bail!("unexpected response from the machine: {other:?}"),
    };
    let raw = if input && terminal { RawTerminal::enter().context("set up the terminal")? } else { None };
    let stop = Arc::new(EventFd::new(EFD_NONBLOCK).context("watch standard input")?);
    let left = Arc::new(EventFd::new(EFD_NONBLOCK).context("watch standard input")?);
    let fed = input.then(|| -> Result<_> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().context("use standard input")?);
        let socket = stream.try_clone().context("use the connection")?;
        let (stop, left, on_terminal) = (stop.clone(), left.clone(), raw.is_some());
        sandbox::spawn("stdin", move || feed(stdin, socket, &stop, &left, on_terminal)).context("start a thread")
    });
    fed.transpose()?;
    tell_size(control);
    let shown = Arc::new(EventFd::new(EFD_NONBLOCK).context("watch the machine")?);
    let (from, told) = (stream.try_clone().context("use the connection")?, shown.clone());
    let shower = sandbox::spawn("stdout", move || {
        let heard = show(&from);
        let _ = told.write(1);
        heard
    });
    let shower = shower.context("start a thread")?;
    let stay = Stay { shower, shown: &shown, end: &end, control, signals, on_terminal: terminal, left: &left };
    let result = stay.run();
    // Neither thread is waited for: one may be writing to who never reads.
    let _ = (stop.write(1), stream.shutdown(Shutdown::Both));
    drop(raw);
    if result? { Ok(End::Left) } else { code(end).map(End::Ended) }
}

/// The code that a machine ends with, once it has.
pub fn code(end: Asked) -> Result<u8> {
    match end.reply()? {
        (Reply::Ended(code), _) => Ok(code),
        (Reply::Refused(why), _) => bail!(why),
        (other, _) => bail!("unexpected response from the machine: {other:?}"),
    }
}

fn tell_size(control: &Path) {
    if let Some(size) = terminal::window_size() {
        // A machine that does not listen any more has no use for it.
        let _ = client::ask(control, &Request::resize(size));
    }
}

/// Stays with a machine whose streams are shown by a thread, which may have to wait for who reads them.
struct Stay<'a> {
    /// The thread that shows them, and what is readable when it has shown all.
    shower: JoinHandle<Result<Heard>>,
    shown: &'a EventFd,
    /// Readable when the machine has ended.
    end: &'a Asked,
    control: &'a Path,
    signals: &'a SignalFd,
    /// Whether the machine has a terminal, which this one's size is told.
    on_terminal: bool,
    /// Readable when whoever looks on has left.
    left: &'a EventFd,
}

impl Stay<'_> {
    /// Hands signals on until the machine has ended; true if whoever looked on has left before, or reads no more.
    fn run(self) -> Result<bool> {
        let epoll = Epoll::new().context("epoll")?;
        let watch = |fd, mark| {
            let event = EpollEvent::new(EventSet::IN, mark);
            epoll.ctl(ControlOperation::Add, fd, event).context("watch the machine")
        };
        watch(self.shown.as_raw_fd(), SHOWN)?;
        watch(self.signals.as_raw_fd(), SIGNAL)?;
        watch(self.left.as_raw_fd(), LEFT)?;
        let mut shower = Some(self.shower);
        loop {
            let timeout_ms = if shower.is_some() { -1 } else { END_TIMEOUT.as_millis() as i32 };
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
                    SHOWN => {
                        let _ = self.shown.read();
                        if let Some(Ok(heard)) = shower.take().map(JoinHandle::join)
                            && matches!(heard?, Heard::NobodyReads)
                        {
                            return Ok(true);
                        }
                        watch(self.end.as_raw_fd(), END)?;
                    }
                    SIGNAL if hand_on(self.control, self.signals, self.on_terminal)? => {}
                    END => return Ok(false),
                    _ => return Ok(true),
                }
            }
        }
    }
}

/// Hands signals on to the machine. False if one asks for an end and there is no machine any more, so that it is our own.
fn hand_on(control: &Path, signals: &SignalFd, on_terminal: bool) -> Result<bool> {
    while let Some(number) = signals.read().context("read a signal")? {
        match u8::try_from(number) {
            Ok(_) if number == libc::SIGWINCH && on_terminal => tell_size(control),
            Ok(signal) => {
                if client::ask(control, &Request::Kill { signal }).is_err() && signal::is_termination(number) {
                    return Ok(false);
                }
            }
            Err(_) => {}
        }
    }
    Ok(true)
}

/// Shows all that the machine says.
fn show(stream: &UnixStream) -> Result<Heard> {
    loop {
        match print(stream)? {
            Heard::More => {}
            heard => return Ok(heard),
        }
    }
}

/// What came of looking for a record.
#[derive(Debug)]
enum Heard {
    More,
    End,
    NobodyReads,
}

/// Prints one record.
fn print(mut stream: &UnixStream) -> Result<Heard> {
    let mut head = [0; HEAD_BYTES];
    if stream.read_exact(&mut head).is_err() {
        return Ok(Heard::End);
    }
    let head = Head::from_bytes(head).context("the machine sent invalid data")?;
    let mut content = vec![0; head.len_bytes as usize];
    if stream.read_exact(&mut content).is_err() {
        return Ok(Heard::End);
    }
    Ok(if write(head.stream, &content)? { Heard::More } else { Heard::NobodyReads })
}

/// Writes to the stream of ours that is like the machine's; false where nobody reads it any more, who has read what they
/// wanted.
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

fn feed(mut stdin: File, mut socket: UnixStream, stop: &EventFd, left: &EventFd, on_terminal: bool) {
    let mut buffer = vec![0; 64 << 10];
    let Ok(epoll) = streams::watch(&stdin, stop) else { return };
    let mut last = None;
    while streams::wait(&epoll) {
        let count = match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => continue,
            Err(_) => break,
        };
        let bytes = buffer.get(..count).unwrap_or_default();
        if on_terminal && leaves(&mut last, bytes) {
            let _ = left.write(1);
            return;
        }
        if socket.write_all(bytes).is_err() {
            return;
        }
    }
    // Nothing more will be said; what the machine says is still wanted.
    let _ = socket.shutdown(Shutdown::Write);
}

/// Whether the keys to leave by are among `bytes`, one behind the other, the first perhaps the `last` of those before.
fn leaves(last: &mut Option<u8>, bytes: &[u8]) -> bool {
    bytes.iter().any(|&byte| last.replace(byte) == Some(LEAVE[0]) && byte == LEAVE[1])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_keys_in_a_row_leave_the_machine() {
        for pieces in [&[&b"ab\x10\x11c"[..]][..], &[b"\x10", b"\x11"], &[b"\x10\x10\x11"]] {
            let mut last = None;
            assert!(pieces.iter().any(|piece| leaves(&mut last, piece)), "{pieces:?}");
        }
        let mut last = None;
        assert!(![&b"\x10a\x11"[..], b"\x11\x10"].iter().any(|piece| leaves(&mut last, piece)));
    }
}
