//! What of a machine that stays survives its processes and a restart of the host: a directory in the user's data, next to the
//! images. A machine's own directory is gone when the host has restarted, and is then made again from this one.
//!
//! ```text
//! DATA/machines/ID/
//!   record.json, origin.json   copies of those in the machine's own directory
//!   layer.ext4                 the disk with its changes to the root file system
//!   runtime                    a link to the machine's own directory, where a link `kept` leads here
//! ```

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};

use super::machine_dir::{self, is_id};
use super::record::Record;
use super::{LAYER, StateDir, origin, record};
use crate::resources::{data_dir, lock};

/// The link in a machine's own directory.
const KEPT: &str = "kept";
/// The link back.
const RUNTIME: &str = "runtime";
/// A machine's own directory while it is made again.
const PART: &str = "recovered.part";

/// The directory that contains those of all machines; `None` if there is no place for the user's data.
pub(super) fn place() -> Option<PathBuf> {
    data_dir::find().map(|data| data.join("machines"))
}

/// What is kept of the machine with the directory `own`.
pub(super) fn of(own: &Path) -> Option<PathBuf> {
    fs::read_link(own.join(KEPT)).ok()
}

/// Creates the directory for the machine with the directory `own` in `place`.
pub(super) fn create(own: &Path, place: &Path) -> Result<PathBuf> {
    let kept = place.join(own.file_name().context("the machine has no ID")?);
    let make = || {
        DirBuilder::new().recursive(true).mode(0o700).create(&kept)?;
        symlink(own, kept.join(RUNTIME))?;
        symlink(&kept, own.join(KEPT))
    };
    make().with_context(|| format!("create {} (set $HUSK_DATA to move it)", kept.display()))?;
    Ok(kept)
}

/// Removes what is kept of the machine with the directory `own`.
pub(super) fn remove_of(own: &Path) -> Result<()> {
    let Some(kept) = of(own) else { return Ok(()) };
    machine_dir::remove(&kept).with_context(|| format!("remove {}", kept.display()))
}

/// Whether a machine with the directory `own` is described there.
pub(super) fn is_described(own: &Path) -> bool {
    of(own).is_some_and(|kept| kept.join(record::FILE).exists())
}

impl StateDir {
    /// The records of all of the user's machines that stay, also of those that belong to another state directory.
    pub fn kept_records(&self) -> Vec<Record> {
        let dirs = self.kept.iter().flat_map(fs::read_dir).flatten().flatten();
        dirs.filter_map(|dir| Record::read(&dir.path()).ok()).collect()
    }

    /// Makes the directories of machines that stay again, if they are gone, as after a restart of the host.
    pub(super) fn recover(&self) {
        let Some(place) = &self.kept else { return };
        for entry in fs::read_dir(place).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let Some(id) = name.to_str().filter(|name| is_id(name)) else { continue };
            if !self.base.join(id).exists()
                && let Err(error) = self.recover_machine(id, &entry.path())
            {
                warn_once(id, &entry.path(), &error);
            }
        }
        machine_dir::remove_leftovers(place);
    }

    fn recover_machine(&self, id: &str, kept: &Path) -> Result<()> {
        let _lock = super::lock(&self.base)?;
        let own = self.base.join(id);
        let Ok(before) = fs::read_link(kept.join(RUNTIME)) else { return Ok(()) };
        // Unless it belongs to another state directory, or runs without its directory, which somebody has removed.
        let is_elsewhere = before != own && before.parent().is_some_and(Path::exists);
        if is_elsewhere || own.exists() || is_locked(&kept.join(LAYER)) {
            return Ok(());
        }
        if !kept.join(record::FILE).exists() && !kept.join(origin::FILE).exists() {
            // Its husk was killed before it could run.
            return Ok(machine_dir::remove(kept)?);
        }
        let mut record = Record::read(kept)?;
        // Under another name until it is complete: a directory without a record is removed, and so are leftovers.
        let part = self.base.join(PART);
        let _ = fs::remove_dir_all(&part);
        DirBuilder::new().mode(0o700).create(&part)?;
        symlink(kept, part.join(KEPT))?;
        let copied = fs::copy(kept.join(origin::FILE), part.join(origin::FILE));
        copied.with_context(|| format!("copy {}", origin::FILE))?;
        let _ = fs::remove_file(kept.join(RUNTIME));
        symlink(&own, kept.join(RUNTIME))?;
        record.write(&part)?;
        fs::rename(&part, &own)?;
        if let Some(name) = &record.name
            && let Err(error) = self.claim_locked(name, id)
        {
            log::warn!("{error:#}: machine {id} has no name now");
            record.name = None;
            record.write(&own)?;
            record.write(kept)?;
        }
        Ok(())
    }
}

/// A command may look for machines several times.
fn warn_once(id: &str, kept: &Path, error: &anyhow::Error) {
    static KNOWN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    if KNOWN.lock().unwrap_or_else(PoisonError::into_inner).insert(id.to_owned()) {
        log::warn!("machine {id} cannot be used, and {} has its changes: {error:#}", kept.display());
    }
}

