//! The guest side of `husk top`, a part of init's own program like [`copy`](crate::copy): the image may have no `ps`.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;

use crate::{cgroup, identity};

/// The kernel's unit of CPU time for programs (`USER_HZ`), on all architectures that matter.
const TICKS_PER_SECOND: u64 = 100;
/// The major numbers of pseudo-terminals.
const PTS_MAJORS: std::ops::Range<u32> = 136..144;
/// PID 1 is init, and PID 2 the parent of the kernel's threads.
const KERNEL: u32 = 2;

/// A process, from /proc/PID/stat.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    parent: u32,
    terminal: u32,
    cpu_ticks: u64,
    start_ticks: u64,
}

/// Prints all processes except init, this one and the kernel's threads, or those of a container. Returns the exit code.
pub fn list(container: Option<String>) -> i32 {
    let passwd = fs::read("/etc/passwd").unwrap_or_default();
    let boot_s = boot_seconds(&fs::read_to_string("/proc/stat").unwrap_or_default());
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    let mut output = io::stdout().lock();
    let is_listed = |pid: u32| container.as_ref().is_none_or(|id| cgroup::has_process(id, pid));
    for pid in pids.into_iter().filter(|pid| *pid > KERNEL && *pid != std::process::id() && is_listed(*pid)) {
        // It may have ended meanwhile.
        let Some(line) = line(pid, &passwd, boot_s) else { continue };
        if output.write_all(line.as_bytes()).is_err() {
            return 1;
        }
    }
    0
}

fn line(pid: u32, passwd: &[u8], boot_s: u64) -> Option<String> {
    let dir = format!("/proc/{pid}");
    let stat = Stat::parse(&String::from_utf8_lossy(&fs::read(format!("{dir}/stat")).ok()?))?;
    if stat.parent == KERNEL {
        return None;
    }
    let uid = fs::metadata(&dir).ok()?.uid();
    let user = identity::name_of(uid, passwd).unwrap_or_else(|| uid.to_string());
    let command = command(&fs::read(format!("{dir}/cmdline")).unwrap_or_default(), &stat.name);
    let start_s = boot_s + stat.start_ticks / TICKS_PER_SECOND;
    let Stat { parent, cpu_ticks, .. } = stat;
    let terminal = terminal(stat.terminal);
    Some(format!("{user}\t{pid}\t{parent}\t{cpu_ticks}\t{start_s}\t{terminal}\t{command}\n"))
}

/// The arguments in one line; for a process without any, its name in brackets.
fn command(arguments: &[u8], name: &str) -> String {
    let arguments = String::from_utf8_lossy(arguments.strip_suffix(b"\0").unwrap_or(arguments)).into_owned();
    let text = if arguments.is_empty() { format!("[{name}]") } else { arguments };
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn terminal(number: u32) -> String {
    // As in `new_encode_dev` of the kernel.
    let (major, minor) = (number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00);
    match major {
        0 => "?".into(),
        major if PTS_MAJORS.contains(&major) => format!("pts/{}", (major - PTS_MAJORS.start) << 8 | minor),
        _ => format!("{major}:{minor}"),
    }
}

fn boot_seconds(stat: &str) -> u64 {
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "));
    line.and_then(|seconds| seconds.trim().parse().ok()).unwrap_or(0)
}

impl Stat {
    /// Parses the file. The name is in parentheses, and may contain some.
    fn parse(text: &str) -> Option<Stat> {
        let (front, back) = text.rsplit_once(')')?;
        let fields: Vec<&str> = back.split_whitespace().collect();
        // proc_pid_stat(5) counts from one, and the first of these is the third.
        let field = |number: usize| fields.get(number.checked_sub(3)?)?.parse::<u64>().ok();
        Some(Stat {
            name: front.split_once('(')?.1.to_owned(),
            parent: field(4)?.try_into().ok()?,
            // Negative if there is none in some kernels.
            terminal: field(7).unwrap_or(0).try_into().ok()?,
            cpu_ticks: field(14)?.checked_add(field(15)?)?,
            start_ticks: field(22)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_be_called_anything() {
        let text = "12 (a) b (c) S 7 12 12 34817 12 4194560 1 0 0 0 5 6 0 0 20 0 1 0 4200 1 2 3";
        let stat = Stat { name: "a) b (c".into(), parent: 7, terminal: 34817, cpu_ticks: 11, start_ticks: 4200 };
        assert_eq!(Stat::parse(text), Some(stat));
        for malformed in ["", "12 (a", "12 (a) S", "12 (a) S x 1 1 0 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1"] {
            assert_eq!(Stat::parse(malformed), None, "{malformed}");
        }
        assert_eq!((command(b"sh\0-c\0a\tb\0", "sh"), command(b"", "name")), ("sh -c a b".into(), "[name]".into()));
    }

    #[test]
    fn terminals_have_their_names() {
        assert_eq!((terminal(0), terminal(34817), terminal(4 << 8 | 64)), ("?".into(), "pts/1".into(), "4:64".into()));
        assert_eq!(boot_seconds("cpu 1\nbtime 1700000000\n"), 1_700_000_000);
    }
}
