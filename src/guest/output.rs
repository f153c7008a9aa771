//! An output of the guest's process on this side of its connection: what has arrived, so that a restored machine repeats nothing.

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};

use husk_protocol::POSITION_BYTES;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::ioctl_fionread;

const BUFFER_BYTES: usize = 64 << 10;

/// An output. One thread [prints](Output::print) it.
pub struct Output {
    socket: UnixStream,
    /// Locked while a byte is taken from the socket, which never blocks.
    progress: Mutex<Progress>,
}

struct Progress {
    /// How much of the stream had arrived before the machine was restored.
    before: u64,
    next: Next,
}

/// The next byte of the connection.
enum Next {
    /// One of the position, of which so much is known.
    Position([u8; POSITION_BYTES], usize),
    /// The byte at this position of the stream.
    At(u64),
}

impl Output {
    /// An output of a machine that has just started, or, if it was restored, the same output again, of which `before` has arrived.
    pub fn new(socket: UnixStream, before: Option<u64>) -> io::Result<Output> {
        socket.set_nonblocking(true)?;
        let next = before.map_or(Next::At(0), |_| Next::Position([0; POSITION_BYTES], 0));
        Ok(Output { socket, progress: Mutex::new(Progress { before: before.unwrap_or(0), next }) })
    }

    /// How much of the stream has arrived or waits in the socket: all that will be printed, if the guest does not run.
    pub fn received(&self) -> u64 {
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match (ioctl_fionread(&self.socket).unwrap_or(0), &progress.next) {
                (waiting, Next::At(position)) => return position.saturating_add(waiting).max(progress.before),
                (0, Next::Position(..)) => return progress.before,
                (_, Next::Position(..)) => {
                    if progress.take(&self.socket, &mut []).is_err() {
                        return progress.before;
                    }
                }
            }
        }
    }

    /// Writes all of the output. If it can no longer be written, the guest's process is notified.
    pub fn print(&self, mut to: impl Write) {
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            match self.read(&mut buffer) {
                Ok(None) => return,
                Ok(Some(bytes)) => {
                    if to.write_all(bytes).is_err() {
                        let _ = self.socket.shutdown(Shutdown::Both);
                        return;
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {}
                Err(_) => return,
            }
        }
    }

    /// Waits for bytes, and returns those that have not arrived before; `None` at the end.
    fn read<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], None)?;
        self.progress.lock().unwrap_or_else(PoisonError::into_inner).take(&self.socket, buffer)
    }
}

impl Progress {
    /// Takes what is left of the position, or as many bytes as there are. Returns those that have not arrived before.
    fn take<'a>(&mut self, mut socket: &UnixStream, buffer: &'a mut [u8]) -> io::Result<Option<&'a [u8]>> {
        match &mut self.next {
            Next::Position(bytes, known) => {
                let count = socket.read(bytes.get_mut(*known..).unwrap_or_default())?;
                *known += count;
                if *known == POSITION_BYTES {
                    self.next = Next::At(u64::from_le_bytes(*bytes));
                }
                Ok((count > 0).then_some(&[]))
            }
            Next::At(position) => {
                let count = socket.read(buffer)?;
                let arrived = usize::try_from(self.before.saturating_sub(*position)).unwrap_or(usize::MAX).min(count);
                *position = position.saturating_add(count as u64);
                Ok(buffer.get(arrived..count).filter(|_| count > 0))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use super::*;

    /// What is printed of a connection with these bytes.
    fn printed(before: Option<u64>, bytes: &[u8]) -> Vec<u8> {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let output = Output::new(ours, before).unwrap();
        thread::scope(|scope| {
            let printer = scope.spawn(|| {
                let mut printed = Vec::new();
                output.print(&mut printed);
                printed
            });
            theirs.write_all(bytes).unwrap();
            drop(theirs);
            printer.join().unwrap()
        })
    }

    fn again(position: u64, bytes: &[u8]) -> Vec<u8> {
        [&position.to_le_bytes(), bytes].concat()
    }

    #[test]
    fn a_restored_machine_repeats_nothing() {
        assert_eq!(printed(None, b"first"), b"first");
        for (before, position, bytes, expected) in [
            (5, 5, &b"next"[..], &b"next"[..]),
            (5, 3, b"stnext", b"next"),
            (5, 0, b"first", b""),
            (5, 0, b"fir", b""),
            // Lost, or a lie.
            (5, 9, b"next", b"next"),
            (5, u64::MAX, b"next", b"next"),
            (u64::MAX, 0, b"next", b""),
        ] {
            assert_eq!(printed(Some(before), &again(position, bytes)), expected, "{before} {position}");
        }
        assert_eq!(printed(Some(5), b"short"), b"", "it has no position");
        let long: Vec<u8> = (0..300_000_u32).map(|number| number as u8).collect();
        assert!(printed(Some(100_001), &again(0, &long)) == long[100_001..]);
    }

    #[test]
    fn what_waits_in_the_socket_has_arrived() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let output = Output::new(ours, None).unwrap();
        assert_eq!(output.received(), 0);
        theirs.write_all(b"12345").unwrap();
        assert_eq!(output.received(), 5);
        assert_eq!(output.read(&mut [0; 3]).unwrap(), Some(&b"123"[..]));
        assert_eq!(output.received(), 5);

        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let output = Output::new(ours, Some(5)).unwrap();
        assert_eq!(output.received(), 5);
        theirs.write_all(&again(2, b"345")).unwrap();
        assert_eq!(output.received(), 5);
        theirs.write_all(b"67").unwrap();
        assert_eq!(output.received(), 7);
        assert_eq!(output.read(&mut [0; 100]).unwrap(), Some(&b"67"[..]));
        drop(theirs);
        assert_eq!(output.read(&mut [0; 100]).unwrap(), None);
        assert_eq!(output.received(), 7);
    }

    #[test]
    fn output_is_available_to_its_reader_while_the_guest_is_silent() {
        let ((mut reader, writer), (mut guest, ours)) = (io::pipe().unwrap(), UnixStream::pair().unwrap());
        let printer = thread::spawn(move || {
            Output::new(ours, None).unwrap().print(File::from(OwnedFd::from(writer)));
        });
        guest.write_all(b"ready").unwrap();
        // Long enough for it to block.
        thread::sleep(Duration::from_millis(50));
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let mut bytes = [0; 5];
            let _ = sender.send(reader.read_exact(&mut bytes).map(|()| bytes));
        });
        let bytes = receiver.recv_timeout(Duration::from_secs(10)).expect("it is held back").unwrap();
        assert_eq!(&bytes, b"ready");
        drop(guest);
        printer.join().unwrap();
    }
}
