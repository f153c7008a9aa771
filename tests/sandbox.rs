//! Compromised processes: threads of each kind, confined as in a monitor or in a process that reads an image, try to get what
//! they must not have. Each attempt is made with system call filters, which end the process, and without, so that the other
//! layers must stop it.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::net::TcpListener;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::Path;
use std::ptr;
use std::sync::Arc;

use husk::memory::GuestBuffers;
use husk::sandbox::task::{self, Confined};
use husk::sandbox::{self, Confinement, Layers, ThreadRole};
use husk::sys::fork::{self, Files, Split};
use husk::sys::uring::Ring;
use husk::sys::violation::Report;
use husk::sys::{event, socket};
use io_uring::{IoUring, Parameters, opcode, squeue, types};
use rustix::fs::MemfdFlags;

const ROLES: [ThreadRole; 7] = [
    ThreadRole::Main,
    ThreadRole::Loader,
    ThreadRole::Vcpu,
    ThreadRole::Worker,
    ThreadRole::Console,
    ThreadRole::Unpacker,
    ThreadRole::Downloader,
];

/// What an attempt has come to.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// The filter ended the process because of this call.
    Stopped(u32),
    /// The call failed with this error.
    Failed(i32),
    /// It did what it should not.
    Succeeded,
}

/// Whether this host allows all layers beside filters; prints a visible message if not.
fn has_all_layers() -> bool {
    let lacks = sandbox::probe().unwrap();
    if !lacks.is_empty() {
        eprintln!("SKIPPED: this host does not allow all layers of the sandbox: {}", lacks.join("; "));
    }
    lacks.is_empty()
}

/// Calls `act` on a thread of this role in a confined process, with filters or without.
fn attempt(role: ThreadRole, has_filters: bool, act: impl Fn() -> i64 + Send + 'static) -> Outcome {
    attempt_with(role, has_filters, || (), move |()| act())
}

/// The same, with what `prepare` creates before the process is confined.
fn attempt_with<T: Send + 'static>(
    role: ThreadRole,
    has_filters: bool,
    prepare: impl FnOnce() -> T,
    act: impl FnOnce(T) -> i64 + Send + 'static,
) -> Outcome {
    let (ours, theirs) = socket::message_pair().unwrap();
    let layers = Layers::new(true);
    let layers = if role == ThreadRole::Downloader { layers.with_network() } else { layers };
    let files = Files { given: vec![theirs.as_raw_fd()], shared: Vec::new() };
    match layers.split((theirs, prepare, act), &files).unwrap() {
        (Split::Child((theirs, prepare, act)), _) => {
            let code = confine_and_act(role, has_filters, &theirs, layers, prepare, act);
            let _ = theirs.send(&code.unwrap_or(-libc::EBADE).to_le_bytes());
            fork::exit_now(0)
        }
        (Split::Parent(pid), _) => {
            let mut packet = [0; 64];
            let len = ours.recv(&mut packet).unwrap();
            // SAFETY: the process is a child that nobody else waits for.
            unsafe { libc::waitpid(pid as i32, ptr::null_mut(), 0) };
            match (Report::parse(&packet[..len]), packet) {
                (Some(report), _) => {
                    assert_eq!(report.thread, "attacker");
                    Outcome::Stopped(report.call)
                }
                (None, [a, b, c, d, ..]) if len == 4 => match i32::from_le_bytes([a, b, c, d]) {
                    code if code < 0 => Outcome::Failed(-code),
                    _ => Outcome::Succeeded,
                },
                other => panic!("{other:?}"),
            }
        }
    }
}

fn confine_and_act<T: Send + 'static>(
    role: ThreadRole,
    has_filters: bool,
    report_to: &UnixDatagram,
    layers: Layers,
    prepare: impl FnOnce() -> T,
    act: impl FnOnce(T) -> i64 + Send + 'static,
) -> anyhow::Result<i32> {
    let confinement = Confinement::begin(layers, Vec::new())?;
    if has_filters {
        sandbox::enable_filters(report_to.as_raw_fd(), |reason| panic!("{reason}"))?;
    }
    let prepared = prepare();
    confinement.complete()?;
    let act = move || match act(prepared) {
        result if result < 0 => -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO),
        _ => 0,
    };
    let thread = sandbox::spawn_confined(role, "attacker", act)?;
    thread.join().map_err(|_| anyhow::anyhow!("it panicked"))
}

