//! Raw system calls without a library wrapper, each as a safe function.
#![allow(unsafe_code)]

pub mod affinity;
pub mod allocator;
pub mod arguments;
pub mod disk;
pub mod event;
pub mod fork;
pub mod identity;
pub mod mapping;
pub mod mounts;
pub mod namespaces;
pub mod net;
pub mod process;
pub mod processor;
pub mod resident;
pub mod seccomp;
pub mod shared;
#[cfg(test)]
pub mod smaps;
pub mod socket;
pub mod timer;
pub mod uring;
pub mod violation;
pub mod xattr;

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;

use vmm_sys_util::epoll::Epoll;
use vmm_sys_util::eventfd::EventFd;

/// The maximum number of parts of a vectored system call (linux/uio.h).
pub const IOV_MAX: usize = 1024;

/// Buffers as vectored system calls take them.
///
/// # Safety
/// Each part that [`IoVecs::iovecs`] returns is mapped, readable and writable, for as long as `self` is borrowed, and
/// Rust has no references into it.
pub unsafe trait IoVecs {
    /// The parts, in order, at most [`IOV_MAX`].
    fn iovecs(&self) -> &[libc::iovec];
}

/// A file descriptor from which signals are read instead of being delivered (signalfd(2)).
///
/// The signals stay blocked in the calling thread, and in threads that it starts later, even after this is dropped.
/// Otherwise a late signal could kill a process that is about to exit, and replace its exit code.
#[derive(Debug)]
pub struct SignalFd(OwnedFd);

impl SignalFd {
    /// Blocks `signals` and receives them through the descriptor.
    pub fn block(signals: &[i32]) -> io::Result<SignalFd> {
        let set = vmm_sys_util::signal::create_sigset(signals)?;
        mask(libc::SIG_BLOCK, &set)?;
        // SAFETY: signalfd only reads the set; the descriptor it returns is new and has no other owner.
        let fd = unsafe {
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        Ok(SignalFd(fd))
    }

    /// Whether one of these signals, which are blocked, is pending. It stays so.
    pub fn is_pending(&self, signals: &[i32]) -> bool {
        let mut pending = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the set is written completely if the call succeeds, and read only then.
        unsafe {
            libc::sigpending(pending.as_mut_ptr()) == 0
                && signals.iter().any(|signal| libc::sigismember(pending.as_ptr(), *signal) == 1)
        }
    }

    /// The next pending signal, if there is one.
    pub fn read(&self) -> io::Result<Option<i32>> {
        let mut info = MaybeUninit::<libc::signalfd_siginfo>::uninit();
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the kernel writes at most `size` bytes to `info`, which has that size, and writes it completely or
        // not at all; it is read only if it was written.
        let info = unsafe {
            if libc::read(self.0.as_raw_fd(), info.as_mut_ptr().cast(), size) != size as isize {
                let error = io::Error::last_os_error();
                return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
            }
            info.assume_init()
        };
        Ok(Some(info.ssi_signo as i32))
    }
}

impl AsFd for SignalFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for SignalFd {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// Makes the kernel kill this process when its parent exits.
pub fn end_with_parent() -> io::Result<()> {
    // SAFETY: the call sets a property of this process, and accesses no memory.
    match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn mask(how: i32, set: &libc::sigset_t) -> io::Result<()> {
    // SAFETY: pthread_sigmask only reads the set, and does not return the old one.
    match unsafe { libc::pthread_sigmask(how, set, ptr::null_mut()) } {
        0 => Ok(()),
        error => Err(io::Error::from_raw_os_error(error)),
    }
}

/// A borrowed descriptor of `epoll`, to be watched by another one.
pub fn epoll_fd(epoll: &Epoll) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `epoll`, and stays open while that is borrowed.
    unsafe { BorrowedFd::borrow_raw(epoll.as_raw_fd()) }
}

/// A borrowed descriptor of `event`.
pub fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor belongs to `event`, and stays open while that is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Fills `buffer` with random bytes (getrandom(2)); blocks only early after the host has booted.
pub fn getrandom(buffer: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: pointer and length are those of an exclusively borrowed slice.
        let count = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(count) {
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Options for files in a machine's directory: accessible only to the owner, regardless of the umask, since they
/// contain environment variables and output.
pub fn private_file() -> OpenOptions {
    let mut options = File::options();
    options.mode(0o600);
    options
}

/// Creates an unnamed file in memory (memfd_create(2)).
pub fn memory_file(name: &CStr) -> io::Result<File> {
    // SAFETY: memfd_create only reads the name; the descriptor it returns is new and has no other owner.
    unsafe {
        let fd = libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(File::from_raw_fd(fd))
    }
}

/// Raises the limit of open files to the maximum (setrlimit(2)): a test holds both ends of its connections.
#[cfg(test)]
pub fn allow_many_files() -> io::Result<()> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the calls access only the structure passed to them.
    let results = unsafe {
        let read = libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit);
        limit.rlim_cur = limit.rlim_max;
        [read, libc::setrlimit(libc::RLIMIT_NOFILE, &limit)]
    };
    if results == [0, 0] { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_not_delivered_after_the_last_read() {
        // By default it kills the process.
        let signals = SignalFd::block(&[libc::SIGUSR2]).unwrap();
        // SAFETY: raise accesses no memory.
        let raise = || assert_eq!(unsafe { libc::raise(libc::SIGUSR2) }, 0);
        raise();
        drop(signals);
        raise();
    }
}
