//! A machine's record: written by its husk process, read by other commands, and printed by `husk inspect`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use husk_protocol::{Process, Rights};
use serde::{Deserialize, Serialize};

use crate::config::{HealthCheck, MachineConfig};
use crate::state_dir::health::Health;
use crate::state_dir::identity::IdentityRecord;
use crate::state_dir::mounts::MountRecord;
use crate::sys::private_file;

pub(super) const FILE: &str = "record.json";
/// Disk space reserved for the next record, so that a machine's exit is recorded even on a full disk.
const RESERVE: &str = "record.reserve";
/// The maximum size of a record. Most of it are the process's arguments and environment.
const MAX_BYTES: u64 = 16 << 20;

/// A machine's description and state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The machine's ID.
    pub id: String,
    /// The machine's name, if it has one.
    pub name: Option<String>,
    /// The PID of its husk process.
    pub pid: u32,
    /// The image as specified by the user, or the kernel for `husk boot`.
    pub image: String,
    /// The image's identity, in hexadecimal, if it is one of the image store: what the machine is started with again, whatever
    /// has its name then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_id: Option<String>,
    /// The command line that it runs, as far as known.
    pub command: Vec<String>,
    /// The creation time, in milliseconds since 1970.
    pub created_ms: u64,
    /// The current state.
    pub state: State,
    /// The number of restarts.
    pub restarts: u32,
    /// Whether it runs in the background.
    pub detached: bool,
    /// Whether the machine is listed and its logs remain available after it has ended.
    pub keep: bool,
    /// The signal that asks its process to terminate.
    pub stop_signal: u8,
    /// The user's labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// How long a stop waits before it is forced, in milliseconds, unless the request says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_timeout_ms: Option<u64>,
    /// How its health is checked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
    /// Its health, if it is checked and has started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health: Option<Health>,
    /// Whether its kernel has killed processes because memory was short, since it was last started.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub oom_killed: bool,
    /// What additional processes inherit, if the machine runs husk's init.
    pub process: Option<Inherited>,
    /// What the machine is called and how it is connected, if it runs husk's init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<IdentityRecord>,
    /// What it mounts from the host, and its anonymous volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mounts: Vec<MountRecord>,
    /// How many times it is restarted when it fails.
    #[serde(default)]
    pub max_retries: u32,
    /// Whether it is restarted however it ends, unless it was stopped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub restarts_always: bool,
    /// The maximum size of its log.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_max_bytes: Option<u64>,
    /// The snapshot that belongs to the machine, from before it is taken until the machine has continued from it. Whether it is
    /// complete is for the files to say, since husk may be killed at any time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<PathBuf>,
    /// The layers of the sandbox that the host does not allow, each with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sandbox_lacks: Vec<String>,
    /// The configuration of the machine.
    pub config: MachineConfig,
}

/// The state of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "status", rename_all = "lowercase")]
pub enum State {
    /// It was created and has not been started yet.
    Created,
    /// It is being created, or its guest is booting.
    Starting,
    /// The guest is running, and under husk's init its process as well.
    Running {
        /// The start time, in milliseconds since 1970.
        since_ms: u64,
    },
    /// Its vCPUs are paused.
    Paused {
        /// The time it was paused.
        since_ms: u64,
    },
    /// It has been saved and ended, and will be continued when it is started again.
    Suspended {
        /// When it was saved.
        since_ms: u64,
    },
    /// It failed and will be restarted after a delay.
    Restarting {
        /// The time of the failure.
        since_ms: u64,
    },
    /// It has ended.
    Exited {
        /// The exit code.
        code: u8,
        /// The exit time.
        at_ms: u64,
        /// The reason, if it was not the exit of the process itself.
        reason: Option<String>,
    },
    /// Its husk process was killed, so the exit status is unknown.
    Lost,
}

impl State {
    /// Its name, as in the record.
    pub fn name(&self) -> String {
        let json = serde_json::to_value(self).unwrap_or_default();
        json["status"].as_str().unwrap_or_default().to_owned()
    }
}

/// What additional processes inherit from a machine's first process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inherited {
    /// `NAME=VALUE` each.
    pub env: Vec<Text>,
    /// The working directory.
    pub working_dir: Text,
    /// The user.
    pub user: String,
    /// Whether the first process has a terminal.
    pub terminal: bool,
    /// Whether the first process has standard input.
    pub stdin: bool,
    /// What they may do.
    #[serde(default)]
    pub rights: Rights,
}

/// Bytes that are serialized as text if they are valid UTF-8, as is usually the case.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Text {
    /// Valid UTF-8.
    Text(String),
    /// Other bytes.
    Bytes(Vec<u8>),
}

impl Default for Text {
    fn default() -> Text {
        Text::Text(String::new())
    }
}

impl From<Vec<u8>> for Text {
    fn from(bytes: Vec<u8>) -> Text {
        String::from_utf8(bytes).map_or_else(|error| Text::Bytes(error.into_bytes()), Text::Text)
    }
}

impl From<Text> for Vec<u8> {
    fn from(text: Text) -> Vec<u8> {
        match text {
            Text::Text(text) => text.into_bytes(),
            Text::Bytes(bytes) => bytes,
        }
    }
}

