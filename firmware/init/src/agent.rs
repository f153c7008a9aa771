//! The one place where init waits: for children, for the host, and for the streams between them; and the machine's end.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use husk_protocol::{Hello, MAIN_SESSION, Role};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::connection::{self, Greeting};
use crate::report;
use crate::root::Kept;
use crate::session::Session;

/// More sessions than this do not run at a time.
const SESSIONS_MAX: usize = 64;
/// Connections that may be open without a session.
const GREETINGS_MAX: usize = 16;
/// How long killed processes are waited for; one may hang in a driver.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

struct Agent<'a> {
    children: Option<SignalFd>,
    listener: Option<OwnedFd>,
    greetings: Vec<Greeting>,
    /// The main session is the first.
    main: Session,
    others: Vec<Session>,
    hostname: &'a str,
    /// When all processes were killed, the main one having ended.
    killed_at: Option<Instant>,
}

/// Where the host opens more sessions. To be made before the main process starts: the host may come as soon as it knows of that.
pub fn listen() -> Option<OwnedFd> {
    connection::listen().inspect_err(|failure| report::say(&failure.message)).ok()
}

/// Serves the main session, and those that the host opens at `listener`, to the end of the machine.
pub fn run(main: Session, hostname: &str, kept: Option<Kept>, listener: Option<OwnedFd>) -> ! {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    let children = set
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
        .inspect_err(|error| report::say(&format!("watch processes: {error}")))
        .ok();
    let (greetings, others) = (Vec::new(), Vec::new());
    let mut agent = Agent { children, listener, greetings, main, others, hostname, killed_at: None };
    agent.serve();
    if let Some(kept) = kept {
        kept.settle();
    }
    report::end(agent.main.exit_code())
}

impl Agent<'_> {
    fn serve(&mut self) {
        loop {
            self.bury();
            self.greet();
            self.main.advance(self.hostname);
            for session in &mut self.others {
                session.advance(self.hostname);
            }
            self.others.retain(|session| !session.is_over());
            if self.main.is_over() {
                return;
            }
            self.wait();
        }
    }

    /// Takes note of processes that have ended, orphans among them. With the main one all others end.
    fn bury(&mut self) {
        let all_gone = loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(status) if status.pid().is_some() => {
                    self.main.note_end(&status);
                    for session in &mut self.others {
                        if session.note_end(&status) {
                            // What it left running may go on, and hold its pipes.
                            session.expect_no_more_output();
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                other => break other == Err(Errno::ECHILD),
            }
        };
        if !self.main.has_ended() {
            return;
        }
        let killed_at = *self.killed_at.get_or_insert_with(|| {
            // All but this process itself, and none of them can start another in between.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            Instant::now()
        });
        if all_gone || killed_at.elapsed() > KILL_PATIENCE {
            self.main.expect_no_more_output();
        }
    }

    /// Hears what new connections are for.
    fn greet(&mut self) {
        if let Some(listener) = &self.listener {
            while let Some(socket) = connection::accept(listener) {
                if self.greetings.len() >= GREETINGS_MAX {
                    self.greetings.remove(0);
                }
                self.greetings.push(Greeting::new(socket));
            }
        }
        for mut greeting in std::mem::take(&mut self.greetings) {
            match greeting.advance() {
                Ok(None) => self.greetings.push(greeting),
                Ok(Some(hello)) => self.join(hello, greeting),
                Err(()) => {}
            }
        }
    }

    fn join(&mut self, hello: Hello, greeting: Greeting) {
        if hello.session == MAIN_SESSION {
            return;
        }
        if let Some(session) = self.others.iter_mut().find(|session| session.id == hello.session) {
            session.offer(hello.role, greeting.socket);
        } else if hello.role != Role::Control {
            // Its session's control connection is still on its way.
            self.greetings.push(greeting);
        } else if self.others.len() < SESSIONS_MAX {
            self.others.push(Session::accepted(hello.session, greeting.socket));
        }
    }

    fn wait(&self) {
        let mut fds: Vec<PollFd> = Vec::new();
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        fds.extend(self.children.as_ref().map(|children| readable(children.as_fd())));
        fds.extend(self.listener.as_ref().map(|listener| readable(listener.as_fd())));
        let incomplete = self.greetings.iter().filter(|greeting| greeting.is_incomplete());
        fds.extend(incomplete.map(|greeting| readable(greeting.socket.as_fd())));
        for session in std::iter::once(&self.main).chain(&self.others) {
            fds.extend(session.awaits().map(|(fd, events)| PollFd::new(fd, events)));
        }
        let timeout = match self.killed_at {
            // Until a while after `bury` will have given up.
            Some(killed_at) if killed_at.elapsed() < 2 * KILL_PATIENCE => PollTimeout::from(100u8),
            _ => PollTimeout::NONE,
        };
        let _ = poll(&mut fds, timeout);
        // What it says is only that there is something; `bury` asks what.
        if let Some(children) = &self.children {
            while let Ok(Some(_)) = children.read_signal() {}
        }
    }
}
