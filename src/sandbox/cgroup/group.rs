//! A single cgroup: where it may be created, and how it is created, entered and removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

/// Cgroups are named after the process that created them.
const PREFIX: &str = "husk-";

/// How long an empty cgroup may be busy.
const REMOVE_TIMEOUT: Duration = Duration::from_secs(1);

/// The cgroup versions (cgroups(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy per controller.
    V1,
    /// A single unified hierarchy.
    V2,
}

/// The controllers in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Controller {
    /// CPU time.
    Cpu,
    /// Memory.
    Memory,
}

impl Controller {
    /// The name, which is the same in both versions.
    pub fn name(self) -> &'static str {
        match self {
            Controller::Cpu => "cpu",
            Controller::Memory => "memory",
        }
    }
}

/// The location of this process in a hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupPath {
    /// The cgroup version.
    pub version: Version,
    /// The mount point of the hierarchy.
    pub mount: PathBuf,
    /// The current cgroup.
    pub home: PathBuf,
}

impl CgroupPath {
    /// The current cgroup for `controller`. `None` if the host does not have the controller.
    pub fn of_this_process(controller: Controller) -> Result<Option<CgroupPath>> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("read {path}"));
        Ok(CgroupPath::find(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?, controller))
    }

    /// Parses /proc/self/cgroup and /proc/self/mountinfo. On a hybrid host only one of the versions has the controller;
    /// v1 takes precedence.
    fn find(groups: &str, mounts: &str, controller: Controller) -> Option<CgroupPath> {
        let group = |wanted: &dyn Fn(&str) -> bool| {
            groups.lines().find_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                wanted(controllers).then_some(path)
            })
        };
        let has_it = |controllers: &str| controllers.split(',').any(|name| name == controller.name());
        let (version, path, kind) = match group(&has_it) {
            Some(path) => (Version::V1, path, "cgroup"),
            None => (Version::V2, group(&str::is_empty)?, "cgroup2"),
        };
        mounts.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let (root, mount) = (mount.next()?, PathBuf::from(mount.next()?));
            let mut file_system = file_system.split(' ');
            let right_kind = file_system.next()? == kind;
            if !right_kind || version == Version::V1 && !has_it(file_system.nth(1)?) {
                return None;
            }
            // In a container the mount may start below the root of the hierarchy.
            let below = Path::new(path).strip_prefix(root).ok()?;
            // Without the trailing slash that joining an empty path leaves.
            Some(CgroupPath { version, home: mount.join(below).components().collect(), mount })
        })
    }

    /// Creates a cgroup with `controller` enabled and moves this process with all of its threads into it. It is created
    /// in the current cgroup or, if that cannot have child cgroups, next to it.
    pub fn enter(&self, controller: Controller) -> Result<Group> {
        let group = self.enter_in(&self.home, controller);
        match (group, self.home.parent()) {
            (Err(_), Some(parent)) if self.may_create_in(parent, controller) => self.enter_in(parent, controller),
            (group, _) => group,
        }
    }

    /// Whether a cgroup may be created next to the current one, in `parent`: only if `parent` already enables the
    /// controller.
    fn may_create_in(&self, parent: &Path, controller: Controller) -> bool {
        self.home != self.mount && self.version == Version::V2 && enables(parent, controller)
    }

    fn enter_in(&self, parent: &Path, controller: Controller) -> Result<Group> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_left_behind(parent);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = parent.join(format!("{PREFIX}{}-{count}", std::process::id()));
        match fs::create_dir(&dir) {
            // Left behind by a killed process with the same PID.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("create the cgroup {}", dir.display()))?,
        }
        // From here on, dropping it cleans up.
        let CgroupPath { version, mount, home } = self.clone();
        let mut group = Group { version, parent_is_root: *parent == mount, dir, home, enabled: Vec::new() };
        group.write("cgroup.procs", "0")?;
        group.enable(controller)?;
        Ok(group)
    }
}

/// The mount points of all cgroup hierarchies.
pub(super) fn mounts() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("read /proc/self/mountinfo")?;
    let mount = |line: &str| {
        let (mount, file_system) = line.split_once(" - ")?;
        let is_one = file_system.starts_with("cgroup ") || file_system.starts_with("cgroup2 ");
        mount.split(' ').nth(4).filter(|_| is_one).map(PathBuf::from)
    };
    Ok(mounts.lines().filter_map(mount).collect())
}

/// A cgroup created by this process, with this process in it. Dropping it moves the process back to its previous
/// cgroup.
#[derive(Debug)]
pub struct Group {
    /// Which kind it is.
    pub version: Version,
    /// Its directory.
    pub dir: PathBuf,
    home: PathBuf,
    parent_is_root: bool,
    /// The controllers that were enabled in the parent for this cgroup, to be disabled again.
    enabled: Vec<Controller>,
}

impl Group {
    /// Enables `controller` in the parent. Must be called when no process is left in the parent: a v2 cgroup has either
    /// processes or children with controllers.
    pub fn enable(&mut self, controller: Controller) -> Result<()> {
        let Some(parent) = self.dir.parent().filter(|_| self.version == Version::V2) else { return Ok(()) };
        if !enables(parent, controller) {
            write(parent, "cgroup.subtree_control", &format!("+{}", controller.name()))?;
            // The root's configuration is shared by all.
            if !self.parent_is_root {
                self.enabled.push(controller);
            }
        }
        Ok(())
    }

