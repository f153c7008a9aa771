//! System calls and instructions without a library wrapper, each as a safe function.
#![allow(unsafe_code)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use husk_protocol::{CallFilter, Capabilities, Limit, WindowSize};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::signal::{SigHandler, Signal};
use nix::sys::socket::{SockFlag, accept4};
use nix::unistd::{ForkResult, Pid};

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Allows this process to access `count` I/O ports from `first`.
pub fn allow_ports(first: u16, count: u16) -> io::Result<()> {
    // SAFETY: the call changes I/O permissions and accesses no memory.
    check(unsafe { libc::ioperm(first.into(), count.into(), 1) })
}

/// Writes a byte to a port permitted by [`allow_ports`]; otherwise the process is killed by a signal.
pub fn write_port(port: u16, value: u8) {
    // SAFETY: the permitted ports belong to the VMM's devices, which access no memory of this process.
    unsafe { std::arch::asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags)) }
}

/// Opens a directory as the descriptor `fd`, which must be free, for as long as this process lives.
pub fn hold(dir: &str, fd: i32) -> io::Result<()> {
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let opened = nix::fcntl::open(dir, flags, nix::sys::stat::Mode::empty())?;
    // SAFETY: the call accesses no memory, and `fd` is nobody's.
    check(unsafe { libc::dup3(opened.as_raw_fd(), fd, libc::O_CLOEXEC) })
}

/// fork(2).
pub fn fork() -> nix::Result<ForkResult> {
    // SAFETY: the only other thread (`pressure`) takes no lock, so no lock is held by another thread in the child.
    unsafe { nix::unistd::fork() }
}

/// fork(2), except that the parent of the new process is that of this one, which is itself a fork of init.
pub fn fork_sibling() -> nix::Result<ForkResult> {
    let flags = libc::c_long::from(libc::CLONE_PARENT | libc::SIGCHLD);
    // SAFETY: without a stack and shared memory, the new process has a copy of this one's, like that of fork(2); this process has no other
    // thread, whose locks it would copy.
    match Errno::result(unsafe { libc::syscall(libc::SYS_clone, flags, 0_i64, 0_i64, 0_i64, 0_i64) })? {
        0 => Ok(ForkResult::Child),
        pid => Ok(ForkResult::Parent { child: Pid::from_raw(pid as i32) }),
    }
}

/// unshare(2): `namespaces` are CLONE_NEW…. A new PID namespace is for the children.
pub fn unshare(namespaces: u32) -> io::Result<()> {
    // SAFETY: the call accesses no memory, and the process's own files stay its own.
    check(unsafe { libc::unshare(namespaces as i32) })
}

/// setns(2): joins those namespaces of a process, or of a namespace's file. A PID namespace is for the children.
pub fn join_namespaces(of: BorrowedFd, namespaces: u32) -> io::Result<()> {
    // SAFETY: the call accesses no memory.
    check(unsafe { libc::setns(of.as_raw_fd(), namespaces as i32) })
}

/// A descriptor of a process (pidfd_open(2)).
pub fn open_process(pid: Pid) -> nix::Result<OwnedFd> {
    // SAFETY: the call accesses no memory.
    let process = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(process as i32) })
}

/// Sets all five sets of capabilities of this process, whose user ID is set already. The bounding set is set while it has
/// CAP_SETPCAP, which is what it needs SECBIT_KEEP_CAPS for.
pub fn set_capabilities(wanted: Capabilities) -> io::Result<()> {
    /// `struct __user_cap_header_struct` and `struct __user_cap_data_struct`, version 3 (64 bits in two halves)
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    #[repr(C)]
    struct Half {
        effective: u32,
        permitted: u32,
        inheritable: u32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let half = |shift: u32| Half {
        effective: (wanted.effective >> shift) as u32,
        permitted: (wanted.permitted >> shift) as u32,
        inheritable: (wanted.inheritable >> shift) as u32,
    };
    let halves = [half(0), half(32)];
    // SAFETY: the call reads a header and two halves from the pointers, which refer to such.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, halves.as_ptr()) } as i32)?;
    for number in (0..u64::BITS).filter(|number| wanted.ambient >> number & 1 == 1) {
        // What is not permitted and inheritable cannot be ambient, which runc ignores as well.
        // SAFETY: the call accesses no memory.
        let _ = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE, number, 0, 0) };
    }
    Ok(())
}

