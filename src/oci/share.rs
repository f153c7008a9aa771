//! What a container's files are on the host, in mount namespaces that end with its processes: its part of the folder that the machine
//! shares, and the root directory of the process that is the container's for its engine.
//!
//! ```text
//! SHARE/             a tmpfs in the mount namespace of the machine's process, whose mounts the folder's server receives
//! SHARE/ID/          a part for each container: a read-only tmpfs
//! SHARE/ID/rootfs    its root file system
//! SHARE/ID/mounts/N  what is mounted in it, by number
//! ```

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use husk_protocol::{Mount, MountSource};
use rustix::fs::{CWD, FlockOperation, Mode, OFlags, flock, mkdirat, openat, statfs};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount, mount_bind_recursive, mount_change,
    mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{Pid, PidfdFlags, Resource, Rlimit, chdir, fchdir, getrlimit, pidfd_open, pivot_root, setrlimit};
use rustix::thread::{
    LinkNameSpaceType, ThreadNameSpaceType, UnshareFlags, move_into_link_name_space, move_into_thread_name_spaces,
};

use super::guest::{Bind, MOUNTS, ROOTFS, TMPFS};
use crate::sys::{mounts, namespaces};

/// Nothing in the parts of the share that are husk's is anything but a directory or a place for a mount.
const QUIET: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

/// More descriptors than this process has otherwise.
const DESCRIPTORS: u64 = 100;

/// Copies of a container's files that are mounted nowhere yet.
pub struct Files {
    root: OwnedFd,
    /// With the places in the container's part of the share, and whether each is a directory.
    binds: Vec<(String, OwnedFd, bool)>,
}

impl Files {
    /// Copies `root` and `binds` as they are mounted in this process's mount namespace.
    pub fn copy(root: &Path, binds: &[Bind]) -> Result<Files> {
        allow_descriptors(binds.len())?;
        let root = copy(root, true).with_context(|| format!("copy the root filesystem {}", root.display()))?;
        mounts::restrict(&root, false)?;
        let copied = |bind: &Bind| {
            let copy = copy_bind(bind)?;
            let what = || format!("copy {}", bind.source.display());
            mounts::restrict(&copy, false).with_context(what)?;
            let is_dir = is_dir(&copy).with_context(what)?;
            Ok((bind.place.clone(), copy, is_dir))
        };
        Ok(Files { root, binds: binds.iter().map(copied).collect::<Result<_>>()? })
    }

    /// Mounts them in the share `dir` as the part of the container `id`.
    fn attach(self, dir: &Path, id: &str) -> Result<()> {
        let part = dir.join(id);
        let made = self.part()?;
        fs::create_dir(&part).with_context(|| format!("create {}", part.display()))?;
        attach(made.as_fd(), &part).context("mount the container's part of the share")?;
        attach(self.root.as_fd(), &part.join(ROOTFS)).context("mount the root filesystem")?;
        self.binds.iter().try_for_each(|(place, copy, _)| {
            attach(copy.as_fd(), &part.join(place)).with_context(|| format!("mount {place} of the container"))
        })
    }

    /// A file system with places for them. The guest could otherwise fill the host's memory with names, so that it is read-only before
    /// anybody sees it.
    fn part(&self) -> Result<OwnedFd> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).context("create a file system")?;
        for (name, value) in [("source", "husk"), ("size", "1m"), ("mode", "700")] {
            fsconfig_set_string(&context, name, value).with_context(|| format!("set {name} of a file system"))?;
        }
        fsconfig_create(&context).context("create a file system")?;
        let restricted =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let part = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, restricted).context("create a file system")?;
        for made in [ROOTFS, MOUNTS] {
            mkdirat(&part, made, Mode::RWXU).with_context(|| format!("create {made}"))?;
        }
        for (place, _, is_dir) in &self.binds {
            let made = if *is_dir {
                mkdirat(&part, place.as_str(), Mode::RWXU)
            } else {
                openat(&part, place.as_str(), OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR).map(drop)
            };
            made.with_context(|| format!("create {place}"))?;
        }
        mounts::make_readonly(&part).context("make the container's part of the share read-only")?;
        Ok(part)
    }
}

/// Raises the limit of this process's descriptors, if that is necessary for `count` more.
fn allow_descriptors(count: usize) -> Result<()> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < DESCRIPTORS + count as u64) {
        setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).context("raise the limit of descriptors")?;
    }
    Ok(())
}

/// A copy of its own: what the host mounts there later would be seen by the guest, without restrictions, and could not be unmounted.
fn copy(path: &Path, is_recursive: bool) -> Result<OwnedFd> {
    let recursive = if is_recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let copy = open_tree(CWD, path, OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | recursive)?;
    mounts::make_private(&copy).context("separate it from the host's mounts")?;
    Ok(copy)
}

fn copy_bind(bind: &Bind) -> Result<OwnedFd> {
    let what = || format!("copy {}", bind.source.display());
    let copy = copy(&bind.source, bind.is_recursive).with_context(what)?;
    if bind.readonly {
        mounts::make_readonly(&copy).context("make it read-only").with_context(what)?;
    }
    Ok(copy)
}

fn is_dir(file: &OwnedFd) -> Result<bool> {
    Ok(File::from(file.try_clone()?).metadata()?.is_dir())
}

