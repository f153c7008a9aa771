//! Cgroups of processes whose number is limited (Documentation/admin-guide/cgroup-v2.rst).

use std::fs;
use std::io;

use husk_protocol::Container;

use crate::errors::{Context, Failure};
use crate::report;
use crate::root::make_dir;

const ROOT: &str = "/sys/fs/cgroup";
const DIR: &str = "/sys/fs/cgroup/machine";

/// Sets the maximum number of processes and threads in the cgroup together, which is created if necessary.
pub fn limit_processes(max: u32) -> Result<(), Failure> {
    make_dir(DIR)?;
    set_processes_max(DIR, max.into()).context("limit the number of processes (the kernel needs CONFIG_CGROUP_PIDS)")
}

fn set_processes_max(dir: &str, max: u64) -> io::Result<()> {
    fs::write(format!("{ROOT}/cgroup.subtree_control"), "+pids")?;
    fs::write(format!("{dir}/pids.max"), max.to_string())
}

/// Moves this process to the cgroup.
pub fn join() -> io::Result<()> {
    fs::write(format!("{DIR}/cgroup.procs"), "0")
}

fn container(id: &str) -> String {
    format!("{ROOT}/container-{id}")
}

/// Creates the cgroup of a container with its limit of processes, which the kernel may not support.
pub fn create_container(container: &Container) {
    let dir = self::container(&container.id);
    if fs::create_dir(&dir).is_err() {
        return;
    }
    if let Some(max) = container.processes_max
        && let Err(error) = set_processes_max(&dir, max)
    {
        report::say(&format!("set pids.max of the container: {error}"));
    }
}

/// Moves this process to the cgroup of a container, if there is one.
pub fn join_container(id: &str) {
    let _ = fs::write(format!("{}/cgroup.procs", container(id)), "0");
}

/// Removes the cgroup of a container, whose processes have ended.
pub fn remove_container(id: &str) {
    let _ = fs::remove_dir(container(id));
}
