//! What a machine mounts: what the user asks for, what other machines have, and the volumes of the image; and opens that.

use std::collections::HashSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use husk_protocol::Tmpfs;

use super::{Access, Mount, Source, path, volumes_from};
use crate::guest::shares::Share;
use crate::image::{Store, volumes};
use crate::state_dir::mounts::{MountRecord, MountSource};
use crate::state_dir::{MachineDir, StateDir};

/// What the mounts of a machine depend on, apart from its flags.
pub(in crate::cli) struct Machine<'a> {
    /// Its directory.
    pub dir: &'a MachineDir,
    /// Whether it stays when it ends, and with it its anonymous volumes.
    pub is_kept: bool,
    /// Whether it is started again.
    pub is_again: bool,
    /// The volumes of its image.
    pub volumes: &'a [String],
}

/// What a machine mounts, opened.
#[derive(Debug, Default)]
pub(in crate::cli) struct Mounted {
    /// Shared with the host.
    pub shares: Vec<Share>,
    /// Volumes that are part of the writable layer.
    pub volumes: Vec<Vec<u8>>,
    /// All of them, for the record.
    pub records: Vec<MountRecord>,
    /// Keep the volumes of the host from being removed.
    pub locks: Vec<File>,
    /// The anonymous volumes that were created.
    pub created: Created,
}

/// Anonymous volumes that were created for a machine.
#[derive(Debug, Default)]
pub(in crate::cli) struct Created {
    /// The ID of the machine.
    machine: String,
    names: Vec<String>,
}

impl Created {
    fn add(&mut self, store: &Store, machine: &str, name: &str) {
        if store.volume(name).is_err() {
            machine.clone_into(&mut self.machine);
            self.names.push(name.to_owned());
        }
    }

    /// They stay, as the machine has run.
    pub fn keep(&mut self) {
        self.names.clear();
    }

    /// Removes them if the machine has not come to exist, since nobody could remove them with it. Called when its directory and its
    /// volumes are not in use any more.
    pub fn settle(&self) {
        let exists = || StateDir::open().is_ok_and(|state_dir| state_dir.find(&self.machine).is_ok());
        if self.names.is_empty() || exists() {
            return;
        }
        let Ok(store) = Store::open_default() else { return };
        for name in &self.names {
            if let Err(error) = store.remove_volume(name) {
                log::warn!("{error:#}");
            }
        }
    }
}

/// The mounts that `--volumes-from` asks for, with each value of the flag.
pub(super) fn of_machines(words: &[String]) -> Result<Vec<Mount>> {
    let mut found = Vec::new();
    for word in words {
        let (name, readonly) = volumes_from(word)?;
        let entry = StateDir::open()?.find(name)?;
        for mount in &entry.record()?.mounts {
            let of_record = mount_of(mount, name);
            found.push(of_record.map(|mount| mount.with_readonly(readonly)).context("--volumes-from")?);
        }
    }
    Ok(found)
}

/// A mount that another machine has.
fn mount_of(record: &MountRecord, machine: &str) -> Result<Mount> {
    let target = Vec::from(record.target.clone());
    let source = match &record.source {
        MountSource::Bind(path) => Source::Bind { path: path.clone(), creates: false },
        MountSource::Volume(name) => Source::Volume(Some(name.clone())),
        MountSource::Layer => bail!(
            "{} of {machine} ends with that machine: give it a named volume, or start it in the background and without --rm",
            path(&target).display()
        ),
    };
    Ok(Mount { source, target, access: Access { readonly: record.readonly, ..Access::default() } })
}

/// Whether what is there comes from the guest's kernel, which is nothing to copy to a volume or to hide behind it.
fn is_kernels(target: &Path) -> bool {
    target.starts_with("/proc") || target.starts_with("/sys") || target == Path::new("/dev")
}

/// All mounts: of those in one place, what the user asks for comes before what other machines have, and that before the volumes
/// of the image.
fn merge(asked: Vec<Mount>, inherited: Vec<Mount>, tmpfs: &[Tmpfs], volumes: &[String]) -> Vec<Mount> {
    let mut seen: HashSet<PathBuf> = tmpfs.iter().map(|tmpfs| path(&tmpfs.path).to_owned()).collect();
    let of_image = volumes
        .iter()
        .filter(|volume| super::check_target(volume.as_bytes()).is_ok() && !is_kernels(path(volume.as_bytes())));
    let of_image = of_image.map(|volume| Mount::anonymous(volume.as_bytes().to_vec()));
    // The last machine wins, as in Docker.
    let all = asked.into_iter().chain(inherited.into_iter().rev()).chain(of_image);
    all.filter(|mount| seen.insert(mount.target().to_owned())).collect()
}

