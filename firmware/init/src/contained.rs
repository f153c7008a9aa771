//! Starts a process in a container: the container's first, which creates it, or one more.
//!
//! The child enters the container, finds there what the process needs, and says that it is ready. It executes the program when it is
//! told to go. It is a child of init, whose children start for a moment in the container's PID namespace, or in the others of a container
//! that exists: what the machine has is not to be seen there.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::fchown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use husk_protocol::{Container, Process};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, ForkResult, Pid, access, ttyname};

use crate::container::{self, Containers, Member};
use crate::errors::{Context, Failure};
use crate::identity::Identity;
use crate::process::{self, Program, Stage, Started, Streams};
use crate::root::make_dir;
use crate::{cgroup, sys};

/// The first byte that a child sends when it is ready, followed by the descriptor of its end of the terminal, or -1. Any other is
/// an exit code, and followed by the reason.
const READY: u8 = 0;
const GO: u8 = 1;
const MESSAGE_BYTES_MAX: u64 = 4096;
/// How long a child may take to get ready. Its container may be frozen or stop it, or its files be on a host that hangs, and init has
/// others to serve.
const READY_TIMEOUT: Duration = Duration::from_secs(20);

/// A process that waits to be told to execute its program. If this is dropped, it exits.
pub struct Waiting {
    child: UnixStream,
}

/// What a child enters.
enum Entrance<'a> {
    New(&'a Container, &'a Containers),
    /// It is in the container already.
    Member,
}

/// Creates a container with its first process, and adds it to the others.
pub fn create(
    container: &Container,
    process: &Process,
    containers: &mut Containers,
) -> Result<(Started, Waiting), Failure> {
    const PIDS: u32 = libc::CLONE_NEWPID as u32;
    containers.expect_free(&container.id)?;
    let shared = container.joined.iter().find(|joined| joined.namespaces & PIDS != 0);
    let shared = shared.map(|joined| containers.find(&joined.container)).transpose()?;
    container::provide_memory(container)?;
    cgroup::create_container(container);
    let prepare_children = || match shared {
        Some(member) => member.adopt_children(),
        None => sys::unshare(container.namespaces & PIDS).context("create a PID namespace"),
    };
    let fork = || fork_after(prepare_children);
    let created = start(process, &Entrance::New(container, containers), fork).and_then(|(started, waiting)| {
        let member = Member::new(container, started.pid)?;
        Ok((started, waiting, member))
    });
    let (started, waiting, member) = created.inspect_err(|_| cgroup::remove_container(&container.id))?;
    containers.add(member);
    Ok((started, waiting))
}

/// Starts a process in a container. Returns when the program is running or has failed to start.
pub fn start_in(member: &Member, process: &Process) -> Result<Started, Failure> {
    let (started, waiting) = start(process, &Entrance::Member, || fork_in(member))?;
    waiting.go().map(|()| started)
}

fn start(
    process: &Process,
    entrance: &Entrance,
    fork: impl FnOnce() -> Result<ForkResult, Failure>,
) -> Result<(Started, Waiting), Failure> {
    let has_terminal = process.terminal.is_some();
    let (mut started, streams) = if has_terminal {
        // It opens it in the container.
        (Started::bare(), None)
    } else {
        let (started, streams) = process::open_streams(process, &nobody())?;
        (started, Some(streams))
    };
    let (ours, theirs) = UnixStream::pair().context("create a socket pair")?;
    match fork()? {
        ForkResult::Child => {
            drop(ours);
            let failure = become_contained(process, entrance, streams, &theirs);
            let message = failure.message.bytes().take(MESSAGE_BYTES_MAX as usize);
            let _ = (&theirs).write_all(&std::iter::once(failure.code.max(1)).chain(message).collect::<Vec<_>>());
            sys::leave()
        }
        ForkResult::Parent { child } => started.pid = child,
    }
    drop((streams, theirs));
    let waiting = Waiting { child: ours };
    let terminal = waiting.await_ready(started.pid).inspect_err(|_| {
        // It may not have noticed.
        let _ = sys::send_signal(started.pid, libc::SIGKILL as u8);
    })?;
    terminal.map_or(Ok(()), |master| started.use_terminal(process, master))?;
    Ok((started, waiting))
}

