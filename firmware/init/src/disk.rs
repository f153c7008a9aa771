//! Finds the root file system on a disk with its own operating system.

use std::fs;
use std::path::Path;

use nix::mount::{MntFlags, MsFlags, umount2};

use crate::boot::INITS;
use crate::errors::{Context, Failure};
use crate::root::{NEW_ROOT, make_dir, mount_at, mount_device};

/// Mounts the root file system of `device`: the whole device, or the largest of its partitions that has an init, or
/// `program` if given.
pub fn mount_root(device: &str, readonly: bool, program: Option<&[u8]>) -> Result<(), Failure> {
    for (kind, dir) in [("proc", "/proc"), ("sysfs", "/sys")] {
        make_dir(dir)?;
        mount_at(kind, dir, MsFlags::empty(), "")?;
    }
    let kinds = kinds(&fs::read_to_string("/proc/filesystems").context("read /proc/filesystems")?);
    let found = candidates(device).iter().any(|candidate| try_mount(candidate, &kinds, readonly, program));
    for dir in ["/proc", "/sys"] {
        let _ = umount2(dir, MntFlags::MNT_DETACH);
    }
    if found {
        return Ok(());
    }
    let wanted = program.map_or(INITS[0].into(), String::from_utf8_lossy);
    Err(Failure::new(format_args!(
        "no partition of {device} has a filesystem that this kernel supports ({}) and that contains {wanted}",
        kinds.join(", ")
    )))
}

fn try_mount(device: &str, kinds: &[String], readonly: bool, program: Option<&[u8]>) -> bool {
    let flags = if readonly { MsFlags::MS_RDONLY } else { MsFlags::empty() };
    if !kinds.iter().any(|kind| mount_device(device, NEW_ROOT, kind, flags, "").is_ok()) {
        return false;
    }
    let there = |path: &str| Path::new(NEW_ROOT).join(path.trim_start_matches('/')).symlink_metadata().is_ok();
    let has_init = match program {
        Some(program) => there(&String::from_utf8_lossy(program)),
        None => INITS.iter().any(|init| there(init)),
    };
    if !has_init {
        let _ = umount2(NEW_ROOT, MntFlags::MNT_DETACH);
    }
    has_init
}

/// The file system types for block devices, from the content of /proc/filesystems.
fn kinds(filesystems: &str) -> Vec<String> {
    filesystems
        .lines()
        .filter(|line| !line.starts_with("nodev"))
        .map(|line| line.trim().to_owned())
        .filter(|kind| !kind.is_empty())
        .collect()
}

/// The device itself, followed by its partitions, largest first.
fn candidates(device: &str) -> Vec<String> {
    let name = device.trim_start_matches("/dev/");
    let mut partitions = Vec::new();
    for entry in fs::read_dir(format!("/sys/block/{name}")).into_iter().flatten().flatten() {
        let partition = entry.file_name().to_string_lossy().into_owned();
        if partition.starts_with(name) {
            let sectors = fs::read_to_string(entry.path().join("size")).unwrap_or_default();
            partitions.push((sectors.trim().parse::<u64>().unwrap_or(0), partition));
        }
    }
    partitions.sort_by(|a, b| b.cmp(a));
    let devices = partitions.into_iter().map(|(_, partition)| format!("/dev/{partition}"));
    [device.to_owned()].into_iter().chain(devices).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_systems_without_a_device_are_skipped() {
        assert_eq!(kinds("nodev\tsysfs\n\text4\nnodev\ttmpfs\n\tvfat\n"), ["ext4", "vfat"]);
    }
}
