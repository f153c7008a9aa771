//! Creates the namespaces and the root file system of a container, in the process that becomes its first.
//!
//! What lies in the machine's share is copied first, as mounts that are not attached, since nothing leads to it from the
//! container's root. All paths of the container are then resolved there, by its own links.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, chown, symlink};
use std::path::{Path, PathBuf};

use husk_protocol::{Container, Device, Joined, Mount, MountSource};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::{Pid, chdir, pivot_root, sethostname};

use crate::errors::{Context, Failure};
use crate::root::{SHARE, make_dir, mount_at, mount_device};
use crate::{cgroup, content, report, sys, sysctl, trees};

/// Where the root is mounted until it is entered.
const NEW_ROOT: &str = "/container";
const NONE: Option<&str> = None;
/// The namespaces that [`Member::join`] joins.
const NAMESPACES: u32 =
    (libc::CLONE_NEWNS | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC | libc::CLONE_NEWPID | libc::CLONE_NEWCGROUP) as u32;
/// The namespace that a process gets when it is made, and not later.
const MADE_BY_FORK: u32 = libc::CLONE_NEWPID as u32;
/// Where the memory is mounted that containers share, by name.
const MEMORY: &str = "/memory";
/// An option of tmpfs that is podman's: it begins with what it is mounted over.
const COPY_UP: &str = "tmpcopyup";
/// The maximum number of links on the way to a mount's target, as for the kernel (path_resolution(7)).
const LINKS_MAX: usize = 40;
/// The device nodes of every container, with their major and minor numbers (runtime-spec, config-linux.md, "Default Devices").
const DEVICES: [(&str, u64, u64); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Its links.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// A container that processes can join, as long as its first process lives.
pub struct Member {
    /// Its ID.
    pub id: String,
    first: OwnedFd,
    /// Whether its first process is in it.
    is_complete: bool,
    /// The names of memory that it shares with others.
    memory: Vec<String>,
}

/// The machine's containers.
#[derive(Default)]
pub struct Containers(Vec<Member>);

impl Containers {
    /// The container `id`, which can be joined.
    pub fn find(&self, id: &str) -> Result<&Member, Failure> {
        let found = self.0.iter().find(|member| member.id == id && member.is_complete);
        found.ok_or_else(|| Failure::new(format_args!("container {id} is not running")))
    }

    /// Adds a container. Its ID must be [free](Containers::expect_free).
    pub fn add(&mut self, member: Member) {
        self.0.push(member);
    }

    /// Fails if there is a container `id`.
    pub fn expect_free(&self, id: &str) -> Result<(), Failure> {
        match self.0.iter().any(|member| member.id == id) {
            true => Err(Failure::new(format_args!("the machine has a container {id} already"))),
            false => Ok(()),
        }
    }

    /// Lets processes join the container `id`: its first one is in its namespaces.
    pub fn complete(&mut self, id: &str) {
        self.0.iter_mut().filter(|member| member.id == id).for_each(|member| member.is_complete = true);
    }

    /// The descriptors by which `container` joins others.
    pub fn descriptors_of(&self, container: &Container) -> Vec<RawFd> {
        let joined = container.joined.iter().filter_map(|joined| self.find(&joined.container).ok());
        joined.map(Member::descriptor).collect()
    }

    /// Removes the container `id`, whose first process has ended or is about to, and kills what is left in it.
    pub fn remove(&mut self, id: &str) {
        let Some(index) = self.0.iter().position(|member| member.id == id) else { return };
        let Member { memory, .. } = self.0.remove(index);
        cgroup::kill_container(id);
        cgroup::remove_container(id);
        // Of the last one that had it: others are not to find what it has left there.
        for name in memory.iter().filter(|name| !self.0.iter().any(|other| other.memory.contains(name))) {
            let dir = format!("{MEMORY}/{name}");
            let _ = umount2(dir.as_str(), MntFlags::MNT_DETACH).is_ok() && fs::remove_dir(&dir).is_ok();
        }
    }
}

impl Member {
    /// The container, whose first process is `first`, and on its way into it.
    pub fn new(container: &Container, first: Pid) -> Result<Member, Failure> {
        let memory = |mount: &Mount| match &mount.source {
            MountSource::Memory { name, .. } => Some(name.clone()),
            MountSource::Share(_) | MountSource::FileSystem { .. } => None,
        };
        let memory = container.mounts.iter().filter_map(memory).collect();
        let first = sys::open_process(first).context("open the container's process")?;
        Ok(Member { id: container.id.clone(), first, is_complete: false, memory })
    }

    /// The descriptor by which it is joined.
    pub fn descriptor(&self) -> RawFd {
        self.first.as_raw_fd()
    }

    /// Makes the next children of this process start in the container's PID namespace.
    pub fn adopt_children(&self) -> Result<(), Failure> {
        let joined = sys::join_namespaces(self.first.as_fd(), libc::CLONE_NEWPID as u32);
        joined.context(format_args!("join container {}", self.id))
    }

    /// Moves this process into the container, and its children also into its PID namespace.
    pub fn join(&self) -> Result<(), Failure> {
        cgroup::join_container(&self.id);
        sys::join_namespaces(self.first.as_fd(), NAMESPACES).context(format_args!("join container {}", self.id))?;
        chdir("/").context("enter the container's root")
    }
}

/// Makes this process, which is in the container's PID namespace if that is not the machine's, the first of `container`. What that shares
/// with others is among `containers`.
pub fn enter(container: &Container, containers: &Containers, has_terminal: bool) -> Result<(), Failure> {
    cgroup::join_container(&container.id);
    for Joined { container: id, namespaces } in &container.joined {
        let flags = namespaces & NAMESPACES & !MADE_BY_FORK;
        let first = containers.find(id)?.first.as_fd();
        let joined = if flags == 0 { Ok(()) } else { sys::join_namespaces(first, flags) };
        joined.context(format_args!("join the namespaces of container {id}"))?;
    }
    let own = container.namespaces | libc::CLONE_NEWNS as u32;
    sys::unshare(own & !MADE_BY_FORK).context("create the container's namespaces")?;
    let has_others_name = container.joined.iter().any(|joined| joined.namespaces & libc::CLONE_NEWUTS as u32 != 0);
    if !container.hostname.is_empty() && !has_others_name {
        sethostname(&container.hostname).context(format_args!("set the host name {:?}", container.hostname))?;
    }
    if !container.domainname.is_empty() && !has_others_name {
        fs::write("/proc/sys/kernel/domainname", &container.domainname).context("set the domain name")?;
    }
    sysctl::set_all(&container.sysctls)?;
    let copies = container.mounts.iter().map(copy_source).collect::<Result<Vec<_>, _>>()?;
    enter_root(&container.root)?;
    for (mount, copy) in container.mounts.iter().zip(copies) {
        attach(mount, copy).map_err(|failure| Failure {
            message: format!("mount {}: {}", path(&mount.target).display(), failure.message),
            ..failure
        })?;
    }
    make_devices(container, has_terminal);
    container.readonly_paths.iter().try_for_each(|path| forbid_writing(path))?;
    container.masked_paths.iter().try_for_each(|path| mask(path))?;
    if container.readonly {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(NONE, "/", NONE, flags, NONE).context("remount the root read-only")?;
    }
    Ok(())
}

fn path(bytes: &[u8]) -> PathBuf {
    Path::new("/").join(OsStr::from_bytes(bytes))
}

fn copy_source(mount: &Mount) -> Result<Option<OwnedFd>, Failure> {
    let flags = MsFlags::from_bits_truncate(mount.flags);
    let (source, is_recursive) = match &mount.source {
        MountSource::FileSystem { .. } => return Ok(None),
        MountSource::Share(source) => (Path::new(SHARE).join(source), flags.contains(MsFlags::MS_REC)),
        MountSource::Memory { name, .. } => (Path::new(MEMORY).join(name), false),
    };
    let copy = trees::copy(&source, is_recursive);
    copy.context(format_args!("find the source of {} in the machine", path(&mount.target).display())).map(Some)
}

/// Mounts the memory that `container` shares with others, as far as it is not there yet, in the machine's own root.
pub fn provide_memory(container: &Container) -> Result<(), Failure> {
    for mount in &container.mounts {
        let MountSource::Memory { name, options } = &mount.source else { continue };
        let is_name = !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric());
        let dir = format!("{MEMORY}/{name}");
        if is_name && !Path::new(&dir).exists() {
            make_dir(&dir)?;
            mount_at("tmpfs", &dir, MsFlags::empty(), options)?;
        }
    }
    Ok(())
}

