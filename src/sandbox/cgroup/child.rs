//! Control groups around a process that somebody else is: made before it starts, entered by it, and removed with what
//! is left in it.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::group::{self, CgroupPath, Controller, Version};
use super::{PERIOD_US, ResourceLimits};

/// A killed process has gone after so long, or waits for a device.
const GONE_WITHIN: Duration = Duration::from_secs(5);

/// Groups with one name, one for each tree of them.
#[derive(Debug)]
pub struct ChildCgroup {
    dirs: Vec<PathBuf>,
}

impl ChildCgroup {
    /// Makes groups of this name that keep `limits`: processor time and memory.
    pub fn new(name: &str, limits: &ResourceLimits) -> Result<ChildCgroup> {
        // From here on dropping it cleans up.
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

    /// What a process writes `0` to in order to enter.
    pub fn procs_files(&self) -> Result<Vec<File>> {
        let open = |dir: &PathBuf| {
            let path = dir.join("cgroup.procs");
            File::options().write(true).open(&path).with_context(|| format!("open {}", path.display()))
        };
        self.dirs.iter().map(open).collect()
    }

    /// Kills who is still in it, and takes it away.
    pub fn remove(mut self) -> Result<()> {
        std::mem::take(&mut self.dirs).iter().try_for_each(|dir| remove(dir))
    }

    /// A group that `controller` is given out to, made if need be.
    fn place(&mut self, name: &str, controller: Controller) -> Result<(Version, PathBuf)> {
        let place = CgroupPath::of_this_process(controller)?;
        let place = place.with_context(|| format!("this host has no cgroup controller for {}", controller.name()))?;
        let mut refused = None;
        // In version 2 one group does for all: a process is in one only.
        let made = self.dirs.first().filter(|_| place.version == Version::V2).and_then(|dir| dir.parent());
        for parent in made.map_or_else(|| parents(&place), |parent| vec![parent.to_owned()]) {
            let dir = parent.join(name);
            match self.make(&place, &parent, &dir, controller) {
                Ok(()) => return Ok((place.version, dir)),
                Err(error) => refused = Some(error),
            }
        }
        Err(refused.context("there is no place for it")?).with_context(|| format!("create the cgroup {name}"))
    }

    fn make(&mut self, place: &CgroupPath, parent: &Path, dir: &PathBuf, controller: Controller) -> Result<()> {
        if place.version == Version::V2 && !group::gives_out(parent, controller) {
            // What others share is changed at the root only, where it is everybody's.
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

/// Removes all groups whose names begin so, with who is in them, of all controllers and whoever made them there: what
/// an engine or a killed process has left.
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

/// Where a group of ours may stand, best first: in ours, or in version 2, where that is not divided while we are in it,
/// at the root or beside ours.
fn parents(place: &CgroupPath) -> Vec<PathBuf> {
    match (place.version, place.home.parent()) {
        (Version::V1, _) => vec![place.home.clone()],
        (Version::V2, Some(beside)) if place.home != place.mount && beside != place.mount => {
            vec![place.mount.clone(), beside.to_owned()]
        }
        (Version::V2, _) => vec![place.mount.clone()],
    }
}

/// Removes a group and those in it.
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
            // It may have ended by itself.
            let _ = kill_process(process, Signal::KILL);
        }
        thread::sleep(Duration::from_millis(1));
    }
}
