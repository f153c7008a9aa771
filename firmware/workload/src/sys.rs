//! The system calls that no library wraps, or that need more care than a type can say, each behind a safe function.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use nix::unistd::{ForkResult, Pid};

/// Memory of whole pages, which are not there before they are touched.
pub struct Pages {
    start: NonNull<u8>,
    len: usize,
}

impl Pages {
    /// Maps `len` bytes, of which there is more than none.
    pub fn map(len: usize) -> io::Result<Pages> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the kernel chooses where there is nothing yet.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(pages) if start != libc::MAP_FAILED => Ok(Pages { start: pages, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Has each page be there on its own. A kernel without huge pages has no need of that.
    pub fn refuse_huge_pages(&mut self) {
        // SAFETY: the range is ours, and the advice leaves what is in it.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_NOHUGEPAGE) };
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has `len` readable bytes, zero at first, as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for reading, and `self` is borrowed by nobody else.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours as a whole, and nobody has borrowed of it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// getppid(2), by the call itself: a library may know the answer.
pub fn ask_for_parent() {
    // SAFETY: the call has no argument and touches no memory.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

/// fork(2). The child does `body`, which may only use what is safe in a signal handler, since other threads may have held
/// locks: system calls. It ends with the code that is returned.
pub fn fork(body: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: the child does nothing but system calls and ends by one, as `body` promises.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = body();
            // SAFETY: the call ends the process, and does nothing before.
            unsafe { libc::_exit(code) }
        }
    }
}

/// More words than any program here is started with, and the null pointer behind them.
const ARGS_MAX: usize = 8;

/// execv(2), with no memory allocated. Returns a shell's code for a program that cannot be started.
pub fn exec(program: &CStr, args: &[&CStr]) -> i32 {
    let mut pointers = [std::ptr::null(); ARGS_MAX + 1];
    for (pointer, arg) in pointers.iter_mut().take(ARGS_MAX).zip(args) {
        *pointer = arg.as_ptr();
    }
    // SAFETY: the strings and their array, which a null pointer ends, live as long as the call.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    127
}
