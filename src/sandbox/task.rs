//! Runs a task that reads foreign data in a confined copy of this process.
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
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::{Pid, WaitOptions, waitpid};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::{Confinement, Layers, ThreadRole};
use crate::sys::fork::{self, Files, Split};
use crate::sys::violation::Report;
use crate::sys::{arguments, socket};

/// The maximum size of a message: above all the configuration of an image.
pub const MESSAGE_BYTES_MAX: usize = 16 << 20;
/// A message is sent in packets of this size, each with a first byte that tells whether it is the last.
const PACKET_BYTES: usize = 16 << 10;
const MORE: u8 = 0;
const LAST: u8 = 1;

/// The socket of this process, if it is a copy that runs a task.
static LINK: OnceLock<Mutex<UnixDatagram>> = OnceLock::new();

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
    let link = LINK.get().context("this process runs no task")?;
    let socket = link.lock().unwrap_or_else(PoisonError::into_inner);
    send(&socket, &Message::<Q, ()>::Question(question), None)?;
    let (bytes, file) = receive(&socket)?.context("the process that answers is gone")?;
    let answer: Result<A, String> = serde_json::from_slice(&bytes)?;
    Ok((answer.map_err(|error| anyhow!(error))?, file))
}

/// Tells that process something that has no answer. Any thread.
pub fn tell<Q: Serialize>(notice: Q) -> Result<()> {
    send_to_link(&Message::<Q, ()>::Notice(notice))
}

fn send_to_link<Q: Serialize, R: Serialize>(message: &Message<Q, R>) -> Result<()> {
    let link = LINK.get().context("this process runs no task")?;
    send(&link.lock().unwrap_or_else(PoisonError::into_inner), message, None)
}

/// Sends a line for the log to the process that answers, if this process runs a task. Any thread.
pub fn forward_log(record: &log::Record) -> bool {
    if LINK.get().is_none() {
        return false;
    }
    let _ = send_to_link(&Message::<(), ()>::Log(record.level() as usize, record.args().to_string()));
    true
}

/// Runs `task` with the filter of `role` in a copy of this process, which has only the files in `shared` and what `answer`
/// returns to its questions. Returns the task's result, which like its questions may be anything of its type.
///
/// `task` must own no files. The caller must be the only thread that uses locks which the task needs; a process with a
/// single thread is.
pub fn run<Q, A, R>(
    role: ThreadRole,
    shared: Vec<RawFd>,
    task: impl FnOnce() -> Result<R>,
    answer: &mut dyn FnMut(Q) -> Result<Answer<A>>,
) -> Result<R>
where
    Q: Serialize + DeserializeOwned,
    A: Serialize,
    R: Serialize + DeserializeOwned,
{
    let (ours, theirs) = socket::message_pair().context("create a socket")?;
    let layers = Layers::new(true);
    let layers = if role.uses_network() { layers.with_network() } else { layers };
    let files = Files { given: vec![theirs.as_raw_fd()], shared };
    match layers.split((theirs, task), &files).context("start a process")? {
        (Split::Child((link, task)), lacks) => {
            let ending = confine(role, link, layers, lacks).and_then(|()| task());
            let ending = ending.map_err(|error| format!("{error:#}"));
            let told = send_to_link(&Message::<(), R>::Ending(ending));
            fork::exit_now(i32::from(told.is_err()))
        }
        (Split::Parent(pid), _) => {
            let result = serve(&ours, answer);
            // Its end of the socket is closed, or it will be by a signal.
            drop(ours);
            end(pid);
            result
        }
    }
}

/// Confines this process, a copy.
fn confine(role: ThreadRole, link: UnixDatagram, layers: Layers, lacks: Vec<String>) -> Result<()> {
    let null = std::fs::File::options().read(true).write(true).open("/dev/null").context("open /dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    drop(null);
    let report_to = link.as_raw_fd();
    let _ = LINK.set(Mutex::new(link));
    panic::set_hook(Box::new(|panic| {
        log::error!("{panic}");
        fork::exit_now(128 + libc::SIGABRT)
    }));
    arguments::forget_environment();
    let confinement = Confinement::begin(layers, lacks)?;
    super::enable_filters(report_to, fail).context("handle SIGSYS")?;
    for lack in confinement.complete()? {
        log::info!("the sandbox lacks {lack}");
    }
    super::confine_this_thread(role);
    Ok(())
}

/// Ends this process, a copy, without a result.
fn fail(reason: &str) -> ! {
    let _ = send_to_link(&Message::<(), ()>::Ending(Err(reason.to_owned())));
    fork::exit_now(1)
}

/// Answers until the task has ended.
fn serve<Q, A, R>(socket: &UnixDatagram, answer: &mut dyn FnMut(Q) -> Result<Answer<A>>) -> Result<R>
where
    Q: DeserializeOwned,
    A: Serialize,
    R: DeserializeOwned,
{
    loop {
        let Some((bytes, _)) = receive(socket)? else { bail!("the process that reads it has failed") };
        match serde_json::from_slice::<Message<Q, R>>(&bytes).context("a message of the process that reads it")? {
            Message::Log(level, text) => {
                let level = log::Level::iter().find(|known| *known as usize == level).unwrap_or(log::Level::Error);
                log::log!(level, "{text}");
            }
            Message::Notice(notice) => drop(answer(notice)?),
            Message::Question(question) => {
                let (answer, file) = match answer(question) {
                    Ok((answer, file)) => (Ok(answer), file),
                    Err(error) => (Err(format!("{error:#}")), None),
                };
                send(socket, &answer, file)?;
            }
            Message::Ending(ending) => return ending.map_err(|error| anyhow!(error)),
        }
    }
}

/// Ends a copy that may still run, and waits for its end.
fn end(pid: u32) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return };
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    while waitpid(Some(pid), WaitOptions::empty()).is_err_and(|error| error == rustix::io::Errno::INTR) {}
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
