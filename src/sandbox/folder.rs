//! Confines a process to a folder of the host: namespaces of its own, with the folder as its root directory, and no
//! capability but those that it is to keep.
//!
//! The process is in a user namespace whatever its user is: what a capability allows there ends at the users that the
//! namespace maps. What the host does not allow is left out and noted, as in `confine.rs`.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetStatus, Scope,
};
use rustix::fs::{CWD, Mode, OFlags, Stat, fstat, open, openat};
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, move_mount, open_tree, unmount};
use rustix::process::{Resource, Rlimit, Signal};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};

use crate::sys::{allocator, mounts, namespaces};

/// The namespaces that the process starts in (clone(2)).
pub const NAMESPACES: i32 =
    libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
/// The folder of a process's descriptors.
const DESCRIPTORS: &str = "/proc/self/fd";
/// A directory that every host has, where a file system for a single file is mounted.
const MOUNT_POINT: &str = "/dev";
/// How a folder or file is opened that is only passed on.
const AS_PATH: OFlags = OFlags::PATH.union(OFlags::CLOEXEC);

/// A folder to which a process is confined, or a single file.
#[derive(Debug)]
pub struct Folder {
    /// Its absolute path without links.
    pub path: PathBuf,
    /// Opened with O_PATH.
    pub fd: OwnedFd,
    /// The name of a single file in a folder of its own; `None` for a folder.
    pub file_name: Option<&'static str>,
    /// Whether nothing in it may be changed.
    pub readonly: bool,
    /// Whether what is mounted in it later, in the namespace of this process's parent, is to be there as well.
    pub follows_mounts: bool,
}

impl Folder {
    /// Another descriptor of the same folder.
    pub fn try_clone(&self) -> io::Result<Folder> {
        Ok(Folder { path: self.path.clone(), fd: self.fd.try_clone()?, ..*self })
    }
}

/// What a confined process has.
#[derive(Debug)]
pub struct Inside {
    /// The folder (O_PATH).
    pub root: OwnedFd,
    /// The folder of this process's descriptors.
    pub descriptors: OwnedFd,
    /// The layers that this host does not allow, each with the reason.
    pub lacks: Vec<String>,
    /// Whether the process has the capabilities that it was to keep.
    pub is_privileged: bool,
}

/// Confines this process, which has a single thread, to `folder`. It is killed when its parent exits. `is_separate` says that it
/// is in [`NAMESPACES`] of its own, in which its user is mapped.
///
/// It may start threads before it installs filters; new files are those in the folder.
pub fn enter(folder: Folder, kept: CapabilitySet, is_separate: bool) -> Result<Inside> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("PR_SET_PDEATHSIG")?;
    rustix::process::setsid().context("leave the terminal")?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .context("limit core dumps")?;
    rustix::thread::set_no_new_privs(true).context("PR_SET_NO_NEW_PRIVS")?;
    allocator::use_one_arena();
    let mut lacks = Vec::new();
    let mut note = |layer: &str, result: Result<()>| {
        if let Err(error) = result {
            lacks.push(format!("{layer}: {error:#}"));
        }
    };
    let mounted = if is_separate { own_root(&folder) } else { Err(anyhow::anyhow!("no user namespace")) };
    let (root, descriptors) = match mounted {
        Ok(both) => both,
        Err(error) => {
            // Paths lead out of this root, but the server opens none, and Landlock allows none.
            ensure!(folder.file_name.is_none(), "share a single file, which needs a mount namespace: {error:#}");
            note("a root directory of its own", Err(error));
            let descriptors = open(DESCRIPTORS, AS_PATH | OFlags::DIRECTORY, Mode::empty());
            (folder.fd.try_clone()?, descriptors.with_context(|| format!("open {DESCRIPTORS}"))?)
        }
    };
    let readonly = folder.readonly;
    // Its descriptor leads to the folders above, whose mounts are the host's.
    drop(folder);
    note("a network namespace", namespaces::unshare(UnshareFlags::NEWNET).map_err(Into::into));
    note("Landlock", allow_only(&root, readonly));
    let has_kept = keep_capabilities(kept).context("drop capabilities")?;
    Ok(Inside { root, descriptors, lacks, is_privileged: has_kept })
}