    /// Writes to one of the cgroup's files.
    pub fn write(&self, file: &str, value: &str) -> Result<()> {
        write(&self.dir, file, value)
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Errors here are repaired when the process exits and when the next process removes stale cgroups.
        if let Some(parent) = self.dir.parent() {
            for controller in &self.enabled {
                let _ = write(parent, "cgroup.subtree_control", &format!("-{}", controller.name()));
            }
        }
        let _ = write(&self.home, "cgroup.procs", "0");
        // A thread that was joined is a member until the kernel has released it, which takes longer under a CPU limit.
        let until = Instant::now() + REMOVE_TIMEOUT;
        let is_busy = || fs::remove_dir(&self.dir).is_err_and(|error| error.kind() == io::ErrorKind::ResourceBusy);
        while is_busy() && Instant::now() < until {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Whether `parent`, a v2 cgroup, enables `controller` for its children.
pub(super) fn enables(parent: &Path, controller: Controller) -> bool {
    let controllers = fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap_or_default();
    controllers.split_whitespace().any(|name| name == controller.name())
}

/// Writes to a file of a cgroup.
pub(super) fn write(group: &Path, file: &str, value: &str) -> Result<()> {
    let path = group.join(file);
    // Written in one call and never created: in a directory that is not a cgroup this fails.
    let written =
        fs::File::options().write(true).open(&path).and_then(|mut file| io::Write::write(&mut file, value.as_bytes()));
    match written {
        Ok(count) if count == value.len() => Ok(()),
        Ok(_) => bail!("write {value} to {}: short write", path.display()),
        Err(error) => Err(anyhow!(error).context(format!("write {value} to {}", path.display()))),
    }
}

/// Removes cgroups in `parent` whose process no longer exists. The kernel refuses to remove populated ones.
fn remove_left_behind(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else { return };
    for entry in entries.flatten() {
        let name = entry.file_name();
        let process = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-'));
        let Some(process) = process.and_then(|(process, _)| process.parse::<u32>().ok()) else { continue };
        if !Path::new("/proc").join(process.to_string()).exists() {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(groups: &str, mounts: &str) -> Option<(Version, String, String)> {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        CgroupPath::find(groups, mounts, Controller::Cpu)
            .map(|place| (place.version, text(place.mount), text(place.home)))
    }

    #[test]
    fn the_current_cgroup_is_found_in_both_versions() {
        let (v1, v2) = ("/sys/fs/cgroup/cpu,cpuacct".to_owned(), "/sys/fs/cgroup".to_owned());
        let mounts_v1 = "25 30 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                         26 30 0:24 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct\n\
                         27 30 0:25 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let groups_v1 = "4:memory:/a\n3:cpu,cpuacct:/user.slice\n2:cpuset:/\n0::/b\n";
        assert_eq!(find(groups_v1, mounts_v1), Some((Version::V1, v1.clone(), format!("{v1}/user.slice"))));
        let mounts_v2 = "26 25 0:23 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";
        let groups_v2 = "0::/user.slice/user-0.slice/session-1.scope\n";
        let home = format!("{v2}/user.slice/user-0.slice/session-1.scope");
        assert_eq!(find(groups_v2, mounts_v2), Some((Version::V2, v2.clone(), home)));
        assert_eq!(find("0::/\n", mounts_v2), Some((Version::V2, v2.clone(), v2)));
    }

    #[test]
    fn v1_controllers_have_separate_hierarchies() {
        let mounts = "25 30 0:23 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      26 30 0:24 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let home = |controller| CgroupPath::find("4:memory:/a\n3:cpu:/b\n0::/\n", mounts, controller).unwrap().home;
        assert_eq!(home(Controller::Memory), Path::new("/sys/fs/cgroup/memory/a"));
        assert_eq!(home(Controller::Cpu), Path::new("/sys/fs/cgroup/cpu/b"));
    }

    #[test]
    fn a_mount_below_the_root_is_supported() {
        let mounts = "26 25 0:23 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        let home = "/sys/fs/cgroup/x".to_owned();
        assert_eq!(find("0::/docker/ab/x\n", mounts), Some((Version::V2, "/sys/fs/cgroup".to_owned(), home)));
        // A path outside of the mount is inaccessible.
        assert_eq!(find("0::/docker/cd\n", mounts), None);
        assert_eq!(find("0::/../x\n", "26 25 0:23 /a /sys/fs/cgroup rw - cgroup2 cgroup rw\n"), None);
    }

    #[test]
    fn a_host_without_cgroups_is_supported() {
        assert_eq!(find("", ""), None);
        assert_eq!(find("3:cpu:/\n", "26 25 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), None);
        assert_eq!(find("garbage\n:\n::\n0::\n", "garbage - \n - cgroup2\n1 2 3 / - cgroup2 x y\n"), None);
    }

    #[test]
    fn only_cgroups_of_dead_processes_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let ours = format!("husk-{}-0", std::process::id());
        // The largest PID is 4194304.
        for name in ["husk-4294967295-0", "husk-4294967295-7", &ours, "husk-x-0", "user.slice", "husk-5000000"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        remove_left_behind(dir.path());
        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        left.sort();
        let mut expected = [ours.as_str(), "husk-5000000", "husk-x-0", "user.slice"];
        expected.sort_unstable();
        assert_eq!(left, expected);
    }

    #[test]
    fn a_directory_that_is_not_a_cgroup_is_rejected() {
        let dir = tempfile::tempdir().unwrap();
        for version in [Version::V1, Version::V2] {
            let place = CgroupPath { version, mount: dir.path().to_owned(), home: dir.path().to_owned() };
            let error = format!("{:#}", place.enter_in(dir.path(), Controller::Cpu).unwrap_err());
            assert!(error.contains("cgroup.procs") && !error.contains('\n'), "{error}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "it left something behind");
        }
    }
}
