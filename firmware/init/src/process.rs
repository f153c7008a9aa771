//! Starts a process with its identity, working directory, limits, streams and environment.

use std::ffi::{CString, OsStr};
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::fchown;
use std::path::PathBuf;

use husk_protocol::{Credentials, FIXED_PATH, Process, WindowSize};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::openpty;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{
    ForkResult, Gid, Pid, Uid, chdir, dup2_stderr, dup2_stdin, dup2_stdout, execve, pipe2, setgid, setgroups, setsid,
    setuid,
};

use crate::cgroup;
use crate::entering::{self, Entering, Told};
use crate::errors::{CODE_NOT_EXECUTABLE, CODE_NOT_FOUND, Context, Failure};
use crate::identity::{self, Identity};
use crate::sys;

/// The group of terminals, on all distributions.
const TTY_GID: u32 = 5;

/// A running process, and our ends of its streams.
pub struct Started {
    pub pid: Pid,
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Its terminal, which replaces the streams.
    pub terminal: Option<OwnedFd>,
}

impl Started {
    /// Without streams.
    pub fn bare() -> Started {
        Started { pid: Pid::from_raw(0), stdin: None, stdout: None, stderr: None, terminal: None }
    }

    /// Transfers what the process reads and writes through our end of its terminal.
    pub fn use_terminal(&mut self, reads_input: bool, master: OwnedFd) -> Result<(), Failure> {
        let copy = || master.try_clone().context("duplicate a file descriptor");
        self.stdin = reads_input.then(copy).transpose()?;
        self.stdout = Some(copy()?);
        self.terminal = Some(master);
        Ok(())
    }
}

/// The process's ends of the streams.
pub struct Streams {
    pub stdin: OwnedFd,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// The step at which a child failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    Session,
    Streams,
    Limits,
    Cgroup,
    Directory,
    Identity,
    Filter,
    Program,
}

/// The absolute working directory.
pub fn working_dir(process: &Process) -> PathBuf {
    PathBuf::from("/").join(OsStr::from_bytes(&process.working_dir))
}

/// A program with its arguments and environment, as execve(2) takes them.
pub struct Program {
    /// Where it may be, in this order.
    pub candidates: Vec<CString>,
    args: Vec<CString>,
    env: Vec<CString>,
}

impl Program {
    /// The program of `process`, whose variables are `env`.
    pub fn new(process: &Process, env: Vec<Vec<u8>>) -> Result<Program, Failure> {
        let text = |bytes: &Vec<u8>| {
            CString::new(bytes.as_slice()).map_err(|_| Failure::new("an argument contains a NUL byte"))
        };
        let args = process.args.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        let candidates = programs(&args, &env)?;
        let env = env.iter().map(text).collect::<Result<Vec<_>, _>>()?;
        Ok(Program { candidates, args, env })
    }
}

/// Begins to start `process` in the machine's root file system.
pub fn start(process: &Process, hostname: &str) -> Result<Entering, Failure> {
    let identity = identify(process)?;
    process.rights.processes_max.map_or(Ok(()), cgroup::limit_processes)?;
    let program = Program::new(process, environment(process, hostname, &identity.home))?;
    let (mut started, streams) = open_streams(process, &identity)?;
    let (ours, reporter) = entering::pair()?;
    match sys::fork().context("fork a process")? {
        ForkResult::Child => {
            let (stage, error) = run(process, &identity, &streams, &program);
            reporter.tell(&Told::Failed(explain(process, Some(&stage), error)));
            sys::leave()
        }
        ForkResult::Parent { child } => started.pid = child,
    }
    Ok(Entering::going(ours, started))
}

/// Who the process is: by its credentials, or by the files of the root directory, which have its home in any case.
pub fn identify(process: &Process) -> Result<Identity, Failure> {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let Some(credentials) = &process.credentials else {
        let group = fs::read("/etc/group").unwrap_or_default();
        let mut identity = identity::find(&process.user, &passwd, &group).map_err(Failure::new)?;
        identity.join(&process.rights.groups, &group).map_err(Failure::new)?;
        return Ok(identity);
    };
    let (uid, gid) = (credentials.uid, credentials.gid);
    Ok(Identity { uid, gid, groups: credentials.groups.clone(), home: identity::home_of(uid, &passwd) })
}