/// Makes this process keep its permitted capabilities when it changes its user.
pub fn keep_capabilities() -> io::Result<()> {
    // SAFETY: the call accesses no memory.
    check(unsafe { libc::prctl(libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) })
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It exited with this code.
    Exited(u8),
    /// It was killed by this signal.
    Signaled(u8),
}

impl Ended {
    /// Decodes the wait status of a process that has ended.
    fn from_status(status: i32) -> Ended {
        if libc::WIFEXITED(status) {
            Ended::Exited(libc::WEXITSTATUS(status) as u8)
        } else {
            Ended::Signaled(libc::WTERMSIG(status) as u8)
        }
    }
}

/// waitpid(2) for any child that has ended, without blocking: `None` if all are running, ECHILD if there are none.
/// nix's version reaps the child and then fails if it was killed by a real-time signal, which nix cannot represent.
pub fn reap() -> nix::Result<Option<(Pid, Ended)>> {
    let mut status = 0;
    // SAFETY: the call writes an `int` to the pointer, which refers to one.
    let pid = Errno::result(unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) })?;
    Ok((pid > 0).then(|| (Pid::from_raw(pid), Ended::from_status(status))))
}

/// kill(2) with any signal, including real-time signals (32 to 64).
pub fn send_signal(pid: Pid, number: u8) -> nix::Result<()> {
    // SAFETY: the call accesses no memory.
    Errno::result(unsafe { libc::kill(pid.as_raw(), number.into()) }).map(drop)
}

/// Exits a child that did not execute a program, without running exit handlers.
pub fn leave() -> ! {
    // SAFETY: the call only ends the process.
    unsafe { libc::_exit(127) }
}

/// Resets a signal to its default action.
pub fn set_default_action(signal: Signal) {
    // SAFETY: the default action runs none of our code. It can fail only for two signals.
    let _ = unsafe { nix::sys::signal::signal(signal, SigHandler::SigDfl) };
}

/// Makes the terminal the controlling one of this process, which must be a session leader.
pub fn take_terminal(terminal: BorrowedFd) -> io::Result<()> {
    // SAFETY: the request takes no pointer and accesses no memory.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSCTTY, 0) })
}

/// Sets a terminal's size; its foreground processes are notified of a change.
pub fn set_window_size(terminal: BorrowedFd, size: WindowSize) -> io::Result<()> {
    let size = libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the request reads a `winsize` from the pointer, which refers to one.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &size) })
}

/// Sets a resource limit of this process.
pub fn set_limit(limit: &Limit) -> io::Result<()> {
    let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: the call reads an `rlimit` from the pointer, which refers to one.
    check(unsafe { libc::setrlimit(limit.resource, &value) })
}

/// Makes it impossible for this process and its children to get these capabilities, a bit for each, by executing a program.
/// Those that the kernel does not know are ignored.
pub fn drop_capabilities(mask: u64) -> io::Result<()> {
    for number in (0..u64::BITS).filter(|number| mask >> number & 1 == 1) {
        // SAFETY: the call accesses no memory.
        match check(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, number, 0, 0, 0) }) {
            Err(error) if error.raw_os_error() != Some(libc::EINVAL) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// Makes it impossible for this process and its children to get more rights by executing a program.
pub fn forbid_new_privileges() -> io::Result<()> {
    // SAFETY: the call accesses no memory.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
}

/// Subjects the system calls of this process and its children to a filter, which cannot be removed.
pub fn filter_calls(filter: &CallFilter) -> io::Result<()> {
    let instruction = |bytes: &[u8]| {
        let [c0, c1, jt, jf, k0, k1, k2, k3] = *bytes else { return None };
        let (code, k) = (u16::from_le_bytes([c0, c1]), u32::from_le_bytes([k0, k1, k2, k3]));
        Some(libc::sock_filter { code, jt, jf, k })
    };
    let program: Option<Vec<_>> = filter.program.chunks(CallFilter::INSTRUCTION_BYTES).map(instruction).collect();
    let program = program.ok_or(io::ErrorKind::InvalidData)?;
    let len = u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let whole = libc::sock_fprog { len, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads as many instructions as `program` has, and validates them.
    let result =
        unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, filter.flags, &raw const whole) };
    check(result as i32)
}