/// Asserts that the call is stopped by every filter, and by another layer with one of `errors`. Without errors only the
/// filters stop it.
#[track_caller]
fn assert_denied(call: i64, errors: &[i32], act: impl Fn() -> i64 + Clone + Send + 'static) {
    for role in ROLES {
        assert_eq!(attempt(role, true, act.clone()), Outcome::Stopped(call as u32), "{role:?}");
    }
    if !errors.is_empty() && has_all_layers() {
        for role in [ThreadRole::Worker, ThreadRole::Downloader] {
            match attempt(role, false, act.clone()) {
                Outcome::Failed(error) if errors.contains(&error) => {}
                other => panic!("{role:?} without filters: {other:?}"),
            }
        }
    }
}

fn path(path: impl AsRef<Path>) -> CString {
    CString::new(path.as_ref().as_os_str().as_bytes()).unwrap()
}

fn open(path: &CString) -> i64 {
    // SAFETY: the path ends with a NUL.
    unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), libc::O_RDONLY) }
}

/// A call whose arguments are numbers.
fn numbers(call: i64, arguments: [i64; 4]) -> impl Fn() -> i64 + Clone + Send + 'static {
    let [a, b, c, d] = arguments;
    // SAFETY: none of the calls made with this takes a pointer, except null pointers.
    move || unsafe { libc::syscall(call, a, b, c, d) }
}

#[test]
fn no_file_can_be_opened() {
    let machine = tempfile::tempdir().unwrap();
    fs::write(machine.path().join("record.json"), "{}").unwrap();
    let record = machine.path().join("record.json");
    for file in [Path::new("/etc/passwd"), Path::new("/"), Path::new("/proc/self/mem"), Path::new("/dev/kvm"), &record]
    {
        let file = path(file);
        assert_denied(libc::SYS_openat, &[libc::EACCES, libc::ENOENT], move || open(&file));
    }
}

#[test]
fn the_file_system_cannot_be_changed() {
    let here = path("/x");
    // SAFETY: the path ends with a NUL.
    let make = move || unsafe { libc::syscall(libc::SYS_mkdir, here.as_ptr(), 0o700) };
    assert_denied(libc::SYS_mkdir, &[libc::EACCES, libc::EROFS], make);
    // SAFETY: all strings end with a NUL.
    let mount = || unsafe { libc::mount(c"x".as_ptr(), c"/".as_ptr(), c"tmpfs".as_ptr(), 0, ptr::null()) }.into();
    assert_denied(libc::SYS_mount, &[libc::EPERM], mount);
    let chroot = || {
        // SAFETY: the path ends with a NUL.
        unsafe { libc::syscall(libc::SYS_chroot, c"/".as_ptr()) }
    };
    assert_denied(libc::SYS_chroot, &[libc::EPERM], chroot);
}

#[test]
fn no_process_can_be_started() {
    assert_denied(libc::SYS_fork, &[], numbers(libc::SYS_fork, [0; 4]));
    assert_denied(libc::SYS_clone, &[], numbers(libc::SYS_clone, [libc::SIGCHLD.into(), 0, 0, 0]));
    let shell = path("/bin/sh");
    // SAFETY: the path ends with a NUL; no arguments are passed.
    let exec = move || unsafe { libc::syscall(libc::SYS_execve, shell.as_ptr(), ptr::null::<u8>(), ptr::null::<u8>()) };
    assert_denied(libc::SYS_execve, &[libc::EACCES, libc::ENOENT], exec);
}

