//! Pins a process's threads to a set of CPUs.
//!
//! This uses each thread's affinity mask (sched_setaffinity(2)) instead of a cgroup: it needs no privileges, costs one
//! system call, and works within a cpuset that the process was already placed in.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::sys::affinity::{self, CpuMask};

/// Pins this process, including all of its threads and those they start, to the host's CPUs `cpus`.
///
/// Fails if a CPU does not exist or is not available to this process. If there is only one thread, nothing has changed
/// then.
pub fn pin_to(cpus: &[u32]) -> Result<()> {
    let wanted = CpuMask::of(cpus);
    // A thread created meanwhile inherits the mask of its creator, which may be the old one.
    loop {
        let mut changed = false;
        for thread in threads()? {
            match affinity::get(thread) {
                // The thread has exited.
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => continue,
                Err(error) => return Err(error).context("get the CPU affinity of a thread"),
                Ok(mask) if mask == wanted => continue,
                Ok(mask) => set(thread, &mask, &wanted, cpus)?,
            }
            changed = true;
        }
        if !changed {
            return Ok(());
        }
    }
}

/// Pins one thread. The kernel silently ignores unavailable CPUs, so the result is checked.
fn set(thread: i32, before: &CpuMask, wanted: &CpuMask, cpus: &[u32]) -> Result<()> {
    let set = affinity::set(thread, wanted).and_then(|()| affinity::get(thread));
    match set {
        Ok(now) if now == *wanted => Ok(()),
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
        Err(error) if error.raw_os_error() != Some(libc::EINVAL) => {
            Err(error).context("set the CPU affinity of a thread")
        }
        found => {
            let _ = affinity::set(thread, before);
            let had = found.unwrap_or_default();
            let missing = cpus.iter().find(|cpu| !had.has(**cpu)).copied().unwrap_or_default();
            bail!("CPU {missing} does not exist or is not available to this process: use --cpuset with other CPUs");
        }
    }
}

/// The threads of this process.
fn threads() -> Result<Vec<i32>> {
    let dir = "/proc/self/task";
    let entries = fs::read_dir(dir).with_context(|| format!("read {dir}"))?;
    Ok(entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    /// The CPUs available to the tests.
    fn ours() -> Vec<u32> {
        let mask = affinity::get(0).unwrap();
        (0..1024).filter(|cpu| mask.has(*cpu)).collect()
    }

    // The mask applies to the whole process and therefore to other tests, so all changes are made in a single test.
    #[test]
    fn all_threads_are_pinned_and_an_unavailable_cpu_is_reported() {
        let all = ours();
        let one = &all[all.len() - 1..];
        let barrier = Barrier::new(2);
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                barrier.wait();
                barrier.wait();
                ours()
            });
            barrier.wait();
            pin_to(one).unwrap();
            barrier.wait();
            assert_eq!(thread.join().unwrap(), one);
        });
        assert_eq!(ours(), one);
        assert_eq!(std::thread::spawn(ours).join().unwrap(), one, "those that start later too");
        for wrong in [vec![8000], vec![one[0], 8000], vec![u32::MAX]] {
            let error = pin_to(&wrong).unwrap_err().to_string();
            let named = wrong[wrong.len() - 1];
            assert!(error.starts_with(&format!("CPU {named} does not exist or is not available")), "{error}");
            assert_eq!(ours(), one, "nothing was changed");
        }
        pin_to(&all).unwrap();
        assert_eq!(ours(), all);
    }
}
