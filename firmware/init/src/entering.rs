//! A process on its way to its program, as init follows it: from the fork until execve(2).
//!
//! Init never waits for it. Whoever is in its container can hold it up, or its files are on a host that hangs, and init has others to
//! serve. It says by a socket what it has reached, and waits there once, if it is told to, before it executes the program.

use std::io::IoSlice;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use husk_protocol::Process;
use nix::errno::Errno;
use nix::poll::PollFlags;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, sendmsg, socketpair};
use nix::unistd::Pid;

use crate::errors::{Context, Failure};
use crate::process::Started;
use crate::sys;

const MESSAGE_BYTES_MAX: usize = 4096;
/// How long a process may take to get ready, and then to execute its program.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// What init tells the process that waits.
const GO: u8 = 1;

/// What a process says on its way, each in a packet of its own.
#[derive(Debug, PartialEq, Eq)]
pub enum Told {
    /// A helper has made the process with this ID, and ends.
    Forked(Pid),
    /// The process waits for the word to go. Its end of the terminal has this number, if it has opened one.
    Ready(Option<RawFd>),
    /// There will be no program.
    Failed(Failure),
}

/// How far a process has come.
#[derive(Debug, PartialEq, Eq)]
pub enum Reached {
    /// It waits for [`Entering::go`].
    Ready,
    /// It has executed its program.
    Program,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Preparing,
    Ready,
    Going,
    /// It has executed its program, or never will.
    Over,
}

/// The process's end of the socket.
pub struct Reporter(OwnedFd);

/// A process that has not executed its program yet. If this is dropped before it was told to go, it is killed.
pub struct Entering {
    socket: OwnedFd,
    /// Who makes the process, until it has said which one that is.
    helper: Option<Pid>,
    pid: Option<Pid>,
    stage: Stage,
    /// Where the terminal is that it has opened, once it is ready.
    terminal: Option<Option<RawFd>>,
    reads_input: bool,
    /// Whether it was reaped, and who was while it was not known which process it is.
    is_reaped: bool,
    reaped: Vec<Pid>,
    deadline: Option<Instant>,
    started: Started,
}

/// Two ends of a socket: init's, and that of a process.
pub fn pair() -> Result<(OwnedFd, Reporter), Failure> {
    // A packet is read as it was sent, and the end of all who have the other end is noticed.
    let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
    pair.map(|(ours, theirs)| (ours, Reporter(theirs))).context("create a socket pair")
}

impl Reporter {
    /// Tells init. If that does not listen any more, the next step fails.
    pub fn tell(&self, told: &Told) {
        let bytes = told.to_bytes();
        let _ = sendmsg::<()>(self.0.as_raw_fd(), &[IoSlice::new(&bytes)], &[], MsgFlags::MSG_NOSIGNAL, None);
    }

    /// Waits until the process may execute its program, and exits if it never may.
    pub fn await_go(&self) {
        let mut word = [0];
        loop {
            match recv(self.0.as_raw_fd(), &mut word, MsgFlags::empty()) {
                Err(Errno::EINTR) => {}
                Ok(1) if word == [GO] => return,
                _ => sys::leave(),
            }
        }
    }
}

impl AsFd for Reporter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Told {
    fn to_bytes(&self) -> Vec<u8> {
        match self {
            Told::Forked(pid) => [&[0][..], &pid.as_raw().to_le_bytes()].concat(),
            Told::Ready(terminal) => [&[1][..], &terminal.unwrap_or(-1).to_le_bytes()].concat(),
            Told::Failed(Failure { message, code }) => {
                let message = message.bytes().take(MESSAGE_BYTES_MAX - 2);
                [2, *code].into_iter().chain(message).collect()
            }
        }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Told> {
        match *bytes {
            [0, a, b, c, d] => {
                let pid = i32::from_le_bytes([a, b, c, d]);
                (pid > 1).then(|| Told::Forked(Pid::from_raw(pid)))
            }
            [1, a, b, c, d] => {
                let number = i32::from_le_bytes([a, b, c, d]);
                Some(Told::Ready((number >= 0).then_some(number)))
            }
            [2, code, ref message @ ..] => {
                Some(Told::Failed(Failure { message: String::from_utf8_lossy(message).into_owned(), code }))
            }
            _ => None,
        }
    }
}

impl Entering {
    /// A process that prepares itself, made by init, or by `helper`, which says later which one it is. `socket` is init's end of its.
    pub fn preparing(
        socket: OwnedFd,
        pid: Option<Pid>,
        helper: Option<Pid>,
        process: &Process,
        started: Started,
    ) -> Self {
        let deadline = Some(Instant::now() + STEP_TIMEOUT);
        let (stage, reads_input) = (Stage::Preparing, process.stdin);
        let (terminal, is_reaped, reaped) = (None, false, Vec::new());
        Entering { socket, helper, pid, stage, terminal, reads_input, is_reaped, reaped, deadline, started }
    }

