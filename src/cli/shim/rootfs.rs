//! The root file system of a container, which its shim mounts in the bundle as containerd describes it.

use std::ffi::CString;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};
use rustix::thread::UnshareFlags;

use super::messages::Mount;
use crate::oci::guest::flag_of;
use crate::sandbox;
use crate::sys::namespaces::unshare;

/// The directory of a bundle with it.
const DIR: &str = "rootfs";
/// What mount(2) takes at most for a file system, which layers of an overlay may exceed.
const DATA_BYTES_MAX: usize = 4095;
const LOWER: &str = "lowerdir=";

/// What mount(2) is given.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    flags: MountFlags,
    data: String,
    /// The directory that paths in `data` are relative to.
    dir: Option<PathBuf>,
}

/// Mounts the root file system of the container in `bundle`. Nothing is mounted after an error.
pub fn mount_all(bundle: &Path, mounts: &[Mount]) -> Result<()> {
    let root = bundle.join(DIR);
    for described in mounts {
        // Some kinds are made of mounts below others.
        let target = match described.target.trim_start_matches('/') {
            "" => root.clone(),
            below => root.join(below),
        };
        let what = || format!("mount {} of type {}", described.source, described.kind);
        let mounted = std::fs::create_dir_all(&target).map_err(Into::into).and_then(|()| mount_one(described, &target));
        if let Err(error) = mounted.with_context(what) {
            let _ = unmount_all(bundle);
            return Err(error);
        }
    }
    Ok(())
}

/// Unmounts what is mounted there, if anything is.
pub fn unmount_all(bundle: &Path) -> Result<()> {
    let root = bundle.join(DIR);
    loop {
        match unmount(&root, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error).with_context(|| format!("unmount {}", root.display())),
        }
    }
}

fn mount_one(described: &Mount, target: &Path) -> Result<()> {
    let Call { flags, data, dir } = parse(&described.options);
    let (source, kind, place) = (described.source.clone(), described.kind.clone(), target.to_owned());
    let call = move || -> Result<()> {
        if let Some(dir) = dir {
            unshare(UnshareFlags::FS).context("leave the process's directory")?;
            rustix::process::chdir(&dir).with_context(|| format!("change to {}", dir.display()))?;
        }
        let data = CString::new(data).context("its options")?;
        let data = (!data.is_empty()).then_some(data.as_c_str());
        mount(source, place, kind, flags, data).context("mount(2)")
    };
    // The directory is then that of a thread.
    let done = sandbox::spawn("mount", call).context("start a thread")?.join();
    done.map_err(|_| anyhow!("a thread has failed"))??;
    if flags.contains(MountFlags::BIND | MountFlags::RDONLY) {
        // Only a mount that is there becomes read-only.
        mount_remount(target, flags & !MountFlags::REC, c"").context("make it read-only")?;
    }
    Ok(())
}

/// Options as of mount(8): flags, and what the file system takes.
fn parse(options: &[String]) -> Call {
    let (mut bits, mut data) = (0, Vec::new());
    for option in options {
        match flag_of(option) {
            Some((bit, true)) => bits |= bit,
            Some((bit, false)) => bits &= !bit,
            None => data.push(option.clone()),
        }
    }
    // All of these flags are in the lower half.
    let flags = MountFlags::from_bits_retain(u32::try_from(bits).unwrap_or_default());
    let joined = data.join(",");
    if joined.len() <= DATA_BYTES_MAX {
        return Call { flags, data: joined, dir: None };
    }
    shorten(flags, &data).unwrap_or(Call { flags, data: joined, dir: None })
}

/// The same with layers relative to the directory that they have in common.
fn shorten(flags: MountFlags, data: &[String]) -> Option<Call> {
    let layers: Vec<&Path> =
        data.iter().find_map(|option| option.strip_prefix(LOWER))?.split(':').map(Path::new).collect();
    let (first, others) = layers.split_first()?;
    let dir = first.ancestors().skip(1).find(|dir| others.iter().all(|layer| layer.starts_with(dir)))?;
    let relative: Option<Vec<&str>> = layers.iter().map(|layer| layer.strip_prefix(dir).ok()?.to_str()).collect();
    let lower = format!("{LOWER}{}", relative?.join(":"));
    let data: Vec<&str> =
        data.iter().map(|option| if option.starts_with(LOWER) { lower.as_str() } else { option.as_str() }).collect();
    Some(Call { flags, data: data.join(","), dir: Some(dir.to_owned()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owned(options: &[&str]) -> Vec<String> {
        options.iter().map(|option| (*option).to_owned()).collect()
    }

    #[test]
    fn options_are_flags_or_the_file_systems() {
        let call = parse(&owned(&["rbind", "ro"]));
        assert_eq!(call.flags, MountFlags::BIND | MountFlags::REC | MountFlags::RDONLY);
        assert_eq!((call.data.as_str(), call.dir), ("", None));
        let call = parse(&owned(&["index=off", "workdir=/w", "rw", "upperdir=/u", "lowerdir=/a:/b"]));
        assert_eq!((call.flags, call.dir), (MountFlags::empty(), None));
        assert_eq!(call.data, "index=off,workdir=/w,upperdir=/u,lowerdir=/a:/b");
    }

    #[test]
    fn many_layers_are_named_from_the_directory_that_they_are_in() {
        let layers: Vec<String> = (0..200).map(|number| format!("/var/lib/containerd/snapshots/{number}/fs")).collect();
        let call = parse(&owned(&["upperdir=/u", &format!("lowerdir={}", layers.join(":"))]));
        assert_eq!(call.dir.as_deref(), Some(Path::new("/var/lib/containerd/snapshots")));
        assert!(call.data.starts_with("upperdir=/u,lowerdir=0/fs:1/fs:2/fs:") && call.data.len() < DATA_BYTES_MAX);
    }

    #[test]
    fn nothing_is_unmounted_where_nothing_is_mounted() {
        let dir = tempfile::tempdir().unwrap();
        unmount_all(dir.path()).unwrap();
        std::fs::create_dir(dir.path().join(DIR)).unwrap();
        unmount_all(dir.path()).unwrap();
        let unknown = Mount { kind: "none-such".into(), source: "x".into(), ..Mount::default() };
        let told = format!("{:#}", mount_all(dir.path(), &[unknown]).unwrap_err());
        assert!(told.starts_with("mount x of type none-such: "), "{told}");
    }
}
