//! Machine names: links to machines' directories, created and removed under one lock so that names are unique.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use super::record::Record;
use super::{MachineDir, StateDir};

/// The maximum length; the name is also used as the guest's host name.
const MAX_BYTES: usize = 63;

/// Validates a machine name. It starts with a letter or a digit, so that it cannot be mistaken for a flag or a hidden
/// file.
pub fn check(name: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_');
    ensure!(
        name.len() <= MAX_BYTES && name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(good),
        "invalid machine name {name:?}: use 1 to {MAX_BYTES} letters, digits, `-`, `.` or `_`, starting with a letter or digit"
    );
    Ok(())
}

impl StateDir {
    fn names(&self) -> PathBuf {
        self.base.join("names")
    }

    /// The ID of the machine with this name, if there is one.
    pub(super) fn named(&self, name: &str) -> Option<String> {
        check(name).ok()?;
        let target = fs::read_link(self.names().join(name)).ok()?;
        Some(target.to_str()?.to_owned()).filter(|id| super::machine_dir::is_id(id))
    }

    /// Assigns this name to the machine `id`, unless another machine has it. A name left behind by a killed machine is
    /// free.
    pub(super) fn claim(&self, name: &str, id: &str) -> Result<()> {
        check(name)?;
        let _lock = super::lock(&self.base)?;
        self.claim_locked(name, id)
    }

    pub(super) fn claim_locked(&self, name: &str, id: &str) -> Result<()> {
        let (names, link) = (self.names(), self.names().join(name));
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&names);
        made.with_context(|| format!("create {}", names.display()))?;
        match symlink(id, &link) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.with_context(|| format!("create {}", link.display())),
        }
        let owner = self.named(name).and_then(|id| self.entry(&id));
        if let Some(owner) = owner.filter(|owner| owner.alive || owner.record.as_ref().is_some_and(Record::stays)) {
            let (id, advice) = (&owner.id, if owner.alive { "husk stop" } else { "husk rm" });
            bail!("the name {name} is in use by machine {id}: run `{advice} {name}`, or choose another name");
        }
        fs::remove_file(&link).and_then(|()| symlink(id, &link)).with_context(|| format!("create {}", link.display()))
    }

    /// Removes the name of the machine `id`, if it has this name.
    pub(super) fn release(&self, name: &str, id: &str) -> Result<()> {
        let _lock = super::lock(&self.base)?;
        self.release_locked(name, id);
        Ok(())
    }

    fn release_locked(&self, name: &str, id: &str) {
        if self.named(name).as_deref() == Some(id) {
            let _ = fs::remove_file(self.names().join(name));
        }
    }

    /// Renames a machine that has ended. A running machine is renamed by its own process: see [`MachineDir::rename`].
    pub fn rename(&self, entry: &super::MachineEntry, name: &str) -> Result<()> {
        check(name)?;
        let _lock = super::lock(&self.base)?;
        let record = entry.record()?;
        self.claim_locked(name, &entry.id)?;
        let renamed = Record { name: Some(name.to_owned()), ..record.clone() };
        let written =
            entry.kept().map_or(Ok(()), |kept| renamed.write(&kept)).and_then(|()| renamed.write(&entry.path));
        let (old, new) = (record.name.as_deref(), Some(name));
        let (kept, unused) = if written.is_ok() { (new, old) } else { (old, new) };
        if let Some(unused) = unused.filter(|_| kept != unused) {
            self.release_locked(unused, &entry.id);
        }
        written
    }

    /// Removes dangling names.
    pub(super) fn remove_stale_names(&self) {
        if !self.names().exists() {
            return;
        }
        let Ok(_lock) = super::lock(&self.base) else { return };
        for link in fs::read_dir(self.names()).into_iter().flatten().flatten() {
            if !link.path().exists() && link.path().is_symlink() {
                // The link points to a sibling of its directory.
                let target = fs::read_link(link.path()).unwrap_or_default();
                if !self.base.join(target).exists() {
                    let _ = fs::remove_file(link.path());
                }
            }
        }
    }
}

impl MachineDir {
    /// Renames this machine, replacing the name in `record`.
    pub fn rename(&self, record: &mut Record, name: &str) -> Result<()> {
        let state_dir = self.state_dir();
        state_dir.claim(name, &self.id())?;
        let mut unused = record.name.replace(name.to_owned());
        let written = self.write(record);
        if written.is_err() {
            std::mem::swap(&mut unused, &mut record.name);
        }
        let released = match unused.filter(|unused| record.name.as_ref() != Some(unused)) {
            Some(unused) => state_dir.release(&unused, &self.id()),
            None => Ok(()),
        };
        written.and(released)
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::record;
    use super::super::tests::state_dir;
    use super::*;

    #[test]
    fn a_name_is_unique() {
        let (_temporary, state_dir) = state_dir();
        let first = state_dir.create(Some("web")).unwrap();
        let error = state_dir.create(Some("web")).unwrap_err().to_string();
        assert!(error.contains(&first.id()) && error.contains("choose another name"), "{error}");
        assert_eq!(state_dir.list().unwrap().len(), 1, "the second left something behind");
        drop(first);
        state_dir.create(Some("web")).unwrap();
    }

    #[test]
    fn concurrent_claims_of_a_name_have_one_winner() {
        let (_temporary, state_dir) = state_dir();
        let claims = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| state_dir.create(Some("one")))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(claims.iter().filter(|claim| claim.is_ok()).count(), 1);
    }

    #[test]
    fn a_renamed_machine_is_found_by_its_new_name_only() {
        let (_temporary, state_dir) = state_dir();
        let (dir, other) = (state_dir.create(Some("old")).unwrap(), state_dir.create(Some("other")).unwrap());
        let mut record = Record { name: Some("old".into()), ..record() };
        dir.write(&record).unwrap();
        assert!(dir.rename(&mut record, "other").is_err());
        dir.rename(&mut record, "new").unwrap();
        assert_eq!(state_dir.find("new").unwrap().id, dir.id());
        assert!(state_dir.find("old").is_err());
        // To its current name.
        assert!(dir.rename(&mut record, "new").is_err() || state_dir.find("new").is_ok());
        drop(other);
    }

    #[test]
    fn a_failed_rename_keeps_the_old_name() {
        let (_temporary, state_dir) = state_dir();
        let dir = state_dir.create(Some("old")).unwrap();
        let mut record = Record { name: Some("old".into()), ..record() };
        dir.write(&record).unwrap();
        // Occupies the path of the next record.
        fs::create_dir(dir.file("record.new")).unwrap();
        assert!(dir.rename(&mut record, "new").is_err());
        assert_eq!(record.name.as_deref(), Some("old"));
        let entry = state_dir.find("old").unwrap();
        assert!(state_dir.rename(&entry, "new").is_err() && state_dir.find("new").is_err());
        assert_eq!(state_dir.find("old").unwrap().id, dir.id());
        dir.abandon();
    }

    #[test]
    fn an_unrecorded_name_is_removed_with_its_machine() {
        let (_temporary, state_dir) = state_dir();
        drop(state_dir.create(Some("web")).unwrap());
        assert!(fs::symlink_metadata(state_dir.names().join("web")).is_err());
    }

    #[test]
    fn an_invalid_name_is_rejected() {
        for name in ["", "-x", ".x", "a/b", "../x", "a b", "é", &"x".repeat(64)] {
            assert!(check(name).unwrap_err().to_string().contains("invalid machine name"), "{name:?}");
        }
        for name in ["a", "web-1", "0.x_y", &"x".repeat(63)] {
            check(name).unwrap();
        }
    }
}
