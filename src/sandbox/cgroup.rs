//! From a number of processors to a limit that the host keeps: a control group of our own, with a quota of processor time.
//!
//! The whole process is held, so that a guest cannot earn time by making its devices work. A limit that cannot be had is an
//! error, never a word in a log.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow, bail};

/// Time is given out once in so long, as other tools do it.
const PERIOD_US: u64 = 100_000;
/// Groups are named for the process that made them.
const PREFIX: &str = "husk-";

/// Holds the process for as long as it exists; dropping it puts the process back where it came from.
#[derive(Debug)]
pub struct CpuHold {
    group: PathBuf,
    home: PathBuf,
    /// Where the group's controller was switched on for it, to be switched off again.
    switched_on: Option<PathBuf>,
}

/// Holds this process, all of its threads, to `limit_millicpus` thousandths of a processor's time.
///
/// Groups that processes left behind which were killed are removed on the way.
pub fn hold_cpus(limit_millicpus: u32) -> Result<CpuHold> {
    let read = |path| fs::read_to_string(path).with_context(|| format!("read {path}"));
    let place = Place::find(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?)
        .context("this host has no control groups for processor time: leave --cpus a whole number")?;
    let hold = place.hold_in(&place.home, limit_millicpus);
    let hold = match (hold, place.home.parent()) {
        // Where ours may not be divided there may be room beside it.
        (Err(_), Some(parent)) if place.may_stand_in(parent) => place.hold_in(parent, limit_millicpus),
        (hold, _) => hold,
    };
    hold.with_context(|| {
        let quota = f64::from(limit_millicpus) / 10.0;
        let limit = f64::from(limit_millicpus) / 1000.0;
        // Users' own groups are divided by systemd in the second version only.
        let start = match place.version {
            _ if is_root() => "systemd-run",
            Version::V1 => "sudo systemd-run",
            Version::V2 => "systemd-run --user",
        };
        format!(
            "hold the machine to {limit} CPUs (start it as `{start} --scope -p CPUQuota={quota}% husk ...`, with a whole \
             number of --cpus)"
        )
    })
}

fn is_root() -> bool {
    fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0)
}

/// The two kinds of control groups (cgroups(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Where processor time is given out to us.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    version: Version,
    /// The root of all groups, as far as we see.
    mount: PathBuf,
    /// The group that we are in.
    home: PathBuf,
}

impl Place {
    /// Looks for it in /proc/self/cgroup and /proc/self/mountinfo. On a host with both versions, only one of them gives out
    /// processor time: the first if it has it.
    fn find(groups: &str, mounts: &str) -> Option<Place> {
        let group = |wanted: &dyn Fn(&str) -> bool| {
            groups.lines().find_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                wanted(controllers).then_some(path)
            })
        };
        let gives_time = |controllers: &str| controllers.split(',').any(|controller| controller == "cpu");
        let (version, path, kind) = match group(&gives_time) {
            Some(path) => (Version::V1, path, "cgroup"),
            None => (Version::V2, group(&str::is_empty)?, "cgroup2"),
        };
        mounts.lines().find_map(|line| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut mount = mount.split(' ').skip(3);
            let (root, mount) = (mount.next()?, PathBuf::from(mount.next()?));
            let mut file_system = file_system.split(' ');
            let right_kind = file_system.next()? == kind;
            if !right_kind || version == Version::V1 && !gives_time(file_system.nth(1)?) {
                return None;
            }
            // In a container the mount may begin further down.
            let below = Path::new(path).strip_prefix(root).ok()?;
            // Without the slash behind it that joining nothing leaves.
            Some(Place { version, home: mount.join(below).components().collect(), mount })
        })
    }

    /// Whether a group may be made beside ours, in `parent`: if that already gives out processor time.
    fn may_stand_in(&self, parent: &Path) -> bool {
        self.home != self.mount && self.version == Version::V2 && gives_out_time(parent)
    }

    fn hold_in(&self, parent: &Path, limit_millicpus: u32) -> Result<CpuHold> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_left_behind(parent);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let group = parent.join(format!("{PREFIX}{}-{count}", std::process::id()));
        match fs::create_dir(&group) {
            // A process of our number that was killed.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("make the control group {}", group.display()))?,
        }
        // From here on dropping it cleans up.
        let mut hold = CpuHold { group, home: self.home.clone(), switched_on: None };
        write(&hold.group, "cgroup.procs", "0")?;
        let quota_us = (u64::from(limit_millicpus) * PERIOD_US / 1000).to_string();
        match self.version {
            Version::V1 => {
                write(&hold.group, "cpu.cfs_period_us", &PERIOD_US.to_string())?;
                write(&hold.group, "cpu.cfs_quota_us", &quota_us)?;
            }
            Version::V2 => {
                if !gives_out_time(parent) {
                    // Once nobody is left in it: a group has either processes or groups that it gives to.
                    write(parent, "cgroup.subtree_control", "+cpu")?;
                    hold.switched_on = (*parent != self.mount).then(|| parent.to_owned());
                }
                write(&hold.group, "cpu.max", &format!("{quota_us} {PERIOD_US}"))?;
            }
        }
        Ok(hold)
    }
}

