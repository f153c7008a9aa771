//! The event loop: init waits only here, for children, the host and the streams between them, and finally ends the
//! machine.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use husk_protocol::{Hello, MAIN_SESSION, Role};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::Pid;

use crate::connection::{self, PendingConnection};
use crate::container::Containers;
use crate::oom::KernelLog;
use crate::report;
use crate::session::{Session, World};
use crate::setup::Prepared;
use crate::sys::Ended;
use crate::{connections, sys};

/// The maximum number of concurrent sessions opened by the host; further ones wait for admission. With four connections
/// each, a fifth of the host device's 512 connections remains for those that wait.
const SESSIONS_MAX: usize = 100;
/// How many of them may have processes in containers: whoever fills them keeps nobody from limiting or listing a container.
const CONTAINED_MAX: usize = 90;
/// How long to wait for killed processes; one may hang in a driver.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the kernel may then take to write out what it has in memory. The host ends the machine 30 seconds after the command.
const SYNC_TIMEOUT: Duration = Duration::from_secs(15);

struct Agent {
    children: Option<SignalFd>,
    listener: Option<OwnedFd>,
    /// Connections of the host that have not sent their hello; their number is limited by the host side.
    pending: Vec<PendingConnection>,
    /// The main session is the first.
    main: Session,
    others: Vec<Session>,
    containers: Containers,
    /// `None` if the machine could not be prepared.
    prepared: Option<Prepared>,
    /// When all processes were killed, after the main one exited.
    killed_at: Option<Instant>,
    /// Where the kernel says that it has killed a process, unless it has no such log.
    kernel_log: Option<KernelLog>,
}

/// Listens for sessions opened by the host. Must be called before the main process starts, since the host may connect
/// as soon as it knows of that.
pub fn listen() -> Option<OwnedFd> {
    connection::listen().inspect_err(|failure| report::say(&failure.message)).ok()
}

/// Serves the main session, and those that the host opens through `listener`, until the machine ends.
pub fn run(main: Session, containers: Containers, prepared: Option<Prepared>, listener: Option<OwnedFd>) -> ! {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    let children = set
        .thread_block()
        .and_then(|()| SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK))
        .inspect_err(|error| report::say(&format!("watch processes: {error}")))
        .ok();
    crate::pressure::watch();
    let (pending, others) = (Vec::new(), Vec::new());
    let kernel_log = KernelLog::open().ok();
    let mut agent =
        Agent { children, listener, pending, main, others, containers, prepared, killed_at: None, kernel_log };
    agent.serve();
    if let Some(kept) = agent.prepared.and_then(|prepared| prepared.kept) {
        kept.settle();
    }
    // A process that was killed ends when what it wrote to a shared folder is on the host. Some may take longer than we have waited.
    if sys::reap() != Err(Errno::ECHILD) {
        sync();
    }
    report::end(agent.main.exit_code())
}

/// Writes out what the kernel has in memory, as far as that is possible soon: the host of a folder may not answer.
fn sync() {
    let (done, is_done) = std::sync::mpsc::channel();
    let write = move || {
        nix::unistd::sync();
        let _ = done.send(());
    };
    if std::thread::Builder::new().spawn(write).is_ok() {
        let _ = is_done.recv_timeout(SYNC_TIMEOUT);
    }
}

impl Agent {
    fn serve(&mut self) {
        loop {
            self.reap();
            let hostname = self.prepared.as_ref().map_or("", Prepared::hostname);
            self.main.advance(&mut World { hostname, containers: &mut self.containers });
            self.change();
            if self.main.is_cut()
                && let Err(failure) = self.main.reconnect()
            {
                report::say(&failure.message);
            }
            let may_go_on = self.serve_others();
            if self.main.is_over() {
                return;
            }
            // Continue with the next session.
            if !may_go_on {
                self.wait();
            }
        }
    }

    /// Makes the machine what the host has said that it is to become.
    fn change(&mut self) {
        let Some((identity, cut)) = self.main.take_change() else { return };
        let changed = self.prepared.as_mut().map_or(Ok(()), |prepared| prepared.change(&identity));
        // Afterwards, since programs may connect again at once, and nobody must hear of the resets: they are from the machine
        // that was saved as far as others can tell.
        if cut {
            let addresses = identity.interfaces.iter().flat_map(|interface| &interface.addresses);
            connections::reset(&addresses.map(|address| address.ip).collect::<Vec<_>>());
        }
        self.main.answer_change(changed);
    }

    /// Makes progress on the sessions opened by the host, without blocking. Returns whether one has ended or was admitted, so that there
    /// may be more.
    fn serve_others(&mut self) -> bool {
        self.read_hellos();
        let hostname = self.prepared.as_ref().map_or("", Prepared::hostname);
        let mut world = World { hostname, containers: &mut self.containers };
        for session in &mut self.others {
            session.advance(&mut world);
        }
        let has_admitted = self.admit();
        let before = self.others.len();
        self.others.retain(|session| {
            let is_over = session.is_over();
            if is_over {
                session.clean_up();
            }
            !is_over
        });
        has_admitted || self.others.len() < before
    }

