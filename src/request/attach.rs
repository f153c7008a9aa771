//! From a machine in the background to this terminal and back, for as long as somebody wants to look.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::client::{self, Asked};
use super::{Reply, Request};
use crate::console::terminal::{self, RawTerminal};
use crate::guest::streams;
use crate::roster::stream_log::{HEAD_BYTES, Head, Stream};
use crate::sandbox;
use crate::sys::SignalFd;

/// Ctrl-P Ctrl-Q leaves the machine to itself, as in Docker.
const LEAVE: [u8; 2] = [0x10, 0x11];

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
        (other, _) => bail!("the machine answered {other:?}"),
    };
    let raw = if input && terminal { RawTerminal::enter().context("set up the terminal")? } else { None };
    let stop = Arc::new(EventFd::new(EFD_NONBLOCK).context("watch standard input")?);
    let left = Arc::new(EventFd::new(EFD_NONBLOCK).context("watch standard input")?);
    let feeder = input.then(|| -> Result<_> {
        let stdin = File::from(io::stdin().as_fd().try_clone_to_owned().context("use standard input")?);
        let socket = stream.try_clone().context("use the connection")?;
        let (stop, left, on_terminal) = (stop.clone(), left.clone(), raw.is_some());
        sandbox::spawn("stdin", move || feed(stdin, socket, &stop, &left, on_terminal)).context("start a thread")
    });
    let feeder = feeder.transpose()?;
    tell_size(control);
    let result = show(&stream, control, signals, &left);
    let _ = (stop.write(1), stream.shutdown(Shutdown::Both));
    if let Some(feeder) = feeder {
        let _ = feeder.join();
    }
    drop(raw);
    if result? { Ok(End::Left) } else { code(end).map(End::Ended) }
}

/// The code that a machine ends with, once it has.
pub fn code(end: Asked) -> Result<u8> {
    match end.reply()? {
        (Reply::Ended(code), _) => Ok(code),
        (Reply::Refused(why), _) => bail!(why),
        (other, _) => bail!("the machine answered {other:?}"),
    }
}

fn tell_size(control: &Path) {
    if let Some(size) = terminal::window_size() {
        // A machine that does not listen any more has no use for it.
        let _ = client::ask(control, &Request::resize(size));
    }
}

/// Prints what the machine says until it has ended; true if whoever looked on has left before.
fn show(stream: &UnixStream, control: &Path, signals: &SignalFd, left: &EventFd) -> Result<bool> {
    let epoll = Epoll::new().context("epoll")?;
    for (fd, mark) in [(stream.as_raw_fd(), 0), (signals.as_raw_fd(), 1), (left.as_raw_fd(), 2)] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, mark)).context("watch the machine")?;
    }
    loop {
        let mut events = [EpollEvent::default(); 3];
        let count = match epoll.wait(-1, &mut events) {
            Err(error) if error.kind() == ErrorKind::Interrupted => 0,
            count => count.context("wait for the machine")?,
        };
        for event in events.iter().take(count) {
            match event.data() {
                0 if !print(stream)? => return Ok(false),
                1 => hand_on(control, signals)?,
                2 => return Ok(true),
                _ => {}
            }
        }
    }
}

/// Prints one record; false at the end.
fn print(mut stream: &UnixStream) -> Result<bool> {
    let mut head = [0; HEAD_BYTES];
    if stream.read_exact(&mut head).is_err() {
        return Ok(false);
    }
    let head = Head::from_bytes(head).context("the machine says what makes no sense")?;
    let mut content = vec![0; head.len_bytes as usize];
    if stream.read_exact(&mut content).is_err() {
        return Ok(false);
    }
    write(head.stream, &content)?;
    Ok(true)
}

/// Writes to the stream of ours that is like the machine's.
pub fn write(stream: Stream, content: &[u8]) -> Result<()> {
    match stream {
        Stream::Output => {
            let mut output = io::stdout().lock();
            output.write_all(content).and_then(|()| output.flush()).context("write to standard output")
        }
        Stream::Errors => io::stderr().write_all(content).context("write to standard error"),
    }
}

fn hand_on(control: &Path, signals: &SignalFd) -> Result<()> {
    while let Some(signal) = signals.read().context("read a signal")? {
        match u8::try_from(signal) {
            Ok(_) if signal == libc::SIGWINCH => tell_size(control),
            Ok(signal) => drop(client::ask(control, &Request::Kill { signal })),
            Err(_) => {}
        }
    }
    Ok(())
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
