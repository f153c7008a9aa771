//! What a container's files are on the host, in mount namespaces that end with its processes: the folder that the machine shares, and
//! the root directory of the process that is the container's for its engine.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Context, Result};
use husk_protocol::{Mount, MountSource};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_bind_recursive, mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::UnshareFlags;

use super::guest::{Bind, MOUNTS, ROOTFS};
use crate::sys::namespaces;

/// Makes the container's root file system, with `binds` mounted where `mounts` say, the root directory of this process, which has
/// a single thread, in a mount namespace of its own. An engine that enters it finds no other files of the host: file systems that
/// exist only in the machine are empty here, and read-only.
pub fn enter(root: &Path, binds: &[Bind], mounts: &[Mount]) -> Result<()> {
    separate()?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let copy = |bind: &Bind| {
        let recursive = if bind.is_recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
        open_tree(CWD, &bind.source, flags | recursive).with_context(|| format!("copy {}", bind.source.display()))
    };
    let copies = binds.iter().map(copy).collect::<Result<Vec<_>>>()?;
    mount_bind_recursive(root, root).context("mount the root filesystem")?;
    chdir(root).context("enter the root filesystem")?;
    pivot_root(".", ".").context("change the root")?;
    unmount(".", UnmountFlags::DETACH).context("leave the host's root")?;
    chdir("/").context("enter the root")?;
    for mount in mounts {
        let target = Path::new("/").join(OsStr::from_bytes(&mount.target));
        let place = match &mount.source {
            MountSource::Share(place) => binds.iter().zip(&copies).find(|(bind, _)| bind.place == *place),
            MountSource::FileSystem { .. } => None,
        };
        // What is missing here is there in the machine all the same.
        if let Err(error) = show(mount, place, &target) {
            log::info!("{}: {error:#}", target.display());
        }
    }
    Ok(())
}

fn show(mount: &Mount, place: Option<(&Bind, &OwnedFd)>, target: &Path) -> Result<()> {
    match (&mount.source, place) {
        (_, Some((bind, copy))) => {
            if File::from(copy.try_clone()?).metadata()?.is_dir() {
                fs::create_dir_all(target)?;
            } else if !target.exists() {
                target.parent().map_or(Ok(()), fs::create_dir_all)?;
                File::create(target)?;
            }
            move_mount(copy, "", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            restrict(bind, target)?;
        }
        (MountSource::FileSystem { kind, .. }, None) if kind == "tmpfs" && target.is_dir() => {
            let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            rustix::mount::mount("husk", target, "tmpfs", flags, Some(c"size=4k"))?;
        }
        (_, None) => {}
    }
    Ok(())
}

fn separate() -> Result<()> {
    namespaces::unshare(UnshareFlags::NEWNS).context("create a mount namespace")?;
    // The host's later mounts below the sources are still seen.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).context("separate mounts")
}

/// Assembles the folder at `dir`, an empty directory: `root` and `binds`. Puts this process, which has a single thread, into a
/// mount namespace of its own first, so that nobody else sees the mounts, and nothing is left of them when it has ended.
pub fn assemble(dir: &Path, root: &Path, binds: &[Bind]) -> Result<()> {
    separate()?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("husk", dir, "tmpfs", flags, Some(c"mode=700,size=1m")).context("mount the share")?;
    let rootfs = dir.join(ROOTFS);
    let mounts = dir.join(MOUNTS);
    for made in [&rootfs, &mounts] {
        fs::create_dir(made).with_context(|| format!("create {}", made.display()))?;
    }
    mount_bind_recursive(root, &rootfs).with_context(|| format!("mount the root filesystem {}", root.display()))?;
    binds.iter().try_for_each(|bind| {
        attach(bind, &dir.join(&bind.place)).with_context(|| format!("mount {}", bind.source.display()))
    })?;
    // The guest could otherwise fill the host's memory with names, and remove its own mount points.
    mount_remount(dir, MountFlags::BIND | MountFlags::RDONLY | flags, "").context("make the share read-only")
}

fn attach(bind: &Bind, place: &Path) -> Result<()> {
    if fs::metadata(&bind.source)?.is_dir() {
        fs::create_dir(place)?;
    } else {
        File::create_new(place)?;
    }
    if bind.is_recursive {
        mount_bind_recursive(&bind.source, place)?
    } else {
        mount_bind(&bind.source, place)?
    }
    restrict(bind, place)
}

fn restrict(bind: &Bind, place: &Path) -> Result<()> {
    if bind.readonly {
        // What the host restricts stays restricted, which a remount must say again in a user namespace.
        let kept = locked(place)?;
        mount_remount(place, MountFlags::BIND | MountFlags::RDONLY | kept, "").context("make it read-only")?;
    }
    Ok(())
}

/// The restrictions of the mount at `place`.
fn locked(place: &Path) -> Result<MountFlags> {
    use rustix::fs::StatVfsMountFlags as Found;
    let found = rustix::fs::statvfs(place)?.f_flag;
    let pairs = [
        (Found::NOSUID, MountFlags::NOSUID),
        (Found::NODEV, MountFlags::NODEV),
        (Found::NOEXEC, MountFlags::NOEXEC),
        (Found::NOATIME, MountFlags::NOATIME),
        (Found::RELATIME, MountFlags::RELATIME),
    ];
    Ok(pairs.into_iter().filter(|(is, _)| found.contains(*is)).fold(MountFlags::empty(), |all, (_, flag)| all | flag))
}
