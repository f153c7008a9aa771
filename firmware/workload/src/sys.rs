//! System calls without a library wrapper, or with requirements beyond types, each as a safe function.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

use nix::unistd::{ForkResult, Pid};

/// Anonymous memory, populated on first access.
pub struct Pages {
    start: NonNull<u8>,
    len: usize,
}

impl Pages {
    /// Maps `len` bytes, which must not be zero.
    pub fn map(len: usize) -> io::Result<Pages> {
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: the kernel chooses an unused address.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, access, kind, -1, 0) };
        match NonNull::new(start.cast::<u8>()) {
            Some(pages) if start != libc::MAP_FAILED => Ok(Pages { start: pages, len }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Disables transparent huge pages. A kernel without them needs no change.
    pub fn refuse_huge_pages(&mut self) {
        // SAFETY: the range is this mapping, and the advice preserves its content.
        unsafe { libc::madvise(self.start.as_ptr().cast(), self.len, libc::MADV_NOHUGEPAGE) };
    }
}

impl Deref for Pages {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the mapping has `len` readable bytes, initially zero, as long as `self` exists.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl DerefMut for Pages {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for reading, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: this is the whole mapping, and nothing is borrowed from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// getppid(2) as a raw system call, which bypasses any cache in the library.
pub fn ask_for_parent() {
    // SAFETY: the call has no argument and accesses no memory.
    unsafe { libc::syscall(libc::SYS_getppid) };
}

/// fork(2). The child runs `body`, which may use only async-signal-safe functions, since other threads may have held
/// locks. It exits with the returned code.
pub fn fork(body: impl FnOnce() -> i32) -> nix::Result<Pid> {
    // SAFETY: the child only makes system calls and exits by one, as `body` guarantees.
    match unsafe { nix::unistd::fork() }? {
        ForkResult::Parent { child } => Ok(child),
        ForkResult::Child => {
            let code = body();
            // SAFETY: the call only ends the process.
            unsafe { libc::_exit(code) }
        }
    }
}

/// More than the number of arguments of any program started here, with the terminating null pointer.
const ARGS_MAX: usize = 8;

/// execv(2) without allocating. Returns a shell's exit code for a program that cannot be executed.
pub fn exec(program: &CStr, args: &[&CStr]) -> i32 {
    let mut pointers = [std::ptr::null(); ARGS_MAX + 1];
    for (pointer, arg) in pointers.iter_mut().take(ARGS_MAX).zip(args) {
        *pointer = arg.as_ptr();
    }
    // SAFETY: the strings and their null-terminated array outlive the call.
    unsafe { libc::execv(program.as_ptr(), pointers.as_ptr()) };
    127
}