/// Extends the connect timeout of a socket, which is two seconds by default.
pub fn set_connect_timeout(socket: BorrowedFd, timeout: Duration) -> io::Result<()> {
    const SO_VM_SOCKETS_CONNECT_TIMEOUT: i32 = 6;
    let value = libc::timeval { tv_sec: timeout.as_secs() as i64, tv_usec: 0 };
    let len = size_of::<libc::timeval>() as u32;
    // SAFETY: the call reads `len` bytes from the pointer, the size of the `timeval` it refers to.
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

/// Accepts the next pending connection of a listener.
pub fn accept(listener: BorrowedFd) -> nix::Result<OwnedFd> {
    let fd = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// A duplicate of descriptor `fd` of process `pid` (Linux 5.6 and later).
pub fn descriptor_of(pid: Pid, fd: i32) -> nix::Result<OwnedFd> {
    let process = open_process(pid)?;
    // SAFETY: the call accesses no memory.
    let duplicate = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), fd, 0) })?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { OwnedFd::from_raw_fd(duplicate as i32) })
}

/// Closes all descriptors of this process, a child that will execute a program or exit, from 3 on, except those (close_range(2), Linux 5.9
/// and later).
pub fn close_others(mut kept: Vec<RawFd>) {
    kept.sort_unstable();
    let mut first = 3;
    for end in kept.into_iter().chain([RawFd::MAX]) {
        if first < end {
            // SAFETY: the child uses no descriptor any more but those that are kept, and returns to no owner of another.
            unsafe { libc::syscall(libc::SYS_close_range, first, end - 1, 0) };
        }
        first = first.max(end.saturating_add(1));
    }
}

/// Disconnects a connected socket, whoever has it: their calls fail, also those that wait.
pub fn disconnect(socket: BorrowedFd) -> io::Result<()> {
    let nowhere = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let len = size_of::<libc::sockaddr>() as u32;
    // SAFETY: the call reads `len` bytes from the pointer, the size of the `sockaddr` it refers to.
    check(unsafe { libc::connect(socket.as_raw_fd(), &nowhere, len) })
}

/// Adds random bytes to the kernel's pool, and makes it generate random numbers from them at once.
pub fn add_entropy(bytes: [u8; 32]) -> io::Result<()> {
    // RNDADDENTROPY, _IOW('R', 0x03, int[2]), and RNDRESEEDCRNG, _IO('R', 0x07)
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    /// `struct rand_pool_info`
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: i32,
        len_bytes: i32,
        bytes: [u8; 32],
    }
    let pool = std::fs::File::open("/dev/urandom")?;
    let info = PoolInfo { entropy_bits: 8 * bytes.len() as i32, len_bytes: bytes.len() as i32, bytes };
    // SAFETY: the request reads a `rand_pool_info` and the bytes behind it, whose number is in it.
    check(unsafe { libc::ioctl(pool.as_raw_fd(), RNDADDENTROPY, &info) })?;
    // SAFETY: the request takes no argument and accesses no memory.
    check(unsafe { libc::ioctl(pool.as_raw_fd(), RNDRESEEDCRNG) })
}

/// Freezes the file system of `dir`: all data is on its disk, and its journal is empty.
pub fn freeze(dir: BorrowedFd) -> io::Result<()> {
    // FIFREEZE, _IOWR('X', 119, int)
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    // SAFETY: despite its number, the request takes no argument and accesses no memory.
    check(unsafe { libc::ioctl(dir.as_raw_fd(), FIFREEZE, 0) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    #[test]
    fn any_signal_is_sent_and_reported() {
        // Excluding signals that the C library ignores in children here, that stop, and that are harmless.
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
