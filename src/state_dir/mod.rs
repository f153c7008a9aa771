//! The state directory: a directory for each of this user's machines, and the names that lead to them.
//!
//! ```text
//! BASE/ID/           locked for as long as its husk lives; if the lock is free, the process is gone
//!   record.json      the machine's configuration and state; replaced atomically
//!   record.reserve   disk space reserved for the next record
//!   origin.json      how the machine was started, if it runs in the background and is kept
//!   kept             a link to what outlives the host's next restart, if the machine stays (kept.rs)
//!   control          the control socket, which receives requests
//!   vsock            the vsock socket; connections from the guest to port P go to vsock_P
//!   streams.log      the output of the process, if the machine runs in the background
//!   console.log      the console of the guest's kernel
//!   husk.log         messages of husk itself, if the machine runs in the background; husk.old has earlier ones
//! BASE/names/NAME    a link to the machine's directory
//! BASE/events        what has happened to machines and more; events.old has what was before
//! BASE/lock          locked while names change
//! ```

pub mod events;
pub mod health;
pub mod husk_log;
pub mod identity;
mod kept;
mod machine_dir;
pub mod mounts;
pub mod names;
pub mod origin;
pub mod record;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use events::Event;
pub use machine_dir::MachineDir;
use record::{Record, State};

use crate::resources::lock;

/// How long another process may take to start a machine again, including the time to pull its image.
const START_TIMEOUT: Duration = Duration::from_secs(600);
/// The control socket in a machine's directory.
pub const CONTROL: &str = "control";
/// The vsock socket in a machine's directory.
pub const VSOCK: &str = "vsock";
/// The log of the guest kernel's console.
pub const CONSOLE_LOG: &str = "console.log";
/// The log of the process's output.
pub const STREAMS_LOG: &str = "streams.log";
/// The log of husk's own messages while it runs in the background.
pub const HUSK_LOG: &str = "husk.log";
/// The file that is locked while the machine is started again.
const STARTING: &str = "starting";
/// The disk with the changes to the root file system of a machine that stays.
pub const LAYER: &str = "layer.ext4";

/// The file that completes a snapshot.
pub const SNAPSHOT_STATE: &str = "state";

/// The state directory of one user, with all of the user's machines.
#[derive(Debug, Clone)]
pub struct StateDir {
    base: PathBuf,
    /// Where machines that stay are kept.
    kept: Option<PathBuf>,
}

/// A snapshot of a machine's state.
#[derive(Debug, Clone)]
pub struct MachineEntry {
    /// The machine's ID.
    pub id: String,
    /// The last record, if one was written.
    pub record: Option<Record>,
    /// Whether the machine's husk process is alive.
    pub alive: bool,
    path: PathBuf,
}

/// There is no machine with this name or ID.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such machine: {0:?} (see `husk ps -a`)")]
pub struct NoSuchMachine(pub String);

impl StateDir {
    /// Opens this user's state directory: `$XDG_RUNTIME_DIR/husk`, or if that is not set `/run/user/UID/husk` or
    /// `/tmp/husk-UID`.
    pub fn open() -> Result<StateDir> {
        let base = machine_dir::base()?;
        machine_dir::own(&base).with_context(|| format!("use the directory {}", base.display()))?;
        Ok(StateDir { base, kept: kept::place() })
    }

    /// Opens the state directory `base`, whose machines end with their processes.
    pub fn at(base: PathBuf) -> Result<StateDir> {
        machine_dir::own(&base).with_context(|| format!("use the directory {}", base.display()))?;
        Ok(StateDir { base, kept: None })
    }

    /// Creates the directory of a new machine and assigns it `name`, if given. Fails if the name is in use.
    pub fn create(&self, name: Option<&str>) -> Result<MachineDir> {
        let dir = machine_dir::create_in(&self.base)
            .with_context(|| format!("create a directory for the machine in {}", self.base.display()))?;
        if let Some(name) = name {
            self.recover();
            self.claim(name, &dir.id())?;
        }
        Ok(dir)
    }

    /// Opens the directory of a machine that has ended, to run it again. It is not modified yet.
    pub fn reopen(&self, id: &str) -> Result<MachineDir> {
        let dir =
            machine_dir::reopen(&self.base.join(id)).with_context(|| format!("use the directory of machine {id}"))?;
        remove_sockets(|name| dir.file(name));
        Ok(dir)
    }