fn enter_root(root: &str) -> Result<(), Failure> {
    let what = || format!("mount the root filesystem {root}");
    make_dir(NEW_ROOT)?;
    let copy = trees::copy(&Path::new(SHARE).join(root), true).context(what())?;
    trees::attach(copy.as_fd(), Path::new(NEW_ROOT)).context(what())?;
    chdir(NEW_ROOT).context(what())?;
    pivot_root(".", ".").context("change the root")?;
    umount2(".", MntFlags::MNT_DETACH).context("leave the machine's root")?;
    chdir("/").context("enter the root")
}

fn attach(mount: &Mount, copy: Option<OwnedFd>) -> Result<(), Failure> {
    let target = behind_links(path(&mount.target));
    let flags = MsFlags::from_bits_truncate(mount.flags);
    let MountSource::FileSystem { kind, options, name } = &mount.source else {
        let Some(copy) = copy else { return Ok(()) };
        let copy = File::from(copy);
        make_target(&target, copy.metadata().context("read its source")?.is_dir())?;
        trees::restrict(copy.as_fd(), flags, false).context("restrict it")?;
        return trees::attach(copy.as_fd(), &target).context("attach it");
    };
    make_dir(&target)?;
    match kind.as_str() {
        // Version 1 has no equivalent in a machine. The kernel may support neither cgroups nor message queues.
        "cgroup" | "cgroup2" | "mqueue" => {
            let kind = if kind == "mqueue" { kind } else { "cgroup2" };
            let mounted = mount_at(kind, &text(&target), flags, "");
            mounted.unwrap_or_else(|failure| report::say(&failure.message));
            Ok(())
        }
        kind => {
            let is_copied = options.split(',').any(|option| option == COPY_UP);
            let others: Vec<&str> = options.split(',').filter(|option| *option != COPY_UP).collect();
            let below =
                is_copied.then(|| trees::copy(&target, false).context("find what it begins with")).transpose()?;
            let mounted = mount_device(name, &text(&target), kind, flags, &others.join(","));
            mounted.context(format_args!("mount {kind} on {}", target.display()))?;
            let below = below.map(|below| (PathBuf::from(format!("/proc/self/fd/{}", below.as_raw_fd())), below));
            below.map_or(Ok(()), |(from, _open)| content::fill(&target, &from))
        }
    }
}

