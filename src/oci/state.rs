//! What is known of a container, in a directory of its own below the runtime's root:
//!
//! ```text
//! ROOT/ID/state.json    what was created, and its process on the host; replaced atomically
//! ROOT/ID/config.json   the configuration at that time
//! ROOT/ID/hook.json     the process that a startContainer hook is in the container
//! ROOT/ID/share/        where the share of its machine is assembled, if that is its own
//! ROOT/ID/oom           there if processes of it were killed because memory was short
//! ROOT/ID/start         where it waits to be started, if it is not the first of its machine
//! ```

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Access, access};
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use super::cgroup::Cgroup;
use super::config::{self, Config};
use super::gate;
use super::pod::Pod;
use crate::state_dir::record::State as MachineState;
use crate::state_dir::{MachineEntry, StateDir};
use crate::sys::namespaces::is_hosts_root;

const FILE: &str = "state.json";
/// The directory where the machine's share is assembled.
const SHARE: &str = "share";
/// The description of a hook that is run in the container.
const HOOK: &str = "hook.json";
/// How long the process of a container waits until its creator has noted it.
const CREATION_TIMEOUT: Duration = Duration::from_secs(60);
/// The length of an ID. Those of engines have 64 characters.
const ID_BYTES_MAX: usize = 255;

/// The directory with all containers of a runtime.
#[derive(Debug, Clone)]
pub struct Root(PathBuf);

/// The directory of a container.
#[derive(Debug, Clone)]
pub struct Dir {
    path: PathBuf,
}

/// What was created.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The container's ID.
    pub id: String,
    /// The absolute path of its bundle.
    pub bundle: PathBuf,
    /// The absolute path of its root file system.
    pub rootfs: PathBuf,
    /// When it was created (RFC 3339).
    pub created: String,
    /// Its annotations.
    pub annotations: BTreeMap<String, String>,
    /// Whether its cgroup is systemd's.
    pub systemd_cgroup: bool,
    /// Whether it is to have none of its own.
    #[serde(default)]
    pub no_cgroup: bool,
    /// Whether it has entered its cgroup, which then ends with it.
    pub has_cgroup: bool,
    /// Whether its process on the host has its cgroup, or does without one.
    #[serde(default)]
    pub is_placed: bool,
    /// Its process on the host, once there is one.
    pub process: Option<ProcessId>,
    /// What it has in common with others, if its machine is that of another container.
    #[serde(default)]
    pub pod: Option<Pod>,
    /// Whether its processes are paused. A container that has its machine for itself pauses that.
    #[serde(default)]
    pub is_frozen: bool,
    /// The ID of its machine, once there is one.
    pub machine: Option<String>,
    /// The state directory of its machine.
    pub machines: PathBuf,
}

/// A process that is told from later ones with the same PID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    /// Its PID.
    pub pid: u32,
    /// When it started, in clock ticks since the host did (proc_pid_stat(5)).
    pub started_ticks: u64,
}

/// The status of a container (runtime-spec, runtime.md, "State"; `Paused` is runc's).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// It is being created.
    Creating,
    /// Its process waits to be started.
    Created,
    /// Its program is running.
    Running,
    /// Its machine is paused.
    Paused,
    /// Its process has ended.
    Stopped,
}

/// The directory for what ends with the host, or without the rights of the host's root, with the user's session. A session of root's
/// is not asked for: engines outlive it.
fn runtime_dir() -> Result<PathBuf> {
    let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| path.is_absolute());
    let system = Path::new("/run");
    match own {
        Some(own) if !is_hosts_root() => Ok(own),
        _ if access(system, Access::WRITE_OK).is_ok() => Ok(system.to_owned()),
        own => own.context("XDG_RUNTIME_DIR is not set: log in, or set it to a directory of this user's"),
    }
}

/// The state directory of containers' machines. Its path is short, since it has sockets.
pub fn machines() -> Result<PathBuf> {
    runtime_dir().map(|dir| dir.join("husk"))
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Status::Creating => "creating",
            Status::Created => "created",
            Status::Running => "running",
            Status::Paused => "paused",
            Status::Stopped => "stopped",
        })
    }
}

/// Checks an ID, which is also the name of a directory.
pub fn check_id(id: &str) -> Result<()> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
    ensure!(
        !id.is_empty() && id.len() <= ID_BYTES_MAX && id.chars().all(good) && !matches!(id, "." | ".."),
        "invalid container ID {id:?}: use 1 to {ID_BYTES_MAX} letters, digits, `_`, `+`, `-` or `.`"
    );
    Ok(())
}