    /// Reaps exited processes, including orphans. When the main one exits, all others are killed.
    fn reap(&mut self) {
        let all_gone = loop {
            match sys::reap() {
                Ok(Some((pid, ended))) => {
                    // Its parent may report the end of one that was killed in its own way.
                    if ended != Ended::Exited(0) {
                        self.note_oom_kills();
                    }
                    self.main.note_end(pid, ended, &mut self.containers);
                    for session in &mut self.others {
                        if session.note_end(pid, ended, &mut self.containers) {
                            // Processes that it left behind may continue and hold its pipes open.
                            session.expect_no_more_output();
                        }
                    }
                }
                Err(Errno::EINTR) => {}
                left => break left == Err(Errno::ECHILD),
            }
        };
        if !self.main.has_ended() {
            return;
        }
        let killed_at = *self.killed_at.get_or_insert_with(|| {
            // All processes except this one; none of them can fork in between.
            let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
            Instant::now()
        });
        if all_gone || killed_at.elapsed() > KILL_TIMEOUT {
            self.main.expect_no_more_output();
        }
    }

    /// Tells the host if the kernel has killed processes because memory was short.
    fn note_oom_kills(&mut self) {
        if self.kernel_log.as_mut().is_some_and(KernelLog::take_kills) {
            self.main.report_oom_kill();
            self.others.iter_mut().for_each(Session::report_oom_kills_of_container);
        }
    }

    /// Reads the hellos of new connections.
    fn read_hellos(&mut self) {
        if let Some(listener) = &self.listener {
            while let Some(socket) = connection::accept(listener) {
                self.pending.push(PendingConnection::new(socket));
            }
        }
        for mut connection in std::mem::take(&mut self.pending) {
            match connection.advance() {
                Ok(None) => self.pending.push(connection),
                Ok(Some(hello)) => self.join(hello, connection),
                Err(()) => {}
            }
        }
    }

    /// Assigns a connection to its session. Streams arrive after admission: without a session, it has ended.
    fn join(&mut self, hello: Hello, connection: PendingConnection) {
        let session = self.others.iter_mut().find(|session| session.id == hello.session);
        match (hello.role, session) {
            (Role::Control, None) if hello.session != MAIN_SESSION => {
                self.others.push(Session::accepted(hello.session, connection.socket));
            }
            (Role::Control, _) | (_, None) => {}
            (role, Some(session)) => session.offer(role, connection.socket),
        }
    }

    /// Admits sessions in order of arrival, as soon as the host has said what they are for. Returns whether there was one.
    fn admit(&mut self) -> bool {
        let admitted = self.others.iter().filter(|session| session.is_admitted());
        let mut contained = admitted.clone().filter(|session| session.is_contained() == Some(true)).count();
        let room = SESSIONS_MAX.saturating_sub(admitted.count());
        let mut free = room;
        for session in self.others.iter_mut().filter(|session| !session.is_admitted()) {
            let Some(is_contained) = session.is_contained() else { continue };
            if free > 0 && (!is_contained || contained < CONTAINED_MAX) {
                session.admit();
                contained += usize::from(is_contained);
                free -= 1;
            }
        }
        free < room
    }

    fn sessions(&self) -> impl Iterator<Item = &Session> {
        std::iter::once(&self.main).chain(&self.others)
    }