    /// All machines, most recent first, including those that have ended and are kept.
    pub fn list(&self) -> Result<Vec<MachineEntry>> {
        self.recover();
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.base).with_context(|| format!("read {}", self.base.display()))? {
            let name = entry?.file_name();
            if let Some(id) = name.to_str().filter(|name| machine_dir::is_id(name)) {
                entries.extend(self.entry(id));
            }
        }
        entries.sort_by_key(|entry| std::cmp::Reverse(entry.record.as_ref().map_or(0, |record| record.created_ms)));
        Ok(entries)
    }

    /// Finds the machine with this name, ID or unique ID prefix.
    pub fn find(&self, word: &str) -> Result<MachineEntry> {
        let by_name = || self.named(word).and_then(|id| self.entry(&id));
        if let Some(entry) = by_name() {
            return Ok(entry);
        }
        let mut found = self.list()?;
        // It may just have been recovered.
        if let Some(entry) = by_name() {
            return Ok(entry);
        }
        found.retain(|entry| !word.is_empty() && entry.id.starts_with(word));
        match found.len() {
            0 => bail!(NoSuchMachine(word.to_owned())),
            1 => found.pop().context("a machine went"),
            count => bail!("the IDs of {count} machines start with {word:?}: use a longer prefix"),
        }
    }

    /// Whether there is a machine with this name or ID. Fails like [`StateDir::find`] for any other reason.
    pub fn has(&self, word: &str) -> Result<bool> {
        match self.find(word) {
            Ok(_) => Ok(true),
            Err(error) if error.is::<NoSuchMachine>() => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn entry(&self, id: &str) -> Option<MachineEntry> {
        let path = self.base.join(id);
        let dir = machine_dir::open(&path).ok()?;
        // The lock is checked first: a record that is read afterwards was complete before the process exited.
        let alive = dir.try_lock_shared().is_err();
        let record = Record::read(&path).ok();
        // Closing it is not enough: a process just forked by another thread would hold the lock until it calls exec.
        let _ = dir.unlock();
        path.exists().then_some(MachineEntry { id: id.to_owned(), record, alive, path })
    }

    /// Removes a machine that has ended, including its name. Fails if it is running.
    pub fn remove(&self, entry: &MachineEntry) -> Result<()> {
        let Ok(held) = machine_dir::open(&entry.path) else { return Ok(()) };
        ensure!(machine_dir::lock(&held), "machine {} is running: stop it first, or use --force", entry.id);
        self.remove_held(entry)
    }

    fn remove_held(&self, entry: &MachineEntry) -> Result<()> {
        if let Some(snapshot) = entry.record.as_ref().and_then(|record| record.snapshot.as_ref()) {
            remove_snapshot(snapshot)?;
        }
        if let Some(name) = entry.record.as_ref().and_then(|record| record.name.as_deref()) {
            self.release(name, &entry.id)?;
        }
        // First: what is left behind without it is a machine that can be removed.
        kept::remove_of(&entry.path)?;
        machine_dir::remove(&entry.path).with_context(|| format!("remove {}", entry.path.display()))?;
        entry.record.iter().for_each(|record| self.note(&[Event::of(record, "destroy")]));
        Ok(())
    }

    /// Removes what killed machines have left behind. Of machines that ran in the background and are kept, only
    /// unneeded files are removed. Must not be called on a latency-sensitive path.
    pub fn remove_stale(&self) -> Result<()> {
        for entry in self.list()?.into_iter().filter(|entry| !entry.alive) {
            let Ok(held) = machine_dir::open(&entry.path) else { continue };
            if entry.record.as_ref().is_some_and(Record::stays) || kept::is_described(&entry.path) {
                // A shared lock, so that other processes see its actual state. The machine cannot start while it is
                // held.
                if held.try_lock_shared().is_ok() {
                    remove_sockets(|name| entry.file(name));
                }
            } else if held.try_lock().is_ok() {
                // Held until the directory is gone: a process that has just created it and locks it later notices that.
                let _ = self.remove_held(&entry);
            }
        }
        machine_dir::remove_leftovers(&self.base);
        self.remove_stale_names();
        Ok(())
    }
}

impl MachineEntry {
    /// The path of a file in the machine's directory.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Waits until nobody else starts the machine again, and keeps others from it until the returned file is closed. It may be running by
    /// then.
    pub fn turn_to_start(&self) -> Result<File> {
        lock::alone_within(&self.file(STARTING), START_TIMEOUT)
    }

    /// The directory that contains all machines' directories: `husk` in `$XDG_RUNTIME_DIR`, if that was set.
    pub fn base(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// The name, or the ID if there is no name.
    pub fn name(&self) -> &str {
        self.record.as_ref().and_then(|record| record.name.as_deref()).unwrap_or(&self.id)
    }

    /// The machine's state. If its husk process was killed, the recorded state is overridden.
    pub fn state(&self) -> State {
        match self.record.as_ref().map(|record| &record.state) {
            None if self.alive => State::Starting,
            Some(state) if self.alive => state.clone(),
            // Even if husk was killed as it was about to say so, or to continue.
            _ if self.suspended().is_some() => {
                State::Suspended { since_ms: self.record.as_ref().map_or(0, Record::since_ms) }
            }
            Some(state @ (State::Exited { .. } | State::Created)) => state.clone(),
            _ => State::Lost,
        }
    }

    /// The snapshot that a machine which is not running continues from.
    pub fn suspended(&self) -> Option<&Path> {
        let path = self.record.as_ref()?.snapshot.as_deref()?;
        (!self.alive && path.join(SNAPSHOT_STATE).exists()).then_some(path)
    }

    /// The directory with what outlives the host's next restart, if the machine stays.
    pub fn kept(&self) -> Option<PathBuf> {
        kept::of(&self.path)
    }

    /// The machine's record. Fails if none has been written yet.
    pub fn record(&self) -> Result<&Record> {
        self.record.as_ref().with_context(|| format!("machine {} is still starting: try again", self.id))
    }

    /// Waits until the machine's husk process has exited, for whatever reason, and returns the new state. `None` if the
    /// machine was removed.
    pub fn await_end(&self) -> Result<Option<MachineEntry>> {
        let Ok(dir) = machine_dir::open(&self.path) else { return Ok(None) };
        dir.lock_shared().with_context(|| format!("wait for machine {}", self.id))?;
        let record = Record::read(&self.path).ok();
        Ok(self.path.exists().then(|| MachineEntry { record, alive: false, ..self.clone() }))
    }
}

/// Removes the snapshot of a suspended machine, if it exists. It is incomplete from the first step on.
pub fn remove_snapshot(path: &Path) -> Result<()> {
    let _ = fs::remove_file(path.join(SNAPSHOT_STATE));
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove the snapshot {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes the sockets with these names, which no process listens on any more.
fn remove_sockets(path: impl Fn(&str) -> PathBuf) {
    for socket in [CONTROL, VSOCK, &format!("{VSOCK}_{}", husk_protocol::PORT)] {
        let _ = fs::remove_file(path(socket));
    }
}

/// Acquires the lock on names, held while the file is open.
fn lock(base: &Path) -> Result<File> {
    lock::alone(&base.join("lock"))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::time::Duration;

    use super::*;
    use crate::state_dir::record::tests::record;

    pub(crate) fn state_dir() -> (tempfile::TempDir, StateDir) {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("husk");
        machine_dir::own(&base).unwrap();
        let kept = Some(dir.path().join("data/machines"));
        (dir, StateDir { base, kept })
    }

    #[test]
    fn a_machine_is_found_by_name_id_or_id_prefix() {
        let (_temporary, state_dir) = state_dir();
        let dir = state_dir.create(Some("web")).unwrap();
        let mut record = record();
        record.name = Some("web".into());
        dir.write(&record).unwrap();
        let id = dir.id();
        for word in ["web", &id, &id[..11]] {
            let entry = state_dir.find(word).unwrap();
            assert_eq!((entry.id.as_str(), entry.alive, entry.name()), (id.as_str(), true, "web"));
        }
        assert!(state_dir.find("w").unwrap_err().to_string().contains("husk ps -a"));
        assert!(state_dir.find("").is_err());
        let other = state_dir.create(None).unwrap();
        assert_eq!(state_dir.list().unwrap().len(), 2);
        assert_eq!(state_dir.find(&other.id()).unwrap().state(), State::Starting);
    }

    #[test]
    fn a_killed_process_is_detected_at_once_and_cleaned_up() {
        let (_temporary, state_dir) = state_dir();
        // Names that cannot be prefixes of an ID.
        let (kept, forgotten) = (state_dir.create(Some("kept")).unwrap(), state_dir.create(Some("lost")).unwrap());
        for (dir, keep) in [(&kept, true), (&forgotten, false)] {
            let name = if keep { "kept" } else { "lost" };
            dir.write(&Record { keep, name: Some(name.into()), state: State::Running { since_ms: 1 }, ..record() })
                .unwrap();
            fs::write(dir.file(VSOCK), "").unwrap();
        }
        state_dir.remove_stale().unwrap();
        assert!(kept.file(VSOCK).exists() && forgotten.file(VSOCK).exists(), "they are alive");
        let ids = [kept.id(), forgotten.id()];
        kept.abandon();
        forgotten.abandon();
        assert_eq!(state_dir.find("kept").unwrap().state(), State::Lost);
        state_dir.remove_stale().unwrap();
        let entry = state_dir.find(&ids[0]).unwrap();
        assert!(!entry.file(VSOCK).exists());
        assert!(state_dir.find(&ids[1]).is_err() && state_dir.find("lost").is_err());
        assert!(state_dir.create(Some("kept")).is_err(), "it is kept, and its name with it");
        state_dir.remove(&entry).unwrap();
        state_dir.create(Some("kept")).unwrap();
        state_dir.create(Some("lost")).unwrap();
    }

    #[test]
    fn a_machine_that_is_ending_is_not_listed_as_running() {
        let (_temporary, state_dir) = state_dir();
        let running = Record { state: State::Running { since_ms: 1 }, ..record() };
        let killed = state_dir.create(None).unwrap();
        killed.write(&running).unwrap();
        let id = killed.id();
        killed.abandon();
        let is_over = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..300 {
                    let dir = state_dir.create(None).unwrap();
                    // A machine that is visible always has a record.
                    dir.write(&Record { keep: false, ..running.clone() }).unwrap();
                    (0..20).for_each(|n| fs::write(dir.file(&format!("file{n}")), "").unwrap());
                    drop(dir);
                    state_dir.remove_stale().unwrap();
                }
                is_over.store(true, std::sync::atomic::Ordering::Relaxed);
            });
            let mut looks = 0;
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) || looks == 0 {
                let seen = state_dir.find(&id).unwrap();
                assert_eq!((seen.alive, seen.state()), (false, State::Lost), "after {looks} looks");
                looks += 1;
            }
        });
        assert_eq!(fs::read_dir(&state_dir.base).unwrap().count(), 1, "something is left");
    }

    #[test]
    fn removing_a_removed_machine_succeeds() {
        let (_temporary, state_dir) = state_dir();
        let dir = state_dir.create(None).unwrap();
        let entry = state_dir.find(&dir.id()).unwrap();
        dir.abandon();
        state_dir.remove_held(&entry).unwrap();
        state_dir.remove_held(&entry).unwrap();
    }

    #[test]
    fn a_running_machine_is_not_removed() {
        let (_temporary, state_dir) = state_dir();
        let dir = state_dir.create(None).unwrap();
        let entry = state_dir.find(&dir.id()).unwrap();
        assert!(state_dir.remove(&entry).unwrap_err().to_string().contains("is running"));
        drop(dir);
        state_dir.remove(&entry).unwrap();
    }

    #[test]
    fn a_directory_is_reopened_by_one_process_at_a_time() {
        let (_temporary, state_dir) = state_dir();
        let dir = state_dir.create(None).unwrap();
        let id = dir.id();
        dir.write(&record()).unwrap();
        assert!(format!("{:#}", state_dir.reopen(&id).unwrap_err()).contains("is running"));
        fs::write(dir.file(VSOCK), "").unwrap();
        dir.abandon();
        let again = state_dir.reopen(&id).unwrap();
        assert!(state_dir.find(&id).unwrap().alive && !again.file(VSOCK).exists());
        drop(again);
        assert_eq!(state_dir.find(&id).unwrap().state(), State::Lost);
        assert!(state_dir.reopen("0123456789ab").is_err());
    }

    #[test]
    fn waiting_detects_any_kind_of_end() {
        let (_temporary, state_dir) = state_dir();
        let (live, gone) = (state_dir.create(None).unwrap(), state_dir.create(None).unwrap());
        let entries = [&live, &gone].map(|dir| state_dir.find(&dir.id()).unwrap());
        let [live_wait, gone_wait] = entries.map(|entry| std::thread::spawn(move || entry.await_end().unwrap()));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!live_wait.is_finished());
        let state = State::Exited { code: 3, at_ms: 9, reason: None };
        live.write(&Record { state: state.clone(), keep: true, ..record() }).unwrap();
        live.abandon();
        drop(gone);
        assert_eq!(live_wait.join().unwrap().unwrap().state(), state);
        assert!(gone_wait.join().unwrap().is_none());
    }
}
