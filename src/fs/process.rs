//! The process that serves a folder: a copy of this one, confined to the folder before it reads the first request.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Barrier};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Resource, Rlimit, Signal};

use super::link::{self, Ends, Link};
use super::saved::{self, Identity};
use super::worker::Worker;
use super::{CAPABILITIES, HANDLES_MAX, INODES_MAX, Options, Server, users};
use crate::sandbox::folder::{self, Folder, Inside, NAMESPACES};
use crate::sandbox::{self, ThreadRole};
use crate::sys::fork::{self, Files, Split};
use crate::sys::{arguments, socket};

/// The number of threads that serve, and so of requests that may wait for the host's disk at once.
const THREADS: usize = 4;
/// The most descriptors that all servers of a machine get, if the host allows that many. Each takes about a KiB of the host's
/// kernel, so that this also bounds memory, whatever becomes of a server.
pub const FILES_MAX: u64 = (INODES_MAX + HANDLES_MAX) as u64;
/// The longest report of a server that it is ready.
const REPORT_BYTES_MAX: usize = 4096;
/// The first byte of a report that says why there is no server.
const FAILED: u8 = b'!';

/// The most that is saved of what a guest knows.
pub const KNOWN_BYTES_MAX: u64 = 64 << 20;
/// The orders of a supervisor: to save what the guest knows, and to let it change nothing any more.
const SAVE: u8 = 0;
const SEAL: u8 = 1;
/// How long a server may take to save that. It makes some system calls for each file that the guest knows.
const SAVE_TIMEOUT: Duration = Duration::from_secs(20);

/// How long tests wait for a server to start.
const TEST_TIMEOUT: Duration = Duration::from_secs(60);

/// A server process. Dropping it ends the process.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    /// How the folder is called in messages.
    name: String,
    /// Where it is told to save what the guest knows, and where it puts that.
    orders: Orders,
}

impl Drop for Process {
    fn drop(&mut self) {
        fork::kill(self.pid);
        fork::wait(self.pid);
    }
}

/// A process that is about to serve.
#[derive(Debug)]
pub struct Starting {
    process: Process,
    ends: Ends,
    lacks: Vec<String>,
}

/// The socket between a supervisor and a server, and memory of both for what a guest knows: a length (64 bits) and that many bytes.
#[derive(Debug)]
struct Orders {
    socket: UnixDatagram,
    known: OwnedFd,
}

impl Orders {
    fn pair() -> Result<(Orders, Orders)> {
        let known = link::sealed_memory(c"husk-known", KNOWN_BYTES_MAX).context("create memory for a server")?;
        let (ours, theirs) = socket::message_pair().context("create a socket")?;
        let copy = known.try_clone().context("duplicate a file descriptor")?;
        Ok((Orders { socket: ours, known: copy }, Orders { socket: theirs, known }))
    }

    fn put(&self, bytes: &[u8]) -> Result<()> {
        let (known, len_bytes) = (fs::File::from(self.known.try_clone()?), bytes.len() as u64);
        ensure!(len_bytes <= KNOWN_BYTES_MAX - 8, "the machine knows too many of its files: {len_bytes} bytes");
        known.write_all_at(bytes, 8)?;
        Ok(known.write_all_at(&len_bytes.to_le_bytes(), 0)?)
    }

    /// What was put last; nothing at first.
    fn take(&self) -> Result<Vec<u8>> {
        let known = fs::File::from(self.known.try_clone()?);
        let mut len = [0; 8];
        known.read_exact_at(&mut len, 0)?;
        let len_bytes = u64::from_le_bytes(len);
        ensure!(len_bytes <= KNOWN_BYTES_MAX - 8, "a server says that its machine knows {len_bytes} bytes");
        let mut bytes = vec![0; usize::try_from(len_bytes)?];
        known.read_exact_at(&mut bytes, 8)?;
        Ok(bytes)
    }
}

/// Starts a process that serves `folder`, in namespaces of its own if the host allows that. With `is_confined` its calls are
/// filtered. It gets `files_max` descriptors, if the host allows that many. `known` is what a machine that is restored knows of the
/// folder.
pub fn start(
    folder: Folder,
    options: Options,
    files_max: u64,
    is_confined: bool,
    known: Option<&[u8]>,
) -> Result<Starting> {
    let begin = |flags| {
        let starting = spawn(&folder, options, flags, is_confined, known)?;
        limit_files(starting.process.pid, files_max);
        // It goes on when its users are mapped, and has its limit.
        starting.ends.socket.send(&[0]).context("start the server")?;
        Ok::<_, anyhow::Error>(starting)
    };
    begin(NAMESPACES).or_else(|error| {
        let mut starting = begin(0)?;
        starting.lacks.push(format!("namespaces: {error:#}"));
        Ok(starting)
    })
}

