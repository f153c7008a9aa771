//! Runs a program with all of its processes and threads, and gets hold of each of their system calls (ptrace(2)): it can make
//! one fail, cut it short, or send a signal before it.
#![allow(unsafe_code)]

use std::collections::HashMap;
use std::fs;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// Longer than any of these programs takes on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);
/// What is written to an eventfd.
pub const EVENT_BYTES: u64 = 8;
/// The operation of futex(2) without its flags.
const FUTEX_OPERATION: u64 = 0x7f;
/// An operation of `ptrace_syscall_info` (PTRACE_SYSCALL_INFO_ENTRY, _EXIT).
const ENTRY: u8 = 1;
const EXIT: u8 = 2;
/// How an error is returned: its negated number.
const fn failed(error: Errno) -> u64 {
    (error as i64).wrapping_neg() as u64
}

/// A system call that is about to be made.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Call {
    /// The name of its thread, after `monitor/` in any process but the first.
    pub thread: String,
    /// Its number.
    pub number: i64,
    /// The request of ioctl(2), the option of prctl(2), the operation of futex(2), [`EVENT_BYTES`] for a
    /// write to an event, or 0.
    pub request: u64,
}

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// It is not made, and fails.
    Error(Errno),
    /// It gets half of its buffer.
    Half,
    /// The first process gets a signal before it.
    Signal(Signal),
}

/// How the first process has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Exited(i32),
    Killed(i32),
    /// Something of it was still running after that long, and was killed.
    TimedOut,
}

#[derive(Default)]
struct Thread {
    /// Whether it has been seen to stop.
    known: bool,
    in_first_process: bool,
    /// The result that replaces that of its current call.
    result: Option<u64>,
}

struct Tracer<F> {
    first: Pid,
    threads: HashMap<Pid, Thread>,
    fault: F,
}

/// Runs `command` until all of its processes have ended, and asks `fault` about each call, in the order in which they are made.
pub fn trace(command: &mut Command, fault: impl FnMut(&Call) -> Option<Fault>) -> End {
    // SAFETY: the closure only makes a system call.
    unsafe { command.pre_exec(|| ptrace::traceme().map_err(Into::into)) };
    // Waited for by its ID, with all others.
    #[allow(clippy::zombie_processes)]
    let child = command.spawn().unwrap();
    let first = Pid::from_raw(child.id() as i32);
    // It has stopped at its first instruction.
    waitpid(first, Some(WaitPidFlag::__WALL)).unwrap();
    let options = Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_EXITKILL;
    ptrace::setoptions(first, options).unwrap();
    let threads = HashMap::from([(first, Thread { known: true, in_first_process: true, result: None })]);
    let mut tracer = Tracer { first, threads, fault };
    let alive = Arc::new(Mutex::new(vec![first]));
    let (ended, watched) = mpsc::channel::<()>();
    let watchdog = thread::spawn({
        let alive = alive.clone();
        move || {
            let timed_out = watched.recv_timeout(TIMEOUT) == Err(RecvTimeoutError::Timeout);
            if timed_out {
                alive.lock().unwrap().iter().for_each(|pid| _ = kill(*pid, Signal::SIGKILL));
            }
            timed_out
        }
    });
    resume(first, 0);
    let mut end = None;
    loop {
        let first = match next_change(0) {
            Err(Errno::ECHILD) => break,
            first => first.unwrap(),
        };
        // All others that have stopped, before one goes on: a busy thread must not keep the others waiting.
        let others = std::iter::from_fn(|| next_change(libc::WNOHANG).ok().filter(|(pid, _)| pid.as_raw() != 0));
        for (pid, status) in [first].into_iter().chain(others).collect::<Vec<_>>() {
            end = tracer.handle(pid, status).or(end);
        }
        *alive.lock().unwrap() = tracer.threads.keys().copied().collect();
    }
    drop(ended);
    if watchdog.join().unwrap() { End::TimedOut } else { end.unwrap() }
}

