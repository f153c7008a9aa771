//! Starts a process in a container: the container's first, which creates it, or one more.
//!
//! The child enters the container, finds there what the process needs, and says that it is ready. It executes the program when it is
//! told to go. It is a child of init, whose children start for a moment in the container's PID namespace, or in the others of a container
//! that exists: what the machine has is not to be seen there.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::fchown;

use husk_protocol::{Container, Process};
use nix::errno::Errno;
use nix::sys::prctl::set_dumpable;
use nix::unistd::{AccessFlags, ForkResult, Pid, access, ttyname};

use crate::container::{self, Containers, Member};
use crate::entering::{self, Entering, Reporter, Told};
use crate::errors::{Context, Failure};
use crate::identity::Identity;
use crate::process::{self, Program, Stage, Started, Streams};
use crate::root::make_dir;
use crate::{cgroup, sys};

/// What a child enters.
enum Entrance<'a> {
    New(&'a Container, &'a Containers),
    /// It is in the container already.
    Member,
}

/// The two sides of a fork.
enum Forked {
    Child,
    /// In init: the child, or who makes it.
    Init {
        child: Option<Pid>,
        helper: Option<Pid>,
    },
}

/// Begins to create a container with its first process, and adds it to the others, where it is to be [completed](Containers::complete)
/// when the process is ready, or removed.
pub fn create(container: &Container, process: &Process, containers: &mut Containers) -> Result<Entering, Failure> {
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
    let fork = |_: &Reporter, _: &[RawFd]| fork_after(prepare_children);
    let created = start(process, &Entrance::New(container, containers), fork).and_then(|entering| {
        let first = entering.pid().ok_or_else(|| Failure::new("the container has no process"))?;
        Ok((Member::new(container, first)?, entering))
    });
    let (member, entering) = created.inspect_err(|_| cgroup::remove_container(&container.id))?;
    containers.add(member);
    Ok(entering)
}

/// Begins to start a process in a container.
pub fn start_in(member: &Member, process: &Process) -> Result<Entering, Failure> {
    start(process, &Entrance::Member, |reporter, kept| fork_in(member, reporter, kept))
}

fn start(
    process: &Process,
    entrance: &Entrance,
    fork: impl FnOnce(&Reporter, &[RawFd]) -> Result<Forked, Failure>,
) -> Result<Entering, Failure> {
    let has_terminal = process.terminal.is_some();
    let (started, streams) = if has_terminal {
        // It opens it in the container.
        (Started::bare(), None)
    } else {
        let (started, streams) = process::open_streams(process, &nobody())?;
        (started, Some(streams))
    };
    let (ours, reporter) = entering::pair()?;
    let own = streams.iter().flat_map(|streams| [&streams.stdin, &streams.stdout, &streams.stderr]);
    let others = match entrance {
        Entrance::New(container, containers) => containers.descriptors_of(container),
        Entrance::Member => Vec::new(),
    };
    let kept = own.map(AsRawFd::as_raw_fd).chain(others).chain([reporter.as_fd().as_raw_fd()]).collect::<Vec<_>>();
    match fork(&reporter, &kept)? {
        Forked::Child => {
            std::mem::forget((ours, started));
            keep_to_itself(kept);
            reporter.tell(&Told::Failed(become_contained(process, entrance, streams, &reporter)));
            sys::leave()
        }
        Forked::Init { child, helper } => Ok(Entering::preparing(ours, child, helper, process, started)),
    }
}

/// Forks a process in the PID namespace that init's children are in after `prepare_children`.
fn fork_after(prepare_children: impl FnOnce() -> Result<(), Failure>) -> Result<Forked, Failure> {
    let own = fs::File::open("/proc/self/ns/pid").context("open init's PID namespace")?;
    prepare_children()?;
    let forked = sys::fork().context("fork a process");
    if let Ok(ForkResult::Child) = forked {
        return Ok(Forked::Child);
    }
    sys::join_namespaces(own.as_fd(), libc::CLONE_NEWPID as u32).context("return to init's PID namespace")?;
    forked.map(|forked| match forked {
        ForkResult::Parent { child } => Forked::Init { child: Some(child), helper: None },
        ForkResult::Child => Forked::Child,
    })
}

/// Forks a process that is in the container of `member` before the container's processes can see it, and what it sees: a helper enters
/// first, and makes it a child of init.
fn fork_in(member: &Member, reporter: &Reporter, kept: &[RawFd]) -> Result<Forked, Failure> {
    if let ForkResult::Parent { child } = sys::fork().context("fork a process")? {
        return Ok(Forked::Init { child: None, helper: Some(child) });
    }
    keep_to_itself([kept, &[member.descriptor()]].concat());
    let told = match member.join().and_then(|()| sys::fork_sibling().context("fork a process")) {
        Ok(ForkResult::Child) => return Ok(Forked::Child),
        Ok(ForkResult::Parent { child }) => Told::Forked(child),
        Err(failure) => Told::Failed(failure),
    };
    reporter.tell(&told);
    sys::leave()
}

/// Separates this child from init before others in its container can see it: they have the same user, and its memory is a copy of init's
/// until it executes its program. And others wait for the end of connections that init had, while it may be held up.
fn keep_to_itself(kept: Vec<RawFd>) {
    // execve(2) takes it back. It cannot fail.
    let _ = set_dumpable(false);
    sys::close_others(kept);
}

/// The owner of what the child gives to its user.
fn nobody() -> Identity {
    Identity { uid: 0, gid: 0, groups: Vec::new(), home: Vec::new() }
}

/// Turns the child into the program. Returns only why that failed.
fn become_contained(process: &Process, entrance: &Entrance, streams: Option<Streams>, reporter: &Reporter) -> Failure {
    let (identity, streams, program) = match prepare(process, entrance, streams, reporter) {
        Ok(prepared) => prepared,
        Err(failure) => return failure,
    };
    reporter.await_go();
    let (stage, error) = process::run(process, &identity, &streams, &program);
    process::explain(process, Some(&stage), error)
}

fn prepare(
    process: &Process,
    entrance: &Entrance,
    streams: Option<Streams>,
    reporter: &Reporter,
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
    // Init takes it before it says that the process may go; it is closed by execve(2).
    let master = master.map(OwnedFd::into_raw_fd);
    reporter.tell(&Told::Ready(master));
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