fn spawn(folder: &Folder, options: Options, flags: i32, is_confined: bool, known: Option<&[u8]>) -> Result<Starting> {
    let name = folder.path.display().to_string();
    let (ends, theirs) = Ends::pair().context("create a socket")?;
    let (orders, ordered) = Orders::pair()?;
    known.map_or(Ok(()), |known| orders.put(known))?;
    let folder = folder.try_clone().context("duplicate a file descriptor")?;
    let others = [folder.fd.as_raw_fd(), ordered.socket.as_raw_fd(), ordered.known.as_raw_fd()];
    let files = Files { given: [theirs.fds().as_slice(), &others].concat(), shared: Vec::new() };
    let split = fork::split(flags, (theirs, ordered, folder), &files).map_err(|(_, error)| error);
    let pid = match split.context("start a process")? {
        Split::Child((ends, orders, folder)) => {
            run(Start { folder, options, ends, orders, is_separate: flags != 0, is_confined })
        }
        Split::Parent(pid) => pid,
    };
    let process = Process { pid, name, orders };
    if flags != 0 {
        users::map(pid).context("map users")?;
    }
    Ok(Starting { process, ends, lacks: Vec::new() })
}

impl Starting {
    /// Waits until the process is confined and serves.
    pub fn finish(self) -> Result<(Ends, Process)> {
        let Starting { process, ends, mut lacks } = self;
        let mut report = vec![0; REPORT_BYTES_MAX];
        // The copy of a test program, which has several threads, may have a lock that nobody releases: it fails then, and is run again.
        ends.socket.set_read_timeout(cfg!(test).then_some(TEST_TIMEOUT))?;
        let len = ends.socket.recv(&mut report).context("wait for the server")?;
        ends.socket.set_read_timeout(None)?;
        let text = String::from_utf8_lossy(report.get(..len).unwrap_or_default()).into_owned();
        let what = || format!("share {}", process.name);
        match report.get(..len) {
            None | Some([]) => bail!("{}: its server has ended", what()),
            Some([FAILED, ..]) => bail!("{}: {}", what(), text.trim_start_matches(char::from(FAILED))),
            Some(_) => {}
        }
        lacks.extend(text.lines().filter(|line| !line.is_empty()).map(str::to_owned));
        for lack in lacks {
            log::info!("{}: the sandbox lacks a layer that this host does not allow: {lack}", what());
        }
        Ok((ends, process))
    }
}

/// Sets the limit of open files of a server, which has one for each file that the guest's kernel knows. It is `files_max`, or
/// what the host allows if that is less.
fn limit_files(pid: u32, files_max: u64) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let allowed = rustix::process::getrlimit(Resource::Nofile).maximum.unwrap_or(files_max);
    for maximum in [files_max, allowed.min(files_max)] {
        let limit = Rlimit { current: Some(maximum), maximum: Some(maximum) };
        if rustix::process::prlimit(Some(pid), Resource::Nofile, limit).is_ok() {
            return;
        }
    }
}

/// What a server starts with.
struct Start {
    folder: Folder,
    options: Options,
    ends: Ends,
    orders: Orders,
    /// Whether it is in namespaces of its own.
    is_separate: bool,
    /// Whether its calls are filtered.
    is_confined: bool,
}

/// Runs this process as the server of a folder, and exits.
fn run(start: Start) -> ! {
    // First of all: whatever fails now is the end of this process, which is its parent's copy. Its confinement says the former again,
    // since a change of identity takes it back.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
    std::panic::set_hook(Box::new(|_| fork::exit_now(1)));
    let socket = start.ends.socket.try_clone().ok();
    let error = match set_up(start) {
        // Its threads serve, and end the process. This one is killed when its parent is gone, which the kernel forgets of a thread
        // that acts for another user.
        Ok(keeper) => {
            drop(socket);
            keeper.run()
        }
        Err(error) => socket.map(|socket| socket.send(report(&failure(&error)))),
    };
    fork::exit_now(1 + i32::from(error.is_none()))
}

/// The report that something has failed.
fn failure(error: &anyhow::Error) -> String {
    format!("{}{error:#}", char::from(FAILED))
}

/// As much of a text as fits into a report.
fn report(text: &str) -> &[u8] {
    let text = text.as_bytes();
    text.get(..text.len().min(REPORT_BYTES_MAX)).unwrap_or_default()
}

