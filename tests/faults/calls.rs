//! The system calls of husk that can fail, with the errors that their manual pages list and a host can produce.

use libc::*;
use nix::errno::Errno;

use crate::tracer::{Call, EVENT_BYTES, Fault};

/// A call's number, name and errors. Whatever is not listed cannot fail if its arguments are valid. Sockets are pairs: their
/// other end is not lost without the process that has it.
const KNOWN: &[(c_long, &str, &[i32])] = &[
    (SYS_accept4, "accept4", &[EMFILE, ECONNABORTED]),
    (SYS_bind, "bind", &[EACCES, ENOSPC]),
    (SYS_capset, "capset", &[EPERM]),
    (SYS_chdir, "chdir", &[EACCES]),
    (SYS_chroot, "chroot", &[EPERM]),
    (SYS_clone, "clone", &[EAGAIN, ENOMEM, EPERM]),
    (SYS_clone3, "clone3", &[EAGAIN, ENOMEM]),
    (SYS_close_range, "close_range", &[ENOMEM]),
    (SYS_dup, "dup", &[EMFILE]),
    (SYS_dup2, "dup2", &[EINTR]),
    (SYS_dup3, "dup3", &[EINTR]),
    (SYS_epoll_create1, "epoll_create1", &[EMFILE, ENOMEM]),
    (SYS_epoll_ctl, "epoll_ctl", &[ENOMEM, ENOSPC]),
    (SYS_epoll_wait, "epoll_wait", &[EINTR]),
    (SYS_eventfd2, "eventfd2", &[EMFILE, ENOMEM]),
    (SYS_fallocate, "fallocate", &[EINTR, ENOSPC, EOPNOTSUPP]),
    (SYS_fchmod, "fchmod", &[EIO]),
    (SYS_fcntl, "fcntl", &[EMFILE]),
    (SYS_fdatasync, "fdatasync", &[EIO, ENOSPC, EINTR]),
    (SYS_flock, "flock", &[EINTR, ENOLCK]),
    (SYS_fstat, "fstat", &[EIO]),
    (SYS_ftruncate, "ftruncate", &[EIO, EINTR]),
    (SYS_futex, "futex", &[EINTR, EAGAIN]),
    (SYS_getdents64, "getdents64", &[EIO]),
    (SYS_io_uring_enter, "io_uring_enter", &[EAGAIN, EBUSY, EINTR]),
    (SYS_io_uring_register, "io_uring_register", &[ENOMEM]),
    (SYS_io_uring_setup, "io_uring_setup", &[EMFILE, ENOMEM, EPERM]),
    (SYS_ioctl, "ioctl", &[EFAULT, EINTR, ENOMEM]),
    (SYS_landlock_create_ruleset, "landlock_create_ruleset", &[EOPNOTSUPP, ENOMEM]),
    (SYS_landlock_restrict_self, "landlock_restrict_self", &[EPERM]),
    (SYS_listen, "listen", &[EADDRINUSE]),
    (SYS_lseek, "lseek", &[EIO]),
    (SYS_madvise, "madvise", &[EAGAIN, ENOMEM]),
    (SYS_memfd_create, "memfd_create", &[EMFILE, ENOMEM]),
    (SYS_mkdir, "mkdir", &[EACCES, ENOSPC]),
    (SYS_mmap, "mmap", &[ENOMEM]),
    (SYS_mount, "mount", &[EPERM, ENOMEM]),
    (SYS_mremap, "mremap", &[ENOMEM]),
    (SYS_newfstatat, "newfstatat", &[EIO]),
    (SYS_openat, "openat", &[EACCES, EMFILE, ENOSPC]),
    (SYS_pipe2, "pipe2", &[EMFILE]),
    (SYS_poll, "poll", &[EINTR, ENOMEM]),
    (SYS_ppoll, "ppoll", &[EINTR, ENOMEM]),
    (SYS_prctl, "prctl", &[EPERM]),
    (SYS_pread64, "pread64", &[EINTR, EIO]),
    (SYS_preadv, "preadv", &[EINTR, EIO]),
    (SYS_preadv2, "preadv2", &[EAGAIN, EIO]),
    (SYS_pwrite64, "pwrite64", &[EINTR, EIO, ENOSPC]),
    (SYS_pwritev, "pwritev", &[EINTR, EIO, ENOSPC]),
    (SYS_pwritev2, "pwritev2", &[EAGAIN, EIO, ENOSPC]),
    (SYS_read, "read", &[EINTR, EIO]),
    (SYS_readlink, "readlink", &[EIO]),
    (SYS_recvfrom, "recvfrom", &[EINTR, ENOMEM]),
    (SYS_recvmsg, "recvmsg", &[EINTR, ENOMEM]),
    (SYS_rename, "rename", &[EIO, ENOSPC]),
    (SYS_rmdir, "rmdir", &[EIO]),
    (SYS_seccomp, "seccomp", &[ENOMEM, EPERM]),
    (SYS_sendmsg, "sendmsg", &[EINTR, ENOBUFS]),
    (SYS_sendto, "sendto", &[EINTR, ENOBUFS]),
    (SYS_setgroups, "setgroups", &[EPERM]),
    (SYS_setns, "setns", &[EPERM]),
    (SYS_setresgid, "setresgid", &[EPERM]),
    (SYS_setresuid, "setresuid", &[EAGAIN, EPERM]),
    (SYS_setsid, "setsid", &[EPERM]),
    (SYS_signalfd4, "signalfd4", &[EMFILE, ENOMEM]),
    (SYS_socket, "socket", &[EMFILE]),
    (SYS_socketpair, "socketpair", &[EMFILE]),
    (SYS_statx, "statx", &[EIO]),
    (SYS_timerfd_create, "timerfd_create", &[EMFILE, ENOMEM]),
    (SYS_unlink, "unlink", &[EIO]),
    (SYS_unlinkat, "unlinkat", &[EIO]),
    (SYS_unshare, "unshare", &[ENOSPC, EPERM]),
    (SYS_write, "write", &[EINTR, EIO, ENOSPC]),
    (SYS_writev, "writev", &[EINTR, EIO, ENOSPC]),
];

/// Those that transfer as many bytes as their third argument says, or fewer.
const PARTIAL: [c_long; 4] = [SYS_read, SYS_write, SYS_pread64, SYS_pwrite64];

/// What can happen to `call`.
pub fn faults_of(call: &Call) -> Vec<Fault> {
    let is_wait = [FUTEX_WAIT, FUTEX_WAIT_BITSET].contains(&(call.request as i32));
    let wakes = call.number == SYS_futex && !is_wait || call.number == SYS_write && call.request == EVENT_BYTES;
    // They cannot fail.
    if wakes {
        return Vec::new();
    }
    let known = KNOWN.iter().find(|(number, ..)| *number == call.number);
    let errors = known.into_iter().flat_map(|(.., errors)| *errors);
    let errors = errors.map(|error| Fault::Error(Errno::from_raw(*error)));
    errors.chain(PARTIAL.contains(&call.number).then_some(Fault::Half)).collect()
}

/// How a person would write `call`.
pub fn describe(call: &Call) -> String {
    let known = KNOWN.iter().find(|(number, ..)| *number == call.number);
    let name = known.map_or_else(|| format!("call {}", call.number), |(_, name, _)| (*name).to_owned());
    let request = if call.request == 0 { String::new() } else { format!("({:#x})", call.request) };
    format!("{name}{request} of {}", call.thread)
}
