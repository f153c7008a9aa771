//! Copies a stream between two descriptors through a buffer.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::PollFlags;
use nix::sys::socket::{Shutdown, shutdown};
use nix::unistd::{read, write};

use crate::connection::is_cut;
use crate::sent::Sent;

/// The size of a pipe's buffer and of a vsock packet.
const BUFFER_BYTES: usize = 64 << 10;
/// The maximum number of consecutive reads, so that a busy stream does not starve others.
const READS_IN_A_ROW: usize = 8;

/// A stream. It reads only when its buffer is empty, so that a slow reader throttles the writer.
pub struct Pump {
    from: Option<OwnedFd>,
    to: Option<OwnedFd>,
    buffer: Vec<u8>,
    /// The range of the buffer to be written.
    start: usize,
    end: usize,
    /// Whether the data available now is all there will be.
    last: bool,
    /// Whether an end was lost because the machine was restored. Nothing is copied before it is replaced.
    is_cut: bool,
    /// Whether the reader was told that there is no more.
    is_shut: bool,
    /// What a connection that takes the sink's place sends again, if nothing may be lost.
    sent: Option<Sent>,
}

impl Pump {
    /// Creates a stream between two descriptors, which become nonblocking.
    pub fn new(from: OwnedFd, to: OwnedFd) -> nix::Result<Pump> {
        for fd in [&from, &to] {
            let flags = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
            fcntl(fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Pump {
            from: Some(from),
            to: Some(to),
            buffer: vec![0; BUFFER_BYTES],
            start: 0,
            end: 0,
            last: false,
            is_cut: false,
            is_shut: false,
            sent: None,
        })
    }

    /// Remembers what was sent last, so that nothing is lost when the [sink is replaced](Pump::replace_sink).
    pub fn remembering(mut self) -> Pump {
        self.sent = Some(Sent::default());
        self
    }

    /// The events to wait for before the next [`Pump::advance`].
    pub fn awaits(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let (fd, events) =
            if self.is_empty() { (&self.from, PollFlags::POLLIN) } else { (&self.to, PollFlags::POLLOUT) };
        fd.as_ref().filter(|_| !self.is_cut).map(|fd| (fd.as_fd(), events))
    }

    /// Whether neither its writer nor its reader has closed the stream.
    pub fn is_open(&self) -> bool {
        self.from.is_some()
    }

    /// Whether the reader has not closed the stream, and may not have got all of it.
    pub fn has_reader(&self) -> bool {
        self.to.is_some()
    }

    /// Reads from `socket` from now on, after a reset of the transport.
    pub fn replace_source(&mut self, socket: OwnedFd) {
        (self.from, self.is_cut) = (Some(socket), false);
    }

    /// Writes to `socket` from now on, after a reset of the transport: first what may be lost, if it was remembered, then what could
    /// not be written before.
    pub fn replace_sink(&mut self, socket: OwnedFd) {
        (self.to, self.is_cut, self.is_shut) = (Some(socket), false, false);
        if let Some(sent) = &mut self.sent {
            self.buffer = sent.again(self.buffer.get(self.start..self.end).unwrap_or_default());
            (self.start, self.end) = (0, self.buffer.len());
        }
    }

    /// Marks the writer as gone, although other processes may hold its end open: only data that is already there is
    /// copied.
    pub fn expect_no_more(&mut self) {
        self.last = true;
    }

    /// Whether everything was copied, or the reader has closed its end.
    pub fn is_done(&self) -> bool {
        self.from.is_none() && self.is_empty()
    }

    /// Copies what is possible without blocking.
    pub fn advance(&mut self) {
        for _ in 0..READS_IN_A_ROW {
            if self.is_cut {
                return;
            }
            if self.is_empty() && !self.fill() || !self.empty() {
                return;
            }
        }
    }

    fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Reads once; returns false if there is no data, now or permanently.
    fn fill(&mut self) -> bool {
        if let Some(from) = &self.from {
            self.buffer.resize(BUFFER_BYTES, 0);
            match read(from, &mut self.buffer) {
                Ok(count) if count > 0 => {
                    (self.start, self.end) = (0, count);
                    return true;
                }
                Err(Errno::EINTR) => return false,
                Err(Errno::EAGAIN) if !self.last => return false,
                Err(error) if is_cut(error) => {
                    self.is_cut = true;
                    return false;
                }
                // End of stream: EOF, a terminal without users, or a disconnected peer.
                _ => self.from = None,
            }
        }
        self.shut();
        false
    }

    /// Tells the reader that there is no more. The socket stays open for the duration of the session, so that its peer can take
    /// its time.
    fn shut(&mut self) {
        if std::mem::replace(&mut self.is_shut, true) {
            return;
        }
        match self.to.as_ref().map_or(Ok(()), |to| shutdown(to.as_raw_fd(), Shutdown::Write)) {
            Ok(()) => {}
            Err(error) if is_cut(error) => self.is_cut = true,
            Err(_) => self.to = None,
        }
    }

    /// Writes the buffer; returns false if it would block.
    fn empty(&mut self) -> bool {
        while !self.is_empty() {
            let (Some(to), Some(bytes)) = (&self.to, self.buffer.get(self.start..self.end)) else { break };
            match write(to, bytes) {
                Ok(count) => {
                    if let Some(sent) = &mut self.sent {
                        sent.note(bytes.get(..count).unwrap_or_default());
                    }
                    self.start += count;
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return false,
                Err(error) if is_cut(error) => {
                    self.is_cut = true;
                    return false;
                }
                // The reader is gone. Closing the input notifies the writer.
                Err(_) => (self.from, self.to, self.end) = (None, None, self.start),
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::net::UnixStream;
    use std::thread;
    use std::time::Duration;

    use nix::poll::{PollFd, PollTimeout, poll};
    use nix::sys::socket::{setsockopt, sockopt};
    use nix::unistd::pipe;

    use super::*;

    fn run(mut pump: Pump) {
        while !pump.is_done() {
            let (fd, events) = pump.awaits().expect("a stream that is not done waits for something");
            poll(&mut [PollFd::new(fd, events)], PollTimeout::NONE).unwrap();
            pump.advance();
        }
    }

    #[test]
    fn all_bytes_arrive_and_then_the_end() {
        let ((read, write), (ours, mut theirs)) = (pipe().unwrap(), UnixStream::pair().unwrap());
        let content: Vec<u8> = (0..5_000_000u32).map(|n| (n ^ n >> 8) as u8).collect();
        let expected = content.clone();
        let writer = thread::spawn(move || File::from(write).write_all(&content).unwrap());
        let reader = thread::spawn(move || {
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).map(|_| got).unwrap()
        });
        run(Pump::new(read, ours.into()).unwrap());
        writer.join().unwrap();
        assert!(reader.join().unwrap() == expected);
    }

    #[test]
    fn a_slow_reader_throttles_the_writer() {
        let ((read, write), (ours, _theirs)) = (pipe().unwrap(), UnixStream::pair().unwrap());
        let mut pump = Pump::new(read, ours.into()).unwrap();
        fcntl(&write, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
        let mut taken = 0;
        let mut write = File::from(write);
        for _ in 0..1000 {
            taken += write.write(&[1; 4096]).unwrap_or(0);
            pump.advance();
        }
        assert!(taken < 2 << 20, "{taken} bytes were taken that nobody read");
        assert!(matches!(pump.awaits(), Some((_, PollFlags::POLLOUT))));
    }

    #[test]
    fn a_writer_without_a_reader_is_notified() {
        let ((read, write), (ours, theirs)) = (pipe().unwrap(), UnixStream::pair().unwrap());
        let mut pump = Pump::new(read, ours.into()).unwrap();
        drop(theirs);
        let mut write = File::from(write);
        write.write_all(b"x").unwrap();
        pump.advance();
        assert!(pump.is_done());
        assert_eq!(write.write(b"y").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    }

    /// A connection, and its other end.
    fn connection() -> (OwnedFd, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let theirs = listener.accept().unwrap().0;
        theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (ours.into(), theirs)
    }

    /// Resets a connection as the kernel does when the machine is restored.
    fn reset(theirs: TcpStream) {
        setsockopt(&theirs, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 }).unwrap();
    }

    #[test]
    fn a_stream_goes_on_over_another_connection() {
        let ((read, write), (ours, theirs)) = (pipe().unwrap(), connection());
        let mut pump = Pump::new(read, ours).unwrap();
        reset(theirs);
        let mut write = File::from(write);
        write.write_all(b"out").unwrap();
        pump.advance();
        assert!(pump.is_open() && !pump.is_done() && pump.awaits().is_none());
        let (ours, mut theirs) = connection();
        pump.replace_sink(ours);
        pump.advance();
        let mut got = [0; 3];
        theirs.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"out");
        assert!(pump.awaits().is_some());

        let ((read, write), (ours, theirs)) = (pipe().unwrap(), connection());
        let mut pump = Pump::new(ours, write).unwrap();
        reset(theirs);
        pump.advance();
        assert!(pump.is_open() && pump.awaits().is_none(), "its reader sees no end");
        let (ours, mut theirs) = connection();
        theirs.write_all(b"in").unwrap();
        drop(theirs);
        pump.replace_source(ours);
        run(pump);
        let mut got = Vec::new();
        File::from(read).read_to_end(&mut got).unwrap();
        assert_eq!(got, b"in");
    }

    #[test]
    fn a_pipe_held_open_by_others_can_be_ended() {
        let ((read, write), (ours, mut theirs)) = (pipe().unwrap(), UnixStream::pair().unwrap());
        let mut pump = Pump::new(read, ours.into()).unwrap();
        let mut write = File::from(write);
        write.write_all(b"last").unwrap();
        pump.expect_no_more();
        pump.advance();
        assert!(pump.is_done());
        let mut got = Vec::new();
        theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        theirs.read_to_end(&mut got).unwrap();
        assert_eq!(got, b"last");
    }
}
