//! What a confined monitor process cannot do by itself, and asks its supervisor for: connections to the host's sockets, and
//! why a helper process has ended.
//!
//! The monitor's threads ask one at a time and wait for the answer. The supervisor answers on a thread of its own, the
//! attendant, so that it may at the same time wait for the monitor.

use std::io::{self, ErrorKind};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

use crate::foreign;
use crate::sandbox;
use crate::sys::socket;

use super::Outside;

/// The monitor's end of the socket; `None` in any other process, which does everything itself.
static LINE: OnceLock<Mutex<UnixDatagram>> = OnceLock::new();

/// The maximum length of an answer in bytes.
const ANSWER_BYTES_MAX: usize = 4096;
/// The kinds of questions, the first byte of each. A 32-bit number follows.
const CONNECT: u8 = 0;
const END_OF_PASST: u8 = 1;

/// Makes this process, a monitor, ask through `socket`. Called once, before it has other threads.
pub fn ask_through(socket: UnixDatagram) {
    let _ = LINE.set(Mutex::new(socket));
}

/// Asks for a connection to the program that handles the guest's vsock connections to `port`. `None` in a process that
/// connects by itself.
pub fn connect(port: u32) -> Option<io::Result<UnixStream>> {
    Some(ask(CONNECT, port)?.and_then(|(error, stream)| match stream {
        Some(stream) => Ok(stream.into()),
        None => Err(io::Error::from_raw_os_error(error.trim().parse().unwrap_or(libc::EIO))),
    }))
}

/// Asks why the passt whose event is `needed` has ended. `None` in a process that knows by itself.
pub fn end_of_passt(needed: RawFd) -> Option<String> {
    let answer = ask(END_OF_PASST, needed.unsigned_abs())?;
    Some(answer.map_or_else(|_| "passt exited".to_owned(), |(reason, _)| reason))
}

fn ask(kind: u8, number: u32) -> Option<io::Result<(String, Option<OwnedFd>)>> {
    let line = LINE.get()?.lock().unwrap_or_else(PoisonError::into_inner);
    let [a, b, c, d] = number.to_le_bytes();
    let ask = || {
        line.send(&[kind, a, b, c, d])?;
        let mut answer = [0; ANSWER_BYTES_MAX];
        let (len, fd) = socket::receive_with_fd(&line, &mut answer)?;
        let answer = answer.get(..len).filter(|answer| !answer.is_empty()).ok_or(ErrorKind::UnexpectedEof)?;
        Ok((String::from_utf8_lossy(answer).into_owned(), fd))
    };
    Some(ask())
}

/// The thread that answers, until the monitor has exited.
#[derive(Debug)]
pub struct Attendant {
    thread: JoinHandle<()>,
    socket: UnixDatagram,
}

impl Attendant {
    /// Starts answering the questions that arrive at `socket`, if there is anything to ask for.
    pub fn start(socket: UnixDatagram, outside: &Outside) -> io::Result<Option<Attendant>> {
        let (vsock, passts) = (outside.vsock_path(), outside.passts());
        if vsock.is_none() && passts.is_empty() {
            return Ok(None);
        }
        let questions = socket.try_clone()?;
        let answer = move || {
            let socket = questions;
            let mut question = [0; 5];
            while let Ok(5) = socket.recv(&mut question) {
                let [kind, number @ ..] = question;
                let number = u32::from_le_bytes(number);
                let answered = match (kind, &vsock) {
                    (CONNECT, Some(path)) => match path.connect(number) {
                        Ok(stream) => socket::send_with_fd(&socket, b" ", stream.as_fd()),
                        Err(error) => tell(&socket, &error.raw_os_error().unwrap_or(libc::EIO).to_string()),
                    },
                    (END_OF_PASST, _) => {
                        let passt = passts.iter().find(|passt| passt.is(number));
                        tell(&socket, &passt.map_or_else(|| "passt exited".to_owned(), |passt| passt.reason_of_end()))
                    }
                    _ => return,
                };
                if answered.is_err() {
                    return;
                }
            }
        };
        sandbox::spawn("attendant", answer).map(|thread| Some(Attendant { thread, socket }))
    }

    /// Ends the thread.
    pub fn stop(self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        let _ = self.thread.join();
    }
}

fn tell(socket: &UnixDatagram, answer: &str) -> io::Result<()> {
    socket.send(foreign::start_of(answer, ANSWER_BYTES_MAX).as_bytes()).map(drop)
}