/// The next thread that has stopped or ended, with its status; 0 if there is none yet, with WNOHANG. nix knows no real-time signals, with which vCPUs are kicked.
fn next_change(flags: i32) -> nix::Result<(Pid, i32)> {
    let mut status = 0;
    // SAFETY: the status is written to a variable. Only this thread's children: other tests have some as well.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::__WALL | libc::__WNOTHREAD | flags) };
    Errno::result(pid).map(|pid| (Pid::from_raw(pid), status))
}

/// Lets a thread go on until its next call, with a signal or 0. It may have been killed meanwhile, which makes this fail.
fn resume(pid: Pid, signal: i32) {
    // SAFETY: the request accesses no memory of this process.
    unsafe { libc::ptrace(libc::PTRACE_SYSCALL, pid.as_raw(), 0, signal) };
}

impl<F: FnMut(&Call) -> Option<Fault>> Tracer<F> {
    /// Handles a change of a thread, and returns the end of the first process.
    fn handle(&mut self, pid: Pid, status: i32) -> Option<End> {
        if libc::WIFEXITED(status) {
            return self.ended(pid, End::Exited(libc::WEXITSTATUS(status)));
        }
        if libc::WIFSIGNALED(status) {
            return self.ended(pid, End::Killed(libc::WTERMSIG(status)));
        }
        let (signal, is_event) = (libc::WSTOPSIG(status), status >> 16 != 0);
        let thread = self.threads.entry(pid).or_default();
        let is_new = !std::mem::replace(&mut thread.known, true);
        if is_new {
            thread.in_first_process = process_of(pid) == Some(self.first);
        }
        if signal == libc::SIGTRAP | 0x80 {
            // It fails if the thread has been killed meanwhile.
            let _ = self.at_call(pid);
        }
        // A new thread starts with a stop of its own.
        let is_own = is_event || signal == libc::SIGTRAP | 0x80 || is_new && signal == libc::SIGSTOP;
        resume(pid, if is_own { 0 } else { signal });
        None
    }

    fn ended(&mut self, pid: Pid, end: End) -> Option<End> {
        self.threads.remove(&pid);
        (pid == self.first).then_some(end)
    }

    fn at_call(&mut self, pid: Pid) -> nix::Result<()> {
        let thread = self.threads.entry(pid).or_default();
        match ptrace::syscall_info(pid)?.op {
            ENTRY => {
                let mut registers = ptrace::getregs(pid)?;
                let number = registers.orig_rax as i64;
                let request = match number {
                    libc::SYS_ioctl => registers.rsi & 0xffff_ffff,
                    libc::SYS_prctl => registers.rdi,
                    // As many bytes as an event is notified with.
                    libc::SYS_write if registers.rdx == EVENT_BYTES => EVENT_BYTES,
                    libc::SYS_futex => registers.rsi & FUTEX_OPERATION,
                    _ => 0,
                };
                let process = if thread.in_first_process { "" } else { "monitor/" };
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                let call = Call { thread: format!("{process}{}", name.trim_end()), number, request };
                match (self.fault)(&call) {
                    None => {}
                    Some(Fault::Signal(signal)) => kill(self.first, signal)?,
                    Some(Fault::Half) => {
                        registers.rdx /= 2;
                        ptrace::setregs(pid, registers)?;
                    }
                    Some(Fault::Error(error)) => {
                        thread.result = Some(failed(error));
                        // Every filter allows this one.
                        registers.orig_rax = libc::SYS_getpid as u64;
                        ptrace::setregs(pid, registers)?;
                    }
                }
            }
            EXIT => {
                if let Some(result) = thread.result.take() {
                    let mut registers = ptrace::getregs(pid)?;
                    registers.rax = result;
                    ptrace::setregs(pid, registers)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

/// The process of a thread.
fn process_of(thread: Pid) -> Option<Pid> {
    let status = fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:"))?;
    Some(Pid::from_raw(process.trim().parse().ok()?))
}