#[test]
fn other_processes_are_out_of_reach() {
    let supervisor = i64::from(std::process::id());
    let missing = [libc::ESRCH, libc::EPERM];
    assert_denied(libc::SYS_kill, &missing, numbers(libc::SYS_kill, [supervisor, 0, 0, 0]));
    let attach = [i64::from(libc::PTRACE_ATTACH), supervisor, 0, 0];
    assert_denied(libc::SYS_ptrace, &missing, numbers(libc::SYS_ptrace, attach));
    assert_denied(libc::SYS_pidfd_open, &missing, numbers(libc::SYS_pidfd_open, [supervisor, 0, 0, 0]));
    // A number of this process is required, which is 1 in its namespace.
    assert_denied(libc::SYS_tgkill, &missing, numbers(libc::SYS_tgkill, [supervisor, supervisor, 0, 0]));
    let limits = [supervisor, i64::from(libc::RLIMIT_NOFILE as i32), 0, 0];
    assert_denied(libc::SYS_prlimit64, &missing, numbers(libc::SYS_prlimit64, limits));
}

#[test]
fn the_network_is_out_of_reach() {
    for family in [libc::AF_INET, libc::AF_INET6, libc::AF_UNIX, libc::AF_NETLINK, libc::AF_PACKET] {
        let new = numbers(libc::SYS_socket, [family.into(), libc::SOCK_DGRAM.into(), 0, 0]);
        for role in ROLES {
            assert_eq!(attempt(role, true, new.clone()), Outcome::Stopped(libc::SYS_socket as u32), "{role:?}");
            let stream = numbers(libc::SYS_socket, [family.into(), libc::SOCK_STREAM.into(), 0, 0]);
            let is_needed = role == ThreadRole::Downloader && matches!(family, libc::AF_INET | libc::AF_INET6);
            let expected = if is_needed { Outcome::Succeeded } else { Outcome::Stopped(libc::SYS_socket as u32) };
            assert_eq!(attempt(role, true, stream), expected, "{role:?}: {family}");
        }
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let connect = move || {
        // SAFETY: the address is a complete structure; the descriptor is checked by the kernel.
        unsafe {
            let socket = libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0);
            let mut address: libc::sockaddr_in = std::mem::zeroed();
            (address.sin_family, address.sin_port) = (libc::AF_INET as u16, port.to_be());
            address.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
            let len = size_of::<libc::sockaddr_in>() as u32;
            i64::from(libc::connect(socket, (&raw const address).cast(), len))
        }
    };
    if !has_all_layers() {
        return;
    }
    let outcome = attempt(ThreadRole::Worker, false, connect);
    let refused = [libc::EACCES, libc::ENETUNREACH, libc::ECONNREFUSED];
    assert!(matches!(outcome, Outcome::Failed(error) if refused.contains(&error)), "{outcome:?}");
}

#[test]
fn the_sockets_of_other_machines_are_out_of_reach() {
    let machine = tempfile::tempdir().unwrap();
    let control = machine.path().join("control");
    let _listener = UnixListener::bind(&control).unwrap();
    let connect = move || socket::connect(&control).map_or(-1, |_| 0);
    if !has_all_layers() {
        return;
    }
    for role in [ThreadRole::Worker, ThreadRole::Downloader] {
        let outcome = attempt(role, false, connect.clone());
        assert!(matches!(outcome, Outcome::Failed(libc::ENOENT | libc::EACCES)), "{role:?}: {outcome:?}");
    }
}

#[test]
fn privileges_cannot_be_gained() {
    assert_denied(libc::SYS_setuid, &[libc::EPERM, libc::EINVAL], numbers(libc::SYS_setuid, [0; 4]));
    assert_denied(libc::SYS_unshare, &[], numbers(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0, 0]));
    assert_denied(libc::SYS_setns, &[], numbers(libc::SYS_setns, [-1, 0, 0, 0]));
    let keys = [3, 0, 0, 0];
    assert_denied(libc::SYS_keyctl, &[], numbers(libc::SYS_keyctl, keys));
    assert_denied(libc::SYS_bpf, &[], numbers(libc::SYS_bpf, [0; 4]));
    assert_denied(libc::SYS_init_module, &[libc::EPERM, libc::ENOSYS], numbers(libc::SYS_init_module, [0; 4]));
    assert_denied(libc::SYS_perf_event_open, &[], numbers(libc::SYS_perf_event_open, [0; 4]));
    assert_denied(libc::SYS_userfaultfd, &[], numbers(libc::SYS_userfaultfd, [0; 4]));
    assert_denied(libc::SYS_seccomp, &[], numbers(libc::SYS_seccomp, [0; 4]));
}

