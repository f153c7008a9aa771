//! The cgroup of a container on the host (runtime-spec, config-linux.md, "Control groups"): its machine's processes are in it.
//!
//! The engine names it: by a path below the root of each hierarchy, or with systemd by `slice:prefix:name`. Whoever is not the host's
//! root may not be allowed to make it. The machine's size then is the only limit.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use super::config::{Linux, Resources};
use super::machine::HOST_OVERHEAD_MIB;
use crate::sys::namespaces::is_hosts_root;

const ROOT: &str = "/sys/fs/cgroup";
/// How long the kernel may take until a cgroup whose processes have ended can be removed.
const REMOVAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The names of systemd on a message bus.
const SYSTEMD: &str = "org.freedesktop.systemd1";
const MANAGER: &str = "org.freedesktop.systemd1.Manager";
/// The controllers of version 1 that are joined where they are mounted.
const V1: [&str; 7] = ["memory", "cpu,cpuacct", "cpuset", "pids", "freezer", "blkio", "devices"];

/// Makes and enters the container's cgroup, for a machine with this memory. Returns whether there is one that ends with the container: whoever is
/// not the host's root goes without one that cannot be made, unless limits need it.
pub fn provide(linux: &Linux, is_systemds: bool, memory_mib: u64) -> Result<bool> {
    let path = &linux.cgroups_path;
    if path.is_empty() {
        return Ok(false);
    }
    let entered = || {
        if is_systemds {
            start_scope(path)?;
        }
        Cgroup::of(path, is_systemds)?.map_or(Ok(()), |cgroup| cgroup.enter(&linux.resources, memory_mib))
    };
    match entered() {
        Ok(()) => Ok(true),
        Err(error) if is_hosts_root() || !is_systemds && !is_refusal(&error) => Err(error),
        Err(error) if linux.resources.cpu.is_limited() => {
            Err(error).context("limits of CPUs need a cgroup, which this user cannot have")
        }
        Err(error) => {
            log::info!("the machine has no cgroup of its own: {error:#}");
            Ok(false)
        }
    }
}

/// Whether the reason is that the cgroups are not this user's.
fn is_refusal(error: &anyhow::Error) -> bool {
    let kind = error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    matches!(kind, Some(ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem))
}

/// The directories of a container's cgroup: one in version 2, else one for each controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
    is_v2: bool,
}

impl Cgroup {
    /// The cgroup that `path` names in a configuration; `None` for the one that this process is in.
    pub fn of(path: &str, is_systemds: bool) -> Result<Option<Cgroup>> {
        if path.is_empty() {
            return Ok(None);
        }
        let relative = match is_systemds {
            true if is_hosts_root() => below_slices(path)?,
            true => format!("{}/{}", users_manager()?, below_slices(path)?),
            false => path.into(),
        };
        let relative = relative.trim_start_matches('/');
        ensure!(
            !relative.split('/').any(|part| matches!(part, "" | "." | "..")),
            "linux.cgroupsPath {path:?} is not a path of a cgroup"
        );
        let root = Path::new(ROOT);
        let is_v2 = root.join("cgroup.controllers").exists();
        let dirs = if is_v2 {
            vec![root.join(relative)]
        } else {
            let mounted = V1.iter().map(|name| root.join(name)).filter(|dir| dir.join("tasks").exists());
            mounted.map(|dir| dir.join(relative)).collect()
        };
        Ok(Some(Cgroup { dirs, is_v2 }))
    }

    /// Creates the cgroup, moves this process there, and limits it, for a machine with this memory. Fails if others are in it, since it
    /// ends with the container.
    fn enter(&self, resources: &Resources, memory_mib: u64) -> Result<()> {
        for dir in &self.dirs {
            let is_other = |pid: Pid| pid.as_raw_nonzero().get().unsigned_abs() != std::process::id();
            ensure!(!processes(dir).any(is_other), "the cgroup {} is in use by other processes", dir.display());
        }
        self.try_enter(resources, memory_mib).inspect_err(|_| {
            // This process is in none yet, unless systemd has made it, which removes it then.
            self.remove_if_unused();
        })
    }

    fn try_enter(&self, resources: &Resources, memory_mib: u64) -> Result<()> {
        for dir in &self.dirs {
            if self.is_v2 {
                enable_controllers(dir);
            }
            fs::create_dir_all(dir).with_context(|| format!("create the cgroup {}", dir.display()))?;
            inherit_cpus(dir);
        }
        self.limit(resources, memory_mib)?;
        self.dirs.iter().try_for_each(|dir| enter(dir, 0))
    }

    /// Moves these processes there as well.
    pub fn add(&self, pids: impl IntoIterator<Item = u32>) -> Result<()> {
        pids.into_iter().try_for_each(|pid| self.dirs.iter().try_for_each(|dir| enter(dir, pid)))
    }