/// Opens all that `machine` mounts. Creates folders and volumes that do not exist, and adds to `tmpfs`.
pub(in crate::cli) fn open(
    asked: Vec<Mount>,
    inherited: Vec<Mount>,
    tmpfs: &mut Vec<Tmpfs>,
    machine: &Machine<'_>,
) -> Result<Mounted> {
    let inherited = match machine.is_again {
        // The others may be gone meanwhile.
        true => {
            let record = machine.dir.record()?;
            let id = machine.dir.id();
            let of_host = record.mounts.iter().filter(|mount| mount.source != MountSource::Layer);
            of_host.map(|mount| mount_of(mount, &id)).collect::<Result<Vec<_>>>()?
        }
        false => inherited,
    };
    let mut mounted = Mounted::default();
    for Mount { source, target, access } in merge(asked, inherited, tmpfs, machine.volumes) {
        let mut record = |source| {
            let target = target.clone().into();
            mounted.records.push(MountRecord { target, source, readonly: access.readonly });
        };
        let (path, is_new) = match source {
            Source::Tmpfs(mount) => {
                tmpfs.push(mount);
                continue;
            }
            Source::Volume(_) if is_kernels(path(&target)) => {
                bail!("{} belongs to the machine's kernel: mount the volume elsewhere", path(&target).display())
            }
            Source::Volume(None) if !machine.is_kept => {
                record(MountSource::Layer);
                mounted.volumes.push(target);
                continue;
            }
            Source::Volume(name) => {
                let store = Store::open_default()?;
                let name = match name {
                    Some(name) => name,
                    None => {
                        let name = volumes::anonymous_name(&machine.dir.id(), &target);
                        mounted.created.add(&store, &machine.dir.id(), &name);
                        name
                    }
                };
                let volume = store.use_volume(&name)?;
                record(MountSource::Volume(name));
                mounted.locks.push(volume.lock);
                let is_empty = volumes::is_empty(&volume.path)?;
                (volume.path, is_empty)
            }
            Source::Bind { path, creates } => {
                let path = bound(path, creates)?;
                record(MountSource::Bind(path.clone()));
                (path, false)
            }
        };
        let is_file = fs::metadata(&path).with_context(|| format!("share {}", path.display()))?.is_file();
        let mut share = Share::new(mounted.shares.len(), path, is_file, target, access.readonly);
        share.mount.copies = is_new && access.copies;
        share.config.fills = share.mount.copies && access.readonly;
        share.mount.owned = access.owned;
        share.config.cache = access.cache;
        mounted.shares.push(share);
    }
    Ok(mounted)
}

/// Keeps the volumes of a machine that is restored from being removed, as long as the files that are returned exist. Fails if one is
/// not there any more.
pub(in crate::cli) fn use_volumes(mounts: &[MountRecord]) -> Result<Vec<File>> {
    let mut names = mounts.iter().filter_map(MountRecord::volume).peekable();
    if names.peek().is_none() {
        return Ok(Vec::new());
    }
    let store = Store::open_default()?;
    names.map(|name| store.volume(name).and_then(|_| store.use_volume(name)).map(|volume| volume.lock)).collect()
}

/// The absolute path of a file or folder of the host, since another command may run in another directory.
fn bound(path: PathBuf, creates: bool) -> Result<PathBuf> {
    if creates && !path.exists() {
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
    }
    fs::metadata(&path).with_context(|| format!("share {}", path.display()))?;
    std::path::absolute(&path).with_context(|| format!("find {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, target: &str) -> Mount {
        let source = Source::Volume(Some(name.into()));
        Mount { source, target: target.into(), access: Access::default() }
    }

    #[test]
    fn what_the_user_asks_for_comes_before_other_machines_and_the_image() {
        let tmpfs = Tmpfs { path: b"/tmp".to_vec(), flags: 0, options: String::new() };
        let volumes = ["/data", "/own/", "/tmp", "/shared", "relative", "/", "/a/../b", "/proc", "/sys/x", "/dev/"]
            .map(String::from);
        let inherited = vec![named("first", "/shared"), named("second", "/shared"), named("other", "/own")];
        let merged = merge(vec![named("mine", "/own")], inherited, &[tmpfs], &volumes);
        let anonymous = Mount::anonymous(b"/data".to_vec());
        assert_eq!(merged, [named("mine", "/own"), named("second", "/shared"), anonymous]);
    }

    #[test]
    fn what_ends_with_a_machine_is_not_for_another_one() {
        let of = |source| mount_of(&MountRecord { target: b"/d".to_vec().into(), source, readonly: true }, "web");
        let error = of(MountSource::Layer).unwrap_err().to_string();
        assert!(error.starts_with("/d of web ends with that machine"), "{error}");
        let Ok(Mount { source, access, .. }) = of(MountSource::Volume("v".into())) else { panic!() };
        assert!(source == Source::Volume(Some("v".into())) && access.readonly);
    }
}
