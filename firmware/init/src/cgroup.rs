//! Cgroups of processes that are limited together (Documentation/admin-guide/cgroup-v2.rst): those of the machine's process, and those
//! of each container.

use std::ffi::OsString;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use husk_protocol::Container;

use crate::errors::{Context, Failure};
use crate::report;
use crate::root::make_dir;

const ROOT: &str = "/sys/fs/cgroup";
const DIR: &str = "/sys/fs/cgroup/machine";

/// Sets the maximum number of processes and threads in the cgroup together, which is created if necessary.
pub fn limit_processes(max: u32) -> Result<(), Failure> {
    make_dir(DIR)?;
    let set = write_limit(Path::new(DIR), "pids.max", &max.to_string());
    set.context("limit the number of processes (the kernel needs CONFIG_CGROUP_PIDS)")
}

/// Moves this process to the cgroup.
pub fn join() -> io::Result<()> {
    fs::write(format!("{DIR}/cgroup.procs"), "0")
}

/// Writes a file of the cgroup `dir`, whose controller is enabled if it is one's.
fn write_limit(dir: &Path, name: &str, value: &str) -> io::Result<()> {
    if let Some((controller, _)) = name.split_once('.').filter(|(controller, _)| *controller != "cgroup") {
        fs::write(format!("{ROOT}/cgroup.subtree_control"), format!("+{controller}"))?;
    }
    fs::write(dir.join(name), value)
}

fn container(id: &str) -> PathBuf {
    PathBuf::from(format!("{ROOT}/container-{id}"))
}

/// Creates the cgroup of a container with its limits, which the kernel may not support.
pub fn create_container(container: &Container) {
    let dir = self::container(&container.id);
    // What an earlier container of that name has left has its limits.
    remove_container(&container.id);
    if let Err(error) = fs::create_dir(&dir) {
        if error.kind() == io::ErrorKind::AlreadyExists {
            report::say(&format!("the cgroup of an earlier container {} is in use", container.id));
        }
        return;
    }
    for (name, value) in &container.limits {
        if let Err(error) = write_limit(&dir, name, value) {
            report::say(&format!("set {name} of the container to {value}: {error}"));
        }
    }
}

/// Moves this process to the cgroup of a container, if there is one.
pub fn join_container(id: &str) {
    let procs = container(id).join("cgroup.procs");
    if procs.exists()
        && let Err(error) = fs::write(&procs, "0")
    {
        report::say(&format!("enter the cgroup of container {id}: {error}"));
    }
}

/// Whether the kernel has killed processes of a container because memory was short.
pub fn ran_out_of_memory(id: &str) -> bool {
    fs::read_to_string(container(id).join("memory.events")).is_ok_and(|events| has_kills(&events))
}

fn has_kills(events: &str) -> bool {
    let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse::<u64>().ok()).is_some_and(|count| count > 0)
}

/// Kills all processes of a container.
pub fn kill_container(id: &str) {
    let _ = fs::write(container(id).join("cgroup.kill"), "1");
}

/// Removes the cgroup of a container, with those that it has made below, if its processes have ended.
pub fn remove_container(id: &str) {
    remove(&container(id));
}

fn remove(dir: &Path) {
    let below = fs::read_dir(dir).into_iter().flatten().flatten();
    below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())).for_each(|entry| remove(&entry.path()));
    let _ = fs::remove_dir(dir);
}

/// Whether the process `pid` is in the cgroup of a container, or below.
pub fn has_process(id: &str, pid: u32) -> bool {
    let place = format!("0::/container-{id}");
    let of_process = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    of_process
        .lines()
        .any(|line| line.strip_prefix(&place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

/// Prints files of a container's cgroup. `words` are its ID and their names. Returns the exit code.
pub fn print(words: impl Iterator<Item = OsString>) -> i32 {
    with_files(words, |dir, name| {
        let text = fs::read_to_string(dir.join(name)).map_err(|error| format!("read {name}: {error}"))?;
        let lines: String = text.lines().map(|line| format!("{name} {line}\n")).collect();
        io::stdout().write_all(lines.as_bytes()).map_err(|error| error.to_string())
    })
}

/// Writes files of a container's cgroup. `words` are its ID and `NAME=VALUE`. Returns the exit code.
pub fn change(words: impl Iterator<Item = OsString>) -> i32 {
    with_files(words, |dir, word| {
        let (name, value) = word.split_once('=').ok_or("no value")?;
        write_limit(dir, name, value).map_err(|error| format!("set {name} to {value}: {error}"))
    })
}

fn with_files(mut words: impl Iterator<Item = OsString>, act: impl Fn(&Path, &str) -> Result<(), String>) -> i32 {
    let id = words.next().unwrap_or_default();
    let dir = container(&id.to_string_lossy());
    let failed = words.filter_map(|word| act(&dir, &word.to_string_lossy()).err()).inspect(|why| eprintln!("{why}"));
    i32::from(failed.count() > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kills_for_want_of_memory_are_counted_by_the_cgroup() {
        assert!(has_kills("low 0\nhigh 0\nmax 9\noom 1\noom_kill 1\noom_group_kill 0\n"));
        for none in ["max 9\noom 1\noom_kill 0\noom_group_kill 3\n", "oom_kill x\n", ""] {
            assert!(!has_kills(none), "{none}");
        }
    }
}
