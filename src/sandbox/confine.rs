//! Takes from a monitor process everything that it could reach by a path, a number or a privilege: namespaces of its own, an
//! empty root directory, no capability, and on behalf of root another user.
//!
//! What the host does not allow is left out and noted. Two steps take longest, and happen on a thread while KVM is set up: a
//! network namespace, and the new root.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use landlock::{ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetStatus, Scope};
use rustix::mount::{MountFlags, mount};
use rustix::process::{Gid, Resource, Rlimit, Signal, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets, LinkNameSpaceType, UnshareFlags};

use crate::sys::fork::{self, Files, Split};
use crate::sys::{allocator, namespaces, socket};

/// The first of the user and group IDs that monitors of root have: far from those that accounts and containers have.
const FIRST_UID: u32 = 2_000_000_000;
/// A directory that every host has. The new root is mounted there first.
const MOUNT_POINT: &str = "/dev";

/// Which layers a monitor process gets.
#[derive(Debug, Clone, Copy)]
pub struct Layers {
    is_on: bool,
    /// The user of a monitor of root.
    uid: Option<u32>,
    /// Whether it stays in the network namespace of the host.
    keeps_network: bool,
}

impl Layers {
    /// The layers of a monitor that this process starts: all that the host allows, or none.
    pub fn new(is_on: bool) -> Layers {
        let of_root = rustix::process::geteuid().is_root().then(|| FIRST_UID + std::process::id());
        // The root of a user namespace has fewer users, and goes without another one like everybody else.
        let uid = of_root.filter(|uid| is_on && namespaces::Users::own().contain(*uid));
        Layers { is_on, uid, keeps_network: false }
    }

    /// The same, with access to the host's network.
    pub fn with_network(self) -> Layers {
        Layers { keeps_network: true, ..self }
    }

    /// Splits this process with the namespaces that the host allows. Returns also which are missing, and why.
    pub fn split<T>(&self, mut given: T, files: &Files) -> io::Result<(Split<T>, Vec<String>)> {
        let mut lacks = Vec::new();
        for flags in self.namespaces() {
            match fork::split(flags, given, files) {
                Ok(split) => return Ok((split, lacks)),
                Err((_, error)) if flags == 0 => return Err(error),
                Err((back, error)) => {
                    given = back;
                    lacks.push(format!("namespaces: {error}"));
                }
            }
        }
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The namespaces that the process starts in (clone(2)), the best first. For root the user namespace is entered later, as
    /// another user.
    fn namespaces(&self) -> impl Iterator<Item = i32> + use<> {
        const OTHERS: i32 = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        let flags: &[i32] = match (self.is_on, self.uid) {
            (false, _) => &[0],
            (true, Some(_)) => &[libc::CLONE_NEWPID, 0],
            (true, None) => &[libc::CLONE_NEWUSER | OTHERS, 0],
        };
        flags.iter().copied()
    }
}

/// The confinement of this process, a monitor, in progress.
pub struct Confinement {
    layers: Layers,
    preparation: Option<JoinHandle<Preparation>>,
    lacks: Vec<String>,
}

/// What the thread has prepared: the network namespace, and the root directory.
struct Preparation {
    network: Option<Result<File>>,
    root: Result<()>,
}

impl Confinement {
    /// Begins to confine this process, which has a single thread. It is killed when its parent exits. `lacks` is what it
    /// already lacks: namespaces.
    pub fn begin(layers: Layers, lacks: Vec<String>) -> Result<Confinement> {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("PR_SET_PDEATHSIG")?;
        // Without a terminal, none of its signals arrive here.
        rustix::process::setsid().context("leave the terminal")?;
        // Whether this process has a mount namespace of its own, in which alone it may change mounts.
        let mut owns_mounts = lacks.is_empty() && layers.uid.is_none();
        let mut confinement = Confinement { layers, preparation: None, lacks };
        if !layers.is_on {
            return Ok(confinement);
        }
        rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
            .context("limit core dumps")?;
        rustix::thread::set_no_new_privs(true).context("PR_SET_NO_NEW_PRIVS")?;
        // More would be created, and shrunk, with system calls that are not allowed later.
        allocator::use_one_arena();
        if let Some(uid) = layers.uid {
            confinement.note("another user", change_user(uid).map_err(Into::into));
            let unshared = namespaces::unshare_all();
            owns_mounts = unshared.is_ok();
            confinement.note("namespaces", unshared.map_err(Into::into));
            // The change of credentials has cleared it (prctl(2)).
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).context("PR_SET_PDEATHSIG")?;
        }
        if owns_mounts {
            let prepare =
                move || Preparation { network: (!layers.keeps_network).then(new_network), root: empty_root() };
            confinement.preparation = Some(super::spawn("sandbox", prepare).context("start a thread")?);
        } else {
            // The C library makes system calls for the first thread that are not allowed later.
            let _ = super::spawn("sandbox", || ()).context("start a thread")?.join();
        }
        Ok(confinement)
    }

