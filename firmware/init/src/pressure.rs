//! Ends thrashing. When programs have used up all memory, the kernel evicts their code and reads it again, possibly for
//! minutes, until nothing can be reclaimed and the OOM killer acts. Init requests an OOM kill after a few seconds.
//!
//! The kernel wakes the thread only while programs wait for memory (pressure stall information). Programs that read
//! many files cause pressure as well. This is no reason to kill one, since memory can still be reclaimed.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::oom::KernelLog;
use crate::report;

/// Wakes the thread when at least one program waited for memory for 600,000 µs in total within 1,000,000 µs
/// (Documentation/accounting/psi.rst).
const TRIGGER: &[u8] = b"some 600000 1000000\0";
/// The maximum time between two wakeups that count as consecutive seconds.
const MAX_GAP: Duration = Duration::from_millis(2500);
/// The number of consecutive seconds of thrashing after which a program is killed.
const SECONDS_MAX: u32 = 3;
/// The minimum time between two kills: on busy processors, it can take seconds until a killed program exits and its
/// memory is free.
const KILL_INTERVAL: Duration = Duration::from_secs(30);
/// A guest thrashes only if less than 1/16 of its memory is available.
const AVAILABLE_DIVISOR: u64 = 16;
/// A guest with more available memory than this does not thrash, however large it is.
const AVAILABLE_MAX_KIB: u64 = 32 << 10;
/// A guest thrashes only if file pages take less than 1/64 of its memory. A program that reads files causes more.
const FILES_DIVISOR: u64 = 64;
/// The maximum size of /proc/meminfo.
const MEMINFO_BYTES: usize = 4096;
/// The stack size of the thread.
const STACK_BYTES: usize = 64 << 10;

/// Files that are opened in advance, before memory is short.
struct Watch {
    pressure: File,
    meminfo: File,
    /// Unless the kernel has no log.
    kernel_log: Option<KernelLog>,
    killer: File,
}

/// Starts the thread, if the kernel supports pressure stall information. Must be called after this process has blocked
/// the signals that it waits for.
pub fn watch() {
    let started = Watch::open()
        .and_then(|watch| thread::Builder::new().stack_size(STACK_BYTES).spawn(move || watch.run()).map(drop));
    match started {
        // The kernel has no pressure stall information, or it is disabled.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EOPNOTSUPP)) => {}
        Err(error) => report::say(&format!("watch memory: {error}")),
        Ok(()) => {}
    }
}

impl Watch {
    fn open() -> io::Result<Watch> {
        let mut pressure = File::options().read(true).write(true).open("/proc/pressure/memory")?;
        pressure.write_all(TRIGGER)?;
        let killer = File::options().write(true).open("/proc/sysrq-trigger")?;
        let (meminfo, kernel_log) = (File::open("/proc/meminfo")?, KernelLog::open().ok());
        let watch = Watch { pressure, meminfo, kernel_log, killer };
        // The kernel allocates a buffer at the first read.
        let _ = watch.is_short();
        Ok(watch)
    }

    /// Neither allocates memory, which may be short, nor takes a lock, which a forked child would inherit. Runs on a
    /// separate thread because the main thread blocks while it starts a program.
    fn run(mut self) {
        let mut thrashing = Thrashing::default();
        loop {
            let mut fds = [PollFd::new(self.pressure.as_fd(), PollFlags::POLLPRI)];
            let woken = poll(&mut fds, PollTimeout::NONE);
            let events = fds[0].revents().unwrap_or(PollFlags::empty());
            if matches!(woken, Err(error) if error != Errno::EINTR) || events.contains(PollFlags::POLLERR) {
                return;
            }
            if !events.contains(PollFlags::POLLPRI) {
                continue;
            }
            if self.kernel_log.as_mut().is_some_and(KernelLog::take_kills) {
                // A program that the kernel killed by itself is exiting.
                thrashing.note_kill(Instant::now());
            }
            if thrashing.note(Instant::now(), self.is_short()) {
                // The kernel never kills this process, or one with an oom_score_adj of -1000.
                let _ = self.killer.write_all(b"f");
            }
        }
    }

    /// Whether almost no memory is left for programs.
    fn is_short(&self) -> bool {
        let mut buffer = [0; MEMINFO_BYTES];
        let Ok(count) = self.meminfo.read_at(&mut buffer, 0) else { return false };
        buffer.get(..count).and_then(Memory::parse).is_some_and(Memory::is_short)
    }
}

/// Values of /proc/meminfo, in KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Memory {
    total: u64,
    /// Free, or reclaimable without swapping.
    available: u64,
    /// File pages, including the code of programs.
    files: u64,
    swap_free: u64,
}

