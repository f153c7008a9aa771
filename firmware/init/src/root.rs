//! Mounts the root file system.

use std::fs::{self, DirBuilder, File, Permissions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::time::{Duration, Instant};

use husk_protocol::{Overlay, Root, Spec, Start};
use nix::mount::{MntFlags, MsFlags, mount as mount_call, umount2};
use nix::unistd::{chdir, chroot, fchdir};

use crate::disk;
use crate::errors::{Context, Failure};
use crate::{report, sys};

/// The mount point in the initramfs.
pub const NEW_ROOT: &str = "/root";
/// The descriptor of the overlay's upper directory, which nothing leads to any more when the root was entered.
pub const UPPER_FD: i32 = 100;
/// That of the image.
pub const IMAGE_FD: i32 = 101;
/// Where the share of the machine's containers is mounted.
pub const SHARE: &str = "/share";
const IMAGE: &str = "/image";
const OVERLAY: &str = "/overlay";
/// How long to wait for a driver to probe its device.
const DEVICE_TIMEOUT: Duration = Duration::from_secs(10);
const QUIET: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// A file system to be synced when the machine ends.
pub struct Kept(OwnedFd);

impl Kept {
    /// Writes everything to the disk, so that the machine may end at any moment.
    pub fn settle(&self) {
        let _ = nix::unistd::syncfs(&self.0);
        if let Err(error) = sys::freeze(self.0.as_fd()) {
            report::say(&format!("unmount the disk: {error}"));
        }
    }
}

/// Mounts a file system without a device.
pub fn mount_at(kind: &str, dir: &str, flags: MsFlags, options: &str) -> Result<(), Failure> {
    mount_device(kind, dir, kind, flags, options).context(format_args!("mount {kind} on {dir}"))
}

/// Mounts `device` on a directory.
pub fn mount_device(device: &str, dir: &str, kind: &str, flags: MsFlags, options: &str) -> nix::Result<()> {
    let options = Some(options).filter(|options| !options.is_empty());
    mount_call(Some(device), dir, Some(kind), flags, options)
}

/// Mounts the root file system described by `spec`, and returns the file system to sync, if any.
pub fn mount(spec: &Spec) -> Result<Option<Kept>, Failure> {
    make_dir(NEW_ROOT)?;
    match &spec.root {
        Root::Image { device, overlay } => mount_image(device, overlay),
        Root::Disk { device, readonly } => {
            let program = match &spec.start {
                Start::Init { args, .. } => args.first().map(Vec::as_slice),
                Start::Process(_) | Start::Wait(_) => None,
            };
            await_device(device)?;
            disk::mount_root(device, *readonly, program)?;
            keep(NEW_ROOT).map(Some)
        }
        Root::Share { tag } => {
            mount_at("tmpfs", NEW_ROOT, MsFlags::empty(), "mode=755")?;
            match spec.start {
                // The run brings it.
                Start::Wait(_) => Ok(None),
                _ => mount_share(tag, &format!("{NEW_ROOT}{SHARE}")).map(|()| None),
            }
        }
    }
}

/// Mounts the share `tag` of the machine's containers on the directory `dir`.
pub fn mount_share(tag: &str, dir: &str) -> Result<(), Failure> {
    make_dir(dir)?;
    mount_device(tag, dir, "virtiofs", MsFlags::empty(), "")
        .context(format_args!("mount the folder {tag:?} of the host (virtiofs)"))
}

fn mount_image(device: &str, overlay: &Overlay) -> Result<Option<Kept>, Failure> {
    for dir in [IMAGE, OVERLAY] {
        make_dir(dir)?;
    }
    await_device(device)?;
    mount_device(device, IMAGE, "erofs", MsFlags::MS_RDONLY, "")
        .context(format_args!("mount the image on {device} (erofs)"))?;
    mount_layers(overlay)
}

/// Mounts the image's writable layer, and both together as the root.
fn mount_layers(overlay: &Overlay) -> Result<Option<Kept>, Failure> {
    let kept = match overlay {
        Overlay::Disk(device) => {
            await_device(device)?;
            mount_device(device, OVERLAY, "ext4", MsFlags::empty(), "")
                .context(format_args!("mount the writable disk {device} (ext4)"))?;
            Some(keep(OVERLAY)?)
        }
        Overlay::Memory | Overlay::ReadOnly => {
            // The default limit on the number of files is low on small machines: half the number of pages.
            mount_at("tmpfs", OVERLAY, MsFlags::empty(), "mode=755,nr_inodes=0")?;
            None
        }
    };
    make_upper()?;
    let options = format!("lowerdir={IMAGE},upperdir={OVERLAY}/upper,workdir={OVERLAY}/work");
    mount_at("overlay", NEW_ROOT, MsFlags::empty(), &options)?;
    for (dir, fd) in [(format!("{OVERLAY}/upper"), UPPER_FD), (IMAGE.to_owned(), IMAGE_FD)] {
        sys::hold(&dir, fd).context(format_args!("open {dir}"))?;
    }
    Ok(kept)
}

/// The upper directory determines the attributes of the root directory, so they are copied from the image.
fn make_upper() -> Result<(), Failure> {
    let (upper, work) = (format!("{OVERLAY}/upper"), format!("{OVERLAY}/work"));
    if !Path::new(&upper).exists() {
        make_dir(&upper)?;
        let image = fs::metadata(IMAGE).context("read the root of the image")?;
        chown(&upper, Some(image.uid()), Some(image.gid())).context("change the owner of the root")?;
        fs::set_permissions(&upper, Permissions::from_mode(image.mode() & 0o7777))
            .context("change the mode of the root")?;
    }
    make_dir(&work)
}

fn keep(dir: &str) -> Result<Kept, Failure> {
    Ok(Kept(File::open(dir).context(format_args!("open {dir}"))?.into()))
}

fn await_device(device: &str) -> Result<(), Failure> {
    let started = Instant::now();
    while !Path::new(device).exists() {
        if started.elapsed() > DEVICE_TIMEOUT {
            return Err(Failure::new(format_args!("no device {device}: does the kernel have a virtio-blk driver?")));
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// The kernel's first root file system, in which the machine's own is mounted.
pub struct Initramfs(OwnedFd);

impl Initramfs {
    /// To be called before [`enter`].
    pub fn open() -> Result<Initramfs, Failure> {
        Ok(Initramfs(File::open("/").context("open the initramfs")?.into()))
    }

    /// Replaces the writable layer of an image, in which nothing has run yet, by `overlay`. What was read of the image stays in
    /// memory. Returns the file system to sync, if any.
    pub fn replace_layer(&self, overlay: &Overlay) -> Result<Option<Kept>, Failure> {
        self.leave_root()?;
        umount2(OVERLAY, MntFlags::MNT_DETACH).context("unmount the writable layer")?;
        let kept = mount_layers(overlay)?;
        enter()?;
        Ok(kept)
    }

    /// The opposite of [`enter`].
    fn leave_root(&self) -> Result<(), Failure> {
        for dir in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
            // The kernel may not support it.
            let _ = umount2(dir, MntFlags::MNT_DETACH);
        }
        let root = File::open("/").context("open the root")?;
        // It is mounted above the initramfs, where no path leads but from its own descriptor.
        fchdir(self.0.as_fd()).and_then(|()| chroot(".")).context("return to the initramfs")?;
        fchdir(root.as_fd()).context("return to the root")?;
        mount_call(Some("dev"), "/dev", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move /dev back")?;
        umount2(".", MntFlags::MNT_DETACH).context("unmount the root")?;
        chdir("/").context("return to the initramfs")
    }
}

/// Enters the mounted root file system, and mounts what programs expect.
pub fn enter() -> Result<(), Failure> {
    let dev = format!("{NEW_ROOT}/dev");
    make_dir(&dev)?;
    mount_call(Some("/dev"), dev.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move /dev")?;
    chdir(NEW_ROOT).context("enter the root")?;
    mount_call(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the root")?;
    chroot(".").and_then(|()| chdir("/")).context("change the root")?;
    mount_system();
    Ok(())
}

/// Mounts what every program expects. Some of it may not be supported by the kernel.
fn mount_system() {
    for (kind, dir, flags, options) in [
        ("proc", "/proc", QUIET, ""),
        ("sysfs", "/sys", QUIET, ""),
        ("devpts", "/dev/pts", MsFlags::MS_NOSUID.union(MsFlags::MS_NOEXEC), "gid=5,mode=620,ptmxmode=666"),
        ("tmpfs", "/dev/shm", QUIET, "mode=1777"),
        ("mqueue", "/dev/mqueue", QUIET, ""),
        ("cgroup2", "/sys/fs/cgroup", QUIET, ""),
    ] {
        if let Err(failure) = make_dir(dir).and_then(|()| mount_at(kind, dir, flags, options)) {
            report::say(&failure.message);
        }
    }
    for (name, target) in
        [("fd", "/proc/self/fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2"), ("core", "/proc/kcore")]
    {
        // An existing device node with that name is fine.
        let _ = symlink(target, format!("/dev/{name}"));
    }
}

/// Creates a directory and its parents, accessible to all.
pub fn make_dir(path: impl AsRef<Path>) -> Result<(), Failure> {
    let path = path.as_ref();
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
        .context(format_args!("create directory {}", path.display()))
}

/// Makes the root file system read-only.
pub fn forbid_changes() -> Result<(), Failure> {
    remount(MsFlags::MS_RDONLY).context("remount the root read-only")
}

/// The opposite.
pub fn allow_changes() -> Result<(), Failure> {
    remount(MsFlags::empty()).context("remount the root writable")
}

fn remount(flags: MsFlags) -> nix::Result<()> {
    mount_call(None::<&str>, "/", None::<&str>, MsFlags::MS_REMOUNT | flags, None::<&str>)
}
