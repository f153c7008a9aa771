//! Splits this process in two: a copy gets some of its files, and namespaces of its own.
#![allow(unsafe_code)]

use std::fs;
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::RawFd;
use std::os::unix::fs::MetadataExt;
use std::ptr;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process, waitpid};

const PAGE_BYTES: usize = 4096;

/// The process in which [`split`] has returned.
#[derive(Debug)]
pub enum Split<T> {
    /// The original one, with the ID of the copy.
    Parent(u32),
    /// The copy, with what was given to it.
    Child(T),
}

/// The files of the two processes after [`split`].
#[derive(Debug, Default)]
pub struct Files {
    /// Those that move to the copy with what it is given.
    pub given: Vec<RawFd>,
    /// Those that both keep.
    pub shared: Vec<RawFd>,
}

/// Copies this process (clone(2)). The copy gets `given` with its files, the standard streams, and the namespaces in `flags`
/// (CLONE_NEWUSER, CLONE_NEWPID, ...). All of its other files are closed, so it must not return to code that owns some, and
/// it must not wait for locks that other threads of this process may hold. Its end is signaled with SIGCHLD.
///
/// After a failure `given` is returned.
pub fn split<T>(flags: i32, given: T, files: &Files) -> Result<Split<T>, (T, io::Error)> {
    let copied = match threads() {
        Ok(1) => clone(flags),
        Ok(_) => clone_twice(flags),
        Err(error) => Err(error),
    };
    match copied {
        Err(error) => Err((given, error)),
        Ok(0) => {
            copy_pages();
            match close_all_but(files) {
                Ok(()) => Ok(Split::Child(given)),
                // Nothing here may be dropped.
                Err(_) => exit_now(1),
            }
        }
        Ok(pid) => {
            mem::forget(given);
            for fd in &files.given {
                // SAFETY: its owner was just given up, and is never dropped.
                unsafe { libc::close(*fd) };
            }
            Ok(Split::Parent(pid))
        }
    }
}

/// Returns the ID of the copy, or 0 in the copy.
fn clone(flags: i32) -> io::Result<u32> {
    // SAFETY: without CLONE_VM both processes continue with a stack and memory of their own. No pointer is passed.
    let pid = unsafe { libc::syscall(libc::SYS_clone, libc::c_long::from(flags | libc::SIGCHLD), 0, 0, 0, 0) };
    u32::try_from(pid).map_err(|_| io::Error::last_os_error())
}

/// The same for a process with other threads, one of which may hold a lock of the allocator that nobody would release in the
/// copy. Unlike clone(2), fork(3) takes care of those, so the copy of a copy is made.
fn clone_twice(flags: i32) -> io::Result<u32> {
    let (mut reader, mut writer) = io::pipe()?;
    // SAFETY: the copy only makes system calls, and returns only in its own copy.
    match unsafe { libc::fork() } {
        0 => match clone(flags | libc::CLONE_PARENT) {
            Ok(0) => Ok(0),
            copied => {
                let pid = copied.map_or_else(|error| -error.raw_os_error().unwrap_or(libc::EIO), |pid| pid as i32);
                let _ = writer.write_all(&pid.to_ne_bytes());
                exit_now(0)
            }
        },
        pid if pid > 0 => {
            drop(writer);
            let mut copied = [0; 4];
            let received = reader.read_exact(&mut copied);
            // SAFETY: the process is a child that nobody else waits for.
            while unsafe { libc::waitpid(pid, ptr::null_mut(), 0) } < 0
                && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
            {}
            received?;
            let copied = i32::from_ne_bytes(copied);
            u32::try_from(copied).map_err(|_| io::Error::from_raw_os_error(-copied))
        }
        _ => Err(io::Error::last_os_error()),
    }
}

/// The number of threads of this process: each has a directory.
fn threads() -> io::Result<u64> {
    Ok(fs::metadata("/proc/self/task")?.nlink().saturating_sub(2))
}

