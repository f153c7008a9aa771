//! Mounts what a run finds below the root file system: tmpfs, volumes, and folders and files of the host.

use std::ffi::OsStr;
use std::fs::{File, remove_dir};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use husk_protocol::{Run, Share, Tmpfs};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::content;
use crate::errors::{Context, Failure};
use crate::root::{make_dir, mount_at};

/// Where a folder is mounted for as long as it takes to find a file in it, and where volumes wait for their places.
const STAGE: &str = "/dev/.share";
const NONE: Option<&str> = None;

/// A mount point, and what is mounted there.
enum Mount<'a> {
    Tmpfs(&'a Tmpfs),
    Share(&'a Share),
    Volume(&'a [u8]),
}

impl Mount<'_> {
    fn path(&self) -> PathBuf {
        let path = match self {
            Mount::Tmpfs(Tmpfs { path, .. }) | Mount::Share(Share { path, .. }) => path.as_slice(),
            Mount::Volume(path) => path,
        };
        PathBuf::from(OsStr::from_bytes(path))
    }
}

/// Mounts what `run` asks for, each after those that it may lie in. What begins with the image's content gets it before
/// anything hides that.
pub fn mount_all(run: &Run, is_root_readonly: bool) -> Result<(), Failure> {
    let volumes = run.volumes.iter().map(|path| Mount::Volume(path));
    let mut mounts: Vec<Mount> =
        run.tmpfs.iter().map(Mount::Tmpfs).chain(run.shares.iter().map(Mount::Share)).chain(volumes).collect();
    mounts.sort_by_key(|mount| mount.path().components().count());
    let stage = |(index, mount): (usize, &Mount)| stage(mount, &format!("{STAGE}.{index}"), is_root_readonly);
    let staged = mounts.iter().enumerate().map(stage).collect::<Result<Vec<_>, _>>()?;
    for (mount, stage) in mounts.iter().zip(staged) {
        match (mount, stage) {
            (_, Some(stage)) => move_mount(&stage, &mount.path())?,
            (Mount::Tmpfs(tmpfs), None) => {
                let path = mount.path().to_string_lossy().into_owned();
                make_dir(&path)?;
                mount_at("tmpfs", &path, MsFlags::from_bits_truncate(tmpfs.flags), &tmpfs.options)?;
            }
            (Mount::Share(share), None) => mount_share(share, &mount.path())?,
            (Mount::Volume(_), None) => {}
        }
        if let Mount::Share(share) = mount
            && share.owned
        {
            content::give(&mount.path(), &run.process.user)?;
        }
    }
    Ok(())
}

/// Mounts a volume at `stage` for now, with the content that it begins with. `None` for what needs no content.
fn stage(mount: &Mount, stage: &str, is_root_readonly: bool) -> Result<Option<String>, Failure> {
    let path = mount.path();
    match mount {
        Mount::Share(share) if share.copies => {
            make_dir(stage)?;
            mount_folder(share, Path::new(stage), MsFlags::empty())?;
            content::fill(Path::new(stage), &path)?;
            if share.readonly {
                // The host lets nobody write to it after that.
                umount2(stage, MntFlags::empty()).context(format_args!("unmount {stage}"))?;
                mount_folder(share, Path::new(stage), readonly(share))?;
            }
        }
        Mount::Volume(_) => {
            make_dir(&path)?;
            make_dir(stage)?;
            if is_root_readonly {
                mount_at("tmpfs", stage, MsFlags::empty(), "mode=755")?;
                content::fill(Path::new(stage), &path)?;
            } else {
                mount_call(&path, Path::new(stage), MsFlags::MS_BIND)?;
            }
        }
        _ => return Ok(None),
    }
    Ok(Some(stage.to_owned()))
}

fn move_mount(stage: &str, path: &Path) -> Result<(), Failure> {
    make_dir(path)?;
    mount_call(Path::new(stage), path, MsFlags::MS_MOVE)?;
    let _ = remove_dir(stage);
    Ok(())
}

fn mount_call(from: &Path, to: &Path, flags: MsFlags) -> Result<(), Failure> {
    mount(Some(from), to, NONE, flags, NONE).context(format_args!("mount {} on {}", from.display(), to.display()))
}

fn mount_share(share: &Share, path: &Path) -> Result<(), Failure> {
    let Some(file) = &share.file else {
        make_dir(path)?;
        return mount_folder(share, path, readonly(share));
    };
    make_dir(STAGE)?;
    mount_folder(share, Path::new(STAGE), readonly(share))?;
    let bound = bind_file(&Path::new(STAGE).join(file), path, readonly(share));
    let _ = umount2(STAGE, MntFlags::MNT_DETACH).map(|()| remove_dir(STAGE));
    bound
}

fn mount_folder(share: &Share, at: &Path, flags: MsFlags) -> Result<(), Failure> {
    let mounted = mount(Some(share.tag.as_str()), at, Some("virtiofs"), flags, NONE);
    mounted.context(format_args!("mount a folder of the host on {}", OsStr::from_bytes(&share.path).display()))
}

fn readonly(share: &Share) -> MsFlags {
    if share.readonly { MsFlags::MS_RDONLY } else { MsFlags::empty() }
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