/// Forks a process in the PID namespace that init's children are in after `prepare_children`.
fn fork_after(prepare_children: impl FnOnce() -> Result<(), Failure>) -> Result<ForkResult, Failure> {
    let own = fs::File::open("/proc/self/ns/pid").context("open init's PID namespace")?;
    prepare_children()?;
    let forked = sys::fork().context("fork a process");
    if let Ok(ForkResult::Child) = forked {
        return forked;
    }
    sys::join_namespaces(own.as_fd(), libc::CLONE_NEWPID as u32).context("return to init's PID namespace")?;
    forked
}

/// Forks a process that is in the container of `member` before the container's processes can see it, and what it sees: a helper enters
/// first, and makes it a child of init.
fn fork_in(member: &Member) -> Result<ForkResult, Failure> {
    let (ours, mut theirs) = UnixStream::pair().context("create a socket pair")?;
    ours.set_read_timeout(Some(READY_TIMEOUT)).context("set up a socket")?;
    let helper = match sys::fork().context("fork a process")? {
        ForkResult::Parent { child } => child,
        ForkResult::Child => {
            drop(ours);
            let told = match member.join().and_then(|()| sys::fork_sibling().context("fork a process")) {
                Ok(ForkResult::Child) => return Ok(ForkResult::Child),
                Ok(ForkResult::Parent { child }) => [&[READY][..], &child.as_raw().to_le_bytes()].concat(),
                Err(failure) => [&[failure.code.max(1)][..], failure.message.as_bytes()].concat(),
            };
            let _ = theirs.write_all(&told);
            sys::leave()
        }
    };
    drop(theirs);
    let mut told = Vec::new();
    if let Err(error) = ours.take(MESSAGE_BYTES_MAX).read_to_end(&mut told) {
        let _ = sys::send_signal(helper, libc::SIGKILL as u8);
        return Err(error).context(format_args!("join container {}", member.id));
    }
    match told[..] {
        [READY, a, b, c, d] => Ok(ForkResult::Parent { child: Pid::from_raw(i32::from_le_bytes([a, b, c, d])) }),
        [code, ref message @ ..] => Err(Failure { message: String::from_utf8_lossy(message).into_owned(), code }),
        [] => Err(Failure::new(format_args!("join container {}: the process has ended", member.id))),
    }
}

/// The owner of what the child gives to its user.
fn nobody() -> Identity {
    Identity { uid: 0, gid: 0, groups: Vec::new(), home: Vec::new() }
}

impl Waiting {
    /// Waits until the child is ready. Returns our end of its terminal, if it has one.
    fn await_ready(&self, pid: Pid) -> Result<Option<OwnedFd>, Failure> {
        let mut answer = [0];
        self.child.set_read_timeout(Some(READY_TIMEOUT)).context("set up a socket")?;
        (&self.child).read_exact(&mut answer).map_err(|_| Failure::new("the process has ended before it was ready"))?;
        if answer != [READY] {
            return Err(self.reason(answer[0]));
        }
        let mut number = [0; 4];
        (&self.child).read_exact(&mut number).context("read from the process")?;
        match i32::from_le_bytes(number) {
            -1 => Ok(None),
            number => sys::descriptor_of(pid, number).context("take the process's terminal").map(Some),
        }
    }

    /// Executes the program. Returns when it is running or has failed to start.
    pub fn go(self) -> Result<(), Failure> {
        // If the process has ended, its end is reported.
        let _ = (&self.child).write_all(&[GO]);
        let mut answer = [0];
        match (&self.child).read_exact(&mut answer) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Err(Failure::new("the process does not get on with executing its program"))
            }
            // It closes without data when the program is executed.
            Err(_) => Ok(()),
            Ok(()) => Err(self.reason(answer[0])),
        }
    }

    fn reason(&self, code: u8) -> Failure {
        let mut message = Vec::new();
        let _ = (&self.child).take(MESSAGE_BYTES_MAX).read_to_end(&mut message);
        Failure { message: String::from_utf8_lossy(&message).into_owned(), code }
    }
}