/// Makes own copies of the pages that this process, a copy, is about to write: its variables, its heap and the end of its
/// stack. Each would otherwise be copied at a page fault, which costs ten times as much.
fn copy_pages() {
    unsafe extern "C" {
        /// The start and the end of the program's variables (ld(1)).
        static __data_start: u8;
        static _end: u8;
    }
    /// The part of the stack in use, and what calls need.
    const STACK_BYTES: usize = 4 * PAGE_BYTES;
    // SAFETY: the calls return numbers, and access no memory of ours.
    let (heap_end, heap_bytes) = unsafe { (libc::sbrk(0) as usize, libc::mallinfo2().arena) };
    let (data, data_end) = (&raw const __data_start as usize, &raw const _end as usize);
    let here = &raw const heap_end as usize;
    let ranges =
        [data..data_end, heap_end.saturating_sub(heap_bytes)..heap_end, here - STACK_BYTES..here + STACK_BYTES];
    for range in ranges {
        let start = range.start / PAGE_BYTES * PAGE_BYTES;
        let len_bytes = range.end.next_multiple_of(PAGE_BYTES) - start;
        // SAFETY: it changes no content, and fails if a part is not mapped (madvise(2), MADV_POPULATE_WRITE, since Linux
        // 5.14). The pages are then copied when they are written.
        unsafe { libc::madvise(start as *mut libc::c_void, len_bytes, libc::MADV_POPULATE_WRITE) };
    }
}

fn close_all_but(files: &Files) -> io::Result<()> {
    let mut kept: Vec<u32> = files.given.iter().chain(&files.shared).filter_map(|fd| u32::try_from(*fd).ok()).collect();
    kept.sort_unstable();
    let mut first = 3;
    for fd in kept.into_iter().chain([u32::MAX]) {
        if fd > first {
            // SAFETY: the caller does not return to the owners of these files. The call accesses no memory.
            if unsafe { libc::syscall(libc::SYS_close_range, first, fd - 1, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = first.max(fd.saturating_add(1));
    }
    Ok(())
}

/// Kills a copy that was not waited for.
pub fn kill(pid: u32) {
    let _ = to_pid(pid).map(|pid| kill_process(pid, Signal::KILL));
}

/// Waits for the end of a copy. `None` if it was waited for before.
pub fn wait(pid: u32) -> Option<WaitStatus> {
    let pid = to_pid(pid)?;
    loop {
        match waitpid(Some(pid), WaitOptions::empty()) {
            Err(rustix::io::Errno::INTR) => {}
            waited => return waited.ok().flatten().map(|(_, status)| status),
        }
    }
}

fn to_pid(pid: u32) -> Option<Pid> {
    i32::try_from(pid).ok().and_then(Pid::from_raw)
}

/// Ends the process with `code`, without running destructors or exit handlers.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: the process ends.
    unsafe { libc::_exit(code) }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// The test's process has several threads.
    #[test]
    fn a_copy_has_what_it_is_given_and_nothing_else() {
        let (mut ours, theirs) = UnixStream::pair().unwrap();
        let secret = File::open("/proc/self/status").unwrap();
        let (given_fd, secret_fd) = (theirs.as_raw_fd(), secret.as_raw_fd());
        let files = Files { given: vec![given_fd], shared: Vec::new() };
        let pid = match split(0, theirs, &files).map_err(|(_, error)| error).unwrap() {
            Split::Parent(pid) => pid,
            Split::Child(mut theirs) => {
                // SAFETY: the call accesses no memory.
                let is_open = unsafe { libc::fcntl(secret_fd, libc::F_GETFD) } >= 0;
                let _ = theirs.write_all(&[u8::from(is_open)]);
                exit_now(7)
            }
        };
        let mut is_open = Vec::new();
        ours.read_to_end(&mut is_open).unwrap();
        assert_eq!(is_open, [0]);
        let mut status = 0;
        // SAFETY: the call writes the status.
        assert_eq!(unsafe { libc::waitpid(pid as i32, &mut status, 0) }, pid as i32);
        assert_eq!(libc::WEXITSTATUS(status), 7);
        drop(secret);
    }
}