fn attach(tree: impl AsFd, target: &Path) -> Result<()> {
    Ok(move_mount(tree, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// Puts this process, which has a single thread, into a mount namespace of its own: what it mounts is seen by nobody else, and gone when
/// it has ended. The host's later mounts are still seen.
pub fn separate() -> Result<()> {
    namespaces::unshare(UnshareFlags::NEWNS).context("create a mount namespace")?;
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).context("separate mounts")
}

/// Assembles the share at `dir`, an empty directory, with the part of the container `id`. This process is
/// [separate].
pub fn assemble(dir: &Path, id: &str, files: Files) -> Result<()> {
    mount("husk", dir, "tmpfs", QUIET, Some(c"mode=700,size=1m")).context("mount the share")?;
    // Its server receives what is mounted here later.
    mount_change(dir, MountPropagationFlags::SHARED).context("mount the share")?;
    files.attach(dir, id)?;
    make_readonly(dir)
}

fn make_readonly(dir: &Path) -> Result<()> {
    mount_remount(dir, MountFlags::BIND | MountFlags::RDONLY | QUIET, "").context("make the share read-only")
}

/// Adds the part of the container `id` to the share at `dir`, which the process `machine` has assembled.
pub fn add(machine: u32, dir: &Path, id: &str, files: Files) -> Result<()> {
    within(machine, dir, || files.attach(dir, id))
}

/// Removes the part of the container `id`, if there is one.
pub fn remove(machine: u32, dir: &Path, id: &str) -> Result<()> {
    let part = dir.join(id);
    within(machine, dir, || {
        if fs::symlink_metadata(&part).is_err() {
            return Ok(());
        }
        match unmount(&part, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            // Its creation may have ended before it was mounted.
            Ok(()) | Err(Errno::INVAL) => {}
            Err(error) => return Err(error).with_context(|| format!("unmount {}", part.display())),
        }
        fs::remove_dir(&part).with_context(|| format!("remove {}", part.display()))
    })
}

/// Does something in the mount namespace of the process `machine`, with the share at `dir` writable meanwhile, which it is not for its
/// server: that has a mount of its own. This process has a single thread.
fn within(machine: u32, dir: &Path, act: impl FnOnce() -> Result<()>) -> Result<()> {
    // One at a time, since the share is writable meanwhile.
    let lock = File::open(dir.parent().unwrap_or(dir)).with_context(|| format!("open {}", dir.display()))?;
    flock(&lock, FlockOperation::LockExclusive).with_context(|| format!("lock {}", dir.display()))?;
    let own = File::open("/proc/self/ns/mnt").context("open the mount namespace")?;
    let here = File::open(".").context("open the working directory")?;
    let pid = i32::try_from(machine).ok().and_then(Pid::from_raw).context("the machine has no process")?;
    let process = pidfd_open(pid, PidfdFlags::empty()).context("find the machine's process")?;
    move_into_thread_name_spaces(process.as_fd(), ThreadNameSpaceType::MOUNT).context("enter the machine's mounts")?;
    let is_share = || statfs(dir).is_ok_and(|found| found.f_type as u64 == TMPFS);
    let done = || {
        // A later process with the machine's PID has none.
        ensure!(is_share(), "the machine has no share at {}", dir.display());
        mount_remount(dir, MountFlags::BIND | QUIET, "").context("make the share writable")?;
        let done = act();
        // Without namespaces of its own, the server has this mount.
        done.and(make_readonly(dir))
    };
    let done = done();
    move_into_link_name_space(own.as_fd(), Some(LinkNameSpaceType::Mount)).context("leave the machine's mounts")?;
    fchdir(&here).context("return to the working directory")?;
    done
}

/// Makes the container's root file system, with `binds` mounted where `mounts` say, the root directory of this process, which is
/// [separate]. An engine that enters it finds no other files of the host: file systems that exist only in the machine are empty
/// here, and read-only.
pub fn enter(root: &Path, binds: &[Bind], mounts: &[Mount]) -> Result<()> {
    let mut copies = binds.iter().map(copy_bind).collect::<Result<Vec<_>>>()?.into_iter();
    mount_bind_recursive(root, root).context("mount the root filesystem")?;
    chdir(root).context("enter the root filesystem")?;
    pivot_root(".", ".").context("change the root")?;
    unmount(".", UnmountFlags::DETACH).context("leave the host's root")?;
    chdir("/").context("enter the root")?;
    for mount in mounts {
        let target = Path::new("/").join(OsStr::from_bytes(&mount.target));
        let shown = match &mount.source {
            MountSource::Share(_) => copies.next().map_or(Ok(()), |copy| show(&copy, &target)),
            MountSource::FileSystem { kind, .. } if kind == "tmpfs" && target.is_dir() => cover(&target),
            MountSource::Memory { .. } if target.is_dir() => cover(&target),
            MountSource::FileSystem { .. } | MountSource::Memory { .. } => Ok(()),
        };
        // What is missing here is there in the machine all the same.
        if let Err(error) = shown {
            log::info!("{}: {error:#}", target.display());
        }
    }
    Ok(())
}

fn show(copy: &OwnedFd, target: &Path) -> Result<()> {
    if is_dir(copy)? {
        fs::create_dir_all(target)?;
    } else if !target.exists() {
        target.parent().map_or(Ok(()), fs::create_dir_all)?;
        File::create(target)?;
    }
    attach(copy, target)
}

fn cover(target: &Path) -> Result<()> {
    Ok(mount("husk", target, "tmpfs", MountFlags::RDONLY | QUIET, Some(c"size=4k"))?)
}