/// Makes the folder the root directory. Returns it, and the folder of this process's descriptors without a way out of it.
fn own_root(folder: &Folder) -> Result<(OwnedFd, OwnedFd)> {
    const CLONE: OpenTreeFlags = OpenTreeFlags::OPEN_TREE_CLONE.union(OpenTreeFlags::OPEN_TREE_CLOEXEC);
    let descriptors = open_tree(CWD, DESCRIPTORS, CLONE).with_context(|| format!("copy the mount of {DESCRIPTORS}"))?;
    // Opened again, since a mount can only be copied within its own namespace.
    let path = CString::new(folder.path.as_os_str().as_bytes())?;
    let again = open(path.as_c_str(), AS_PATH | OFlags::NOFOLLOW, Mode::empty()).context("open the shared folder")?;
    ensure!(is_same(&fstat(&again)?, &fstat(&folder.fd)?), "another file has taken the place of the shared one");
    let flags = CLONE | OpenTreeFlags::AT_EMPTY_PATH | OpenTreeFlags::AT_RECURSIVE;
    let copy = open_tree(&again, "", flags).context("copy the mount of the shared folder")?;
    let root = match folder.file_name {
        None => copy,
        Some(name) => folder_of(name, &copy)?,
    };
    // Landlock does not cover modes, owners and attributes.
    mounts::restrict(&root, folder.readonly).context("restrict the mount of the shared folder")?;
    if folder.follows_mounts {
        // A mount that is attached nowhere receives none.
        move_mount(&root, "", CWD, &folder.path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
            .context("attach the mount of the shared folder")?;
        rustix::process::fchdir(&root)?;
        rustix::process::pivot_root(".", ".").context("change the root of the mount namespace")?;
        unmount(".", UnmountFlags::DETACH).context("leave the host's root")?;
    } else {
        rustix::process::fchdir(&root)?;
        rustix::process::chroot(".").context("change the root directory")?;
    }
    rustix::process::chdir("/")?;
    Ok((root, descriptors))
}

/// A folder that has only the file `file`, by the name `name`.
fn folder_of(name: &str, file: impl AsFd) -> Result<OwnedFd> {
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("none", MOUNT_POINT, "tmpfs", flags, Some(c"size=0,nr_inodes=2,mode=755")).context("mount a folder")?;
    let folder = open(MOUNT_POINT, AS_PATH | OFlags::DIRECTORY, Mode::empty())?;
    let place = openat(&folder, name, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::RUSR)?;
    drop(place);
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(file, "", &folder, name, flags).context("mount the shared file")?;
    Ok(folder)
}

fn is_same(one: &Stat, other: &Stat) -> bool {
    (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)
}

/// Allows access only to what is below `root`, and denies network connections and signals to other processes (Landlock).
fn allow_only(root: &OwnedFd, readonly: bool) -> Result<()> {
    let all = AccessFs::from_all(ABI::V6);
    let allowed = if readonly { AccessFs::from_read(ABI::V6) } else { all };
    let rules = Ruleset::default()
        // Without it, no file could move to another folder.
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .handle_access(AccessNet::from_all(ABI::V6))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rule(PathBeneath::new(root, allowed))?;
    let status = rules.restrict_self()?;
    ensure!(status.ruleset != RulesetStatus::NotEnforced, "not in this kernel");
    Ok(())
}

/// Drops all capabilities but `kept`. Returns whether it has those.
fn keep_capabilities(kept: CapabilitySet) -> io::Result<bool> {
    let none = CapabilitySet::empty();
    let has_kept = rustix::thread::capabilities(None)?.permitted.contains(kept);
    let left = if has_kept { kept } else { none };
    let sets = CapabilitySets { effective: left, permitted: left, inheritable: none };
    rustix::thread::set_capabilities(None, sets)?;
    Ok(has_kept)
}

/// Opens what `path` names, to be passed to [`enter`].
pub fn open_path(path: &std::path::Path) -> io::Result<File> {
    Ok(open(path, AS_PATH, Mode::empty())?.into())
}