/// Where `path` leads if there are links in it to what does not exist yet, and is to be created there.
fn behind_links(mut path: PathBuf) -> PathBuf {
    let is_dangling = |place: &&Path| place.is_symlink() && !place.exists();
    for _ in 0..LINKS_MAX {
        let Some(link) = path.ancestors().filter(is_dangling).last() else { break };
        let (Some(parent), Ok(led_to), Ok(below)) = (link.parent(), fs::read_link(link), path.strip_prefix(link))
        else {
            break;
        };
        // Without the slash at the end that an empty rest would add.
        path = parent.join(led_to).join(below).components().collect();
    }
    path
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn make_target(target: &Path, is_dir: bool) -> Result<(), Failure> {
    if is_dir {
        return make_dir(target);
    }
    if target.exists() {
        return Ok(());
    }
    target.parent().map_or(Ok(()), make_dir)?;
    File::create(target).map(drop).context(format_args!("create {}", target.display()))
}

/// Without a file system of its own, /dev is the root file system's: the host allows no device nodes there.
fn make_devices(container: &Container, has_terminal: bool) {
    let usual = DEVICES.map(|(name, major, minor)| (PathBuf::from("/dev").join(name), makedev(major, minor), 0o666));
    for (path, number, mode) in usual {
        make_device(&path, number, SFlag::S_IFCHR, mode);
    }
    for Device { path: named, mode, major, minor, uid, gid } in &container.devices {
        let path = path(named);
        let kind = SFlag::from_bits_truncate(*mode) & SFlag::S_IFMT;
        let _ = path.parent().map(make_dir);
        make_device(&path, makedev((*major).into(), (*minor).into()), kind, *mode);
        let _ = chown(&path, Some(*uid), Some(*gid));
    }
    for (name, target) in LINKS {
        let place = Path::new("/dev").join(name);
        if name == "ptmx" && place.exists() {
            let _ = fs::remove_file(&place);
        }
        let _ = symlink(target, place);
    }
    if has_terminal {
        let _ = File::options().create(true).append(true).open("/dev/console");
    }
}

fn make_device(path: &Path, number: u64, kind: SFlag, mode: u32) {
    if fs::symlink_metadata(path).is_ok_and(|found| found.rdev() == number) {
        return;
    }
    let permissions = Mode::from_bits_truncate(mode);
    let before = nix::sys::stat::umask(Mode::empty());
    let made = mknod(path, kind, permissions, number);
    nix::sys::stat::umask(before);
    if let Err(error) = made {
        report::say(&format!("create device {}: {}", path.display(), error.desc()));
    }
}

/// Makes the terminal `name` the console.
pub fn set_console(name: &Path) {
    if let Err(error) = mount(Some(name), "/dev/console", NONE, MsFlags::MS_BIND, NONE) {
        report::say(&format!("mount /dev/console: {}", error.desc()));
    }
}

fn forbid_writing(name: &[u8]) -> Result<(), Failure> {
    let path = path(name);
    let what = || format!("make {} read-only", path.display());
    let Ok(copy) = trees::copy(&path, true) else { return Ok(()) };
    trees::restrict(copy.as_fd(), MsFlags::MS_RDONLY, true).context(what())?;
    trees::attach(copy.as_fd(), &path).context(what())
}

fn mask(name: &[u8]) -> Result<(), Failure> {
    let path = path(name);
    let what = || format!("mask {}", path.display());
    match fs::metadata(&path) {
        Err(_) => Ok(()),
        Ok(found) if found.is_dir() => {
            mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0k")).context(what())
        }
        Ok(_) => mount(Some("/dev/null"), &path, NONE, MsFlags::MS_BIND, NONE).context(what()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_target_of_a_mount_is_found_behind_links_to_what_does_not_exist() {
        let dir = std::env::temp_dir().join(format!("husk-links-{}", std::process::id()));
        fs::create_dir_all(dir.join("real")).unwrap();
        let link = |to: &str, name: &str| symlink(to, dir.join(name)).unwrap();
        link("real", "there");
        link("real/none", "dangling");
        link("dangling", "twice");
        link("round", "round");
        let found = |name: &str| behind_links(dir.join(name));
        assert_eq!(found("there/x"), dir.join("there/x"));
        assert_eq!(found("dangling/x/y"), dir.join("real/none/x/y"));
        assert_eq!(found("twice"), dir.join("real/none"));
        // It fails when it is used.
        assert_eq!(found("round/x"), dir.join("round/x"));
        fs::remove_dir_all(&dir).unwrap();
    }
}
