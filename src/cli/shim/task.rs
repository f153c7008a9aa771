//! The processes of a container, as its shim knows them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Mutex, MutexGuard, PoisonError};

use prost::Message;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::messages::{self, Status, Timestamp, Waited};
use super::runtime::Begun;
use super::streams::{Paths, Screen};
use super::ttrpc::{Code, Failure, Reply};

/// The exit code of a process that could not be started, as for a shell.
const CODE_NOT_STARTED: u32 = 127;

/// A container.
#[derive(Debug)]
pub struct Task {
    pub id: String,
    pub bundle: PathBuf,
    /// Whether containerd was told that its memory was short.
    pub is_short_of_memory: AtomicBool,
    /// Its processes by their IDs; that of the first is empty.
    processes: Mutex<BTreeMap<String, Process>>,
}

/// How a process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    pub code: u32,
    pub at: Timestamp,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    pub paths: Paths,
    /// What a further process is, until it is started (JSON).
    pub spec: Vec<u8>,
    /// That of the process on the host that stands for it; 0 before there is one.
    pub pid: u32,
    handle: Option<OwnedFd>,
    pub status: Status,
    pub ended: Option<Ended>,
    /// Whether its start is not told yet, and its end, if it has ended meanwhile.
    is_starting: bool,
    held: Option<Ended>,
    /// Who waits for its end.
    waiters: Vec<Reply>,
    input: Option<File>,
    is_input_closed: bool,
    terminal: Option<File>,
    screen: Option<Screen>,
}

impl Process {
    /// One that is described.
    pub fn added(paths: Paths, spec: Vec<u8>) -> Process {
        Process {
            paths,
            spec,
            pid: 0,
            handle: None,
            status: Status::Created,
            ended: None,
            is_starting: false,
            held: None,
            waiters: Vec::new(),
            input: None,
            is_input_closed: false,
            terminal: None,
            screen: None,
        }
    }

    /// It is there.
    pub fn begin(&mut self, begun: Begun) {
        let pid = i32::try_from(begun.pid).ok().and_then(Pid::from_raw);
        // It may have ended.
        self.handle = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        self.input = begun.input.filter(|_| !self.is_input_closed);
        self.pid = begun.pid;
        (self.terminal, self.screen) = begun.terminal.unzip();
    }

    /// A handle of the process on the host, if it has not ended.
    pub fn handle(&self) -> Option<&OwnedFd> {
        self.handle.as_ref().filter(|_| self.ended.is_none())
    }

    /// The outer end of its terminal.
    pub fn terminal(&self) -> Option<&File> {
        self.terminal.as_ref()
    }

    /// What its terminal prints, once.
    pub fn take_screen(&mut self) -> Option<Screen> {
        self.screen.take()
    }

    /// Lets its input end.
    pub fn close_input(&mut self) {
        (self.input, self.is_input_closed) = (None, true);
    }

    /// Its start is going to be told. Fails if it was started before.
    pub fn hold_end(&mut self) -> Result<(), Failure> {
        if self.status != Status::Created || self.is_starting {
            return Err(Failure::new(Code::FailedPrecondition, "the process was started before"));
        }
        self.is_starting = true;
        Ok(())
    }

    /// Its start is told, or has failed. Returns its end, if it has ended since that was [held](Process::hold_end).
    pub fn release_end(&mut self, is_running: bool) -> Option<Ended> {
        self.is_starting = false;
        if is_running {
            self.status = Status::Running;
        }
        self.held.take()
    }

    /// It could not be started. Returns who waits for its end, with how that is told.
    pub fn fail(&mut self) -> (Vec<Reply>, Ended) {
        let ended = Ended::now(CODE_NOT_STARTED);
        self.is_starting = false;
        (self.end(ended).unwrap_or_default(), ended)
    }

    /// Whether its start is under way.
    pub fn is_starting(&self) -> bool {
        self.is_starting
    }

    /// It has ended. Returns who waits for that, or nothing if its end is held.
    pub fn end(&mut self, ended: Ended) -> Option<Vec<Reply>> {
        if self.is_starting {
            self.held = Some(ended);
            return None;
        }
        (self.ended, self.status) = (Some(ended), Status::Stopped);
        (self.input, self.terminal) = (None, None);
        Some(std::mem::take(&mut self.waiters))
    }

    /// Answers when it has ended.
    pub fn await_end(&mut self, reply: Reply) {
        match self.ended {
            Some(ended) => reply.send(Ok(ended.to_answer())),
            None => self.waiters.push(reply),
        }
    }

    /// What is told of it.
    pub fn state(&self) -> messages::State {
        let ended = self.ended;
        messages::State {
            pid: self.pid,
            status: self.status.into(),
            stdin: self.paths.stdin.clone(),
            stdout: self.paths.stdout.clone(),
            stderr: self.paths.stderr.clone(),
            terminal: self.paths.terminal,
            exit_status: ended.map_or(0, |ended| ended.code),
            exited_at: ended.map(|ended| ended.at),
            ..messages::State::default()
        }
    }
}

impl Ended {
    pub fn now(code: u32) -> Ended {
        Ended { code, at: Timestamp::now() }
    }

    pub fn to_answer(self) -> Vec<u8> {
        Waited { exit_status: self.code, exited_at: Some(self.at) }.encode_to_vec()
    }
}

impl Task {
    /// A container with its first process.
    pub fn new(id: &str, bundle: PathBuf, first: Process) -> Task {
        let processes = Mutex::new([(String::new(), first)].into());
        Task { id: id.to_owned(), bundle, is_short_of_memory: AtomicBool::new(false), processes }
    }

    pub fn processes(&self) -> MutexGuard<'_, BTreeMap<String, Process>> {
        self.processes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What `act` says of one of its processes.
    pub fn with<T>(&self, exec_id: &str, act: impl FnOnce(&mut Process) -> Result<T, Failure>) -> Result<T, Failure> {
        let mut processes = self.processes();
        let unknown = || Failure::new(Code::NotFound, format!("container {} has no process {exec_id}", self.id));
        act(processes.get_mut(exec_id).ok_or_else(unknown)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_before_the_start_is_told_is_told_after_it() {
        let mut process = Process::added(Paths::default(), Vec::new());
        process.hold_end().unwrap();
        assert_eq!(process.hold_end().unwrap_err().code, Code::FailedPrecondition);
        let ended = Ended::now(3);
        assert!(process.end(ended).is_none());
        assert_eq!((process.state().status, process.state().exit_status), (Status::Created.into(), 0));
        assert_eq!(process.release_end(true), Some(ended));
        assert!(process.end(ended).is_some_and(|waiters| waiters.is_empty()));
        assert_eq!((process.state().status, process.state().exit_status), (Status::Stopped.into(), 3));
        assert!(process.hold_end().is_err() && process.handle().is_none());
    }

    #[test]
    fn a_process_that_could_not_be_started_has_ended() {
        let mut process = Process::added(Paths::default(), Vec::new());
        process.hold_end().unwrap();
        assert!(process.release_end(false).is_none());
        let (waiters, ended) = process.fail();
        assert_eq!((waiters.len(), ended.code, process.ended), (0, 127, Some(ended)));
        assert_eq!(process.hold_end().unwrap_err().code, Code::FailedPrecondition);
    }

    #[test]
    fn a_process_that_is_unknown_is_not_found() {
        let task = Task::new("c", "/b".into(), Process::added(Paths::default(), Vec::new()));
        task.with("", |_| Ok(())).unwrap();
        assert_eq!(task.with("x", |_| Ok(())).unwrap_err().code, Code::NotFound);
    }
}
