//! Cgroups for another process: created before it starts, entered by that process, and removed together with all
//! processes left in them.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::group::{self, CgroupPath, Controller, Version};
use super::{PERIOD_US, ResourceLimits};

/// The time within which a killed process exits, unless it is blocked on a device.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Cgroups with a common name, one per hierarchy.
#[derive(Debug)]
pub struct ChildCgroup {
    dirs: Vec<PathBuf>,
}

impl ChildCgroup {
    /// Creates cgroups with this name and with CPU and memory `limits`.
    pub fn new(name: &str, limits: &ResourceLimits) -> Result<ChildCgroup> {
        // From here on, dropping it cleans up.
        let mut cgroup = ChildCgroup { dirs: Vec::new() };
        if let Some(millicpus) = limits.cpu_millicpus {
            let (version, dir) = cgroup.place(name, Controller::Cpu)?;
            let quota_us = u64::from(millicpus) * PERIOD_US / 1000;
            match version {
                Version::V1 => {
                    group::write(&dir, "cpu.cfs_period_us", &PERIOD_US.to_string())?;
                    group::write(&dir, "cpu.cfs_quota_us", &quota_us.to_string())?;
                }
                Version::V2 => group::write(&dir, "cpu.max", &format!("{quota_us} {PERIOD_US}"))?,
            }
        }
        if let Some(bytes) = limits.memory_bytes {
            let (version, dir) = cgroup.place(name, Controller::Memory)?;
            let file = if version == Version::V1 { "memory.limit_in_bytes" } else { "memory.max" };
            group::write(&dir, file, &bytes.to_string())?;
        }
        Ok(cgroup)
    }

    /// The files to which a process writes `0` to enter the cgroups.
    pub fn procs_files(&self) -> Result<Vec<File>> {
        let open = |dir: &PathBuf| {
            let path = dir.join("cgroup.procs");
            File::options().write(true).open(&path).with_context(|| format!("open {}", path.display()))
        };
        self.dirs.iter().map(open).collect()
    }

    /// Kills all remaining processes and removes the cgroups.
    pub fn remove(mut self) -> Result<()> {
        std::mem::take(&mut self.dirs).iter().try_for_each(|dir| remove(dir))
    }

    /// Returns a cgroup in which `controller` is enabled, creating it if necessary.
    fn place(&mut self, name: &str, controller: Controller) -> Result<(Version, PathBuf)> {
        let place = CgroupPath::of_this_process(controller)?;
        let place = place.with_context(|| format!("this host has no cgroup controller for {}", controller.name()))?;
        let mut refused = None;
        // In cgroup v2 a single cgroup serves all controllers, because a process is a member of only one.
        let made = self.dirs.first().filter(|_| place.version == Version::V2).and_then(|dir| dir.parent());
        for parent in made.map_or_else(|| parents(&place), |parent| vec![parent.to_owned()]) {
            let dir = parent.join(name);
            match self.make(&place, &parent, &dir, controller) {
                Ok(()) => return Ok((place.version, dir)),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.context("no suitable parent cgroup")?).with_context(|| format!("create the cgroup {name}"))
    }

    fn make(&mut self, place: &CgroupPath, parent: &Path, dir: &PathBuf, controller: Controller) -> Result<()> {
        if place.version == Version::V2 && !group::enables(parent, controller) {
            // Shared configuration is changed only at the root, where it affects everyone.
            ensure!(
                parent == place.mount,
                "{} does not delegate the {} controller",
                parent.display(),
                controller.name()
            );
            group::write(parent, "cgroup.subtree_control", &format!("+{}", controller.name()))?;
        }
        if !self.dirs.contains(dir) {
            fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
            self.dirs.push(dir.clone());
        }
        Ok(())
    }
}

impl Drop for ChildCgroup {
    fn drop(&mut self) {
        for dir in &self.dirs {
            let _ = remove(dir);
        }
    }
}

/// Removes all cgroups whose names start with `prefix`, in all hierarchies, and kills the processes in them: remains of
/// an engine or of a killed process.
pub fn remove_left_behind(prefix: &str) -> Result<()> {
    let mut dirs = group::mounts()?;
    for controller in [Controller::Cpu, Controller::Memory] {
        dirs.extend(CgroupPath::of_this_process(controller)?.iter().flat_map(parents));
    }
    for entry in dirs.iter().filter_map(|dir| fs::read_dir(dir).ok()).flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(prefix) && entry.file_type().is_ok_and(|kind| kind.is_dir())
        {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

/// Possible parents of our cgroup, best first: the current cgroup or, in v2, which does not allow a populated cgroup to
/// distribute resources, the root or the current cgroup's parent.
fn parents(place: &CgroupPath) -> Vec<PathBuf> {
    match (place.version, place.home.parent()) {
        (Version::V1, _) => vec![place.home.clone()],
        (Version::V2, Some(beside)) if place.home != place.mount && beside != place.mount => {
            vec![place.mount.clone(), beside.to_owned()]
        }
        (Version::V2, _) => vec![place.mount.clone()],
    }
}

/// Removes a cgroup and its descendants.
fn remove(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    let started = Instant::now();
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if started.elapsed() > GONE_WITHIN => {
                bail!("remove the cgroup {}: {error}", dir.display())
            }
            Err(_) => {}
        }
        let processes = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
        for process in processes.lines().filter_map(|line| line.parse().ok().and_then(Pid::from_raw)) {
            // The process may already have exited.
            let _ = kill_process(process, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(1));
    }
}
