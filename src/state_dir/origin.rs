//! How a machine in the background was started, for `husk start`: the arguments, working directory and environment of
//! the command. They are stored separately from the record and not printed with it, because the environment may contain
//! secrets.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::record::{Text, write_private};
use super::{MachineDir, MachineEntry};

pub(super) const FILE: &str = "origin.json";
/// More than arguments and environment may take (execve(2): a quarter of the stack limit), allowing for the JSON
/// encoding of bytes that are not text.
const MAX_BYTES: u64 = 64 << 20;
/// Already resolved by the process that restarts the machine.
const RUNTIME_DIR: &str = "XDG_RUNTIME_DIR";

/// A command that started a machine.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    words: Vec<Text>,
    dir: Text,
    variables: Vec<(Text, Text)>,
}

fn text(value: OsString) -> Text {
    value.into_vec().into()
}

fn bytes(text: Text) -> OsString {
    OsString::from_vec(text.into())
}

impl Origin {
    /// The origin with these arguments and this process's working directory and environment.
    pub fn here(words: Vec<OsString>) -> Result<Origin> {
        let dir = std::env::current_dir().context("get the working directory")?.into_os_string();
        let variables = std::env::vars_os().map(|(name, value)| (text(name), text(value))).collect();
        Ok(Origin { words: words.into_iter().map(text).collect(), dir: text(dir), variables })
    }

    /// The same with other arguments.
    pub fn with_words(self, words: Vec<OsString>) -> Origin {
        Origin { words: words.into_iter().map(text).collect(), ..self }
    }

    /// Writes it to a machine's directory.
    pub fn write(&self, dir: &MachineDir) -> Result<()> {
        let json = serde_json::to_vec(self).context("record how the machine was started")?;
        let mut paths = dir.kept().map(|kept| kept.join(FILE)).into_iter().chain([dir.file(FILE)]);
        paths.try_for_each(|path| write_private(&path, &json).with_context(|| format!("write {}", path.display())))
    }

    /// Reads how `entry` was started.
    pub fn read(entry: &MachineEntry) -> Result<Origin> {
        let path = entry.file(FILE);
        let read = || -> Result<Origin> {
            let mut json = Vec::new();
            File::open(&path)?.take(MAX_BYTES + 1).read_to_end(&mut json)?;
            ensure!(json.len() as u64 <= MAX_BYTES, "longer than {MAX_BYTES} bytes");
            Ok(serde_json::from_slice(&json)?)
        };
        read().with_context(|| format!("read {}", path.display()))
    }

    /// The arguments, without the program's name.
    pub fn words(&self) -> Vec<OsString> {
        self.words.iter().cloned().map(bytes).collect()
    }

    /// The working directory.
    pub fn dir(&self) -> PathBuf {
        PathBuf::from(bytes(self.dir.clone()))
    }

    /// The value of an environment variable.
    pub fn variable(&self, name: &str) -> Option<OsString> {
        let is_it = |(found, _): &&(Text, Text)| bytes(found.clone()) == name;
        self.variables.iter().find(is_it).map(|(_, value)| bytes(value.clone()))
    }

    /// This program with the same working directory, environment and arguments.
    pub fn command(self) -> Result<(Command, Vec<OsString>)> {
        let dir = PathBuf::from(bytes(self.dir));
        ensure!(dir.is_dir(), "it was started in {}, which no longer exists", dir.display());
        let variables: BTreeMap<OsString, OsString> =
            self.variables.into_iter().map(|(name, value)| (bytes(name), bytes(value))).collect();
        let mut command = Command::new("/proc/self/exe");
        command.current_dir(dir).env_clear().envs(variables);
        match std::env::var_os(RUNTIME_DIR) {
            Some(place) => command.env(RUNTIME_DIR, place),
            None => command.env_remove(RUNTIME_DIR),
        };
        Ok((command, self.words.into_iter().map(bytes).collect()))
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::super::tests::state_dir;
    use super::*;

    #[test]
    fn an_origin_survives_a_round_trip() {
        let (_temporary, state_dir) = state_dir();
        let dir = state_dir.create(None).unwrap();
        let words = vec!["run".into(), OsStr::from_bytes(b"\xff\n").to_owned()];
        Origin::here(words.clone()).unwrap().write(&dir).unwrap();
        let (command, read) = Origin::read(&state_dir.find(&dir.id()).unwrap()).unwrap().command().unwrap();
        assert_eq!(read, words);
        assert_eq!(command.get_current_dir(), std::env::current_dir().ok().as_deref());
        let path = command.get_envs().find(|(name, _)| *name == "PATH").unwrap().1;
        assert_eq!(path.map(OsStr::to_owned), std::env::var_os("PATH"));
    }

    #[test]
    fn a_missing_working_directory_is_reported() {
        let mut origin = Origin::here(Vec::new()).unwrap();
        origin.dir = text("/nowhere".into());
        assert!(origin.command().unwrap_err().to_string().contains("/nowhere, which no longer exists"));
    }
}
