//! From a list of processors to threads that run on no others.
//!
//! By each thread's own mask (sched_setaffinity(2)) and not by a control group: it needs no rights on any host, costs a
//! system call, and a machine that was put into a cpuset by others can be kept to a part of that.

use std::fs;

use anyhow::{Context, Result, bail};

use crate::sys::affinity::{self, CpuMask};

/// Keeps this process, all of its threads and those they start, to `cpus` of the host's.
///
/// Fails, with nothing changed where there is one thread, if one of them is not there or not ours to use.
pub fn keep_to(cpus: &[u32]) -> Result<()> {
    let wanted = CpuMask::of(cpus);
    // A thread that starts meanwhile has the mask of the one that starts it, which may be the old one.
    loop {
        let mut changed = false;
        for thread in threads()? {
            match affinity::get(thread) {
                // It has ended.
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

/// Keeps one thread to the processors; the host silently leaves out those that it cannot have, so they are looked for.
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

    /// What a program may use that tests run in.
    fn ours() -> Vec<u32> {
        let mask = affinity::get(0).unwrap();
        (0..1024).filter(|cpu| mask.has(*cpu)).collect()
    }

    // The masks are of the whole process, and so of the other tests: one test has all that changes them.
    #[test]
    fn all_threads_are_kept_to_what_was_asked_for_and_a_processor_that_is_not_there_is_named() {
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
            keep_to(one).unwrap();
            barrier.wait();
            assert_eq!(thread.join().unwrap(), one);
        });
        assert_eq!(ours(), one);
        assert_eq!(std::thread::spawn(ours).join().unwrap(), one, "those that start later too");
        for wrong in [vec![8000], vec![one[0], 8000], vec![u32::MAX]] {
            let error = keep_to(&wrong).unwrap_err().to_string();
            let named = wrong[wrong.len() - 1];
            assert!(error.starts_with(&format!("CPU {named} does not exist or is not available")), "{error}");
            assert_eq!(ours(), one, "nothing was changed");
        }
        keep_to(&all).unwrap();
        assert_eq!(ours(), all);
    }
}
