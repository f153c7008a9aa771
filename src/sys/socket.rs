//! System calls for Unix sockets: nonblocking ones, and those that transfer guest memory.
#![allow(unsafe_code)]

use std::fs::{File, Permissions};
use std::io;
use std::mem::{offset_of, size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::IoVecs;

/// The maximum path length of a Unix socket, excluding the NUL (unix(7)).
pub const PATH_BYTES_MAX: usize = size_of::<libc::sockaddr_un>() - offset_of!(libc::sockaddr_un, sun_path) - 1;

/// The backlog of a listener.
const BACKLOG: i32 = 128;

/// Binds a nonblocking socket to `path`, created with `mode`, and listens.
pub fn listen(path: &Path, mode: u32) -> io::Result<UnixListener> {
    let socket = File::from(stream_socket()?);
    // A socket's mode applies to its file when it is bound.
    socket.set_permissions(Permissions::from_mode(mode))?;
    let (address, len) = address(path)?;
    let fd = socket.as_raw_fd();
    // SAFETY: both calls only read; `address` is a complete `sockaddr_un` with `len` valid bytes.
    let result = unsafe {
        match libc::bind(fd, (&raw const address).cast(), len) {
            0 => libc::listen(fd, BACKLOG),
            error => error,
        }
    };
    if result == 0 { Ok(UnixListener::from(OwnedFd::from(socket))) } else { Err(io::Error::last_os_error()) }
}

/// Connects to the socket at `path` without blocking: fails with `WouldBlock` if the listener's backlog is full. The
/// stream is nonblocking.
pub fn connect(path: &Path) -> io::Result<UnixStream> {
    let socket = stream_socket()?;
    let (address, len) = address(path)?;
    // SAFETY: the call only reads `address`, a complete `sockaddr_un` with `len` valid bytes.
    match unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) } {
        0 => Ok(UnixStream::from(socket)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A connected pair of sockets that keep the boundaries of messages, each sent completely or not at all, and report the end
/// of the other side as an empty one (unix(7), SOCK_SEQPACKET).
pub fn message_pair() -> io::Result<(UnixDatagram, UnixDatagram)> {
    let mut fds = [0; 2];
    // SAFETY: the call writes two descriptors, which are new and have no other owner.
    unsafe {
        if libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let [ours, theirs] = fds.map(|fd| OwnedFd::from_raw_fd(fd));
        Ok((ours.into(), theirs.into()))
    }
}

/// Sends a message without waiting for room: fails with `WouldBlock` instead.
pub fn send_now(socket: &UnixDatagram, message: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
    // SAFETY: the call only reads the slice.
    let count = unsafe { libc::send(socket.as_raw_fd(), message.as_ptr().cast(), message.len(), flags) };
    if count < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Receives a message without waiting: fails with `WouldBlock` if there is none. Returns its length: 0 at the end.
pub fn receive_now(socket: &UnixDatagram, bytes: &mut [u8]) -> io::Result<usize> {
    // SAFETY: pointer and length are those of an exclusively borrowed slice.
    let count = unsafe { libc::recv(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len(), libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Sends a message and a copy of `fd` (unix(7), SCM_RIGHTS).
pub fn send_with_fd(socket: &UnixDatagram, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(socket.send_with_fd(bytes, fd.as_raw_fd()).map(drop)?)
}

/// Sends bytes and a copy of `fd` over a stream (unix(7), SCM_RIGHTS).
pub fn send_with_fd_over(stream: &UnixStream, bytes: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(stream.send_with_fd(bytes, fd.as_raw_fd()).map(drop)?)
}

/// Receives a message into `bytes`, with the descriptor sent with it, if any. Returns its length: 0 at the end.
pub fn receive_with_fd(socket: &UnixDatagram, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let (len, file) = socket.recv_with_fd(bytes)?;
    Ok((len, file.map(OwnedFd::from)))
}

/// Receives bytes of a stream, with the descriptor sent with them, if any. Returns their number: 0 at the end.
pub fn receive_with_fd_over(stream: &UnixStream, bytes: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let (len, file) = stream.recv_with_fd(bytes)?;
    Ok((len, file.map(OwnedFd::from)))
}

/// Sends a message and copies of `fds` (unix(7), SCM_RIGHTS).
pub fn send_with_fds<const N: usize>(socket: &UnixDatagram, bytes: &[u8], fds: [BorrowedFd<'_>; N]) -> io::Result<()> {
    Ok(socket.send_with_fds(&[bytes], &fds.map(|fd| fd.as_raw_fd())).map(drop)?)
}

/// Receives a message of one byte with exactly `N` descriptors.
pub fn receive_fds<const N: usize>(socket: &UnixDatagram) -> io::Result<[OwnedFd; N]> {
    let (mut byte, mut fds) = ([0_u8], [-1; N]);
    let mut iovecs = [libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: byte.len() }];
    // SAFETY: the kernel writes to `byte`, which outlives the call.
    let (_, count) = unsafe { socket.recv_with_fds(&mut iovecs, &mut fds) }?;
    // SAFETY: these descriptors were just received, and have no other owner.
    let received = fds.into_iter().take(count).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }).collect::<Vec<_>>();
    received.try_into().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Sends as many of `buffers` as one call accepts (sendmsg(2)), without SIGPIPE. Returns the number of bytes.
pub fn send(stream: &UnixStream, buffers: &impl IoVecs) -> io::Result<usize> {
    let message = message(buffers);
    // SAFETY: `IoVecs` guarantees that each iovec is mapped; it is only read.
    let count = unsafe { libc::sendmsg(stream.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Receives into as many of `buffers` as one call accepts (recvmsg(2)). Returns the number of bytes: 0 at the end.
pub fn receive(stream: &UnixStream, buffers: &mut impl IoVecs) -> io::Result<usize> {
    let mut message = message(buffers);
    // SAFETY: `IoVecs` guarantees that each iovec is mapped and not referenced by Rust. There is no space for control
    // messages, so the kernel closes any descriptors that were sent.
    let count = unsafe { libc::recvmsg(stream.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

fn message(buffers: &impl IoVecs) -> libc::msghdr {
    // SAFETY: all zeroes is a valid message header without address, data and control messages.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = buffers.iovecs().as_ptr().cast_mut();
    message.msg_iovlen = buffers.iovecs().len();
    message
}

fn stream_socket() -> io::Result<OwnedFd> {
    // SAFETY: no pointer is passed; the returned descriptor is new and has no other owner.
    unsafe {
        let fd = libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0);
        if fd < 0 { Err(io::Error::last_os_error()) } else { Ok(OwnedFd::from_raw_fd(fd)) }
    }
}

fn address(path: &Path) -> io::Result<(libc::sockaddr_un, libc::socklen_t)> {
    let bytes = path.as_os_str().as_bytes();
    // An empty name, or one that starts with a NUL, is not a file.
    if bytes.is_empty() || bytes.contains(&0) || bytes.len() > PATH_BYTES_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    address.sun_path.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from as libc::c_char);
    Ok((address, size_of::<libc::sockaddr_un>() as libc::socklen_t))
}
