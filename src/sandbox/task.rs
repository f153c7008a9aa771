//! Runs a task that reads foreign data, or secrets, in a copy of this process, confined if it reads foreign data.
//!
//! ```text
//! run ─ fork ─┬ this process: answers questions, logs ──────── Ending ─> result
//!             └ its copy: confined, task ───── Question, Log, Ending ─┘
//! ```
//!
//! The copy has the files it is given, and gets others as answers. It may have been taken over by what it reads: the
//! process that answers trusts no question and no result.

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::panic;
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Resource, Rlimit, WaitStatus};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Confinement, Layers, ThreadRole};
use crate::foreign;
use crate::sys::fork::{self, Files, Split};
use crate::sys::violation::Report;
use crate::sys::{arguments, socket};

/// The maximum size of a message: above all the configuration of an image.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// A message is sent in packets of this size, each with a first byte that tells whether it is the last.
const PACKET_BYTES: usize = 16 << 10;
const MORE: u8 = 0;
const LAST: u8 = 1;

/// The longest line of the log, and the longest error, that are taken from a copy.
const TEXT_BYTES_MAX: usize = 4096;
/// The memory that a confined copy may map: some times what an image of the maximum size takes.
const MEMORY_BYTES_MAX: u64 = 4 << 30;
/// The files that it may have beside those that it is given.
const FILES_MAX: u64 = 64;

/// The socket of this process, if it is a copy that runs a task. A copy of a copy has another one.
static LINK: Mutex<Option<UnixDatagram>> = Mutex::new(None);

/// What the copy sends.
#[derive(Serialize, Deserialize)]
enum Message<Q, R> {
    /// A line for the log, and its level (`log::Level`, from 1 for an error).
    Log(usize, String),
    /// Something that has no answer.
    Notice(Q),
    /// A question.
    Question(Q),
    /// The result, or why there is none. The last message.
    Ending(Result<R, String>),
}

/// An answer, possibly with a file.
pub type Answer<A> = (A, Option<OwnedFd>);

/// Asks the process that has started this task, and waits for the answer. One question at a time; any thread.
pub fn ask<Q: Serialize, A: DeserializeOwned>(question: Q) -> Result<Answer<A>> {
    let link = link();
    let socket = link.as_ref().context("this process runs no task")?;
    send(socket, &Message::<Q, ()>::Question(question), None)?;
    let (bytes, file) = receive(socket)?.context("the process that answers is gone")?;
    let answer: Result<A, String> = serde_json::from_slice(&bytes)?;
    Ok((answer.map_err(|error| anyhow!(error))?, file))
}

/// Tells that process something that has no answer. Any thread.
pub fn tell<Q: Serialize>(notice: Q) -> Result<()> {
    send_to_link(&Message::<Q, ()>::Notice(notice))
}

fn send_to_link<Q: Serialize, R: Serialize>(message: &Message<Q, R>) -> Result<()> {
    let link = link();
    send(link.as_ref().context("this process runs no task")?, message, None)
}

fn link() -> MutexGuard<'static, Option<UnixDatagram>> {
    LINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sends a line for the log to the process that answers, if this process runs a task. Any thread.
pub fn forward_log(record: &log::Record) -> bool {
    if link().is_none() {
        return false;
    }
    let text = record.args().to_string();
    send_to_link(&Message::<(), ()>::Log(record.level() as usize, text)).is_ok()
}

/// Logs a line of another process. An unknown level is an error.
pub fn log_as_told(level: usize, text: &str) {
    let level = log::Level::iter().find(|known| *known as usize == level).unwrap_or(log::Level::Error);
    log::log!(level, "{text}");
}

/// How a copy of this process is confined.
#[derive(Debug, Clone)]
pub struct Confined {
    /// The filter of its threads.
    pub role: ThreadRole,
    /// The files that it has.
    pub files: Vec<RawFd>,
    /// The size that the files may have which it writes.
    pub file_bytes_max: u64,
}

/// Runs `task` in a copy of this process, which has only the files that it is given and what `answer` returns to its questions.
/// Returns the task's result, which like its questions may be anything of its type.
///
/// Without a confinement the copy can do what this process can; what it has read is gone when it ends.
///
/// `task` must own no files. The caller must be the only thread that uses locks which the task needs; a process with a
/// single thread is.
pub fn run<Q, A, R>(
    confined: Option<&Confined>,
    task: impl FnOnce() -> Result<R>,
    answer: &mut dyn FnMut(Q) -> Result<Answer<A>>,
) -> Result<R>
where
    Q: Serialize + DeserializeOwned,
    A: Serialize,
    R: Serialize + DeserializeOwned,
{
    let (ours, theirs) = socket::message_pair().context("create a socket")?;
    let layers = Layers::new(confined.is_some());
    let layers =
        if confined.is_some_and(|confined| confined.role.uses_network()) { layers.with_network() } else { layers };
    let shared = confined.map(|confined| confined.files.clone()).unwrap_or_default();
    let files = Files { given: vec![theirs.as_raw_fd()], shared };
    match layers.split((theirs, task), &files).context("start a process")? {
        (Split::Child((socket, task)), lacks) => {
            let ending = enter(socket, confined, layers, lacks).and_then(|()| task());
            let ending = ending.map_err(|error| format!("{error:#}"));
            let told = send_to_link(&Message::<(), R>::Ending(ending));
            fork::exit_now(i32::from(told.is_err()))
        }
        (Split::Parent(pid), _) => {
            let result = serve(&ours, answer);
            // Its end of the socket is closed, or it will be by a signal.
            drop(ours);
            fork::kill(pid);
            let status = fork::wait(pid);
            match result {
                Ok(Some(result)) => Ok(result),
                Ok(None) => bail!("the process that reads it has failed{}", reason(status)),
                Err(error) => Err(error),
            }
        }
    }
}

