//! System calls for tap devices, and for sockets that transmit frames from guest memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};

use super::{IOV_MAX, IoVecs};

/// Up to this many parts of a frame are passed without allocating.
const PARTS_ON_STACK: usize = 32;

// linux/if_tun.h
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETQUEUE: libc::c_ulong = 0x4004_54d9;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETVNETLE: libc::c_ulong = 0x4004_54dc;
const IFF_TAP: libc::c_short = 0x0002;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;

/// The offloads for frames read from a tap device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TapOffloads {
    /// Checksum offload.
    pub checksum: bool,
    /// TCP segmentation over IPv4.
    pub tso4: bool,
    /// TCP segmentation over IPv6.
    pub tso6: bool,
    /// Segmentation with ECN.
    pub ecn: bool,
}

/// Attaches `tun`, an open /dev/net/tun, to the tap device `name`, with a little-endian virtio header of `header_bytes`
/// before each frame. A device that does not exist is created if this process is permitted to, and removed when the
/// descriptor is closed; the kernel replaces `%d` in its name by an unused number. A `multiqueue` device can be
/// attached several times, each time with another `tun` and for an additional queue. Returns the device's name.
pub fn attach_tap(tun: &File, name: &str, header_bytes: usize, multiqueue: bool) -> io::Result<String> {
    let mut request = interface_request(name)?;
    let queues = if multiqueue { IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | queues;
    let (size, yes) = (header_bytes as libc::c_int, 1 as libc::c_int);
    // SAFETY: TUNSETIFF accesses one `ifreq`, the others read one int each, all of which outlive the calls.
    unsafe {
        check(libc::ioctl(tun.as_raw_fd(), TUNSETIFF as _, &mut request))?;
        check(libc::ioctl(tun.as_raw_fd(), TUNSETVNETHDRSZ as _, &size))?;
        check(libc::ioctl(tun.as_raw_fd(), TUNSETVNETLE as _, &yes))?;
    }
    let name = request.ifr_name.iter().map(|&byte| byte as u8).take_while(|byte| *byte != 0).collect();
    String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Attaches or detaches the queue `tap` of a multiqueue device. Frames waiting in a detached queue are dropped.
pub fn set_tap_queue(tap: &File, attached: bool) -> io::Result<()> {
    let mut request = interface_request("")?;
    request.ifr_ifru.ifru_flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
    // SAFETY: TUNSETQUEUE reads one `ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETQUEUE as _, &mut request) })
}

/// Sets the offloads for frames read from `tap`.
pub fn set_tap_offloads(tap: &File, offloads: TapOffloads) -> io::Result<()> {
    let TapOffloads { checksum, tso4, tso6, ecn } = offloads;
    let flags = [(checksum, TUN_F_CSUM), (tso4, TUN_F_TSO4), (tso6, TUN_F_TSO6), (ecn, TUN_F_TSO_ECN)];
    let flags = flags.iter().filter(|(wanted, _)| *wanted).fold(0, |all, (_, flag)| all | flag);
    // SAFETY: the argument of the request is a number, not a pointer.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETOFFLOAD as _, flags) })
}

/// Sets the tap device `tap` as the back end of vhost-net's queue of `direction`, or removes it if `None`; on return
/// vhost-net has stopped processing the queue.
pub fn set_vhost_backend(device: &File, direction: usize, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let backend = vhost_vring_file { index: direction as u32, fd: tap.map_or(-1, |tap| tap.as_raw_fd()) };
    // SAFETY: the request reads one `vhost_vring_file`, which outlives the call.
    check(unsafe { libc::ioctl(device.as_raw_fd(), VHOST_NET_SET_BACKEND() as _, &backend) })
}

/// The MTU of the interface `name`, in bytes.
pub fn interface_mtu(name: &str) -> io::Result<u32> {
    let mut request = interface_request(name)?;
    // SAFETY: the socket is new and has no other owner; the request accesses one `ifreq`, whose number is written if
    // the call succeeds and read only then.
    unsafe {
        let fd = libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0);
        check(fd)?;
        let socket = OwnedFd::from_raw_fd(fd);
        check(libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU as _, &mut request))?;
        Ok(request.ifr_ifru.ifru_mtu.unsigned_abs())
    }
}