impl Memory {
    fn parse(text: &[u8]) -> Option<Memory> {
        let text = str::from_utf8(text).ok()?;
        let field = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim_end_matches("kB").trim().parse().ok()
        };
        let files = u64::checked_add(field("Active(file)")?, field("Inactive(file)")?)?;
        // The kernel may not support swap.
        let swap_free = field("SwapFree").unwrap_or(0);
        Some(Memory { total: field("MemTotal")?, available: field("MemAvailable")?, files, swap_free })
    }

    /// Whether almost no memory is left. Free swap counts as available: programs still make progress, if slowly.
    fn is_short(self) -> bool {
        let available = self.available.saturating_add(self.swap_free);
        available < (self.total / AVAILABLE_DIVISOR).min(AVAILABLE_MAX_KIB) && self.files < self.total / FILES_DIVISOR
    }
}

/// Counts consecutive seconds of thrashing.
#[derive(Debug, Default)]
struct Thrashing {
    seconds: u32,
    last: Option<Instant>,
    /// When a program was last killed.
    killed: Option<Instant>,
}

impl Thrashing {
    /// A program was killed, and has [`KILL_INTERVAL`] to exit.
    fn note_kill(&mut self, now: Instant) {
        self.killed = Some(now);
    }

    /// Records a second in which programs waited for memory. Returns whether a program must be killed.
    fn note(&mut self, now: Instant, is_short: bool) -> bool {
        let is_consecutive = self.last.is_some_and(|last| now.duration_since(last) <= MAX_GAP);
        self.last = Some(now);
        self.seconds = match (is_short, is_consecutive) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => self.seconds + 1,
        };
        let killed_recently = self.killed.is_some_and(|killed| now.duration_since(killed) < KILL_INTERVAL);
        let must_kill = self.seconds >= SECONDS_MAX && !killed_recently;
        if must_kill {
            self.killed = Some(now);
        }
        must_kill
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From a guest with 192 MiB in which `tail /dev/zero` has used up all memory.
    const MEMINFO: &str = "MemTotal:         158228 kB\nMemFree:            2036 kB\nMemAvailable:       6648 kB\n\
        Active(file):         44 kB\nInactive(file):       40 kB\nSwapTotal:             0 kB\nSwapFree:              0 kB\n\
        SReclaimable:       9264 kB\nHugePages_Total:       0\n";
    const THRASHING: Memory = Memory { total: 158_228, available: 6648, files: 84, swap_free: 0 };

    #[test]
    fn thrashing_differs_from_reading_much() {
        assert_eq!(Memory::parse(MEMINFO.as_bytes()), Some(THRASHING));
        assert!(THRASHING.is_short());
        let with = |available, files| Memory { available, files, ..THRASHING };
        // In the same guest: walking through many files, reading a large file, and the same with less memory available.
        assert!(![with(27_292, 3492), with(13_404, 9668), with(9000, 6000)].into_iter().any(Memory::is_short));
        assert!(!Memory { swap_free: 100_000, ..THRASHING }.is_short());
        assert!(!Memory { total: 4 << 20, available: AVAILABLE_MAX_KIB, ..THRASHING }.is_short());
    }

    #[test]
    fn a_missing_value_ends_nothing() {
        assert_eq!(Memory::parse(b""), None);
        assert_eq!(Memory::parse(&[0xff; 64]), None);
        assert_eq!(Memory::parse(MEMINFO.replace("6648", "x").as_bytes()), None);
        assert_eq!(Memory::parse(MEMINFO.replace("44 kB", "18446744073709551615 kB").as_bytes()), None);
        assert_eq!(Memory::parse(MEMINFO.replace("SwapFree", "Other").as_bytes()), Some(THRASHING));
    }

    #[test]
    fn only_seconds_in_a_row_without_memory_are_thrashing() {
        let start = Instant::now();
        let verdicts = |seconds: &[(u64, bool)]| -> Vec<bool> {
            let mut thrashing = Thrashing::default();
            let note = |&(at, is_short)| thrashing.note(start + Duration::from_secs(at), is_short);
            seconds.iter().map(note).collect()
        };
        assert_eq!(verdicts(&[(1, true), (2, true), (3, true), (4, true)]), [false, false, true, false]);
        let more: Vec<(u64, bool)> = (1..=40).map(|second| (second, true)).collect();
        let killed: Vec<usize> =
            verdicts(&more).iter().enumerate().filter(|(_, kills)| **kills).map(|(at, _)| at).collect();
        assert_eq!(killed, [2, 2 + KILL_INTERVAL.as_secs() as usize]);
        let mut thrashing = Thrashing::default();
        thrashing.note_kill(start);
        let kills = (1..=40).find(|second| thrashing.note(start + Duration::from_secs(*second), true));
        assert_eq!(kills, Some(KILL_INTERVAL.as_secs()), "after a kill of the kernel's own");
        assert_eq!(verdicts(&[(1, true), (2, true), (9, true), (10, true)]), [false; 4]);
        assert_eq!(verdicts(&[(1, true), (2, true), (3, false), (4, true), (5, true)]), [false; 5]);
    }
}