impl Root {
    /// The runtime's root: `chosen`, or `husk-oci` in `$XDG_RUNTIME_DIR` or, as root, in /run.
    pub fn new(chosen: Option<PathBuf>) -> Result<Root> {
        let path = chosen.map_or_else(|| runtime_dir().map(|dir| dir.join("husk-oci")), Ok)?;
        let made = DirBuilder::new().recursive(true).mode(0o711).create(&path);
        made.with_context(|| format!("create {}", path.display()))?;
        Ok(Root(path.canonicalize().with_context(|| format!("use {}", path.display()))?))
    }

    /// The path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Creates the directory of a container. Fails if there is one with this ID.
    pub fn create(&self, id: &str) -> Result<Dir> {
        check_id(id)?;
        let dir = self.dir(id);
        match DirBuilder::new().mode(0o700).create(&dir.path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                bail!("container with given ID already exists: {id}")
            }
            made => made.with_context(|| format!("create {}", dir.path.display()))?,
        }
        let share = dir.share();
        if let Err(error) = DirBuilder::new().mode(0o700).create(&share) {
            // The disk may be full.
            let _ = fs::remove_dir(&dir.path);
            return Err(error).with_context(|| format!("create {}", share.display()));
        }
        Ok(dir)
    }

    /// The directory of the container `id`, and what is known of it.
    pub fn open(&self, id: &str) -> Result<(Dir, State)> {
        check_id(id)?;
        let dir = self.dir(id);
        ensure!(dir.path.is_dir(), "container does not exist: {id}");
        let state = dir.state()?;
        Ok((dir, state))
    }

    /// The same when `process` is known as the container's process, which is after it has started.
    pub fn wait_for(&self, id: &str, process: u32) -> Result<(Dir, State)> {
        let (dir, _) = self.open(id)?;
        let state = dir.wait_until(|state| state.process.is_some_and(|known| known.pid == process))?;
        Ok((dir, state))
    }

    /// All containers, by their IDs.
    pub fn list(&self) -> Result<Vec<(Dir, State)>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0).with_context(|| format!("read {}", self.0.display()))? {
            let name = entry?.file_name();
            // It may be created or deleted meanwhile.
            found.extend(name.to_str().and_then(|id| self.open(id).ok()));
        }
        found.sort_by(|(_, one), (_, other)| one.id.cmp(&other.id));
        Ok(found)
    }

    /// The directory of the container `id`, which may be damaged.
    pub fn dir(&self, id: &str) -> Dir {
        Dir { path: self.0.join(id) }
    }
}

impl Dir {
    /// The path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the machine's share is assembled.
    pub fn share(&self) -> PathBuf {
        self.path.join(SHARE)
    }

    /// Where a hook that is run in the container is described.
    pub fn hook(&self) -> PathBuf {
        self.path.join(HOOK)
    }

    /// The saved configuration.
    pub fn config(&self) -> Result<Config> {
        Config::read(&self.path.join(config::FILE))
    }

    /// Saves the configuration at `from`.
    pub fn save_config(&self, from: &Path) -> Result<()> {
        fs::copy(from, self.path.join(config::FILE)).map(drop).with_context(|| format!("copy {}", from.display()))
    }

    /// What is known of the container.
    pub fn state(&self) -> Result<State> {
        let path = self.path.join(FILE);
        let json = fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        serde_json::from_slice(&json).with_context(|| format!("read {}", path.display()))
    }

    /// The same once it is so.
    pub fn wait_until(&self, is_so: impl Fn(&State) -> bool) -> Result<State> {
        let until = Instant::now() + CREATION_TIMEOUT;
        loop {
            let state = self.state()?;
            if is_so(&state) {
                return Ok(state);
            }
            ensure!(Instant::now() < until, "the container's other process does not go on");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Replaces what is known.
    pub fn write(&self, state: &State) -> Result<()> {
        let path = self.path.join(FILE);
        let next = self.path.join(format!("{FILE}.{}", std::process::id()));
        let json = serde_json::to_vec_pretty(state)?;
        fs::write(&next, json)
            .and_then(|()| fs::rename(&next, &path))
            .with_context(|| format!("write {}", path.display()))
    }

    /// Removes the directory.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("remove {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }
}

impl ProcessId {
    /// The process `pid`, if it runs.
    pub fn of(pid: u32) -> Option<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name in parentheses may contain anything.
        let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
        let state = fields.next()?;
        let started_ticks = fields.nth(18)?.parse().ok()?;
        (!matches!(state, "Z" | "X")).then_some(ProcessId { pid, started_ticks })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        ProcessId::of(self.pid) == Some(*self)
    }

    /// Its PID.
    pub fn pid(&self) -> Option<Pid> {
        Pid::from_raw(i32::try_from(self.pid).ok()?)
    }
}

impl State {
    /// The container's machine, if it runs.
    pub fn machine(&self) -> Result<MachineEntry> {
        let id = self.machine.as_ref().with_context(|| format!("container {} has no machine", self.id))?;
        StateDir::at(self.machines.clone())?.find(id)
    }

