//! Resource limits and a disposable root for contenders that have no engine to provide them.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

use super::{Fixture, Job, is_root};
use crate::foreign::one_line;
use crate::sandbox::cgroup::ResourceLimits;
use crate::sandbox::cgroup::child::ChildCgroup;

/// Which limits are enforced by control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitScope {
    /// CPU time and memory.
    Container,
    /// CPU time, if it is less than that of all virtual CPUs. The VMM limits the rest itself.
    Machine,
}

impl LimitScope {
    fn limits(self, fixture: &Fixture) -> ResourceLimits {
        let whole = fixture.millicpus().is_multiple_of(1000);
        match self {
            LimitScope::Container => ResourceLimits {
                cpu_millicpus: Some(fixture.millicpus()),
                memory_bytes: Some(fixture.limits.memory_mib << 20),
                cpu_shares: None,
            },
            LimitScope::Machine => ResourceLimits {
                cpu_millicpus: Some(fixture.millicpus()).filter(|_| !whole),
                ..ResourceLimits::default()
            },
        }
    }

    /// Creates the control groups of an instance. Returns `None` if that is impossible, which [`LimitScope::note`]
    /// reports.
    pub fn cgroup(self, fixture: &Fixture, contender: &str, job: &Job) -> Option<ChildCgroup> {
        ChildCgroup::new(&fixture.instance_name(contender, job), &self.limits(fixture)).ok()
    }

    /// Returns a note for the report if limits cannot be enforced.
    pub fn note(self, fixture: &Fixture) -> Option<String> {
        let limits = self.limits(fixture);
        if limits == ResourceLimits::default() {
            return None;
        }
        let refused =
            ChildCgroup::new(&format!("{}-probe", fixture.id()), &limits).and_then(ChildCgroup::remove).err()?;
        let refused = one_line(&format!("{refused:#}"));
        Some(format!("CPU and memory limits are not enforced: {refused}"))
    }
}

/// Opens the control groups for a new process to join.
pub fn procs_files(cgroup: Option<&ChildCgroup>) -> Result<Vec<File>> {
    cgroup.map_or(Ok(Vec::new()), ChildCgroup::procs_files)
}

/// Returns the root of an instance. For root, it is an overlay whose changes are in the instance's directory;
/// otherwise, it is shared and read-only.
pub fn root(fixture: &Fixture, dir: &Path) -> Result<PathBuf> {
    if !is_root() {
        return Ok(fixture.root.clone());
    }
    let root = dir.join("root");
    let (upper, work) = (dir.join("upper"), dir.join("work"));
    for path in [&root, &upper, &work] {
        DirBuilder::new().mode(0o755).create(path).with_context(|| format!("create {}", path.display()))?;
    }
    let options =
        format!("lowerdir={},upperdir={},workdir={}", fixture.root.display(), upper.display(), work.display());
    let options = std::ffi::CString::new(options).context("the path contains a NUL byte")?;
    mount("overlay", &root, "overlay", MountFlags::empty(), &*options)
        .with_context(|| format!("mount an overlay at {}", root.display()))?;
    Ok(root)
}

/// Returns a note for the report if the root is read-only.
pub fn root_note() -> Option<String> {
    (!is_root()).then(|| "its root is read-only, because overlays require root; /tmp is in memory".to_owned())
}

/// Creates a scratch directory on the host's disk, for contenders without disks of their own.
pub fn scratch(job: &Job, dir: &Path) -> Result<Option<PathBuf>> {
    if job.scratch_mib.is_none() {
        return Ok(None);
    }
    let scratch = dir.join("scratch");
    fs::create_dir(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    Ok(Some(scratch))
}