/// Without a terminal, one pipe per stream, so that outputs stay separate and can be closed individually.
pub fn open_streams(process: &Process, identity: &Identity) -> Result<(Started, Streams), Failure> {
    let mut started = Started::bare();
    let owner = |fd: &OwnedFd, gid| fchown(fd, Some(identity.uid), Some(gid));
    let copy = |fd: &OwnedFd| fd.try_clone().context("duplicate a file descriptor");
    if process.detached {
        let nowhere = File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?.into();
        return Ok((started, Streams { stdin: copy(&nowhere)?, stdout: copy(&nowhere)?, stderr: nowhere }));
    }
    if let Some(size) = process.terminal {
        let (master, streams) = open_terminal(size, identity.uid)?;
        started.use_terminal(process.stdin, master)?;
        return Ok((started, streams));
    }
    let pipe = || -> Result<_, Failure> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC).context("create a pipe")?;
        // A program may reopen its streams through /dev/stdout.
        for end in [&read, &write] {
            owner(end, identity.gid).context("change the owner of a pipe")?;
        }
        Ok((read, write))
    };
    let stdin = if process.stdin {
        let (read, write) = pipe()?;
        started.stdin = Some(write);
        read
    } else {
        File::open("/dev/null").context("open /dev/null")?.into()
    };
    let (stdout_ours, stdout) = pipe()?;
    let (stderr_ours, stderr) = pipe()?;
    started.stdout = Some(stdout_ours);
    started.stderr = Some(stderr_ours);
    Ok((started, Streams { stdin, stdout, stderr }))
}

/// Runs the program in this process. Returns only why that failed.
pub fn run(process: &Process, identity: &Identity, streams: &Streams, program: &Program) -> (Stage, Errno) {
    match become_process(process, identity, streams) {
        Ok(()) => (Stage::Program, exec(&program.candidates, &program.args, &program.env)),
        Err(failed) => failed,
    }
}

/// Opens a terminal of the user `uid`. Returns our end, and the process's streams.
pub fn open_terminal(size: WindowSize, uid: u32) -> Result<(OwnedFd, Streams), Failure> {
    let copy = |fd: &OwnedFd| fd.try_clone().context("duplicate a file descriptor");
    let pty = openpty(None, None).context("open a pseudo-terminal")?;
    for end in [&pty.master, &pty.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).context("open a pseudo-terminal")?;
    }
    sys::set_window_size(pty.master.as_fd(), size).context("set the window size of the terminal")?;
    fchown(&pty.slave, Some(uid), Some(TTY_GID)).context("change the owner of the terminal")?;
    let streams = Streams { stdin: copy(&pty.slave)?, stdout: copy(&pty.slave)?, stderr: pty.slave };
    Ok((pty.master, streams))
}