    /// Completes it on the calling thread, and for all threads that it starts later. Returns the layers that this host does not
    /// allow, each with the reason.
    pub fn complete(mut self) -> Result<Vec<String>> {
        if !self.layers.is_on {
            return Ok(Vec::new());
        }
        if let Some(preparation) = self.preparation.take() {
            let Preparation { network, root } =
                preparation.join().map_err(|_| anyhow!("the sandbox thread panicked"))?;
            let enter = |network: File| {
                Ok(rustix::thread::move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?)
            };
            if let Some(network) = network {
                self.note("a network namespace", network.and_then(enter));
            }
            self.note("an empty root directory", root);
        }
        let denied = deny_paths(self.layers.keeps_network);
        self.note("Landlock", denied);
        drop_capabilities().context("drop all capabilities")?;
        Ok(self.lacks)
    }

    fn note(&mut self, layer: &str, result: Result<()>) {
        if let Err(error) = result {
            self.lacks.push(format!("{layer}: {error:#}"));
        }
    }
}

/// Which layers this host does not allow, each with the reason: what a monitor process of this user would lack.
pub fn probe() -> Result<Vec<String>> {
    let (ours, theirs) = socket::message_pair()?;
    let layers = Layers::new(true);
    let files = Files { given: vec![theirs.as_raw_fd()], shared: Vec::new() };
    let pid = match layers.split(theirs, &files)? {
        (Split::Child(socket), lacks) => {
            let found = Confinement::begin(layers, lacks).and_then(Confinement::complete);
            let found = found.unwrap_or_else(|error| vec![format!("{error:#}")]);
            // The first line keeps the message from being empty.
            let _ = socket.send(format!("\n{}", found.join("\n")).as_bytes());
            fork::exit_now(0)
        }
        (Split::Parent(pid), _) => pid,
    };
    let mut text = [0; 4096];
    let len = ours.recv(&mut text)?;
    fork::wait(pid);
    let text = String::from_utf8_lossy(text.get(..len).unwrap_or_default()).into_owned();
    Ok(text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

/// Becomes a user that owns nothing, and keeps capabilities until the user namespace is left.
fn change_user(uid: u32) -> io::Result<()> {
    rustix::thread::set_thread_groups(&[])?;
    let gid = Gid::from_raw(uid);
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    let uid = Uid::from_raw(uid);
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
}

/// A new network namespace, which the calling thread is left in.
fn new_network() -> Result<File> {
    namespaces::unshare(UnshareFlags::NEWNET)?;
    Ok(File::open("/proc/thread-self/ns/net")?)
}

/// Replaces the root directory of this process by an empty file system that cannot be written to.
///
/// The old root stays mounted below it. Taking it off (pivot_root(2), umount2(2)) waits for RCU grace periods, which takes
/// up to a millisecond, and adds nothing: without descriptors of directories and without CAP_SYS_CHROOT no path leads
/// there. A mount namespace that belongs to another user namespace than the old one passes no mounts on to it.
fn empty_root() -> Result<()> {
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("none", MOUNT_POINT, "tmpfs", flags, Some(c"size=0,nr_inodes=1"))?;
    rustix::process::chroot(MOUNT_POINT)?;
    Ok(rustix::process::chdir("/")?)
}

/// Denies all access by path, new network connections unless the network is kept, and signals to other processes (Landlock).
fn deny_paths(keeps_network: bool) -> Result<()> {
    let network = if keeps_network { AccessNet::BindTcp.into() } else { AccessNet::from_all(ABI::V6) };
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))?
        .handle_access(network)?
        .scope(Scope::from_all(ABI::V6))?
        .create()?;
    let status = rules.restrict_self()?;
    anyhow::ensure!(status.ruleset != RulesetStatus::NotEnforced, "not in this kernel");
    Ok(())
}

fn drop_capabilities() -> io::Result<()> {
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}
