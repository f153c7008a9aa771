//! How a session begins: with a machine that boots, that was restored or that waits, or with another process in one.

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use anyhow::{Context, Result};
use husk_protocol::{MAIN_SESSION, Overlay, Renewal, Role, Run, ToGuest};
use vmm_sys_util::epoll::{Epoll, EventSet};

use super::control::ControlConnection;
use super::{Attached, Change, Endpoints, Session, Streams};
use crate::snapshot::Received;
use crate::timings::Timings;

impl Session {
    /// Creates a session whose guest connects to `listener`. `stdin` says whether the process reads this process's
    /// standard input, `on_terminal` whether it has a terminal.
    pub fn new(
        listener: UnixListener,
        stdin: bool,
        on_terminal: bool,
        endpoints: Endpoints,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        let session = Session::without_connections(MAIN_SESSION, stdin, on_terminal, endpoints, timings)?;
        session.listening(listener)
    }

    /// Creates the session of a restored machine, whose process has started before. The guest connects again, which may
    /// be before or after this call, and says which of the process's streams are still open. Of its outputs, `received` has
    /// arrived before. Then it is told what it becomes. The machine must not have another session.
    pub fn resumed(
        listener: UnixListener,
        received: Received,
        on_terminal: bool,
        change: Change,
        endpoints: Endpoints,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        // Any of them, until the guest has said which.
        let mut session = Session::without_connections(MAIN_SESSION, true, on_terminal, endpoints, timings)?;
        session.streams.expect_again(received);
        session.is_double = !change.is_same;
        session.change = Some(change);
        session.listening(listener)
    }

    /// Creates the session of a machine that waits for its process (see [`GuestSpec::waiting_initramfs`]). When it
    /// [waits](Session::is_waiting), it can be saved.
    ///
    /// [`GuestSpec::waiting_initramfs`]: crate::guest::GuestSpec::waiting_initramfs
    pub fn waiting(listener: UnixListener, timings: Arc<Timings>) -> Result<Session> {
        let mut session =
            Session::without_connections(MAIN_SESSION, false, false, Endpoints::Stdio(Attached::default()), timings)?;
        session.expected.clear();
        session.is_to_wait = true;
        session.listening(listener)
    }

    /// Creates the session of a machine that waits for its process, usually a restored one, and begins `run` in it, with the
    /// writable layer `overlay`. From then on the session is like that of a machine that was started for the run.
    pub fn beginning(
        listener: UnixListener,
        overlay: Overlay,
        run: Box<Run>,
        endpoints: Endpoints,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        let (stdin, on_terminal) = (run.process.stdin, run.process.terminal.is_some());
        let longest = Renewal { time_ns: u64::MAX, entropy: [0; 32] };
        husk_protocol::frame::write(&ToGuest::Begin(longest, overlay.clone(), run.clone()), &mut Vec::new())
            .context("the command is too long")?;
        let mut session = Session::without_connections(MAIN_SESSION, stdin, on_terminal, endpoints, timings)?;
        session.run = Some((overlay, run));
        session.listening(listener)
    }

    fn listening(mut self, listener: UnixListener) -> Result<Session> {
        listener.set_nonblocking(true).context("set up the session")?;
        self.watch(listener.as_raw_fd(), EventSet::IN)?;
        self.listener = Some(listener);
        Ok(self)
    }

    /// Creates a session for an additional process over established connections: one per stream, and `control`, on
    /// which the process was described.
    pub fn over(
        id: u64,
        control: UnixStream,
        streams: Vec<(Role, UnixStream)>,
        on_terminal: bool,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        let stdin = streams.iter().any(|(role, _)| *role == Role::Stdin);
        let mut session =
            Session::without_connections(id, stdin, on_terminal, Endpoints::Stdio(Attached::default()), timings)?;
        control.set_nonblocking(true).context("set up the session")?;
        session.watch(control.as_raw_fd(), EventSet::IN)?;
        session.control = Some(ControlConnection::new(control));
        for (role, stream) in streams {
            session.arrived.push(role);
            session.streams.start(role, stream)?;
        }
        Ok(session)
    }

    fn without_connections(
        id: u64,
        stdin: bool,
        on_terminal: bool,
        endpoints: Endpoints,
        timings: Arc<Timings>,
    ) -> Result<Session> {
        let epoll = Epoll::new().context("epoll")?;
        let mut expected = vec![Role::Stdout];
        expected.extend(stdin.then_some(Role::Stdin));
        expected.extend((!on_terminal).then_some(Role::Stderr));
        let session = Session {
            epoll,
            id,
            listener: None,
            pending: Vec::new(),
            control: None,
            streams: Streams::new(endpoints).context("set up the streams")?,
            expected,
            arrived: Vec::new(),
            on_terminal,
            started: false,
            is_created: false,
            only_forwards: false,
            change: None,
            is_changing: false,
            is_double: false,
            is_to_wait: false,
            is_waiting: false,
            run: None,
            end: None,
            was_out_of_memory: false,
            finish_by: None,
            signaled_at: Vec::new(),
            timings,
        };
        session.watch(session.streams.closed().as_raw_fd(), EventSet::IN)?;
        Ok(session)
    }
}
