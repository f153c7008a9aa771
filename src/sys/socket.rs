//! System calls on Unix sockets: those that must not wait, and those that move a guest's memory.
#![allow(unsafe_code)]

use std::fs::{File, Permissions};
use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::IoVecs;

/// Longest path of a Unix socket: its field ends with a NUL (unix(7)).
pub const PATH_BYTES_MAX: usize = size_of::<libc::sockaddr_un>() - offset_of!(libc::sockaddr_un, sun_path) - 1;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 128;

/// Binds a socket to `path` that has `mode` from its first moment on, and listens. It never waits.
pub fn listen(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let socket = File::from(stream_socket()?);
    // A socket's own mode is what its name in the file system is made with.
    socket.set_permissions(Permissions::from_mode(mode))?;
    let (address, len) = address(path)?;
    let fd = socket.as_raw_fd();
    // SAFETY: both calls only read; `address` is a whole `sockaddr_un`, of which `len` bytes count.
    let result = unsafe {
        match libc::bind(fd, (&raw const address).cast(), len) {
            0 => libc::listen(fd, BACKLOG),
            error => error,
        }
    };
    if result == 0 { Ok(UnixListener::from(OwnedFd::from(socket))) } else { Err(io::Error::last_os_error()) }
}

/// Connects to the socket at `path`, at once or not at all: where its listener's backlog is full, this is `WouldBlock`.
/// The stream never waits either.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    let (address, len) = address(path)?;
    // SAFETY: the call only reads `address`, a whole `sockaddr_un`, of which `len` bytes count.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) } {
        0 => Ok(UnixStream::from(socket)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sends from as many of `buffers` as one call takes (sendmsg(2)), without a signal where nobody reads. Returns how many
/// bytes it was.
pub fn send(stream: &UnixStream, buffers: &impl IoVecs) -> io::Result<usize> {
    let message = message(buffers);
    // SAFETY: each iovec is mapped, as `IoVecs` promises; it is only read.
    let count = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Receives into as many of `buffers` as one call takes (recvmsg(2)). Returns how many bytes it was: none at the end.
pub fn receive(stream: &UnixStream, buffers: &mut impl IoVecs) -> io::Result<usize> {
    let mut message = message(buffers);
    // SAFETY: each iovec is mapped, as `IoVecs` promises, and of which Rust has no references.
    // There is no room for control messages, so that descriptors sent along are closed by the kernel.
    let count = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn message(buffers: &impl IoVecs) -> libc::msghdr {
    // SAFETY: all zeroes are a message without address, data and control messages.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = buffers.iovecs().as_ptr().cast_mut();
    message.msg_iovlen = buffers.iovecs().len();
    message
}

fn stream_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed; the descriptor that is returned is new and owned by nobody else.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    // An empty name, or one that begins with a NUL, is not in the file system.
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() > PATH_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all zeroes are a valid value of this structure of plain numbers.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    address.sun_path.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from as libc::c_char);
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}