    /// A process that executes its program without being told to.
    pub fn going(socket: OwnedFd, started: Started) -> Self {
        let pid = Some(started.pid);
        let mut entering = Entering::preparing(socket, pid, None, &Process::default(), started);
        (entering.stage, entering.deadline) = (Stage::Going, None);
        entering
    }

    /// Its ID, once it is known.
    pub fn pid(&self) -> Option<Pid> {
        self.pid
    }

    /// Whether it was reaped, so that its ID may be another's.
    pub fn is_reaped(&self) -> bool {
        self.is_reaped
    }

    /// What the process has reached since the last call, or why it never will; then this is of no more use. Does not block.
    pub fn advance(&mut self) -> Result<Option<Reached>, Failure> {
        if matches!(self.stage, Stage::Ready | Stage::Over) {
            return Ok(None);
        }
        let reached = self.listen();
        if reached.is_err() {
            self.kill();
        }
        if !matches!(reached, Ok(None | Some(Reached::Ready))) {
            self.stage = Stage::Over;
        }
        reached
    }

    fn listen(&mut self) -> Result<Option<Reached>, Failure> {
        let mut packet = [0; MESSAGE_BYTES_MAX];
        loop {
            match recv(self.socket.as_raw_fd(), &mut packet, MsgFlags::MSG_DONTWAIT) {
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if self.is_reaped => return self.close(),
                Err(Errno::EAGAIN) => break,
                Err(_) | Ok(0) => return self.close(),
                Ok(len) => match packet.get(..len).and_then(Told::from_bytes) {
                    // From its helper, once.
                    Some(Told::Forked(pid)) if self.stage == Stage::Preparing && self.pid.is_none() => {
                        (self.pid, self.helper) = (Some(pid), None);
                        self.is_reaped = self.reaped.contains(&pid);
                    }
                    Some(Told::Ready(terminal)) if self.stage == Stage::Preparing => self.terminal = Some(terminal),
                    Some(Told::Failed(failure)) => return Err(failure),
                    _ => {}
                },
            }
            if let (Stage::Preparing, Some(pid), Some(terminal), false) =
                (self.stage, self.pid, self.terminal, self.is_reaped)
            {
                return self.note_ready(pid, terminal).map(Some);
            }
        }
        if self.deadline.is_some_and(|deadline| deadline <= Instant::now()) {
            return Err(Failure::new("the process does not get on with executing its program"));
        }
        Ok(None)
    }

    fn note_ready(&mut self, pid: Pid, terminal: Option<RawFd>) -> Result<Reached, Failure> {
        self.started.pid = pid;
        (self.stage, self.deadline) = (Stage::Ready, None);
        if let Some(number) = terminal {
            let master = sys::descriptor_of(pid, number).context("take the process's terminal")?;
            self.started.use_terminal(self.reads_input, master)?;
        }
        Ok(Reached::Ready)
    }

    /// Nobody has the other end any more: it closes when the program is executed.
    fn close(&mut self) -> Result<Option<Reached>, Failure> {
        match self.stage {
            Stage::Going => Ok(Some(Reached::Program)),
            _ => Err(Failure::new("the process has ended before it was ready")),
        }
    }

    /// Our ends of its streams, once.
    pub fn take_streams(&mut self) -> Started {
        std::mem::replace(&mut self.started, Started::bare())
    }

    /// Lets a process that is ready execute its program.
    pub fn go(&mut self) {
        if self.stage == Stage::Ready {
            (self.stage, self.deadline) = (Stage::Going, Some(Instant::now() + STEP_TIMEOUT));
            // If it has ended, that is noticed.
            let _ = sendmsg::<()>(
                self.socket.as_raw_fd(),
                &[IoSlice::new(&[GO])],
                &[],
                MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
                None,
            );
        }
    }

    /// Notes that a process was reaped. Returns whether it is this one; [`Entering::advance`] then says what it has reached.
    pub fn note_end(&mut self, pid: Pid) -> bool {
        if self.helper == Some(pid) {
            self.helper = None;
        }
        if self.pid.is_none() {
            self.reaped.push(pid);
        }
        self.is_reaped |= self.pid == Some(pid);
        self.pid == Some(pid)
    }

    /// When [`Entering::advance`] is due although nothing has happened.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// What to wait for.
    pub fn awaits(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        matches!(self.stage, Stage::Preparing | Stage::Going).then(|| (self.socket.as_fd(), PollFlags::POLLIN))
    }