/// Turns the child into the program.
fn become_process(process: &Process, identity: &Identity, streams: &Streams) -> Result<(), (Stage, Errno)> {
    let at = |stage| move |error| (stage, error);
    let io = |error: std::io::Error| Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
    setsid().map_err(at(Stage::Session))?;
    if process.terminal.is_some() {
        sys::take_terminal(streams.stdin.as_fd()).map_err(io).map_err(at(Stage::Session))?;
    }
    dup2_stdin(&streams.stdin).map_err(at(Stage::Streams))?;
    dup2_stdout(&streams.stdout).map_err(at(Stage::Streams))?;
    dup2_stderr(&streams.stderr).map_err(at(Stage::Streams))?;
    for limit in &process.limits {
        sys::set_limit(limit).map_err(io).map_err(at(Stage::Limits))?;
    }
    if process.rights.processes_max.is_some() {
        cgroup::join().map_err(io).map_err(at(Stage::Cgroup))?;
    }
    // As root, which can enter directories that the user cannot.
    chdir(&working_dir(process)).map_err(at(Stage::Directory))?;
    let credentials = process.credentials.as_ref();
    let dropped =
        credentials.map_or(process.rights.dropped_capabilities, |credentials| !credentials.capabilities.bounding);
    sys::drop_capabilities(dropped).map_err(io).map_err(at(Stage::Identity))?;
    let filter = process.rights.filter.as_ref();
    let install = |filter| sys::filter_calls(filter).map_err(io).map_err(at(Stage::Filter));
    // Who may get more rights later needs CAP_SYS_ADMIN for it, which the user may not have.
    filter.filter(|_| !process.rights.no_new_privileges).map_or(Ok(()), install)?;
    let groups: Vec<Gid> = identity.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    credentials.map_or(Ok(()), |_| sys::keep_capabilities()).map_err(io).map_err(at(Stage::Identity))?;
    setgroups(&groups)
        .and_then(|()| setgid(Gid::from_raw(identity.gid)))
        .and_then(|()| setuid(Uid::from_raw(identity.uid)))
        .map_err(at(Stage::Identity))?;
    if let Some(credentials) = credentials {
        take_on(credentials).map_err(io).map_err(at(Stage::Identity))?;
    }
    if process.rights.no_new_privileges {
        sys::forbid_new_privileges().map_err(io).map_err(at(Stage::Identity))?;
    }
    sys::set_default_action(Signal::SIGPIPE);
    SigSet::empty().thread_set_mask().map_err(at(Stage::Session))?;
    // Last, so that the program's filter decides on as few calls of init's as possible.
    filter.filter(|_| process.rights.no_new_privileges).map_or(Ok(()), install)
}

fn take_on(credentials: &Credentials) -> std::io::Result<()> {
    if let Some(mask) = credentials.umask {
        umask(Mode::from_bits_truncate(mask));
    }
    sys::set_capabilities(credentials.capabilities)
}

/// Tries each path in order, and returns the most significant error.
fn exec(programs: &[CString], args: &[CString], env: &[CString]) -> Errno {
    let mut error = Errno::ENOENT;
    for program in programs {
        match execve(program, args, env).unwrap_err() {
            Errno::ENOENT | Errno::ENOTDIR => {}
            // A later directory of PATH may have an executable one.
            Errno::EACCES => error = Errno::EACCES,
            other => return other,
        }
    }
    error
}

/// The candidates for a program: the name itself if it is a path, or a file in each directory of PATH.
fn programs(args: &[CString], env: &[Vec<u8>]) -> Result<Vec<CString>, Failure> {
    let name = args.first().map(|name| name.to_bytes());
    let name = name.ok_or_else(|| Failure::new("no command specified, and the image has none"))?;
    if name.is_empty() {
        return Err(Failure { message: "\"\": the command is empty".into(), code: CODE_NOT_FOUND });
    }
    let text = |bytes: Vec<u8>| CString::new(bytes).map_err(|_| Failure::new("PATH contains a NUL byte"));
    if name.contains(&b'/') {
        return Ok(vec![text(name.to_vec())?]);
    }
    let path = env.iter().rev().find_map(|variable| variable.strip_prefix(b"PATH=")).unwrap_or_default();
    path.split(|&byte| byte == b':')
        .map(|dir| if dir.is_empty() { &b"."[..] } else { dir })
        .map(|dir| text([dir, b"/", name].concat()))
        .collect()
}

/// The given variables, preceded by standard ones that are missing.
pub fn environment(process: &Process, hostname: &str, home: &[u8]) -> Vec<Vec<u8>> {
    let mut env = Vec::new();
    let mut provide = |name: &str, value: &[u8]| {
        let start = [name.as_bytes(), b"="].concat();
        if !process.env.iter().any(|variable| variable.starts_with(&start)) {
            env.push([&start, value].concat());
        }
    };
    if process.credentials.is_none() {
        provide("PATH", FIXED_PATH.as_bytes());
        provide("HOSTNAME", hostname.as_bytes());
        if process.terminal.is_some() {
            provide("TERM", b"xterm");
        }
    }
    provide("HOME", home);
    env.extend(process.env.iter().cloned());
    env
}