/// Turns the child into the program. Returns only why that failed.
fn become_contained(process: &Process, entrance: &Entrance, streams: Option<Streams>, parent: &UnixStream) -> Failure {
    let (identity, streams, program) = match prepare(process, entrance, streams, parent) {
        Ok(prepared) => prepared,
        Err(failure) => return failure,
    };
    let mut word = [0];
    let told = { parent }.read_exact(&mut word);
    if told.is_err() || word != [GO] {
        sys::leave();
    }
    let (stage, error) = process::run(process, &identity, &streams, &program);
    process::explain(process, Some(&stage), error)
}

fn prepare(
    process: &Process,
    entrance: &Entrance,
    streams: Option<Streams>,
    mut parent: &UnixStream,
) -> Result<(Identity, Streams, Program), Failure> {
    match entrance {
        Entrance::New(container, others) => container::enter(container, others, process.terminal.is_some())?,
        Entrance::Member => {}
    }
    let identity = process::identify(process)?;
    let program = Program::new(process, process::environment(process, "", &identity.home))?;
    if let Some(adjustment) = process.credentials.as_ref().and_then(|credentials| credentials.oom_score_adj) {
        // Without /proc there is no such adjustment.
        let _ = fs::write("/proc/self/oom_score_adj", adjustment.to_string());
    }
    let dir = process::working_dir(process);
    make_dir(&dir)?;
    check(process, &program)?;
    let (master, streams) = match (process.terminal, streams) {
        (Some(size), _) => {
            let (master, streams) = process::open_terminal(size, identity.uid)?;
            if let (Entrance::New(..), Ok(name)) = (entrance, ttyname(&streams.stdin)) {
                container::set_console(&name);
            }
            (Some(master), streams)
        }
        (None, Some(streams)) => {
            for stream in [&streams.stdin, &streams.stdout, &streams.stderr] {
                let _ = fchown(stream, Some(identity.uid), Some(identity.gid));
            }
            (None, streams)
        }
        (None, None) => return Err(Failure::new("the process has no streams")),
    };
    let number = master.as_ref().map_or(-1, AsRawFd::as_raw_fd);
    let ready = [&[READY][..], &number.to_le_bytes()].concat();
    parent.write_all(&ready).context("report to init")?;
    // Init takes it before it says that the process may go; it is closed by execve(2).
    std::mem::forget(master);
    Ok((identity, streams, program))
}

/// Fails if there is no such program. Who creates a container hears of it then, and not when it is started.
fn check(process: &Process, program: &Program) -> Result<(), Failure> {
    let mut error = Errno::ENOENT;
    for candidate in &program.candidates {
        match access(candidate.as_c_str(), AccessFlags::X_OK) {
            Ok(()) => return Ok(()),
            Err(Errno::EACCES) => error = Errno::EACCES,
            Err(_) => {}
        }
    }
    Err(process::explain(process, Some(&Stage::Program), error))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_that_is_missing_is_reported_in_the_words_of_engines() {
        let credentials = Some(husk_protocol::Credentials::default());
        let told = |name: &str| {
            let args = vec![name.as_bytes().to_vec()];
            let process = Process { args, credentials: credentials.clone(), ..Process::default() };
            let program = Program::new(&process, vec![b"PATH=/nowhere:/bin".to_vec()]).unwrap();
            check(&process, &program).map_err(|failure| (failure.message, failure.code))
        };
        assert_eq!(told("sh"), Ok(()));
        let (message, code) = told("no-such-program").unwrap_err();
        assert_eq!((message.as_str(), code), ("exec: \"no-such-program\": executable file not found in $PATH", 127));
        assert!(told("/no/such").unwrap_err().0.contains("no such file or directory"));
        assert_eq!(told("/etc/passwd").unwrap_err(), ("/etc/passwd: permission denied".into(), 126));
    }
}