    fn wait(&mut self) {
        let mut fds: Vec<PollFd> = Vec::new();
        let readable = |fd| PollFd::new(fd, PollFlags::POLLIN);
        fds.extend(self.kernel_log.as_ref().map(|log| readable(log.as_fd())));
        fds.extend(self.children.as_ref().map(|children| readable(children.as_fd())));
        fds.extend(self.listener.as_ref().map(|listener| readable(listener.as_fd())));
        fds.extend(self.pending.iter().map(|connection| readable(connection.socket.as_fd())));
        for session in self.sessions() {
            fds.extend(session.awaits().map(|(fd, events)| PollFd::new(fd, events)));
        }
        let timeout = match self.killed_at {
            // Until some time after `reap` gives up.
            Some(killed_at) if killed_at.elapsed() < 2 * KILL_TIMEOUT => PollTimeout::from(100u8),
            _ => self.sessions().filter_map(Session::deadline).min().map_or(PollTimeout::NONE, |deadline| {
                let left = deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }),
        };
        let _ = poll(&mut fds, timeout);
        let is_first_ready = fds.first().and_then(PollFd::any).unwrap_or_default();
        if is_first_ready && self.kernel_log.is_some() {
            self.note_oom_kills();
        }
        // The descriptor only signals that children have exited; `reap` reaps them.
        if let Some(children) = &self.children {
            while let Ok(Some(_)) = children.read_signal() {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use husk_protocol::frame::{self, Reader};
    use husk_protocol::{Process, ToGuest, ToHost};

    use super::*;

    /// The host's end of a session that has said what it is for.
    fn open(agent: &mut Agent, session: u64, process: Process) -> UnixStream {
        let mut host = connect(agent, session, Role::Control);
        let mut message = Vec::new();
        frame::write(&ToGuest::Start(Box::new(process)), &mut message).unwrap();
        host.write_all(&message).unwrap();
        host
    }

    /// A process in a container that does not exist.
    fn contained() -> Process {
        Process { container: Some("none".into()), ..Process::default() }
    }

    /// The host's end of a connection that has sent its hello.
    fn connect(agent: &mut Agent, session: u64, role: Role) -> UnixStream {
        let (mut host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        host.write_all(&Hello { session, role }.to_bytes()).unwrap();
        agent.pending.push(PendingConnection::new(guest.into()));
        host
    }

    fn is_admitted(mut host: &UnixStream) -> bool {
        let (mut reader, mut buffer) = (Reader::default(), [0; 64]);
        let Ok(count) = host.read(&mut buffer) else { return false };
        reader.push(&buffer[..count]);
        reader.take::<ToHost>().unwrap() == Some(ToHost::Admitted)
    }

    /// No process is started or reaped: `reap` would reap those of other tests.
    fn agent() -> (Agent, UnixStream) {
        let (host, guest) = UnixStream::pair().unwrap();
        guest.set_nonblocking(true).unwrap();
        let main = Session::accepted(MAIN_SESSION, guest.into());
        let (pending, others) = (Vec::new(), Vec::new());
        let (children, listener, prepared, killed_at, kernel_log) = (None, None, None, None, None);
        let containers = Containers::default();
        (Agent { children, listener, pending, main, others, containers, prepared, killed_at, kernel_log }, host)
    }

    #[test]
    fn sessions_beyond_the_limit_are_admitted_when_others_end() {
        let (mut agent, _main) = agent();
        let mut hosts: Vec<UnixStream> =
            (1..=SESSIONS_MAX as u64 + 3).map(|id| open(&mut agent, id, Process::default())).collect();
        assert!(agent.serve_others() && !agent.serve_others());
        let admitted = |hosts: &[UnixStream]| hosts.iter().map(is_admitted).collect::<Vec<_>>();
        let waiting = hosts.split_off(SESSIONS_MAX);
        assert!(admitted(&hosts).iter().all(|admitted| *admitted));
        assert_eq!(admitted(&waiting), [false; 3]);
        // One that ends, and one that gives up waiting.
        hosts.pop();
        let mut waiting = waiting.into_iter();
        drop(waiting.next());
        assert!(agent.serve_others());
        agent.serve_others();
        assert_eq!(admitted(waiting.as_slice()), [true, false]);
    }

    #[test]
    fn a_process_without_streams_starts_when_it_is_admitted() {
        let (mut agent, _main) = agent();
        let _host = open(&mut agent, 7, Process { detached: true, ..contained() });
        // It is not to wait for anything else.
        while agent.serve_others() {}
        assert!(agent.others.iter().all(Session::has_ended), "it has not been tried");
    }

    #[test]
    fn processes_in_containers_leave_room_for_orders() {
        let (mut agent, _main) = agent();
        let all: Vec<UnixStream> = (1..=SESSIONS_MAX as u64).map(|id| open(&mut agent, id, contained())).collect();
        let silent = connect(&mut agent, 1000, Role::Control);
        agent.serve_others();
        assert_eq!(all.iter().filter(|host| is_admitted(host)).count(), CONTAINED_MAX);
        let order = open(&mut agent, 1001, Process::default());
        agent.serve_others();
        assert!(is_admitted(&order) && !is_admitted(&silent));
    }

    #[test]
    fn a_stream_without_a_session_is_closed() {
        let (mut agent, _main) = agent();
        let _control = connect(&mut agent, 7, Role::Control);
        agent.serve_others();
        let mut taken = connect(&mut agent, 7, Role::Stdout);
        let others = [(7, Role::Stdout), (7, Role::Control), (8, Role::Stdout), (MAIN_SESSION, Role::Stdin)];
        let others = others.map(|(session, role)| connect(&mut agent, session, role));
        agent.serve_others();
        assert!(agent.pending.is_empty());
        let closed = |host: &mut UnixStream| host.read(&mut [0]).is_ok_and(|count| count == 0);
        assert!(!closed(&mut taken) && others.into_iter().all(|mut host| closed(&mut host)));
    }
}