impl From<&Process> for Inherited {
    fn from(process: &Process) -> Inherited {
        Inherited {
            env: process.env.iter().cloned().map(Text::from).collect(),
            working_dir: process.working_dir.clone().into(),
            user: process.user.clone(),
            terminal: process.terminal.is_some(),
            stdin: process.stdin,
            rights: process.rights.clone(),
        }
    }
}

impl Inherited {
    /// An additional process with these arguments, and without input.
    pub fn process(&self, args: Vec<Vec<u8>>) -> Process {
        Process {
            args,
            env: self.env.iter().cloned().map(Vec::from).collect(),
            working_dir: self.working_dir.clone().into(),
            user: self.user.clone(),
            rights: self.rights.clone(),
            ..Process::default()
        }
    }
}

impl Record {
    /// Whether the machine stays when it is not running, until it is removed.
    pub fn stays(&self) -> bool {
        self.keep || self.state == State::Created
    }

    /// When it entered its state, in milliseconds since 1970, as far as known.
    pub fn since_ms(&self) -> u64 {
        match &self.state {
            State::Running { since_ms }
            | State::Paused { since_ms }
            | State::Suspended { since_ms }
            | State::Restarting { since_ms }
            | State::Exited { at_ms: since_ms, .. } => *since_ms,
            State::Created | State::Starting | State::Lost => self.created_ms,
        }
    }

    /// Reads the record from a machine's directory.
    pub fn read(dir: &Path) -> Result<Record> {
        let path = dir.join(FILE);
        let read = || -> Result<Record> {
            let mut text = String::new();
            let read_bytes = File::open(&path)?.take(MAX_BYTES + 1).read_to_string(&mut text)?;
            ensure!(read_bytes as u64 <= MAX_BYTES, "longer than {MAX_BYTES} bytes");
            Ok(serde_json::from_str(&text)?)
        };
        read().with_context(|| format!("read {}", path.display()))
    }

    /// Atomically replaces the record in `dir`, which stays unchanged on failure. There must be a single writer.
    pub fn write(&self, dir: &Path) -> Result<()> {
        let (path, new, reserve) = (dir.join(FILE), dir.join("record.new"), dir.join(RESERVE));
        let text = serde_json::to_vec_pretty(self).context("write the machine's record")?;
        let put = || write_private(&new, &text).and_then(|()| fs::rename(&new, &path));
        let mut written = put();
        if written.is_err() && fs::remove_file(&reserve).is_ok() {
            written = put();
        }
        if written.is_err() {
            let _ = fs::remove_file(&new);
        } else if !fs::metadata(&reserve).is_ok_and(|reserve| reserve.len() >= text.len() as u64) {
            // Without the reserve, the next record depends on free disk space.
            let _ = write_private(&reserve, &text);
        }
        written.with_context(|| format!("write {}", path.display()))
    }
}

/// Creates or replaces the file at `path`, accessible only to its owner.
pub(super) fn write_private(path: &Path, content: &[u8]) -> io::Result<()> {
    private_file().write(true).create(true).truncate(true).open(path)?.write_all(content)
}

impl Record {
    /// The record of a machine that starts in the foreground, in this process, and has nothing but an image and a command.
    pub fn new(id: String, image: String, command: Vec<String>, config: MachineConfig) -> Record {
        Record {
            id,
            name: None,
            pid: std::process::id(),
            image,
            image_id: None,
            command,
            created_ms: now_ms(),
            max_retries: 0,
            restarts_always: false,
            log_max_bytes: None,
            snapshot: None,
            state: State::Starting,
            restarts: 0,
            detached: false,
            keep: false,
            stop_signal: libc::SIGTERM as u8,
            labels: BTreeMap::new(),
            stop_timeout_ms: None,
            health_check: None,
            health: None,
            oom_killed: false,
            process: None,
            identity: None,
            mounts: Vec::new(),
            sandbox_lacks: Vec::new(),
            config,
        }
    }
}

/// The current time, in milliseconds since 1970.
pub fn now_ms() -> u64 {
    let since = SystemTime::UNIX_EPOCH.elapsed().unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn record() -> Record {
        Record {
            pid: 1,
            detached: true,
            keep: true,
            ..Record::new("0123456789ab".into(), "debian:12".into(), vec!["sh".into()], MachineConfig::default())
        }
    }

    #[test]
    fn a_record_survives_a_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let process = Process { env: vec![b"A=\xff".to_vec(), b"B=c".to_vec()], ..Process::default() };
        for state in [
            State::Starting,
            State::Running { since_ms: 5 },
            State::Suspended { since_ms: 5 },
            State::Exited { code: 137, at_ms: u64::MAX, reason: Some("terminated by signal 9".into()) },
        ] {
            let record = Record { state, process: Some(Inherited::from(&process)), ..record() };
            record.write(dir.path()).unwrap();
            assert_eq!(Record::read(dir.path()).unwrap(), record);
        }
        let text = fs::read_to_string(dir.path().join(FILE)).unwrap();
        assert!(text.contains(r#""status": "exited""#) && text.contains(r#""B=c""#), "{text}");
    }

    #[test]
    fn an_invalid_record_is_an_error_with_its_path() {
        let dir = tempfile::tempdir().unwrap();
        assert!(format!("{:#}", Record::read(dir.path()).unwrap_err()).contains("record.json"));
        fs::write(dir.path().join(FILE), "{").unwrap();
        assert!(Record::read(dir.path()).is_err());
    }
}