    /// Sets the limits that `resources` has; negative ones are none. Memory is that of the whole machine, which has `memory_mib`: the
    /// limit is that and what husk takes.
    pub fn limit(&self, resources: &Resources, memory_mib: u64) -> Result<()> {
        let cpu = &resources.cpu;
        let none = if self.is_v2 { "max" } else { "-1" };
        let memory = resources.memory.limit.filter(|limit| *limit != 0).map(|limit| match limit {
            ..0 => none.to_owned(),
            _ => (memory_mib.saturating_add(HOST_OVERHEAD_MIB) << 20).to_string(),
        });
        let period = cpu.period.filter(|period| *period > 0).unwrap_or(100_000);
        let quota = cpu.quota.filter(|quota| *quota != 0);
        let quota = quota.map(|quota| if quota < 0 { none.to_owned() } else { quota.to_string() });
        let cpus = Some(cpu.cpus.clone()).filter(|cpus| !cpus.is_empty());
        let values: Vec<(&str, Option<String>)> = if self.is_v2 {
            vec![("memory.max", memory), ("cpu.max", cpu.max()), ("cpu.weight", cpu.weight()), ("cpuset.cpus", cpus)]
        } else {
            vec![
                ("memory.limit_in_bytes", memory),
                ("cpu.cfs_period_us", quota.as_ref().map(|_| period.to_string())),
                ("cpu.cfs_quota_us", quota),
                ("cpu.shares", cpu.shares.filter(|shares| *shares > 1).map(|shares| shares.to_string())),
                ("cpuset.cpus", cpus),
            ]
        };
        values.into_iter().filter_map(|(name, value)| Some((name, value?))).try_for_each(|(name, value)| {
            let place = self.dirs.iter().map(|dir| dir.join(name)).find(|path| path.exists());
            if place.is_none() && name.starts_with("memory.") && !is_hosts_root() {
                // The controller is not this user's, and the machine's own memory is a limit.
                return Ok(());
            }
            let place = place.with_context(|| format!("limit {name} to {value}: this host has no such controller"))?;
            fs::write(&place, &value).with_context(|| format!("write {value} to {}", place.display()))
        })
    }

    /// Kills what is left in the cgroup, and removes it.
    pub fn remove(&self) -> Result<()> {
        let until = Instant::now() + REMOVAL_TIMEOUT;
        self.dirs.iter().try_for_each(|dir| {
            while let Err(error) = fs::remove_dir(dir) {
                match error.kind() {
                    ErrorKind::NotFound => break,
                    ErrorKind::ResourceBusy if Instant::now() < until => {
                        remove_children(dir);
                        processes(dir).for_each(|pid| kill_process(pid, Signal::KILL).unwrap_or_default());
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    _ => return Err(error).with_context(|| format!("remove the cgroup {}", dir.display())),
                }
            }
            Ok(())
        })
    }

    /// Removes it unless processes are in it: it may be that of others.
    pub fn remove_if_unused(&self) {
        self.dirs.iter().for_each(|dir| drop(fs::remove_dir(dir)));
    }

    /// The processes in the cgroup.
    pub fn processes(&self) -> impl Iterator<Item = Pid> {
        self.dirs.first().into_iter().flat_map(|dir| processes(dir))
    }
}

/// Moves the process `pid`, or this one if that is 0, to the cgroup `dir`.
fn enter(dir: &Path, pid: u32) -> Result<()> {
    fs::write(dir.join("cgroup.procs"), pid.to_string()).with_context(|| format!("enter the cgroup {}", dir.display()))
}

fn processes(dir: &Path) -> impl Iterator<Item = Pid> + use<> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    let pids: Vec<Pid> = text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect();
    pids.into_iter()
}

/// Removes what an agent in the container may have made below its cgroup, as far as it is empty.
fn remove_children(dir: &Path) {
    let children = fs::read_dir(dir).into_iter().flatten().flatten().map(|entry| entry.path());
    for child in children.filter(|path| path.is_dir() && !path.is_symlink()) {
        processes(&child).for_each(|pid| kill_process(pid, Signal::KILL).unwrap_or_default());
        remove_children(&child);
        let _ = fs::remove_dir(child);
    }
}

/// Lets the cgroups above `dir` have the controllers that limits need, as far as their owners allow it.
fn enable_controllers(dir: &Path) {
    let above: Vec<&Path> = dir.ancestors().skip(1).take_while(|above| above.starts_with(ROOT)).collect();
    for above in above.into_iter().rev() {
        let _ = fs::create_dir(above);
        for controller in ["memory", "cpu", "cpuset", "pids", "io"] {
            let _ = fs::write(above.join("cgroup.subtree_control"), format!("+{controller}"));
        }
    }
}

