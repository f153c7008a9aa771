//! Crashes for the isolation scenario.

use std::fs;
use std::thread;
use std::time::Duration;

use crate::memory::PAGE_BYTES;
use crate::say;
use crate::sys::Pages;

const BLOCK_BYTES: usize = 16 << 20;
/// A crashing kernel discards data that is still on its way out of the machine.
const WORD_TAKES: Duration = Duration::from_millis(100);

/// Uses memory until the process is killed. Returns if allocation fails, or at a maximum that protects other users of
/// the memory.
pub fn memory(at_most_mib: usize) -> u8 {
    // Makes the kernel's OOM killer choose this process.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    say::line(format_args!("ready"));
    for _ in 0..at_most_mib.div_ceil(BLOCK_BYTES >> 20) {
        match Pages::map(BLOCK_BYTES) {
            Ok(mut pages) => {
                pages.chunks_mut(PAGE_BYTES).for_each(|page| page.fill(1));
                std::mem::forget(pages);
            }
            Err(error) => {
                say::line(format_args!("fail crash map memory: {error}"));
                return 1;
            }
        }
    }
    say::line(format_args!("fail crash nothing stopped it at {at_most_mib} MiB"));
    1
}

/// Makes the kernel crash (Documentation/admin-guide/sysrq.rst: `c`). Returns if it did not.
pub fn kernel() -> u8 {
    say::line(format_args!("ready"));
    thread::sleep(WORD_TAKES);
    let why = match fs::write("/proc/sysrq-trigger", "c") {
        Ok(()) => "the kernel goes on".into(),
        Err(error) => format!("write /proc/sysrq-trigger: {error}"),
    };
    say::line(format_args!("fail crash {why}"));
    1
}