#[test]
fn memory_cannot_be_made_executable() {
    let protection = i64::from(libc::PROT_READ | libc::PROT_EXEC);
    assert_denied(libc::SYS_mmap, &[], numbers(libc::SYS_mmap, [0, 4096, protection, libc::MAP_PRIVATE.into()]));
    assert_denied(libc::SYS_mprotect, &[], numbers(libc::SYS_mprotect, [0, 4096, protection, 0]));
}

#[test]
fn only_the_requests_of_a_role_reach_kvm_and_terminals() {
    // KVM_CREATE_VM, KVM_SET_USER_MEMORY_REGION, TIOCSTI and FIFREEZE.
    for request in [0xae01, 0x4020_ae46, 0x5412, 0xc004_5877] {
        assert_denied(libc::SYS_ioctl, &[], numbers(libc::SYS_ioctl, [-1, request, 0, 0]));
    }
    // KVM_RUN: a vCPU's thread may, others not.
    let run = numbers(libc::SYS_ioctl, [-1, 0xae80, 0, 0]);
    assert_eq!(attempt(ThreadRole::Vcpu, true, run.clone()), Outcome::Failed(libc::EBADF));
    assert_eq!(attempt(ThreadRole::Worker, true, run), Outcome::Stopped(libc::SYS_ioctl as u32));
}

/// The ring of a disk, and how its creator would map it.
struct DiskRing {
    ring: Ring<GuestBuffers>,
    parameters: Parameters,
}

