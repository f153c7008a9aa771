//! Kernel tasks: system calls, fork, exec, and context switches.

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;

use husk_init::errors::{Context, Failure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, pipe, read, write};

use crate::sys;
use crate::task::Task;

/// System calls that only return a number.
pub fn system_calls(amount: u64) -> Result<Task, Failure> {
    Ok(Box::new(move || {
        (0..amount).for_each(|_| sys::ask_for_parent());
        Ok(())
    }))
}

/// Processes that exit immediately, one after the other.
pub fn forks(amount: u64) -> Result<Task, Failure> {
    Ok(Box::new(move || (0..amount).try_for_each(|_| bury(sys::fork(|| 0).context("fork")?))))
}

/// Processes that execute this program, which exits immediately.
pub fn execs(amount: u64) -> Result<Task, Failure> {
    let program = std::env::current_exe().context("find this program (is /proc mounted?)")?;
    let program = CString::new(program.into_os_string().into_vec()).map_err(Failure::new)?;
    Ok(Box::new(move || {
        (0..amount).try_for_each(|_| {
            let child = sys::fork(|| sys::exec(&program, &[&program, c"nothing"])).context("fork")?;
            bury(child)
        })
    }))
}

fn bury(child: Pid) -> Result<(), Failure> {
    match waitpid(child, None).context("wait for a process")? {
        WaitStatus::Exited(_, 0) => Ok(()),
        other => Err(Failure::new(format_args!("a process ended otherwise than it should: {other:?}"))),
    }
}

/// Two processes on one CPU pass a byte back and forth: each transfer is a switch.
pub fn switches(amount: u64) -> Result<Task, Failure> {
    let pair = Pair::start()?;
    Ok(Box::new(move || pair.hand_over(amount).context("hand a byte over")))
}

struct Pair {
    child: Pid,
    to_child: Option<OwnedFd>,
    from_child: OwnedFd,
    /// The original affinity of this process.
    processors: CpuSet,
}

impl Pair {
    fn start() -> Result<Pair, Failure> {
        let myself = Pid::from_raw(0);
        let processors = sched_getaffinity(myself).context("ask for this process's processors")?;
        let mut one = CpuSet::new();
        let first = (0..CpuSet::count()).find(|cpu| processors.is_set(*cpu) == Ok(true)).unwrap_or(0);
        one.set(first).context("choose a processor")?;
        let (child_reads, to_child) = pipe().context("create a pipe")?;
        let (from_child, child_writes) = pipe().context("create a pipe")?;
        sched_setaffinity(myself, &one).context("keep to one processor")?;
        let other_end = &to_child;
        let child = sys::fork(move || {
            // It exits when the last write end is closed, so it must not hold one.
            let _ = nix::unistd::close(std::os::fd::AsRawFd::as_raw_fd(other_end));
            answer(&child_reads, &child_writes)
        });
        let pair = Pair { child: child.context("fork")?, to_child: Some(to_child), from_child, processors };
        // It has started, and is waiting.
        pair.hand_over(2).context("hand a byte over")?;
        Ok(pair)
    }

    fn hand_over(&self, times: u64) -> nix::Result<()> {
        let mut byte = [0];
        for time in 0..times {
            if time % 2 == 1 {
                read(&self.from_child, &mut byte)?;
            } else if let Some(to_child) = &self.to_child {
                write(to_child, &byte)?;
            }
        }
        Ok(())
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.to_child = None;
        let _ = waitpid(self.child, None);
        let _ = sched_setaffinity(Pid::from_raw(0), &self.processors);
    }
}

/// The other process: answers until its peer is gone.
fn answer(from: &OwnedFd, to: &OwnedFd) -> i32 {
    let mut byte = [0];
    while read(from, &mut byte) == Ok(1) && write(to, &byte) == Ok(1) {}
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_process_is_an_error() {
        assert!(bury(sys::fork(|| 3).unwrap()).is_err());
        assert!(bury(sys::fork(|| sys::exec(c"/nonexistent", &[c"nonexistent"])).unwrap()).is_err());
        bury(sys::fork(|| 0).unwrap()).unwrap();
    }

    #[test]
    fn the_other_process_exits_and_affinity_is_restored() {
        let before = sched_getaffinity(Pid::from_raw(0)).unwrap();
        let pair = Pair::start().unwrap();
        let child = pair.child;
        pair.hand_over(101).unwrap();
        drop(pair);
        assert_eq!(nix::sys::signal::kill(child, None), Err(nix::Error::ESRCH));
        assert_eq!(sched_getaffinity(Pid::from_raw(0)).unwrap(), before);
    }
}
