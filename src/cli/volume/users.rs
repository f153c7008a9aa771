//! The machines that have volumes, running or not.

use std::collections::HashMap;

use anyhow::{Result, bail};

use crate::image::volumes::Volume;
use crate::image::{Store, volumes};
use crate::state_dir::mounts::MountRecord;
use crate::state_dir::{MachineEntry, StateDir};

/// The machines that have volumes, by the volumes' names.
pub(in crate::cli) struct Users(HashMap<String, String>);

impl Users {
    /// Those of now, also in other state directories: volumes are the same in all of them.
    pub fn find(state_dir: &StateDir) -> Result<Users> {
        let here = state_dir.list()?.into_iter().filter_map(|entry| entry.record);
        let mut users = HashMap::new();
        for record in here.chain(state_dir.kept_records()) {
            let name = record.name.as_ref().unwrap_or(&record.id);
            let volumes = record.mounts.iter().filter_map(MountRecord::volume);
            users.extend(volumes.map(|volume| (volume.to_owned(), name.clone())));
        }
        Ok(Users(users))
    }

    /// Fails if a machine has the volume.
    pub fn check_none(&self, volume: &str) -> Result<()> {
        self.0.get(volume).map_or(Ok(()), |user| {
            bail!("volume {volume} is in use by machine {user}: remove that first (husk rm {user})")
        })
    }

    /// All volumes of `store`. Those of machines that do not run are in use as well.
    pub fn volumes(&self, store: &Store) -> Result<Vec<Volume>> {
        let mut volumes = store.volumes()?;
        volumes.iter_mut().for_each(|volume| volume.in_use |= self.0.contains_key(&volume.name));
        Ok(volumes)
    }
}

/// Removes the anonymous volumes of a machine that is removed, unless others have them.
pub(in crate::cli) fn remove_anonymous(state_dir: &StateDir, machine: &MachineEntry) -> Result<()> {
    let mounts = machine.record.iter().flat_map(|record| &record.mounts);
    let mut names = mounts.filter_map(|mount| mount.volume()).filter(|name| volumes::is_anonymous(name)).peekable();
    if names.peek().is_none() {
        return Ok(());
    }
    let (users, store) = (Users::find(state_dir)?, Store::open_default()?);
    names.filter(|name| users.check_none(name).is_ok()).try_for_each(|name| store.remove_volume(name))
}