/// Whether another process has this file locked.
fn is_locked(path: &Path) -> bool {
    match lock::file().create(false).open(path) {
        Err(error) => error.kind() != ErrorKind::NotFound,
        Ok(file) => File::try_lock(&file).is_err(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::State;
    use super::super::record::tests::record;
    use super::super::tests::state_dir;
    use super::*;
    use crate::state_dir::origin::Origin;

    /// A machine that stays and has stopped, with its ID and what is kept of it.
    fn stopped(state_dir: &StateDir, name: &str) -> (String, PathBuf) {
        let mut dir = state_dir.create(Some(name)).unwrap();
        let kept = dir.stay_in(state_dir.kept.as_ref().unwrap()).unwrap();
        fs::write(kept.join(LAYER), "changes").unwrap();
        Origin::here(vec!["run".into()]).unwrap().write(&dir).unwrap();
        let state = State::Exited { code: 3, at_ms: 5, reason: None };
        dir.write(&Record { id: dir.id(), name: Some(name.into()), state, ..record() }).unwrap();
        let id = dir.id();
        dir.abandon();
        (id, kept)
    }

    #[test]
    fn a_machine_that_stays_survives_the_loss_of_the_state_directory() {
        let (temporary, state_dir) = state_dir();
        let (id, kept) = stopped(&state_dir, "web");
        fs::remove_dir_all(temporary.path().join("husk")).unwrap();
        machine_dir::own(&state_dir.base).unwrap();
        assert!(state_dir.create(Some("web")).unwrap_err().to_string().contains("husk rm web"), "its name is taken");
        let entry = state_dir.find("web").unwrap();
        assert_eq!((&entry.id, entry.alive, entry.kept()), (&id, false, Some(kept.clone())));
        assert!(matches!(entry.state(), State::Exited { code: 3, .. }));
        Origin::read(&entry).unwrap();
        assert_eq!(state_dir.list().unwrap().len(), 1);
        state_dir.remove_stale().unwrap();
        assert!(kept.join(LAYER).exists());
        state_dir.remove(&entry).unwrap();
        assert!(!kept.exists() && state_dir.find("web").is_err());
    }

    #[test]
    fn a_machine_of_another_state_directory_is_left_to_that() {
        let (temporary, here) = state_dir();
        let there = StateDir { base: temporary.path().join("there"), kept: here.kept.clone() };
        machine_dir::own(&there.base).unwrap();
        let (id, kept) = stopped(&there, "web");
        assert!(here.list().unwrap().is_empty());
        assert_eq!(here.kept_records().iter().map(|record| &record.id).collect::<Vec<_>>(), [&id]);
        fs::remove_dir_all(&there.base).unwrap();
        let layer = File::open(kept.join(LAYER)).unwrap();
        layer.lock().unwrap();
        assert!(here.list().unwrap().is_empty(), "it is running");
        layer.unlock().unwrap();
        assert_eq!(here.find("web").unwrap().id, id);
        assert_eq!(fs::read_link(kept.join(RUNTIME)).unwrap(), here.base.join(&id));
    }

    #[test]
    fn a_machine_whose_husk_was_killed_before_it_ran_leaves_nothing() {
        let (_temporary, state_dir) = state_dir();
        let mut dir = state_dir.create(None).unwrap();
        let kept = dir.stay_in(state_dir.kept.as_ref().unwrap()).unwrap();
        fs::write(kept.join(LAYER), "").unwrap();
        dir.abandon();
        state_dir.remove_stale().unwrap();
        assert!(!kept.exists() && state_dir.list().unwrap().is_empty());
        // The same if its own directory is gone as well.
        let mut dir = state_dir.create(None).unwrap();
        let kept = dir.stay_in(state_dir.kept.as_ref().unwrap()).unwrap();
        let own = dir.file("");
        dir.abandon();
        fs::remove_dir_all(own).unwrap();
        assert!(state_dir.list().unwrap().is_empty() && !kept.exists());
    }

    #[test]
    fn a_machine_that_is_being_recovered_is_no_leftover() {
        let (temporary, state_dir) = state_dir();
        let (id, _) = stopped(&state_dir, "web");
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                    machine_dir::remove_leftovers(&state_dir.base);
                }
            });
            let found = (0..300).map(|_| {
                let gone = temporary.path().join("gone");
                fs::rename(state_dir.base.join(&id), &gone).unwrap();
                fs::remove_dir_all(gone).unwrap();
                fs::remove_file(state_dir.base.join("names/web")).unwrap();
                state_dir.find("web").is_ok_and(|entry| entry.record.is_some())
            });
            let missed = found.filter(|found| !found).count();
            is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            assert_eq!(missed, 0);
        });
    }

    #[test]
    fn a_machine_whose_record_is_damaged_keeps_its_changes() {
        let (_temporary, state_dir) = state_dir();
        let (id, kept) = stopped(&state_dir, "web");
        fs::write(state_dir.base.join(&id).join(record::FILE), "{").unwrap();
        state_dir.remove_stale().unwrap();
        assert!(kept.join(LAYER).exists());
        state_dir.remove(&state_dir.find(&id).unwrap()).unwrap();
        assert!(!kept.exists());
    }

    #[test]
    fn a_machine_that_did_not_run_takes_what_is_kept_of_it_along() {
        let (_temporary, state_dir) = state_dir();
        let mut dir = state_dir.create(None).unwrap();
        let kept = dir.stay_in(state_dir.kept.as_ref().unwrap()).unwrap();
        drop(dir);
        assert!(!kept.exists());
    }
}
