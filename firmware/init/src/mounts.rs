//! Mounts what a run finds below the root file system: tmpfs, and folders and files of the host.

use std::ffi::OsStr;
use std::fs::{File, remove_dir};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use husk_protocol::{Share, Tmpfs};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::errors::{Context, Failure};
use crate::root::{make_dir, mount_at};

/// Where a folder is mounted for as long as it takes to find a file in it.
const STAGE: &str = "/dev/.share";
const NONE: Option<&str> = None;

/// A mount point, and what is mounted there.
enum Mount<'a> {
    Tmpfs(&'a Tmpfs),
    Share(&'a Share),
}

impl Mount<'_> {
    fn path(&self) -> PathBuf {
        let (Mount::Tmpfs(Tmpfs { path, .. }) | Mount::Share(Share { path, .. })) = self;
        PathBuf::from(OsStr::from_bytes(path))
    }
}

/// Mounts all of them, each after those that it may lie in.
pub fn mount_all(tmpfs: &[Tmpfs], shares: &[Share]) -> Result<(), Failure> {
    let mut mounts: Vec<Mount> = tmpfs.iter().map(Mount::Tmpfs).chain(shares.iter().map(Mount::Share)).collect();
    mounts.sort_by_key(|mount| mount.path().components().count());
    mounts.iter().try_for_each(|mount| match mount {
        Mount::Tmpfs(tmpfs) => {
            let path = mount.path().to_string_lossy().into_owned();
            make_dir(&path)?;
            mount_at("tmpfs", &path, MsFlags::from_bits_truncate(tmpfs.flags), &tmpfs.options)
        }
        Mount::Share(share) => mount_share(share, &mount.path()),
    })
}

fn mount_share(share: &Share, path: &Path) -> Result<(), Failure> {
    let what = || format!("mount a folder of the host on {}", path.display());
    let readonly = if share.readonly { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    let mount_folder = |at: &Path| mount(Some(share.tag.as_str()), at, Some("virtiofs"), readonly, NONE);
    let Some(file) = &share.file else {
        make_dir(path)?;
        return mount_folder(path).context(what());
    };
    make_dir(STAGE)?;
    mount_folder(Path::new(STAGE)).context(what())?;
    let bound = bind_file(&Path::new(STAGE).join(file), path, readonly);
    let _ = umount2(STAGE, MntFlags::MNT_DETACH).map(|()| remove_dir(STAGE));
    bound
}

/// Makes the file `from` appear at `path`, where an empty one is made if there is none.
fn bind_file(from: &Path, path: &Path, readonly: MsFlags) -> Result<(), Failure> {
    let what = || format!("mount a file of the host on {}", path.display());
    if let Some(parent) = path.parent() {
        make_dir(parent)?;
    }
    if !path.exists() {
        File::create(path).context(what())?;
    }
    mount(Some(from), path, NONE, MsFlags::MS_BIND, NONE).context(what())?;
    if !readonly.is_empty() {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | readonly;
        mount(NONE, path, NONE, flags, NONE).context(what())?;
    }
    Ok(())
}