/// Sets this process up, a copy.
fn enter(socket: UnixDatagram, confined: Option<&Confined>, layers: Layers, lacks: Vec<String>) -> Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    drop(null);
    let report_to = socket.as_raw_fd();
    // The one that a copy of a copy has inherited was closed with the other files.
    std::mem::forget(link().replace(socket));
    panic::set_hook(Box::new(|panic| fail(&panic.to_string())));
    let Some(confined) = confined else {
        let killed = Some(rustix::process::Signal::KILL);
        return rustix::process::set_parent_process_death_signal(killed).context("PR_SET_PDEATHSIG");
    };
    arguments::forget_environment();
    let confinement = Confinement::begin(layers, lacks)?;
    super::enable_filters(report_to, fail).context("handle SIGSYS")?;
    for lack in confinement.complete()? {
        log::info!("the sandbox lacks a layer that this host does not allow: {lack}");
    }
    let files_max = FILES_MAX + confined.files.len() as u64;
    for (resource, maximum) in
        [(Resource::Fsize, confined.file_bytes_max), (Resource::As, MEMORY_BYTES_MAX), (Resource::Nofile, files_max)]
    {
        let held = rustix::process::getrlimit(resource).maximum;
        let maximum = Some(held.map_or(maximum, |held| held.min(maximum)));
        rustix::process::setrlimit(resource, Rlimit { current: maximum, maximum }).context("limit resources")?;
    }
    super::confine_this_thread(confined.role);
    Ok(())
}

/// Ends this process, a copy, with an error in place of its result.
fn fail(reason: &str) -> ! {
    let told = send_to_link(&Message::<(), ()>::Ending(Err(reason.to_owned())));
    fork::exit_now(1 + i32::from(told.is_err()))
}

/// Answers until the task has ended. `None` if its process has ended before.
fn serve<Q, A, R>(socket: &UnixDatagram, answer: &mut dyn FnMut(Q) -> Result<Answer<A>>) -> Result<Option<R>>
where
    Q: DeserializeOwned,
    A: Serialize,
    R: DeserializeOwned,
{
    loop {
        let Some((bytes, _)) = receive(socket)? else { return Ok(None) };
        match serde_json::from_slice::<Message<Q, R>>(&bytes).context("a message of the process that reads it")? {
            Message::Log(level, text) => log_as_told(level, foreign::start_of(&text, TEXT_BYTES_MAX)),
            Message::Notice(notice) => drop(answer(notice)?),
            Message::Question(question) => {
                let (answer, file) = match answer(question) {
                    Ok((answer, file)) => (Ok(answer), file),
                    Err(error) => (Err(format!("{error:#}")), None),
                };
                send(socket, &answer, file)?;
            }
            Message::Ending(Ok(result)) => return Ok(Some(result)),
            Message::Ending(Err(error)) => bail!(foreign::start_of(&error, TEXT_BYTES_MAX).to_owned()),
        }
    }
}

/// Why a copy has ended, for an error message.
fn reason(status: Option<WaitStatus>) -> String {
    let signal = status.and_then(|status| status.terminating_signal());
    let code = status.and_then(|status| status.exit_status()).filter(|code| *code != 0);
    match (signal, code) {
        // The host's kernel ends processes when it has no memory left.
        (Some(libc::SIGKILL), _) => ": it was killed (the host may be out of memory)".to_owned(),
        (Some(signal), _) => format!(": it was ended by signal {signal}"),
        (_, Some(code)) => format!(": it exited with {code}"),
        (None, None) => String::new(),
    }
}

fn send(socket: &UnixDatagram, message: &impl Serialize, file: Option<OwnedFd>) -> Result<()> {
    let bytes = serde_json::to_vec(message)?;
    ensure!(bytes.len() <= MESSAGE_BYTES_MAX, "a message of {} bytes is too long", bytes.len());
    let mut packets = bytes.chunks(PACKET_BYTES - 1).peekable();
    while let Some(part) = packets.next() {
        let mark = if packets.peek().is_some() { MORE } else { LAST };
        let packet = [&[mark], part].concat();
        match &file {
            Some(file) if mark == LAST => socket::send_with_fd(socket, &packet, file.as_fd())?,
            _ => drop(socket.send(&packet)?),
        }
    }
    Ok(())
}

/// The next message, with its file; `None` at the end.
fn receive(socket: &UnixDatagram) -> Result<Option<(Vec<u8>, Option<OwnedFd>)>> {
    let (mut bytes, mut packet) = (Vec::new(), [0; PACKET_BYTES]);
    loop {
        let (len, file) = match socket::receive_with_fd(socket, &mut packet) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            received => received?,
        };
        let packet = packet.get(..len).unwrap_or_default();
        if let Some(Report { call, thread }) = Report::parse(packet) {
            bail!("the sandbox stopped the process that reads it: thread {thread} made system call {call}");
        }
        let [mark, part @ ..] = packet else { return Ok(None) };
        ensure!(bytes.len() + part.len() <= MESSAGE_BYTES_MAX, "a message is too long");
        bytes.extend_from_slice(part);
        if *mark == LAST {
            return Ok(Some((bytes, file)));
        }
    }
}