    /// The cgroup on the host that ends with this container, whose configuration is `config`, if it has one.
    pub fn cgroup(&self, config: &Config) -> Result<Option<Cgroup>> {
        if self.has_cgroup { Cgroup::of(&config.linux.cgroups_path, self.systemd_cgroup) } else { Ok(None) }
    }

    /// Removes the cgroup of a container whose process has ended, perhaps after it had made the cgroup and before it noted that.
    pub fn remove_cgroup(&self, config: &Config) -> Result<()> {
        match self.cgroup(config)? {
            Some(cgroup) => cgroup.remove(),
            None if self.no_cgroup || self.is_placed => Ok(()),
            None => {
                let named = Cgroup::of(&config.linux.cgroups_path, self.systemd_cgroup)?;
                named.iter().for_each(Cgroup::remove_if_unused);
                Ok(())
            }
        }
    }

    /// The status of this container, whose directory is `dir`.
    pub fn status(&self, dir: &Dir) -> Status {
        let Some(process) = self.process else { return Status::Creating };
        if !process.is_alive() {
            return Status::Stopped;
        }
        match self.machine().map(|machine| machine.state()) {
            Ok(MachineState::Starting | MachineState::Running { .. }) if self.is_frozen => Status::Paused,
            Ok(MachineState::Starting | MachineState::Running { .. }) if self.pod.is_some() => {
                if gate::is_shut(dir) {
                    Status::Created
                } else {
                    Status::Running
                }
            }
            Ok(MachineState::Running { .. }) => Status::Running,
            Ok(MachineState::Paused { .. }) => Status::Paused,
            Ok(MachineState::Starting) if self.machine.is_some() => Status::Created,
            // It is about to end.
            Ok(_) => Status::Stopped,
            Err(_) if self.machine.is_none() => Status::Creating,
            Err(_) => Status::Stopped,
        }
    }

    /// The state as other programs get it (runtime-spec, runtime.md, "State").
    pub fn to_json(&self, status: Status) -> serde_json::Value {
        let pid = self.process.filter(|_| status != Status::Stopped).map_or(0, |process| process.pid);
        serde_json::json!({
            "ociVersion": config::VERSION,
            "id": self.id,
            "pid": pid,
            "status": status,
            "bundle": self.bundle,
            "rootfs": self.rootfs,
            "created": self.created,
            "annotations": self.annotations,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            id: "a".into(),
            bundle: "/b".into(),
            rootfs: "/b/rootfs".into(),
            created: "2024-01-01T00:00:00Z".into(),
            annotations: BTreeMap::new(),
            systemd_cgroup: false,
            no_cgroup: false,
            has_cgroup: false,
            is_placed: false,
            process: None,
            pod: None,
            is_frozen: false,
            machine: None,
            machines: "/run/husk".into(),
        }
    }

    #[test]
    fn a_container_is_created_once_and_found_until_it_is_removed() {
        let temporary = tempfile::tempdir().unwrap();
        let root = Root::new(Some(temporary.path().join("root"))).unwrap();
        assert!(root.open("a").unwrap_err().to_string().contains("does not exist"));
        let dir = root.create("a").unwrap();
        assert!(root.list().unwrap().is_empty(), "it has no state yet");
        dir.write(&state()).unwrap();
        assert!(root.create("a").unwrap_err().to_string().contains("already exists"));
        assert_eq!(root.open("a").unwrap().1, state());
        assert_eq!(root.list().unwrap().len(), 1);
        dir.remove().unwrap();
        dir.remove().unwrap();
        assert!(root.open("a").is_err());
        for wrong in ["", ".", "..", "a/b", "a b", &"x".repeat(256)] {
            assert!(root.create(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn a_process_is_told_from_others_with_its_pid() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let process = ProcessId::of(child.id()).unwrap();
        assert!(process.is_alive());
        assert!(!ProcessId { started_ticks: process.started_ticks + 1, ..process }.is_alive());
        child.kill().unwrap();
        while process.is_alive() {
            std::thread::yield_now();
        }
        let dir = Dir { path: "/none".into() };
        assert_eq!(State { process: Some(process), ..state() }.status(&dir), Status::Stopped);
        child.wait().unwrap();
        assert_eq!(state().status(&dir), Status::Creating);
        assert_eq!(state().to_json(Status::Creating)["status"], "creating");
    }
}
