//! The system calls that each kind of thread of a confined process may make, by caller. Arguments are checked where that
//! narrows the call.

use libc::{
    PROT_EXEC, SYS_accept4, SYS_brk, SYS_capget, SYS_capset, SYS_clock_gettime, SYS_clock_nanosleep, SYS_clone,
    SYS_clone3, SYS_close, SYS_connect, SYS_copy_file_range, SYS_dup, SYS_epoll_ctl, SYS_epoll_wait, SYS_eventfd2,
    SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fchmodat, SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_fstat,
    SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_getdents64, SYS_getpeername, SYS_getpid, SYS_getrandom,
    SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_getxattr, SYS_io_uring_enter, SYS_io_uring_register, SYS_ioctl,
    SYS_linkat, SYS_listxattr, SYS_lseek, SYS_madvise, SYS_mkdirat, SYS_mknodat, SYS_mmap, SYS_mprotect, SYS_mremap,
    SYS_munmap, SYS_newfstatat, SYS_openat, SYS_openat2, SYS_poll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_preadv2,
    SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read, SYS_readlinkat, SYS_readv, SYS_recvfrom, SYS_recvmsg,
    SYS_removexattr, SYS_renameat, SYS_renameat2, SYS_restart_syscall, SYS_rseq, SYS_rt_sigprocmask, SYS_rt_sigreturn,
    SYS_sched_getaffinity, SYS_sched_yield, SYS_sendmsg, SYS_sendto, SYS_set_robust_list, SYS_setfsgid, SYS_setfsuid,
    SYS_setsockopt, SYS_setxattr, SYS_shutdown, SYS_sigaltstack, SYS_socket, SYS_statx, SYS_symlinkat, SYS_syncfs,
    SYS_tgkill, SYS_timerfd_settime, SYS_umask, SYS_unlinkat, SYS_utimensat, SYS_write, SYS_writev,
};

use super::ThreadRole;
use super::requests::{kvm, vhost};
use crate::sys::uring::UNREGISTER_FILES;

/// A condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Argument {
    /// It has this 32-bit value.
    Is(u8, u32),
    /// It has none of these bits.
    Lacks(u8, u32),
    /// It has this bit.
    Has(u8, u32),
    /// It has this value without the bits of a mask: `(index, mask, value)`.
    IsBut(u8, u32, u32),
    /// It is the ID of this process.
    IsThisProcess(u8),
}

/// An allowed call: if one of the conditions holds, or there are none; or if all of a set of conditions hold.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// The conditions.
    pub arguments: &'static [Argument],
    /// Whether all of them must hold.
    pub needs_all: bool,
}

const fn any(number: i64) -> Call {
    Call { number, arguments: &[], needs_all: false }
}

const fn only(number: i64, arguments: &'static [Argument]) -> Call {
    Call { number, arguments, needs_all: false }
}

const fn all(number: i64, arguments: &'static [Argument]) -> Call {
    Call { number, arguments, needs_all: true }
}