/// Whether the groups in this one of version 2 have processor time of their own.
fn gives_out_time(parent: &Path) -> bool {
    let controllers = fs::read_to_string(parent.join("cgroup.subtree_control")).unwrap_or_default();
    controllers.split_whitespace().any(|controller| controller == "cpu")
}

fn write(group: &Path, file: &str, value: &str) -> Result<()> {
    let path = group.join(file);
    // Written in one piece, and never made: in a folder that is no group this is an error.
    let written =
        fs::File::options().write(true).open(&path).and_then(|mut file| io::Write::write(&mut file, value.as_bytes()));
    match written {
        Ok(count) if count == value.len() => Ok(()),
        Ok(_) => bail!("write {value} to {}: not all of it was taken", path.display()),
        Err(error) => Err(anyhow!(error).context(format!("write {value} to {}", path.display()))),
    }
}

/// Removes groups in `parent` whose process does not exist any more. The kernel refuses where one is in use.
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

impl Drop for CpuHold {
    fn drop(&mut self) {
        // Whatever fails here is mended by the process's end, and by the next one that looks for what is left behind.
        if let Some(parent) = &self.switched_on {
            let _ = write(parent, "cgroup.subtree_control", "-cpu");
        }
        let _ = write(&self.home, "cgroup.procs", "0");
        let _ = fs::remove_dir(&self.group);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(groups: &str, mounts: &str) -> Option<(Version, String, String)> {
        let text = |path: PathBuf| path.to_str().unwrap().to_owned();
        Place::find(groups, mounts).map(|place| (place.version, text(place.mount), text(place.home)))
    }

    #[test]
    fn the_place_is_found_in_either_version() {
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
    fn a_mount_that_begins_further_down_is_reckoned_with() {
        let mounts = "26 25 0:23 /docker/ab /sys/fs/cgroup rw - cgroup2 cgroup rw\n";
        let home = "/sys/fs/cgroup/x".to_owned();
        assert_eq!(find("0::/docker/ab/x\n", mounts), Some((Version::V2, "/sys/fs/cgroup".to_owned(), home)));
        // What is not under the mount is out of reach.
        assert_eq!(find("0::/docker/cd\n", mounts), None);
        assert_eq!(find("0::/../x\n", "26 25 0:23 /a /sys/fs/cgroup rw - cgroup2 cgroup rw\n"), None);
    }

    #[test]
    fn a_host_without_groups_has_no_place() {
        assert_eq!(find("", ""), None);
        assert_eq!(find("3:cpu:/\n", "26 25 0:23 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"), None);
        assert_eq!(find("garbage\n:\n::\n0::\n", "garbage - \n - cgroup2\n1 2 3 / - cgroup2 x y\n"), None);
    }

    #[test]
    fn groups_of_dead_processes_are_removed_and_others_stay() {
        let folder = tempfile::tempdir().unwrap();
        let ours = format!("husk-{}-0", std::process::id());
        // Numbers of processes end at 4194304.
        for name in ["husk-4294967295-0", "husk-4294967295-7", &ours, "husk-x-0", "user.slice", "husk-5000000"] {
            fs::create_dir(folder.path().join(name)).unwrap();
        }
        remove_left_behind(folder.path());
        let mut left: Vec<_> = fs::read_dir(folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        let mut expected = [ours.as_str(), "husk-5000000", "husk-x-0", "user.slice"];
        expected.sort_unstable();
        assert_eq!(left, expected);
    }

    #[test]
    fn what_is_no_control_group_holds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        for version in [Version::V1, Version::V2] {
            let place = Place { version, mount: folder.path().to_owned(), home: folder.path().to_owned() };
            let error = format!("{:#}", place.hold_in(folder.path(), 500).unwrap_err());
            assert!(error.contains("cgroup.procs") && !error.contains('\n'), "{error}");
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "it left something behind");
        }
    }
}