    fn kill(&self) {
        for pid in [self.helper, self.pid.filter(|_| !self.is_reaped)].into_iter().flatten() {
            let _ = sys::send_signal(pid, libc::SIGKILL as u8);
        }
    }
}

impl Drop for Entering {
    fn drop(&mut self) {
        if matches!(self.stage, Stage::Preparing | Stage::Ready) {
            self.kill();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::{Child, Command};

    use super::*;

    /// A process that stands for one on its way, and does nothing.
    fn child() -> Child {
        Command::new("sleep").arg("1000").spawn().unwrap()
    }

    fn pid_of(child: &Child) -> Pid {
        Pid::from_raw(child.id() as i32)
    }

    fn preparing(pid: Option<Pid>) -> (Entering, Reporter) {
        let (ours, theirs) = pair().unwrap();
        (Entering::preparing(ours, pid, None, &Process::default(), Started::bare()), theirs)
    }

    #[test]
    fn a_process_says_what_it_has_reached() {
        let mut child = child();
        let (mut entering, theirs) = preparing(None);
        assert_eq!(entering.advance(), Ok(None));
        // It may be faster than who has made it.
        theirs.tell(&Told::Ready(None));
        assert_eq!(entering.advance(), Ok(None));
        theirs.tell(&Told::Forked(pid_of(&child)));
        assert_eq!(entering.advance(), Ok(Some(Reached::Ready)));
        assert!(entering.awaits().is_none() && entering.deadline().is_none());
        assert_eq!((entering.take_streams().pid, entering.advance()), (pid_of(&child), Ok(None)));
        entering.go();
        // Nobody can make it another one.
        theirs.tell(&Told::Forked(Pid::from_raw(2)));
        theirs.await_go();
        assert_eq!((entering.advance(), entering.pid()), (Ok(None), Some(pid_of(&child))));
        drop(theirs);
        assert_eq!(entering.advance(), Ok(Some(Reached::Program)));
        drop(entering);
        assert_eq!(child.try_wait().unwrap(), None, "it was killed");
        child.kill().and_then(|()| child.wait()).unwrap();
    }

    #[test]
    fn what_a_process_says_arrives_whole() {
        let failure = Failure { message: "exec: \"x\": not found".into(), code: 127 };
        for told in
            [Told::Forked(Pid::from_raw(70_000)), Told::Ready(Some(5)), Told::Ready(None), Told::Failed(failure)]
        {
            assert_eq!(Told::from_bytes(&told.to_bytes()).as_ref(), Some(&told));
        }
        let long = Told::Failed(Failure { message: "x".repeat(2 * MESSAGE_BYTES_MAX), code: 1 }).to_bytes();
        assert_eq!(long.len(), MESSAGE_BYTES_MAX);
        for pid in [-1, 0, 1] {
            assert_eq!(Told::from_bytes(&Told::Forked(Pid::from_raw(pid)).to_bytes()), None);
        }
    }

    #[test]
    fn who_is_reaped_on_its_way_is_waited_for_no_longer() {
        let mut child = child();
        let (mut entering, _still_open) = preparing(Some(pid_of(&child)));
        assert!(!entering.note_end(Pid::from_raw(1)) && entering.advance() == Ok(None));
        child.kill().and_then(|()| child.wait()).unwrap();
        assert!(entering.note_end(pid_of(&child)));
        assert_eq!(entering.advance().unwrap_err().message, "the process has ended before it was ready");
        // Also before it was known which one it is.
        let (mut entering, theirs) = preparing(None);
        assert!(!entering.note_end(Pid::from_raw(1234)));
        theirs.tell(&Told::Ready(None));
        theirs.tell(&Told::Forked(Pid::from_raw(1234)));
        assert_eq!(entering.advance().unwrap_err().message, "the process has ended before it was ready");
        let (mut entering, theirs) = preparing(None);
        theirs.tell(&Told::Failed(Failure::new("why")));
        assert_eq!(entering.advance(), Err(Failure::new("why")));
    }

    #[test]
    fn who_takes_too_long_or_is_given_up_is_killed() {
        let (mut late, mut given_up) = (child(), child());
        let (mut entering, _open) = preparing(Some(pid_of(&late)));
        entering.deadline = Some(Instant::now());
        let told = entering.advance().unwrap_err().message;
        assert_eq!(told, "the process does not get on with executing its program");
        let killed = Some(libc::SIGKILL);
        assert_eq!(late.wait().unwrap().signal(), killed);
        drop(preparing(Some(pid_of(&given_up))));
        assert_eq!(given_up.wait().unwrap().signal(), killed);
    }
}
