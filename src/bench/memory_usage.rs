//! Memory usage of running instances, as counted by the host's kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use super::host_info::meminfo_kib;

/// Returns the proportional set size of `roots`, their descendants, and `others` (proc_pid_smaps(5), Pss). Processes
/// that have exited count as zero.
pub fn pss_kib(roots: &[u32], others: &[u32]) -> u64 {
    let mut processes = descendants(roots, &parents());
    processes.extend(others);
    let of_one = |pid| meminfo_kib(&read(&format!("/proc/{pid}/smaps_rollup")), "Pss");
    processes.iter().filter_map(of_one).sum()
}

/// Returns the size of the host's page cache. Excludes shared memory (Shmem), which is part of the PSS.
pub fn page_cache_kib() -> u64 {
    let meminfo = read("/proc/meminfo");
    let kib = |key| meminfo_kib(&meminfo, key).unwrap_or(0);
    (kib("Cached") + kib("Buffers")).saturating_sub(kib("Shmem"))
}

/// Returns the memory available to new processes without swapping, in MiB.
pub fn available_mib() -> u64 {
    meminfo_kib(&read("/proc/meminfo"), "MemAvailable").unwrap_or(0) >> 10
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// Returns the parent of every process.
fn parents() -> BTreeMap<u32, u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeMap::new() };
    let process = |entry: fs::DirEntry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        Some((pid, parent(&read(&format!("/proc/{pid}/stat")))?))
    };
    entries.flatten().filter_map(process).collect()
}

/// Returns the fourth field of /proc/PID/stat. Fields are counted from the closing parenthesis, since the name may
/// contain anything (proc_pid_stat(5)).
fn parent(stat: &str) -> Option<u32> {
    let (_, behind) = stat.rsplit_once(')')?;
    behind.split_whitespace().nth(1)?.parse().ok()
}

fn descendants(roots: &[u32], parents: &BTreeMap<u32, u32>) -> BTreeSet<u32> {
    let mut found: BTreeSet<u32> = roots.iter().copied().collect();
    loop {
        let more: Vec<u32> = parents
            .iter()
            .filter(|(pid, parent)| found.contains(parent) && !found.contains(pid))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            return found;
        }
        found.extend(more);
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn descendants_are_found_at_any_depth() {
        let parents = BTreeMap::from([(2, 1), (3, 2), (4, 3), (9, 8)]);
        assert_eq!(descendants(&[2], &parents), BTreeSet::from([2, 3, 4]));
    }

    #[test]
    fn a_process_name_with_parentheses_is_parsed() {
        assert_eq!(parent("12 (a) S 3) S 7 1 1"), Some(7));
    }

    #[test]
    fn a_process_below_a_shell_is_counted_with_it() {
        let mut shell = Command::new("sh").args(["-c", "sleep 60 & wait"]).stdin(Stdio::null()).spawn().unwrap();
        let started = std::time::Instant::now();
        while descendants(&[shell.id()], &parents()).len() < 2 {
            assert!(started.elapsed().as_secs() < 10);
        }
        let found = descendants(&[shell.id()], &parents());
        let (own, none) = (pss_kib(&[shell.id()], &[]), pss_kib(&[u32::MAX], &[]));
        for pid in found {
            let _ = Command::new("kill").arg(pid.to_string()).status();
        }
        shell.wait().unwrap();
        assert!(own > 0 && none == 0, "{own} {none}");
    }
}
