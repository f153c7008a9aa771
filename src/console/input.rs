//! Forwards standard input to the serial port, no faster than the guest reads it.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::keys::{Command, Keys};

/// The maximum amount buffered for a guest that does not read.
const PENDING_MAX_BYTES: usize = 4096;

/// Standard input, with data that was read but not yet accepted by the guest.
pub struct Input {
    file: File,
    /// On a terminal: separates husk's commands from keys for the guest.
    keys: Option<Keys>,
    pending: Vec<u8>,
    ended: bool,
    watched: bool,
}

impl Input {
    /// This process's standard input; `None` if it is closed, or a terminal on which this process is in the background.
    pub fn from_stdin(on_terminal: bool) -> Option<Input> {
        let stdin = io::stdin();
        if !on_terminal && io::IsTerminal::is_terminal(&stdin) {
            return None;
        }
        let file = File::from(stdin.as_fd().try_clone_to_owned().ok()?);
        Some(Input::new(file, on_terminal.then(Keys::default)))
    }

    /// Input from a client attached to a machine in the background.
    pub fn from_file(file: File) -> Input {
        Input::new(file, None)
    }

    fn new(file: File, keys: Option<Keys>) -> Input {
        Input { file, keys, pending: Vec::new(), ended: false, watched: false }
    }

    /// Makes `epoll` report `token` when there is input. Returns false for a regular file, which never blocks and which
    /// epoll rejects. Does nothing if it is already watched.
    pub fn watch(&mut self, epoll: &Epoll, token: u64) -> io::Result<bool> {
        if !self.watched {
            let event = EpollEvent::new(EventSet::IN, token);
            match epoll.ctl(ControlOperation::Add, self.file.as_raw_fd(), event) {
                Err(e) if e.raw_os_error() == Some(libc::EPERM) => return Ok(false),
                other => other?,
            }
            self.watched = true;
        }
        Ok(true)
    }

    /// Stops watching. Does nothing if it is not watched.
    pub fn unwatch(&mut self, epoll: &Epoll) -> io::Result<()> {
        if std::mem::take(&mut self.watched) {
            epoll.ctl(ControlOperation::Delete, self.file.as_raw_fd(), EpollEvent::default())?;
        }
        Ok(())
    }

    /// Reads available input once and returns the commands in it.
    pub fn read(&mut self) -> Vec<Command> {
        let mut buffer = [0; 512];
        let count = match self.file.read(&mut buffer) {
            Ok(count) => count,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => return Vec::new(),
            // A terminal that hung up reads as an error; there is no more input either way.
            Err(_) => 0,
        };
        self.ended |= count == 0;
        let read = buffer.get(..count).unwrap_or_default();
        match &mut self.keys {
            None => {
                self.pending.extend_from_slice(read);
                Vec::new()
            }
            Some(keys) => {
                let commands = keys.sort(read, &mut self.pending);
                // Keys are read even if the guest does not accept them, so that commands work; excess keys are dropped.
                self.pending.truncate(PENDING_MAX_BYTES);
                commands
            }
        }
    }

    /// Offers pending input to `guest`, which returns how much it accepted. Returns whether more should be read.
    pub fn feed(&mut self, guest: impl FnOnce(&[u8]) -> usize) -> bool {
        if !self.pending.is_empty() {
            let taken = guest(&self.pending).min(self.pending.len());
            self.pending.drain(..taken);
        }
        !self.ended && (self.pending.is_empty() || self.keys.is_some())
    }

    /// Whether input has ended and the guest has accepted all of it.
    pub fn is_over(&self) -> bool {
        self.ended && self.pending.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, Write};

    use super::*;

    fn input(content: &[u8], keys: Option<Keys>) -> Input {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(content).unwrap();
        file.rewind().unwrap();
        Input::new(file, keys)
    }

    #[test]
    fn all_input_arrives_in_pieces_of_any_size() {
        let content: Vec<u8> = (0..2000u32).map(|n| n as u8).collect();
        let (mut input, mut got) = (input(&content, None), Vec::new());
        loop {
            let more = input.feed(|bytes| {
                let taken = bytes.len().min(7);
                got.extend_from_slice(&bytes[..taken]);
                taken
            });
            if more {
                input.read();
            } else if input.pending.is_empty() {
                break;
            }
        }
        assert_eq!(got, content);
    }

    #[test]
    fn nothing_is_read_ahead_of_a_guest_that_does_not_read() {
        let mut input = input(&[7; 2000], None);
        input.read();
        assert!(!input.feed(|_| 0));
        assert_eq!(input.pending.len(), 512);
    }

    #[test]
    fn commands_work_although_the_guest_does_not_read() {
        let mut content = vec![b'k'; 3 * PENDING_MAX_BYTES];
        content.extend(b"\x01x");
        let (mut input, mut commands) = (input(&content, Some(Keys::default())), Vec::new());
        while input.feed(|_| 0) {
            commands.extend(input.read());
        }
        assert_eq!(commands, [Command::Quit]);
        assert_eq!(input.pending.len(), PENDING_MAX_BYTES);
    }
}