fn disk_ring() -> DiskRing {
    const SIZE: u16 = 8;
    let file = File::from(rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    let ring = Ring::new(Arc::new(file), &event::create().unwrap(), SIZE).unwrap();
    DiskRing { ring, parameters: IoUring::new(SIZE.into()).unwrap().params().clone() }
}

/// The result of an entry in the disk's ring.
fn submit(disk: &DiskRing, entry: &squeue::Entry) -> i64 {
    // SAFETY: the ring has this size, and stays open. The entries have no buffers.
    let result = unsafe {
        let fd = libc::fcntl(disk.ring.as_raw_fd(), libc::F_DUPFD_CLOEXEC, 0);
        let mut ring = IoUring::from_fd(fd, disk.parameters.clone()).unwrap();
        ring.submission().push(entry).unwrap();
        let _ = ring.submit_and_wait(1);
        ring.completion().next().unwrap().result()
    };
    // SAFETY: it is the calling thread's.
    unsafe { *libc::__errno_location() = -result };
    result.into()
}

#[test]
fn rings_execute_only_what_disks_need() {
    let Ok(any) = IoUring::new(1) else { return eprintln!("SKIPPED: this host does not allow io_uring") };
    assert_denied(libc::SYS_io_uring_setup, &[], numbers(libc::SYS_io_uring_setup, [8, 0, 0, 0]));
    // Buffers, files, a personality, restrictions, kernel threads, and the ring itself (linux/io_uring.h).
    for request in [0, 2, 9, 11, 12, 19, 20] {
        assert_denied(libc::SYS_io_uring_register, &[], numbers(libc::SYS_io_uring_register, [-1, request, 0, 0]));
    }
    // Not before Linux 6.10: see Ring.
    let registered = any.params().is_feature_recvsend_bundle().then_some(squeue::Flags::FIXED_FILE);
    let flags = registered.unwrap_or(squeue::Flags::empty());
    let of = |entry: squeue::Entry| {
        attempt_with(ThreadRole::Worker, true, disk_ring, move |disk| submit(&disk, &entry.flags(flags)))
    };
    let refused = Outcome::Failed(libc::EACCES);
    let fd = types::Fd(0);
    assert_eq!(of(opcode::OpenAt::new(types::Fd(libc::AT_FDCWD), c"/".as_ptr()).build()), refused);
    assert_eq!(of(opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build()), refused);
    assert_eq!(of(opcode::Connect::new(fd, ptr::null(), 0).build()), refused);
    assert_eq!(of(opcode::Close::new(fd).build()), refused);
    assert_eq!(of(opcode::Nop::new().build()), refused);
    if registered.is_some() {
        assert_eq!(of(opcode::Fsync::new(fd).build()), Outcome::Succeeded);
        let sync = |disk: DiskRing| submit(&disk, &opcode::Fsync::new(types::Fd(0)).build());
        assert_eq!(attempt_with(ThreadRole::Worker, true, disk_ring, sync), refused, "not the disk");
    }
}

#[test]
fn what_a_thread_needs_works() {
    let read = numbers(libc::SYS_read, [-1, 0, 0, 0]);
    for role in ROLES {
        assert_eq!(attempt(role, true, read.clone()), Outcome::Failed(libc::EBADF), "{role:?}");
        assert_eq!(attempt(role, true, numbers(libc::SYS_getpid, [0; 4])), Outcome::Succeeded, "{role:?}");
    }
}

/// Runs a task that reads an image, without files.
fn run_task(task: impl FnOnce() -> anyhow::Result<String>) -> anyhow::Result<String> {
    let confined = Confined { role: ThreadRole::Unpacker, files: Vec::new(), file_bytes_max: 1 << 20 };
    task::run(Some(&confined), task, &mut |question: String| {
        let file = File::open("/etc/passwd")?;
        anyhow::ensure!(question != "no", "no answer");
        Ok((format!("{question}!"), Some(file.into())))
    })
}

#[test]
fn a_task_gets_answers_and_files_and_returns_its_result() {
    let long = "x".repeat(100_000);
    let expected = long.clone();
    let result = run_task(move || {
        let (answer, file): task::Answer<String> = task::ask(long)?;
        let mut start = [0; 4];
        std::io::Read::read_exact(&mut File::from(file.unwrap()), &mut start)?;
        let refused = task::ask::<_, String>("no".to_owned()).unwrap_err();
        Ok(format!("{answer} {} {refused}", String::from_utf8_lossy(&start)))
    });
    assert_eq!(result.unwrap(), format!("{expected}! root no answer"));
}

#[test]
fn a_task_cannot_take_all_memory() {
    let long = run_task(|| {
        let memory = vec![1u8; 5 << 30];
        Ok(memory.len().to_string())
    });
    // An allocation that fails ends it.
    let error = format!("{:#}", long.unwrap_err());
    assert!(error.contains("the process that reads it"), "{error}");
}

#[test]
fn a_task_that_is_not_confined_answers_for_one_that_is() {
    let mut answer = |question: String| Ok((format!("{question}, outer"), None));
    let outer = || {
        let inner = || Ok(task::ask::<String, String>("inner".to_owned())?.0);
        let confined = Confined { role: ThreadRole::Downloader, files: Vec::new(), file_bytes_max: 0 };
        task::run(Some(&confined), inner, &mut |question: String| task::ask::<String, String>(question))
    };
    assert_eq!(task::run(None, outer, &mut answer).unwrap(), "inner, outer");
}

#[test]
fn a_task_that_fails_or_was_taken_over_is_reported() {
    let error = |task: fn() -> anyhow::Result<String>| format!("{:#}", run_task(task).unwrap_err());
    assert_eq!(error(|| Err(anyhow::anyhow!("cause").context("it failed"))), "it failed: cause");
    assert_eq!(error(|| fork::exit_now(0)), "the process that reads it has failed");
    assert_eq!(error(|| fork::exit_now(7)), "the process that reads it has failed: it exited with 7");
    assert!(error(|| panic!("by intent")).ends_with("by intent"));
    let stopped = error(|| Ok(std::fs::read_to_string("/etc/passwd")?));
    assert!(stopped.ends_with(&format!("made system call {}", libc::SYS_openat)), "{stopped}");
    let threads = run_task(|| {
        let thread = sandbox::spawn("other", || std::thread::current().name().map(str::to_owned))?;
        Ok(thread.join().unwrap().unwrap())
    });
    assert_eq!(threads.unwrap(), "other");
}