/// A request for the interface `name`, of at most 15 bytes.
fn interface_request(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all zeroes is a valid value of this plain structure.
    let mut request: libc::ifreq = unsafe { zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.ifr_name.iter_mut().zip(name.bytes()).for_each(|(to, from)| *to = from as libc::c_char);
    Ok(request)
}

/// Sets the send buffer size of `socket`, up to the host's limit.
pub fn set_send_buffer(socket: &UnixStream, bytes: usize) -> io::Result<()> {
    let (value, len) = (libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX), size_of::<libc::c_int>() as u32);
    // SAFETY: the call reads `len` bytes, the size of the number that the pointer refers to.
    check(unsafe {
        libc::setsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDBUF, (&raw const value).cast(), len)
    })
}

/// Writes `prefix` and `frame` in one call (writev(2)). Returns the number of bytes.
pub fn write(file: &File, prefix: &[u8], frame: &impl IoVecs) -> io::Result<usize> {
    with_parts(prefix, frame, |parts| {
        // SAFETY: the first part is `prefix`, and `IoVecs` guarantees that the others are mapped; all are only read.
        unsafe { libc::writev(file.as_raw_fd(), parts.as_ptr(), parts.len() as i32) }
    })
}

/// Sends `frames`, each a prefix and its content, in one call (sendmsg(2)), as many as it takes, without blocking and
/// without SIGPIPE. Returns the number of bytes, which may end within a frame.
pub fn send_all<'a, F: IoVecs + 'a>(
    socket: &UnixStream,
    frames: impl Iterator<Item = (&'a [u8], &'a F)>,
) -> io::Result<usize> {
    let mut parts = Vec::with_capacity(PARTS_ON_STACK);
    for (prefix, frame) in frames {
        if parts.len() >= IOV_MAX {
            break;
        }
        parts.push(libc::iovec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: prefix.len() });
        parts.extend_from_slice(frame.iovecs());
    }
    retry(|| {
        // SAFETY: all zeroes is a valid message header without address, data and control messages; its parts are
        // prefixes and mapped guest memory, all borrowed for 'a, and are only read.
        unsafe {
            let mut message: libc::msghdr = zeroed();
            message.msg_iov = parts.as_ptr().cast_mut();
            message.msg_iovlen = parts.len().min(IOV_MAX);
            libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
        }
    })
}

/// Calls `call` with `prefix` and the parts of `frame`, as [`retry`] does.
fn with_parts(prefix: &[u8], frame: &impl IoVecs, call: impl Fn(&[libc::iovec]) -> isize) -> io::Result<usize> {
    let first = libc::iovec { iov_base: prefix.as_ptr().cast_mut().cast(), iov_len: prefix.len() };
    let rest = frame.iovecs();
    let mut on_stack = [first; PARTS_ON_STACK];
    let all;
    let parts = match on_stack.get_mut(1..=rest.len()) {
        Some(places) => {
            places.copy_from_slice(rest);
            on_stack.get(..=rest.len()).unwrap_or_default()
        }
        None => {
            all = [&[first], rest.get(..rest.len().min(IOV_MAX - 1)).unwrap_or_default()].concat();
            &all[..]
        }
    };
    retry(|| call(parts))
}

/// Calls `call`, again if it is interrupted by signals.
fn retry(call: impl Fn() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(count) => return Ok(count),
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
}

/// A pair of connected sockets that keep the boundaries between calls of [`send_all`] (SOCK_SEQPACKET, unix(7)).
#[cfg(test)]
pub fn packet_pair() -> io::Result<(UnixStream, UnixStream)> {
    let mut fds = [0; 2];
    // SAFETY: the call writes two descriptors to `fds`, which are new and have no other owner.
    unsafe {
        check(libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()))?;
        Ok((UnixStream::from_raw_fd(fds[0]), UnixStream::from_raw_fd(fds[1])))
    }
}

/// Moves the calling thread, and threads that it starts later, to a new network namespace with a separate umask
/// (unshare(2)).
#[cfg(test)]
pub fn leave_network() -> io::Result<()> {
    // SAFETY: no pointer is passed.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET | libc::CLONE_FS) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
