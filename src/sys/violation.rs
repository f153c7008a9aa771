//! Reports a system call that a filter has refused, from the signal handler in which the thread finds itself.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::RawFd;
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

/// The exit code of a process that was stopped: that of a shell for a program killed by SIGSYS.
pub const EXIT_CODE: i32 = 128 + libc::SIGSYS;
/// The length of a thread's name (prctl(2), PR_GET_NAME).
const NAME_BYTES: usize = 16;
/// The length of a [`Report`]: the mark, the number of the call and the name of the thread.
const REPORT_BYTES: usize = 4 + 4 + NAME_BYTES;

/// Where reports are written.
static REPORT_TO: AtomicI32 = AtomicI32::new(-1);

/// A call that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Its number.
    pub call: u32,
    /// The name of the thread.
    pub thread: String,
}

impl Report {
    /// Parses what the handler has written. Such a packet starts with four bytes 0xff.
    pub fn parse(packet: &[u8]) -> Option<Report> {
        let [0xff, 0xff, 0xff, 0xff, a, b, c, d, name @ ..] = packet else { return None };
        let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
        Some(Report { call: u32::from_le_bytes([*a, *b, *c, *d]), thread: String::from_utf8_lossy(name).into_owned() })
    }
}

/// Handles SIGSYS on all threads from now on: a [`Report`] is sent to the socket `report_to`, which must stay open, and the
/// process exits with [`EXIT_CODE`].
pub fn install(report_to: RawFd) -> io::Result<()> {
    REPORT_TO.store(report_to, Ordering::Relaxed);
    // SAFETY: all zeroes is a valid action, whose fields are then set.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = on_violation as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
    // SAFETY: the handler has the signature for SA_SIGINFO, and makes only calls that are safe in a handler.
    match unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

extern "C" fn on_violation(_signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    /// The start of `siginfo_t` for SIGSYS (sigaction(2)).
    #[repr(C)]
    struct SigSys {
        head: [i32; 3],
        _padding: i32,
        call_address: *const libc::c_void,
        call: i32,
    }
    let mut report = [0xff; REPORT_BYTES];
    // SAFETY: for SIGSYS the kernel passes this structure, which is smaller than `siginfo_t`.
    let call = unsafe { (*info.cast::<SigSys>()).call };
    let [_, number, name] = [0..4, 4..8, 8..REPORT_BYTES];
    report[number].copy_from_slice(&call.to_le_bytes());
    // SAFETY: PR_GET_NAME writes 16 bytes, which is the length of this part. The other calls read only `report`; none of
    // them takes a lock or allocates.
    unsafe {
        libc::prctl(libc::PR_GET_NAME, report[name].as_mut_ptr());
        let (to, flags) = (REPORT_TO.load(Ordering::Relaxed), libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT);
        libc::send(to, report.as_ptr().cast(), report.len(), flags);
        libc::_exit(EXIT_CODE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_the_call_and_the_thread() {
        let mut packet = vec![0xff, 0xff, 0xff, 0xff, 59, 0, 0, 0];
        packet.extend(b"vcpu0\0\0\0\0\0\0\0\0\0\0\0");
        assert_eq!(Report::parse(&packet), Some(Report { call: 59, thread: "vcpu0".into() }));
        assert_eq!(Report::parse(&packet[1..]), None);
        assert_eq!(Report::parse(&[]), None);
    }
}