/// The message for a child that failed before executing its program.
pub fn explain(process: &Process, stage: Option<&Stage>, error: Errno) -> Failure {
    let name = process.args.first().map_or("".into(), |name| String::from_utf8_lossy(name));
    let dir = working_dir(process);
    let why = error.desc();
    let message = match stage {
        Some(Stage::Program) => match error {
            Errno::ENOENT if name.contains('/') => {
                format!("{name}: no such file or directory, or its interpreter is missing")
            }
            Errno::EACCES => format!("{name}: permission denied"),
            // Engines look for these words.
            Errno::ENOENT if process.credentials.is_some() => {
                format!("exec: {name:?}: executable file not found in $PATH")
            }
            Errno::ENOENT => format!("{name}: not found in PATH"),
            Errno::ENOEXEC => format!("{name}: exec format error"),
            _ => format!("{name}: {why}"),
        },
        Some(Stage::Directory) => format!("enter the working directory {}: {why}", dir.display()),
        Some(Stage::Cgroup) => format!("limit the number of processes: {why}"),
        Some(Stage::Limits) => format!("set the resource limits: {why}"),
        Some(Stage::Filter) => format!("install the system call filter: {why}"),
        Some(Stage::Identity) => format!("switch to user {:?}: {why}", process.user),
        _ => format!("start {name}: {why}"),
    };
    let code = match (stage, error) {
        (Some(Stage::Program), Errno::ENOENT | Errno::ENOTDIR) => CODE_NOT_FOUND,
        (Some(Stage::Program | Stage::Directory), _) => CODE_NOT_EXECUTABLE,
        _ => crate::errors::CODE_OWN,
    };
    Failure { message, code }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(env: &[&str]) -> Process {
        Process { env: env.iter().map(|variable| variable.as_bytes().to_vec()).collect(), ..Process::default() }
    }

    fn texts(list: Vec<Vec<u8>>) -> Vec<String> {
        list.into_iter().map(|bytes| String::from_utf8(bytes).unwrap()).collect()
    }

    #[test]
    fn missing_variables_are_added() {
        let env = environment(&process(&["A=b", "HOME=/x"]), "box", b"/root");
        assert_eq!(texts(env), [&format!("PATH={FIXED_PATH}"), "HOSTNAME=box", "A=b", "HOME=/x"]);
        let with_terminal = Process { terminal: Some(Default::default()), ..process(&["PATH=/p", "TERM=vt100"]) };
        let env = environment(&with_terminal, "box", b"/root");
        assert_eq!(texts(env), ["HOSTNAME=box", "HOME=/root", "PATH=/p", "TERM=vt100"]);
    }

    #[test]
    fn only_names_are_searched_in_path() {
        let find = |name: &str, path: &str| {
            let args = [CString::new(name).unwrap()];
            programs(&args, &[format!("PATH={path}").into_bytes()])
                .map(|list| texts(list.into_iter().map(CString::into_bytes).collect()))
        };
        assert_eq!(find("sh", "/a:/b").unwrap(), ["/a/sh", "/b/sh"]);
        assert_eq!(find("sh", "/a::").unwrap(), ["/a/sh", "./sh", "./sh"]);
        assert_eq!(find("./sh", "/a").unwrap(), ["./sh"]);
        let failure = find("", "/a").unwrap_err();
        assert!(failure.code == CODE_NOT_FOUND && failure.message.starts_with("\"\": "), "{failure:?}");
        assert!(programs(&[], &[]).unwrap_err().message.contains("no command specified"));
    }

    #[test]
    fn missing_and_non_executable_programs_have_different_codes() {
        let process = Process { args: vec![b"frob".to_vec()], ..Process::default() };
        let told = |error| explain(&process, Some(&Stage::Program), error);
        assert_eq!((told(Errno::ENOENT).code, told(Errno::EACCES).code), (127, 126));
        assert_eq!(told(Errno::ENOEXEC).code, 126);
        assert_eq!(told(Errno::ENOENT).message, "frob: not found in PATH");
        assert_eq!(explain(&process, Some(&Stage::Identity), Errno::EPERM).code, 125);
    }

    #[test]
    fn a_relative_working_directory_starts_at_the_root() {
        let at = |dir: &str| working_dir(&Process { working_dir: dir.as_bytes().to_vec(), ..Process::default() });
        assert_eq!((at(""), at("srv"), at("/srv")), ("/".into(), "/srv".into(), "/srv".into()));
    }
}