/// In version 1, no process can enter a cgroup before it has CPUs and memory nodes.
fn inherit_cpus(dir: &Path) {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let is_empty = |dir: &Path| fs::read_to_string(dir.join(name)).is_ok_and(|text| text.trim().is_empty());
        let missing: Vec<&Path> =
            dir.ancestors().take_while(|above| above.starts_with(ROOT) && is_empty(above)).collect();
        for dir in missing.into_iter().rev() {
            let from = dir.parent().and_then(|above| fs::read_to_string(above.join(name)).ok());
            let _ = from.map(|value| fs::write(dir.join(name), value));
        }
    }
}

/// `system.slice:husk:ID` is system.slice/husk-ID.scope.
fn below_slices(path: &str) -> Result<String> {
    let [slice, prefix, name] = path.split(':').collect::<Vec<_>>()[..] else {
        bail!("linux.cgroupsPath {path:?}: with --systemd-cgroup it is SLICE:PREFIX:NAME");
    };
    let slice = if slice.is_empty() { default_slice() } else { slice };
    let stem = slice.strip_suffix(".slice").with_context(|| format!("{slice:?} is not the name of a slice"))?;
    let mut dirs = Vec::new();
    if stem != "-" {
        for (at, _) in stem.match_indices('-').chain([(stem.len(), "")]) {
            dirs.push(format!("{}.slice", stem.get(..at).unwrap_or_default()));
        }
    }
    let unit = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}-{name}") };
    let unit = if name.ends_with(".slice") { name.to_owned() } else { format!("{unit}.scope") };
    Ok(dirs.into_iter().chain([unit]).collect::<Vec<_>>().join("/"))
}

fn default_slice() -> &'static str {
    if is_hosts_root() { "system.slice" } else { "user.slice" }
}

/// The cgroup of the manager of this user's units, below which theirs are.
fn users_manager() -> Result<String> {
    let mut command = busctl();
    command.args(["get-property", SYSTEMD, "/org/freedesktop/systemd1", MANAGER, "ControlGroup"]);
    let output = command.output().context("ask systemd for this user's cgroup: run busctl")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let path = text.trim().strip_prefix("s \"").and_then(|text| text.strip_suffix('"'));
    let why = String::from_utf8_lossy(&output.stderr);
    path.map(str::to_owned).with_context(|| format!("ask systemd for this user's cgroup: {}", why.trim()))
}

/// `busctl` for the manager of this user's units. In a user namespace, its root is this user.
fn busctl() -> Command {
    let mut command = Command::new("busctl");
    if !is_hosts_root() {
        command.arg("--user");
    }
    command.stdin(Stdio::null());
    command
}

/// Asks systemd for the scope `path` (`SLICE:PREFIX:NAME`) with this process in it, so that it leaves the cgroup to us.
fn start_scope(path: &str) -> Result<()> {
    let [slice, prefix, name] = path.split(':').collect::<Vec<_>>()[..] else { return Ok(()) };
    let unit = if prefix.is_empty() { format!("{name}.scope") } else { format!("{prefix}-{name}.scope") };
    let slice = if slice.is_empty() { default_slice() } else { slice };
    let pid = std::process::id().to_string();
    let mut command = busctl();
    command.args(["call", SYSTEMD, "/org/freedesktop/systemd1", MANAGER]);
    command.args(["StartTransientUnit", "ssa(sv)a(sa(sv))", &unit, "fail", "3"]);
    command.args(["PIDs", "au", "1", &pid, "Delegate", "b", "true", "Slice", "s", slice, "0"]);
    let output = command.output().context("ask systemd for a scope: run busctl")?;
    ensure!(
        output.status.success(),
        "ask systemd for the scope {unit}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    // The job has to be done before the cgroup exists.
    let until = Instant::now() + REMOVAL_TIMEOUT;
    while !fs::read_to_string("/proc/self/cgroup").is_ok_and(|text| text.contains(&unit)) {
        ensure!(Instant::now() < until, "systemd has not created the scope {unit}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scope_lies_in_its_slices() {
        assert_eq!(below_slices("system.slice:husk:abc").unwrap(), "system.slice/husk-abc.scope");
        assert_eq!(below_slices("a-b-c.slice:x:1").unwrap(), "a.slice/a-b.slice/a-b-c.slice/x-1.scope");
        assert_eq!(below_slices(":husk:abc").unwrap(), "system.slice/husk-abc.scope");
        assert_eq!(below_slices("-.slice::abc").unwrap(), "abc.scope");
        assert!(below_slices("/a/b").is_err() && below_slices("a:b:c").is_err());
    }

    #[test]
    fn a_cgroup_does_not_leave_its_hierarchy() {
        assert_eq!(Cgroup::of("", false).unwrap(), None);
        assert!(Cgroup::of("/a/../../etc", false).is_err() && Cgroup::of("a//b", false).is_err());
        let cgroup = Cgroup::of("/machine/abc", false).unwrap().unwrap();
        assert!(cgroup.dirs.iter().all(|dir| dir.starts_with(ROOT) && dir.ends_with("machine/abc")));
    }
}
