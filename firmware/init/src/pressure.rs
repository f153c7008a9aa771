//! Ends thrashing. When programs have taken all memory, the kernel evicts their code and reads it again, for minutes, until
//! reclaim frees nothing any more and its OOM killer acts. Init requests that after a few seconds.
//!
//! The kernel wakes the thread only while programs wait for memory (pressure stall information). Programs that read many
//! files wait as well, which is no reason to kill one: memory can still be reclaimed then.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::report;

/// Wakes the thread whenever some program waited for memory for 600,000 µs within 1,000,000 µs
/// (Documentation/accounting/psi.rst).
const TRIGGER: &[u8] = b"some 600000 1000000\0";
/// The maximum time between two wakeups of consecutive seconds.
const IN_A_ROW: Duration = Duration::from_millis(2500);
/// The number of consecutive seconds of thrashing after which a program is killed.
const SECONDS_MAX: u32 = 3;
/// The time that a killed program has to exit and release its memory, which takes seconds while others use the CPUs.
const REST: Duration = Duration::from_secs(30);
/// A guest thrashes only if less than this part of its memory, as a divisor, is available.
const LEFT_DIVISOR: u64 = 16;
/// A guest with more available memory than this does not thrash, however large it is.
const LEFT_MAX_KIB: u64 = 32 << 10;
/// A guest thrashes only if file pages take less than this part of its memory, as a divisor. A program that reads files
/// holds more.
const FILES_DIVISOR: u64 = 64;
/// The maximum sizes of /proc/meminfo and /proc/vmstat.
const MEMINFO_BYTES: usize = 4096;
const VMSTAT_BYTES: usize = 8192;
/// The stack size of the thread.
const STACK_BYTES: usize = 64 << 10;

/// Files that are open before memory is short.
struct Watch {
    pressure: File,
    meminfo: File,
    vmstat: File,
    killer: File,
}

/// Starts the thread, if the kernel supports pressure stall information. Must be called after the signals that this process
/// waits for are blocked.
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
        let (meminfo, vmstat) = (File::open("/proc/meminfo")?, File::open("/proc/vmstat")?);
        let watch = Watch { pressure, meminfo, vmstat, killer };
        // The kernel allocates buffers for both at the first read.
        let _ = (watch.is_short(), watch.kills());
        Ok(watch)
    }

    /// Neither allocates nor takes a lock, because of `fork` and because memory is short. This is a separate thread because
    /// the main one waits while a program is being started.
    fn run(mut self) {
        let mut thrashing = Thrashing::default();
        let mut kills = self.kills();
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
            let kills_now = self.kills();
            if std::mem::replace(&mut kills, kills_now) != kills_now {
                // A program that the kernel killed by itself is exiting.
                thrashing.note_kill(Instant::now());
            }
            if thrashing.note(Instant::now(), self.is_short()) {
                // It never kills this process or those with an oom_score_adj of -1000.
                let _ = self.killer.write_all(b"f");
            }
        }
    }

    /// How many programs the kernel has killed because memory was short.
    fn kills(&self) -> Option<u64> {
        let mut buffer = [0; VMSTAT_BYTES];
        let count = self.vmstat.read_at(&mut buffer, 0).ok()?;
        buffer.get(..count).and_then(parse_kills)
    }

    /// Whether almost no memory is left for programs.
    fn is_short(&self) -> bool {
        let mut buffer = [0; MEMINFO_BYTES];
        let Ok(count) = self.meminfo.read_at(&mut buffer, 0) else { return false };
        buffer.get(..count).and_then(Memory::parse).is_some_and(Memory::is_short)
    }
}

/// How many programs were killed because memory was short, from the text of /proc/vmstat.
fn parse_kills(text: &[u8]) -> Option<u64> {
    let line = str::from_utf8(text).ok()?.lines().find_map(|line| line.strip_prefix("oom_kill "))?;
    line.trim().parse().ok()
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

    /// While there is free swap, programs make progress, however slowly.
    fn is_short(self) -> bool {
        let left = self.available.saturating_add(self.swap_free);
        left < (self.total / LEFT_DIVISOR).min(LEFT_MAX_KIB) && self.files < self.total / FILES_DIVISOR
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
    /// A program was killed, and has [`REST`] to exit.
    fn note_kill(&mut self, now: Instant) {
        self.killed = Some(now);
    }

    /// Counts one second in which programs waited. Returns whether a program is to be killed.
    fn note(&mut self, now: Instant, is_short: bool) -> bool {
        let goes_on = self.last.is_some_and(|last| now.duration_since(last) <= IN_A_ROW);
        self.last = Some(now);
        self.seconds = match (is_short, goes_on) {
            (false, _) => 0,
            (true, false) => 1,
            (true, true) => self.seconds + 1,
        };
        let rests = self.killed.is_some_and(|killed| now.duration_since(killed) < REST);
        let is_enough = self.seconds >= SECONDS_MAX && !rests;
        if is_enough {
            self.killed = Some(now);
        }
        is_enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From a guest with 192 MiB in which `tail /dev/zero` has taken all memory.
    const MEMINFO: &str = "MemTotal:         158228 kB\nMemFree:            2036 kB\nMemAvailable:       6648 kB\n\
        Active(file):         44 kB\nInactive(file):       40 kB\nSwapTotal:             0 kB\nSwapFree:              0 kB\n\
        SReclaimable:       9264 kB\nHugePages_Total:       0\n";
    const THRASHING: Memory = Memory { total: 158_228, available: 6648, files: 84, swap_free: 0 };

    #[test]
    fn thrashing_differs_from_reading_much() {
        assert_eq!(Memory::parse(MEMINFO.as_bytes()), Some(THRASHING));
        assert!(THRASHING.is_short());
        let with = |available, files| Memory { available, files, ..THRASHING };
        // In the same guest: a walk through many files, a large file that is read, and the same with less memory left.
        assert!(![with(27_292, 3492), with(13_404, 9668), with(9000, 6000)].into_iter().any(Memory::is_short));
        assert!(!Memory { swap_free: 100_000, ..THRASHING }.is_short());
        assert!(!Memory { total: 4 << 20, available: LEFT_MAX_KIB, ..THRASHING }.is_short());
    }

    #[test]
    fn what_is_not_said_ends_nothing() {
        assert_eq!(parse_kills(b"pgfault 3\noom_kill 12\noom_kill_x 4\n"), Some(12));
        assert_eq!(
            (parse_kills(b"pgfault 3\n"), parse_kills(b"oom_kill x\n"), parse_kills(&[0xff])),
            (None, None, None)
        );
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
        assert_eq!(killed, [2, 2 + REST.as_secs() as usize]);
        let mut thrashing = Thrashing::default();
        thrashing.note_kill(start);
        let kills = (1..=40).find(|second| thrashing.note(start + Duration::from_secs(*second), true));
        assert_eq!(kills, Some(REST.as_secs()), "after a kill of the kernel's own");
        assert_eq!(verdicts(&[(1, true), (2, true), (9, true), (10, true)]), [false; 4]);
        assert_eq!(verdicts(&[(1, true), (2, true), (3, false), (4, true), (5, true)]), [false; 5]);
    }
}
