//! The cgroup of processes whose number is limited (Documentation/admin-guide/cgroup-v2.rst).

use std::fs;
use std::io;

use crate::errors::{Context, Failure};
use crate::root::make_dir;

const ROOT: &str = "/sys/fs/cgroup";
const DIR: &str = "/sys/fs/cgroup/machine";

/// Sets the maximum number of processes and threads in the cgroup together, which is created if necessary.
pub fn limit_processes(max: u32) -> Result<(), Failure> {
    make_dir(DIR)?;
    fs::write(format!("{ROOT}/cgroup.subtree_control"), "+pids")
        .and_then(|()| fs::write(format!("{DIR}/pids.max"), max.to_string()))
        .context("limit the number of processes (the kernel needs CONFIG_CGROUP_PIDS)")
}

/// Moves this process to the cgroup.
pub fn join() -> io::Result<()> {
    fs::write(format!("{DIR}/cgroup.procs"), "0")
}