/// A new TCP socket of this family (socket(2)).
const fn tcp(family: i32) -> [Argument; 3] {
    let flags = (libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u32;
    [
        Argument::Is(0, family as u32),
        Argument::IsBut(1, flags, libc::SOCK_STREAM as u32),
        Argument::IsBut(2, libc::IPPROTO_TCP as u32, 0),
    ]
}

/// The second argument of ioctl(2).
const fn request(number: u32) -> Argument {
    Argument::Is(1, number)
}

const NOT_EXECUTABLE: &[Argument] = &[Argument::Lacks(2, PROT_EXEC as u32)];

/// Every thread: the allocator, locks, clocks, signals, the end of threads and processes, and messages to the supervisor.
const COMMON: &[Call] = &[
    any(SYS_read),
    any(SYS_write),
    any(SYS_close),
    only(SYS_mmap, NOT_EXECUTABLE),
    only(SYS_mprotect, NOT_EXECUTABLE),
    any(SYS_munmap),
    any(SYS_mremap),
    any(SYS_madvise),
    any(SYS_brk),
    any(SYS_futex),
    // std: channels.
    any(SYS_sched_yield),
    // std: the time where the vDSO has no clock.
    any(SYS_clock_gettime),
    any(SYS_rt_sigreturn),
    any(SYS_rt_sigprocmask),
    // std: the end of a thread.
    any(SYS_sigaltstack),
    any(SYS_exit),
    any(SYS_exit_group),
    any(SYS_restart_syscall),
    any(SYS_getpid),
    any(SYS_gettid),
    // vcpu: kicks; abort(3).
    only(SYS_tgkill, &[Argument::IsThisProcess(0)]),
    // monitor: events and log lines.
    any(SYS_sendto),
    // std: random keys of hash maps; virtio: the entropy device.
    any(SYS_getrandom),
    // virtio: queues get copies of their events; std: whether a descriptor is open, in debug builds.
    only(SYS_fcntl, &[Argument::Is(1, libc::F_DUPFD_CLOEXEC as u32), Argument::Is(1, libc::F_GETFD as u32)]),
    // sys/violation.rs: the name of the thread.
    only(SYS_prctl, &[Argument::Is(0, libc::PR_GET_NAME as u32)]),
];

/// The supervisor's calls, and the end of the machine.
const MAIN: &[Call] = &[
    any(SYS_recvfrom),
    any(SYS_epoll_wait),
    any(SYS_clock_nanosleep),
    // virtio: workers are told of new limits, link states and requests for statistics.
    any(SYS_timerfd_settime),
    // backend/net/tap.rs: the kernel's counters of a tap device; memory/save.rs: pages in use.
    any(SYS_pread64),
    // monitor: a machine is saved to files that the supervisor sends.
    any(SYS_recvmsg),
    any(SYS_ftruncate),
    any(SYS_pwrite64),
    only(SYS_ioctl, &[request(kvm::GET_MSR_INDEX_LIST), request(kvm::GET_IRQCHIP), request(kvm::GET_CLOCK)]),
];

/// The kernel image and the initrd are read, and KVM is asked for its CPUID.
const LOADER: &[Call] = &[
    any(SYS_pread64),
    any(SYS_preadv),
    any(SYS_readv),
    any(SYS_lseek),
    any(SYS_fstat),
    any(SYS_statx),
    // std: reading a whole file.
    any(SYS_fcntl),
    any(SYS_dup),
    only(SYS_ioctl, &[request(kvm::GET_SUPPORTED_CPUID)]),
];

/// The guest, and what its accesses to registers lead to.
const VCPU: &[Call] = &[
    only(
        SYS_ioctl,
        &[
            request(kvm::RUN),
            // After a pause, for the guest's watchdogs.
            request(kvm::KVMCLOCK_CTRL),
            // The reason of a triple fault.
            request(kvm::GET_REGS),
            request(kvm::GET_SREGS),
            // The rest of its state.
            request(kvm::GET_MSRS),
            request(kvm::GET_LAPIC),
            request(kvm::GET_CPUID2),
            request(kvm::GET_MP_STATE),
            request(kvm::GET_VCPU_EVENTS),
            request(kvm::GET_DEBUGREGS),
            request(kvm::GET_TSC_KHZ),
            request(kvm::GET_XSAVE),
            request(kvm::GET_XCRS),
            request(kvm::GET_DEVICE_ATTR),
            request(kvm::GET_NESTED_STATE),
            // pci: MSI-X tables and moved BARs.
            request(kvm::IRQFD),
            request(kvm::IOEVENTFD),
            request(kvm::SET_GSI_ROUTING),
        ],
    ),
    // virtio: a worker that is asked to stop; rate limits.
    any(SYS_timerfd_settime),
    any(SYS_clock_nanosleep),
];

/// Queues of any device with all back ends.
const WORKER: &[Call] = &[
    any(SYS_epoll_wait),
    any(SYS_epoll_ctl),
    // backend/rate.rs, virtio/net: limits and announcements.
    any(SYS_timerfd_settime),
    // backend/disk.
    any(SYS_pread64),
    any(SYS_pwrite64),
    any(SYS_preadv),
    any(SYS_pwritev),
    any(SYS_preadv2),
    any(SYS_pwritev2),
    any(SYS_fdatasync),
    any(SYS_fallocate),
    any(SYS_ftruncate),
    any(SYS_lseek),
    // sys/uring.rs: rings are used and dropped, but were created before.
    any(SYS_io_uring_enter),
    only(SYS_io_uring_register, &[Argument::Is(1, UNREGISTER_FILES as u32)]),
    any(SYS_eventfd2),
    // backend/net, virtio/vsock: streams, and the attendant's answers.
    any(SYS_writev),
    any(SYS_sendmsg),
    any(SYS_recvmsg),
    any(SYS_recvfrom),
    any(SYS_accept4),
    any(SYS_shutdown),
    any(SYS_setsockopt),
    only(
        SYS_ioctl,
        &[
            request(BLKDISCARD),
            request(BLKZEROOUT),
            request(TUNSETOFFLOAD),
            request(TUNSETQUEUE),
            // std: nonblocking sockets.
            request(libc::FIONBIO as u32),
            request(vhost::GET_FEATURES),
            request(vhost::SET_FEATURES),
            request(vhost::SET_OWNER),
            request(vhost::SET_MEM_TABLE),
            request(vhost::SET_VRING_NUM),
            request(vhost::SET_VRING_ADDR),
            request(vhost::SET_VRING_BASE),
            request(vhost::GET_VRING_BASE),
            request(vhost::SET_VRING_KICK),
            request(vhost::SET_VRING_CALL),
            request(vhost::SET_VRING_ERR),
            request(vhost::NET_SET_BACKEND),
        ],
    ),
];

/// The serial port's output.
const CONSOLE: &[Call] = &[any(SYS_writev), any(SYS_poll)];

/// A process that reads foreign data for another one: the link to it, threads of its own, and files that are read and
/// written.
const TASK: &[Call] = &[
    any(SYS_recvmsg),
    // std: starting a thread, as the C library does without clone3(2), whose flags no filter sees.
    only(SYS_clone, &[Argument::Has(0, libc::CLONE_THREAD as u32)]),
    any(SYS_set_robust_list),
    any(SYS_rseq),
    any(SYS_sched_getaffinity),
    only(SYS_prctl, &[Argument::Is(0, libc::PR_SET_NAME as u32)]),
    any(SYS_pread64),
    any(SYS_pwrite64),
    any(SYS_lseek),
    any(SYS_fstat),
    any(SYS_statx),
    any(SYS_ftruncate),
    // image/erofs: space of content that a later layer hides.
    any(SYS_fallocate),
];

/// Connections to registries.
const DOWNLOADER: &[Call] = &[
    all(SYS_socket, &tcp(libc::AF_INET)),
    all(SYS_socket, &tcp(libc::AF_INET6)),
    any(SYS_connect),
    any(SYS_getsockopt),
    // ureq: no delay; std: timeouts.
    all(SYS_setsockopt, &[Argument::Is(1, libc::IPPROTO_TCP as u32), Argument::Is(2, libc::TCP_NODELAY as u32)]),
    all(SYS_setsockopt, &[Argument::Is(1, libc::SOL_SOCKET as u32), Argument::Is(2, libc::SO_RCVTIMEO as u32)]),
    all(SYS_setsockopt, &[Argument::Is(1, libc::SOL_SOCKET as u32), Argument::Is(2, libc::SO_SNDTIMEO as u32)]),
    any(SYS_getpeername),
    any(SYS_getsockname),
    any(SYS_recvfrom),
    any(SYS_shutdown),
    any(SYS_poll),
    only(SYS_ioctl, &[request(libc::FIONBIO as u32)]),
    // image/registry: pauses before another attempt, and progress.
    any(SYS_clock_nanosleep),
];

/// linux/fs.h and linux/if_tun.h.
const BLKDISCARD: u32 = 0x1277;
const BLKZEROOUT: u32 = 0x127f;
const TUNSETQUEUE: u32 = 0x4004_54d9;
const TUNSETOFFLOAD: u32 = 0x4004_54d0;

/// A process that serves a folder: its files, by descriptors and names. `open_by_handle_at`, mounts and sockets are not among
/// them. Its root directory and Landlock decide where names lead.
const SHARE: &[Call] = &[
    any(SYS_recvfrom),
    any(SYS_openat2),
    any(SYS_openat),
    any(SYS_statx),
    any(SYS_newfstatat),
    any(SYS_fstat),
    any(SYS_fstatfs),
    any(SYS_readlinkat),
    any(SYS_getdents64),
    any(SYS_mkdirat),
    // Devices are refused before, and by the user namespace.
    any(SYS_mknodat),
    any(SYS_symlinkat),
    any(SYS_linkat),
    any(SYS_unlinkat),
    any(SYS_renameat2),
    any(SYS_renameat),
    any(SYS_fchmodat),
    any(SYS_fchownat),
    any(SYS_utimensat),
    any(SYS_ftruncate),
    any(SYS_fallocate),
    any(SYS_pread64),
    any(SYS_preadv),
    any(SYS_pwrite64),
    any(SYS_pwritev),
    any(SYS_pwritev2),
    any(SYS_copy_file_range),
    any(SYS_lseek),
    any(SYS_fsync),
    any(SYS_fdatasync),
    any(SYS_syncfs),
    any(SYS_getxattr),
    any(SYS_setxattr),
    any(SYS_listxattr),
    any(SYS_removexattr),
    // The identity of the guest's user.
    any(SYS_umask),
    any(SYS_setfsuid),
    any(SYS_setfsgid),
    any(SYS_capget),
    any(SYS_capset),
];

/// The calls that threads of `role` may make.
pub fn calls(role: ThreadRole) -> impl Iterator<Item = &'static Call> {
    let shared = if starts_threads(role) { TASK } else { &[] };
    let own = match role {
        ThreadRole::Unpacker => &[],
        ThreadRole::Downloader => DOWNLOADER,
        ThreadRole::Share => SHARE,
        ThreadRole::Main => MAIN,
        ThreadRole::Loader => LOADER,
        ThreadRole::Vcpu => VCPU,
        ThreadRole::Worker => WORKER,
        ThreadRole::Console => CONSOLE,
    };
    COMMON.iter().chain(shared).chain(own)
}

/// The calls that fail with ENOSYS, so that the C library makes others.
pub fn unsupported(role: ThreadRole) -> &'static [i64] {
    if starts_threads(role) { &[SYS_clone3] } else { &[] }
}

fn starts_threads(role: ThreadRole) -> bool {
    matches!(role, ThreadRole::Unpacker | ThreadRole::Downloader)
}
