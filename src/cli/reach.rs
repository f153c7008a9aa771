//! Reaches the files of a machine: of a running one through its init, of a stopped one through another machine with the same root file
//! system and the same changes, which runs nothing but init. So husk never reads a file system that a guest has written.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use husk_protocol::{IDLE, INIT_PROGRAM};

use super::{exec, lifecycle, machines};
use crate::request::Request;
use crate::state_dir::origin::Origin;
use crate::state_dir::record::State;
use crate::state_dir::{LAYER, MachineEntry, StateDir};

/// The label of that machine, which `husk ps` does not list. Its value is the ID of the machine that is stopped.
pub const FILES_OF: &str = "husk.files-of";
/// Enough to serve files.
const MEMORY: &str = "--memory=256M";
/// How long that machine has to write its files.
const STOP_TIMEOUT: Duration = Duration::from_secs(60);

/// A machine whose files can be reached.
#[derive(Debug)]
pub struct Reached {
    entry: MachineEntry,
    /// The machine that was asked for, if it is stopped.
    stopped: Option<MachineEntry>,
}

/// The machines of the user, most recent first, without those that serve the files of others.
pub fn machines(state_dir: &StateDir) -> Result<Vec<MachineEntry>> {
    let serves_files =
        |entry: &MachineEntry| entry.record.as_ref().is_some_and(|record| record.labels.contains_key(FILES_OF));
    Ok(state_dir.list()?.into_iter().filter(|entry| !serves_files(entry)).collect())
}

impl Reached {
    /// Finds the machine with this name or ID, and starts another one for its files if it is stopped.
    pub fn find(word: &str) -> Result<Reached> {
        Reached::find_with(word, false)
    }

    /// The same with what the machine mounts from the host.
    pub fn with_mounts(word: &str) -> Result<Reached> {
        Reached::find_with(word, true)
    }

    fn find_with(word: &str, mounts: bool) -> Result<Reached> {
        let state_dir = StateDir::open()?;
        let entry = state_dir.find(word)?;
        let is_stopped = matches!(entry.state(), State::Created | State::Exited { .. } | State::Lost);
        let layer = entry.kept().map(|kept| kept.join(LAYER)).filter(|layer| layer.exists());
        if !is_stopped || layer.is_none() {
            exec::inherited(&entry)?;
            return Ok(Reached { entry, stopped: None });
        }
        let record = entry.record()?;
        let (command, _) = Origin::read(&entry)?.command()?;
        let fixed = ["run", "--detach", "--rm", "--network=none", MEMORY, "--user=0:0", "--workdir=/"];
        let mut words: Vec<OsString> = fixed.map(OsString::from).into();
        words.push(format!("--entrypoint={INIT_PROGRAM}").into());
        words.push(format!("--files-of={}", entry.id).into());
        words.push(format!("--label={FILES_OF}={}", entry.id).into());
        if mounts && !record.mounts.is_empty() {
            words.push(format!("--volumes-from={}", entry.id).into());
        }
        words.extend(["--kernel".into(), record.config.kernel.clone().into_os_string()]);
        words.extend(["--".into(), record.image.clone().into(), IDLE.into(), "/".into()]);
        let id = lifecycle::spawn(command, &words)?;
        let id = id.with_context(|| format!("machine {} is stopped, and its files cannot be reached", entry.name()))?;
        Ok(Reached { entry: state_dir.find(id.trim_end())?, stopped: Some(entry) })
    }

    /// The running machine that serves the files.
    pub fn entry(&self) -> &MachineEntry {
        &self.entry
    }

    /// The machine that was asked for.
    pub fn asked_for(&self) -> &MachineEntry {
        self.stopped.as_ref().unwrap_or(&self.entry)
    }

    /// Returns when what was written is on the machine's disk.
    pub fn release(mut self) -> Result<()> {
        self.stop()
    }

    fn stop(&mut self) -> Result<()> {
        if self.stopped.take().is_none() {
            return Ok(());
        }
        let end = machines::watch_exit(&self.entry);
        let timeout_ms = u64::try_from(STOP_TIMEOUT.as_millis()).unwrap_or(u64::MAX);
        machines::request(&self.entry, &Request::Stop { timeout_ms })?;
        let code = machines::exit_code(&self.entry, end)?;
        ensure!(code == 128 + libc::SIGTERM as u8, "the machine that serves the files has failed (exit code {code})");
        Ok(())
    }
}

impl Drop for Reached {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            log::warn!("{error:#}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::state_dir::record::Record;
    use crate::state_dir::record::tests::record;
    use crate::state_dir::tests::state_dir;

    #[test]
    fn a_machine_that_serves_files_is_none_of_the_users() {
        let (_temporary, state_dir) = state_dir();
        let labels = [BTreeMap::new(), BTreeMap::from([(FILES_OF.to_owned(), "0123456789ab".to_owned())])];
        let dirs = labels.map(|labels| {
            let dir = state_dir.create(None).unwrap();
            dir.write(&Record { id: dir.id(), labels, ..record() }).unwrap();
            dir
        });
        let found: Vec<String> = machines(&state_dir).unwrap().into_iter().map(|entry| entry.id).collect();
        assert_eq!((found, state_dir.list().unwrap().len()), (vec![dirs[0].id()], 2));
    }
}
