//! A pseudo-terminal with husk in its foreground.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::husk::end_of;

/// A pseudo-terminal, its foreground process and its output.
pub struct Terminal {
    keyboard: File,
    line: OwnedFd,
    child: Child,
    screen: Receiver<Vec<u8>>,
    shown: String,
}

/// The terminal modes that raw mode changes.
#[derive(Debug, PartialEq, Eq)]
pub struct Modes {
    local: libc::tcflag_t,
    input: libc::tcflag_t,
    output: libc::tcflag_t,
}

impl Modes {
    /// Whether canonical mode is enabled.
    pub fn canonical(&self) -> bool {
        self.local & libc::ICANON != 0
    }

    /// Whether output processing is enabled.
    #[allow(dead_code)] // only some of the programs that have this file ask
    pub fn changes_output(&self) -> bool {
        self.output & libc::OPOST != 0
    }
}

impl Terminal {
    /// Starts `command` in a new session on a new terminal.
    pub fn start(mut command: Command) -> Terminal {
        let (keyboard, line) = open_pty().unwrap();
        let stream = || line.try_clone().unwrap();
        command.stdin(stream()).stdout(stream()).stderr(stream());
        // SAFETY: setsid and ioctl are async-signal-safe, and access no memory of the parent.
        unsafe {
            command.pre_exec(|| {
                if libc::setsid() < 0 || libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                    return Err(io::Error::last_os_error());
                }
                Ok(())
            });
        }
        let child = command.spawn().unwrap();
        let mut from = keyboard.try_clone().unwrap();
        let (to, screen) = channel();
        thread::spawn(move || {
            let mut buffer = [0; 4096];
            // The end of the terminal reads as an error.
            while let Ok(count @ 1..) = from.read(&mut buffer) {
                if to.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Terminal { keyboard, line, child, screen, shown: String::new() }
    }

    /// The foreground process.
    #[allow(dead_code)] // only some of the programs that have this file ask
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Types keys.
    pub fn type_keys(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// Resizes the terminal, of which its foreground process is notified.
    #[allow(dead_code)] // only some of the programs that have this file resize
    pub fn resize(&mut self, rows: u16, columns: u16) {
        let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        // SAFETY: the request reads a `winsize` from the pointer, which refers to one.
        assert_eq!(unsafe { libc::ioctl(self.keyboard.as_raw_fd(), libc::TIOCSWINSZ, &size) }, 0);
    }

    /// Waits until `words` have been printed.
    #[track_caller]
    pub fn wait_for(&mut self, words: &str) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.shown.contains(words) {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("{words:?} was never shown: {:?}", self.shown),
            }
        }
    }

    /// The output so far, up to what was waited for.
    #[allow(dead_code)] // only some of the programs that have this file look at all of it
    pub fn shown(&self) -> &str {
        &self.shown
    }

    /// The current modes.
    pub fn modes(&self) -> Modes {
        let mut attributes = std::mem::MaybeUninit::<libc::termios>::uninit();
        // SAFETY: `line` is an open terminal, and tcgetattr fills `attributes` if it returns 0.
        let attributes = unsafe {
            assert_eq!(libc::tcgetattr(self.line.as_raw_fd(), attributes.as_mut_ptr()), 0);
            attributes.assume_init()
        };
        Modes { local: attributes.c_lflag, input: attributes.c_iflag, output: attributes.c_oflag }
    }

    /// Waits for the process and returns its exit code.
    #[track_caller]
    pub fn wait(&mut self) -> Option<i32> {
        end_of(&mut self.child).unwrap_or_else(|| panic!("husk did not end: {:?}", self.shown)).code()
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open_pty() -> io::Result<(File, OwnedFd)> {
    let (mut master, mut slave) = (-1, -1);
    let none = std::ptr::null_mut();
    // SAFETY: openpty writes two descriptors to the integers, and accepts null for the other arguments.
    if unsafe { libc::openpty(&mut master, &mut slave, none, none.cast(), none.cast()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // The child must not inherit the parent's ends: otherwise the terminal would never hang up.
    for fd in [master, slave] {
        // SAFETY: the descriptor was just opened here; FD_CLOEXEC accesses no memory.
        unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    }
    // SAFETY: both were just opened, and have no other owner.
    Ok(unsafe { (File::from_raw_fd(master), OwnedFd::from_raw_fd(slave)) })
}
