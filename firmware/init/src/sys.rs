//! The system calls and instructions that no library wraps, each behind a safe function.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use husk_protocol::{Limit, WindowSize};
use nix::errno::Errno;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::{ForkResult, Pid};

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets this process, and it alone, write to `count` I/O ports from `first` on.
pub fn allow_ports(first: u16, count: u16) -> io::Result<()> {
    // SAFETY: the call changes which ports may be written, and touches no memory.
    check(unsafe { libc::ioperm(first.into(), count.into(), 1) })
}

/// Writes a byte to a port, which [`allow_ports`] has allowed; else the process ends by a signal.
pub fn write_port(port: u16, value: u8) {
    // SAFETY: what stands behind the ports that are allowed is the machine's own; no memory of ours is touched.
    unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// fork(2).
pub fn fork() -> nix::Result<ForkResult> {
    // SAFETY: there is one thread, so that the child finds every lock as its own thread left it.
    unsafe { nix::unistd::fork() }
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// By itself, with this exit code.
    Exited(u8),
    /// By a signal of this number.
    Signaled(u8),
}

impl Ended {
    /// What a wait status says; of a process that has ended it says nothing else.
    fn from_status(status: i32) -> Ended {
        if libc::WIFEXITED(status) {
            Ended::Exited(libc::WEXITSTATUS(status) as u8)
        } else {
            Ended::Signaled(libc::WTERMSIG(status) as u8)
        }
    }
}

/// waitpid(2) for any child that has ended, without waiting: `None` while all run, ECHILD where there is none.
/// nix's own takes the child and then fails where a real-time signal ended it, for which it has no name.
pub fn reap() -> nix::Result<Option<(Pid, Ended)>> {
    let mut status = 0;
    // SAFETY: the call writes an `int` to the pointer, and `status` is one.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })?;
    Ok((pid > 0).then(|| (Pid::from_raw(pid), Ended::from_status(status))))
}

/// kill(2) with any signal, those included that have a number only (32 to 64).
pub fn send_signal(pid: Pid, number: u8) -> nix::Result<()> {
    // SAFETY: the call touches no memory.
    Errno::result(unsafe { libc::kill(pid.as_raw(), number.into()) }).map(drop)
}

/// Ends a child that did not become a program, without a trace of this process's own end.
pub fn leave() -> ! {
    // SAFETY: the call ends the process, and does nothing before.
    unsafe { libc::_exit(127) }
}

/// Has a signal do what it does by default.
pub fn set_default_action(signal: Signal) {
    // SAFETY: the default action runs no code of ours. It can fail for no signal that has a name but two.
    let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
}

/// Makes the terminal the controlling one of this process, which leads a session.
pub fn take_terminal(terminal: BorrowedFd) -> io::Result<()> {
    // SAFETY: the request has no argument but 0, and touches no memory.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })
}

/// Tells a terminal its size; who runs on it hears of a change.
pub fn set_window_size(terminal: BorrowedFd, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads a whole `winsize` from the pointer, and `size` is one.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) })
}

/// Sets a resource limit of this process.
pub fn set_limit(limit: &Limit) -> io::Result<()> {
    let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: the call reads a whole `rlimit` from the pointer, and `value` is one.
    check(unsafe { libc::setrlimit(limit.resource, &value) })
}

/// Gives a connection in the making more time than the two seconds it has by default.
pub fn set_connect_timeout(socket: BorrowedFd, timeout: Duration) -> io::Result<()> {
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: i32 = 6;
    let value = libc::timeval { tv_sec: timeout.as_secs() as i64, tv_usec: 0 };
    let len = size_of::<libc::timeval>() as u32;
    // SAFETY: the call reads `len` bytes from the pointer, the size of the `timeval` behind it.
    check(unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::AF_VSOCK,
            SO_VM_SOCKETS_CONNECT_TIMEOUT,
            (&raw const value).cast(),
            len,
        )
    })
}

/// Takes the next connection that waits at a listener.
pub fn accept(listener: BorrowedFd) -> nix::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: the descriptor is new and owned by nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Brings the file system that `dir` is on to rest: all of it is on its disk, and its journal is empty.
pub fn freeze(dir: BorrowedFd) -> io::Result<()> {
    // FIFREEZE, _IOWR('X', 119, int)
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    // SAFETY: the request takes no argument and touches no memory, its number notwithstanding.
    check(unsafe { libc::ioctl(dir.as_raw_fd(), FIFREEZE, 0) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn any_signal_is_sent_and_told_as_the_end_of_a_process() {
        // Without those that the C library has ignored in what it starts here, that stop, and that end nothing.
        const OTHERS: [i32; 10] = [
            32,
            33,
            libc::SIGSTOP,
            libc::SIGTSTP,
            libc::SIGTTIN,
            libc::SIGTTOU,
            libc::SIGCHLD,
            libc::SIGCONT,
            libc::SIGURG,
            libc::SIGWINCH,
        ];
        for number in (1..=64).filter(|number| !OTHERS.contains(number)) {
            let mut child = Command::new("sleep").arg("100").spawn().unwrap();
            let pid = Pid::from_raw(child.id() as i32);
            send_signal(pid, number as u8).unwrap();
            let status = child.wait().unwrap();
            assert_eq!(Ended::from_status(status.into_raw()), Ended::Signaled(number as u8));
        }
        assert_eq!((Ended::from_status(32), Ended::from_status(33)), (Ended::Signaled(32), Ended::Signaled(33)));
        let status = Command::new("sh").args(["-c", "exit 162"]).status().unwrap();
        assert_eq!(Ended::from_status(status.into_raw()), Ended::Exited(162));
    }
}