fn set_up(start: Start) -> Result<Keeper> {
    let Start { folder, options, ends, orders, is_separate, is_confined } = start;
    let mut go = [0];
    if ends.socket.recv(&mut go).context("wait for the start")? == 0 {
        bail!("husk has ended");
    }
    let null = fs::File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    drop(null);
    rustix::thread::set_name(c"share").context("name the server")?;
    arguments::forget_environment();
    let link = Arc::new(ends.connect().context("map the slots")?);
    if is_confined {
        sandbox::enable_filters(link.socket().as_raw_fd(), |_| fork::exit_now(1)).context("handle SIGSYS")?;
    }
    let shared = Identity::of(&folder.fd).context("identify the shared folder")?;
    let Inside { root, descriptors, lacks, is_privileged } =
        folder::enter(folder, CAPABILITIES, is_separate).context("confine the server")?;
    let files_max = rustix::process::getrlimit(Resource::Nofile).current.unwrap_or(FILES_MAX);
    let files_max = usize::try_from(files_max).unwrap_or(usize::MAX);
    let server = Arc::new(Server::new(root, options, is_privileged, files_max).context("read the shared folder")?);
    let known = orders.take()?;
    if !known.is_empty() {
        saved::restore(&server, shared, &descriptors, &known)?;
    }
    drop(known);
    let descriptors = Arc::new(descriptors);
    // A thread that a request has taken over could write to the memory of one that is not confined yet.
    let confined = Arc::new(Barrier::new(THREADS + 1));
    for _ in 0..THREADS {
        let (server, link, descriptors) = (server.clone(), link.clone(), descriptors.clone());
        let confined = confined.clone();
        let serve = move |worker: Worker| {
            sandbox::confine_this_thread(ThreadRole::Share);
            confined.wait();
            let _ = worker.run();
            fork::exit_now(0)
        };
        sandbox::spawn("share", move || match Worker::new(server, link, &*descriptors) {
            Ok(worker) => serve(worker),
            Err(_) => fork::exit_now(1),
        })
        .context("start a thread")?;
    }
    sandbox::confine_this_thread(ThreadRole::Share);
    confined.wait();
    report_ready(&link, &lacks)?;
    Ok(Keeper { server, shared, descriptors, orders })
}

/// The server's main thread.
struct Keeper {
    server: Arc<Server>,
    shared: Identity,
    descriptors: Arc<OwnedFd>,
    orders: Orders,
}

impl Keeper {
    /// Does what is ordered, until the supervisor is gone.
    fn run(&self) -> ! {
        let mut order = [0];
        while self.orders.socket.recv(&mut order).is_ok_and(|len| len > 0) {
            if order == [SEAL] {
                self.server.seal();
                continue;
            }
            let saved = saved::save(&self.server, self.shared, &*self.descriptors);
            let result = saved.and_then(|known| self.orders.put(&known));
            let text = result.err().map_or_else(|| "\n".to_owned(), |error| failure(&error));
            if self.orders.socket.send(report(&text)).is_err() {
                break;
            }
        }
        fork::exit_now(0)
    }
}

fn report_ready(link: &Link, lacks: &[String]) -> Result<()> {
    // The first line keeps the message from being empty.
    let text = format!("\n{}", lacks.join("\n"));
    Ok(socket::send_now(link.socket(), report(&text))?)
}

impl Process {
    /// What the guest knows of the folder. Its device must be paused.
    pub fn save(&self) -> Result<Vec<u8>> {
        self.try_save().with_context(|| format!("save what the guest knows of share {}", self.name))
    }

    fn try_save(&self) -> Result<Vec<u8>> {
        let Orders { socket, .. } = &self.orders;
        let mut reply = [0; REPORT_BYTES_MAX];
        // One that came too late for an earlier order.
        while socket::receive_now(socket, &mut reply).is_ok_and(|len| len > 0) {}
        socket.set_read_timeout(Some(SAVE_TIMEOUT))?;
        socket::send_now(socket, &[SAVE])?;
        match socket.recv(&mut reply).map(|len| reply.get(..len).unwrap_or_default()) {
            Ok([]) => bail!("its process has ended"),
            Ok([FAILED, why @ ..]) => bail!("{}", String::from_utf8_lossy(why)),
            Ok(_) => self.orders.take(),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                bail!("the host's file system has not answered for {} s", SAVE_TIMEOUT.as_secs())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Lets the guest change nothing any more, if the folder is read-only: it is filled, or nothing fills it.
    pub fn seal(&self) {
        // One that has ended changes nothing either.
        let _ = socket::send_now(&self.orders.socket, &[SEAL]);
    }

    /// The ID of the process.
    pub fn id(&self) -> u32 {
        self.pid
    }
}
