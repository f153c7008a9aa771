//! Notices that the kernel has killed processes because memory was short, whoever has started them: it says so in its log. A small
//! kernel counts them nowhere.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

/// The beginnings of the message, before the process that was killed (mm/oom_kill.c).
const MESSAGES: [&str; 2] = ["Out of memory", "Memory cgroup out of memory"];
/// Longer than these messages. The kernel skips one that is longer than the buffer.
const RECORD_BYTES: usize = 1024;
/// The maximum number of messages read at a time; a process that writes more hides those of the kernel.
const RECORDS_MAX: usize = 4096;

/// The kernel's log, which is readable when something new is in it.
#[derive(Debug)]
pub struct KernelLog(File);

impl KernelLog {
    /// Opens the log at its end.
    pub fn open() -> io::Result<KernelLog> {
        let mut file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(KernelLog(file))
    }

    /// Whether the kernel has killed a process because memory was short since the last call. Allocates no memory.
    pub fn take_kills(&mut self) -> bool {
        let (mut buffer, mut is_killed) = ([0; RECORD_BYTES], false);
        for _ in 0..RECORDS_MAX {
            match self.0.read(&mut buffer) {
                Ok(count) => is_killed |= buffer.get(..count).is_some_and(is_kill),
                // Records were overwritten before they were read, or one is too long.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EINVAL)) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // There are no more.
                Err(_) => return is_killed,
            }
        }
        let _ = self.0.seek(SeekFrom::End(0));
        is_killed
    }
}

impl AsFd for KernelLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether a record, `PRIORITY,NUMBER,TIME,FLAGS;TEXT`, says that a process was killed. Those of the kernel have facility 0, which no
/// process can give its own (Documentation/ABI/testing/dev-kmsg).
fn is_kill(record: &[u8]) -> bool {
    let parse = || {
        let (head, text) = str::from_utf8(record).ok()?.split_once(';')?;
        let priority: u32 = head.split(',').next()?.parse().ok()?;
        Some(priority >> 3 == 0 && MESSAGES.iter().any(|message| text.starts_with(message)))
    };
    parse().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_kernel_says_that_it_has_killed_a_process() {
        for killed in [
            "3,612,6561109,-;Out of memory: Killed process 43 (tail) total-vm:70728kB, anon-rss:68608kB\n",
            "3,9,1,-;Memory cgroup out of memory: Killed process 7 (x) total-vm:1kB\n SUBSYSTEM=memory\n",
            "3,612,6561109,c;Out of memory: Kill process 43 (tail) score 901 or sacrifice child\n",
        ] {
            assert!(is_kill(killed.as_bytes()), "{killed}");
        }
        for other in [
            "6,612,6561109,-;oom-kill:constraint=CONSTRAINT_NONE,task=tail,pid=43,uid=0\n",
            "12,612,6561109,-;Out of memory: Killed process 43 (tail)\n",
            "3,612,6561109,-;tail: Out of memory\n",
            "3;",
            "x,1;Out of memory",
            "",
        ] {
            assert!(!is_kill(other.as_bytes()), "{other}");
        }
        assert!(!is_kill(&[0xff; 9]));
    }
}
