//! What contenders without an engine get made by the bench: their share of the host, and a root that forgets what is changed in it.

use std::fs::{self, DirBuilder, File};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

use super::{Ground, Job, is_root};
use crate::foreign::one_line;
use crate::sandbox::cgroup::Limits;
use crate::sandbox::cgroup::pen::Pen;

/// Which limits are kept by control groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Processor time and memory.
    Container,
    /// Processor time, where it is less than that of all virtual processors: the rest is the machine's own.
    Machine,
}

impl Held {
    fn limits(self, ground: &Ground) -> Limits {
        let whole = ground.millicpus().is_multiple_of(1000);
        match self {
            Held::Container => Limits {
                cpu_millicpus: Some(ground.millicpus()),
                memory_bytes: Some(ground.limits.memory_mib << 20),
                cpu_shares: None,
            },
            Held::Machine => Limits { cpu_millicpus: Some(ground.millicpus()).filter(|_| !whole), ..Limits::default() },
        }
    }

    /// Groups for an instance; `None` where they cannot be had, which [`Held::note`] has said.
    pub fn pen(self, ground: &Ground, contender: &str, job: &Job) -> Option<Pen> {
        Pen::new(&ground.instance(contender, job), &self.limits(ground)).ok()
    }

    /// What the results have to say of limits that cannot be kept.
    pub fn note(self, ground: &Ground) -> Option<String> {
        let limits = self.limits(ground);
        if limits == Limits::default() {
            return None;
        }
        let refused = Pen::new(&format!("{}-probe", ground.id()), &limits).and_then(Pen::remove).err()?;
        let refused = one_line(&format!("{refused:#}"));
        Some(format!("its limits of processor time and memory were not applied: {refused}"))
    }
}

/// The doors of a pen, if there is one.
pub fn doors(pen: Option<&Pen>) -> Result<Vec<File>> {
    pen.map_or(Ok(Vec::new()), Pen::doors)
}

/// The root for an instance whose folder is given: with changes that go with the folder for root, as it is for others.
pub fn root(ground: &Ground, folder: &Path) -> Result<PathBuf> {
    if !is_root() {
        return Ok(ground.root.clone());
    }
    let root = folder.join("root");
    let (upper, work) = (folder.join("upper"), folder.join("work"));
    for path in [&root, &upper, &work] {
        DirBuilder::new().mode(0o755).create(path).with_context(|| format!("make {}", path.display()))?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", ground.root.display(), upper.display(), work.display());
    let options = std::ffi::CString::new(options).context("the folder's path has a NUL")?;
    mount("overlay", &root, "overlay", MountFlags::empty(), &*options)
        .with_context(|| format!("mount an overlay at {}", root.display()))?;
    Ok(root)
}

/// What the results have to say of a root that cannot be changed.
pub fn root_note() -> Option<String> {
    (!is_root())
        .then(|| "its root is read-only, since only root may mount an overlay here; /tmp is in memory".to_owned())
}

/// A folder on the bench's disk for who has no disk of its own, if the job wants one.
pub fn scratch(job: &Job, folder: &Path) -> Result<Option<PathBuf>> {
    if job.scratch_mib.is_none() {
        return Ok(None);
    }
    let scratch = folder.join("scratch");
    fs::create_dir(&scratch).with_context(|| format!("make {}", scratch.display()))?;
    Ok(Some(scratch))
}
