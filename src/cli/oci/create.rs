//! `husk oci create` and `run`: check the bundle, and start the process that is the container's on the host.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::SystemTime;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use super::channel::Channel;
use super::console;
use super::{Flags, delete, start, supervise};
use crate::cli::exit::Exit;
use crate::oci::config::{self, Config};
use crate::oci::machine::Shape;
use crate::oci::pod::Pod;
use crate::oci::state::{Dir, ProcessId, Root, State, Status};
use crate::oci::{guest, hooks, state};
use crate::supervisor;

/// What the container's process says when its namespaces exist, and what it is answered.
pub const PREPARED: &str = "prepared";
pub const PROCEED: &str = "proceed";
/// What it says when its container is created.
pub const CREATED: &str = "created";
/// Why it is not, if it has not said that.
const NOT_CREATED: &str = "the container's process has ended before it was created";

#[derive(Debug, Args)]
pub(super) struct Create {
    #[command(flatten)]
    creation: Creation,
}

#[derive(Debug, Args)]
struct Creation {
    /// Directory with config.json and, usually, the root filesystem
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,

    /// Number of further descriptors for the process; a machine cannot have any
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,

    /// File to which the PID of the container's process is written
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,

    /// Socket to which the terminal of the container is sent
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,

    /// Accepted as other runtimes have it
    #[arg(long, hide = true)]
    no_pivot: bool,

    /// Accepted as other runtimes have it
    #[arg(long, hide = true)]
    no_new_keyring: bool,

    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

#[derive(Debug, Args)]
pub(super) struct Run {
    #[command(flatten)]
    creation: Creation,

    /// Return when the container is running, and leave it to be deleted later
    #[arg(short, long)]
    detach: bool,
}

/// A container that was created, and its process, a child of this one.
struct Created {
    root: Root,
    dir: Dir,
    process: Child,
}

impl Create {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        self.creation.create_in_background(flags).map(drop)
    }
}

impl Run {
    pub(super) fn run(self, flags: &Flags) -> Result<Exit> {
        let id = &self.creation.id;
        if self.detach {
            let created = self.creation.create_in_background(flags)?;
            let started = start::start(flags, id).map(|()| Exit::Success);
            return started.or_else(|error| created.take_back(flags, id, error));
        }
        ensure!(self.creation.console_socket.is_none(), "--console-socket: it is for --detach");
        // From now on none ends this process before the container is deleted.
        let signals = supervisor::block_signals(true)?;
        // The container's terminal is this process's.
        let mut created = self.creation.create(flags, |_| Ok(None), false)?;
        let written = write_pid(self.creation.pid_file.as_deref(), created.process.id());
        if let Err(error) = written.and_then(|()| start::start(flags, id)) {
            return created.take_back(flags, id, error);
        }
        let exit = supervise::pass_signals_on(&signals, &mut created.process, false)?;
        delete::delete(flags, id, true)?;
        Ok(exit)
    }
}

impl Creation {
    /// Creates the container apart from this process's session, with a terminal for the console socket if it has one.
    fn create_in_background(&self, flags: &Flags) -> Result<Created> {
        let terminal = |config: &Config| match (has_terminal(config), &self.console_socket) {
            (true, None) => bail!("process.terminal is set: use --console-socket to get the terminal"),
            (true, Some(socket)) => {
                let size = config.process.as_ref().and_then(|process| process.console_size);
                console::open(socket, size).map(Some)
            }
            (false, Some(_)) => bail!("process.terminal is not set: remove --console-socket"),
            (false, None) => Ok(None),
        };
        let created = self.create(flags, terminal, true)?;
        match write_pid(self.pid_file.as_deref(), created.process.id()) {
            Ok(()) => Ok(created),
            Err(error) => created.take_back(flags, &self.id, error),
        }
    }

    /// Creates the container, with its terminal from `terminal`. Leaves nothing behind on an error. `leads_session` says whether its
    /// process leaves this one's session.
    fn create(
        &self,
        flags: &Flags,
        terminal: impl FnOnce(&Config) -> Result<Option<fs::File>>,
        leads_session: bool,
    ) -> Result<Created> {
        ensure!(self.preserve_fds == 0, "--preserve-fds: a machine cannot have this process's descriptors");
        ensure!(
            rustix::process::geteuid().is_root(),
            "only root can create containers: start them with podman, or be root in a user namespace (podman unshare)"
        );
        let bundle =
            self.bundle.canonicalize().with_context(|| format!("open the bundle {}", self.bundle.display()))?;
        let path = bundle.join(config::FILE);
        let config = Config::read(&path)?;
        let root = flags.root()?;
        let pod = Pod::of(&root, &config)?;
        let rootfs = check(&self.id, &config, &bundle, pod.as_ref()).with_context(|| path.display().to_string())?;
        let machines = state::machines()?;
        let dir = root.create(&self.id)?;
        let state = State {
            id: self.id.clone(),
            bundle,
            rootfs,
            created: humantime::format_rfc3339_nanos(SystemTime::now()).to_string(),
            annotations: config.annotations.clone(),
            systemd_cgroup: flags.uses_systemd(),
            no_cgroup: flags.uses_no_cgroups(),
            has_cgroup: false,
            is_placed: false,
            process: None,
            pod,
            is_frozen: false,
            machine: None,
            machines,
        };
        let begun = dir.save_config(&path).and_then(|()| dir.write(&state)).and_then(|()| {
            let terminal = terminal(&config)?;
            self.spawn(root.path(), terminal, leads_session)
        });
        let ended =
            begun.and_then(|(mut process, channel)| match prepare(&dir, &config, state.clone(), &process, channel) {
                Ok(()) => Ok(process),
                Err(error) => {
                    let _ = process.kill().and_then(|()| process.wait());
                    Err(error)
                }
            });
        match ended {
            Ok(process) => Ok(Created { root, dir, process }),
            Err(error) => {
                let _ = delete::clean_up(&root, &dir);
                // Who deletes the container meanwhile leaves nothing by which it could be found.
                let _ = state.remove_cgroup(&config);
                Err(error)
            }
        }
    }

    /// Starts the container's process on the host. Returns it with the connection to it.
    fn spawn(&self, root: &Path, terminal: Option<fs::File>, leads_session: bool) -> Result<(Child, Channel)> {
        let mut words = vec!["--root".into(), root.into(), "supervise".into()];
        words.extend(leads_session.then(|| "--session".into()));
        words.push(self.id.clone().into());
        Channel::spawn(words, terminal)
    }
}

impl Created {
    /// Undoes the creation because of `error`.
    fn take_back<T>(mut self, flags: &Flags, id: &str, error: anyhow::Error) -> Result<T> {
        let _ = self.process.kill().and_then(|()| self.process.wait());
        if delete::delete(flags, id, true).is_err() {
            let _ = delete::clean_up(&self.root, &self.dir);
        }
        Err(error)
    }
}

/// Checks what can be checked without a machine. Returns the path of the root file system.
fn check(id: &str, config: &Config, bundle: &Path, pod: Option<&Pod>) -> Result<PathBuf> {
    state::check_id(id)?;
    ensure!(!config.root.path.as_os_str().is_empty(), "root.path is missing");
    let rootfs = bundle.join(&config.root.path);
    let rootfs = rootfs.canonicalize().with_context(|| format!("root.path {}", rootfs.display()))?;
    ensure!(rootfs.is_dir(), "root.path {} is not a directory", rootfs.display());
    let process = config.process.as_ref().context("process is missing")?;
    guest::process(process, config.linux.seccomp.as_ref())?;
    guest::container(id, config, bundle, pod)?;
    Shape::of(config)?;
    Ok(rootfs)
}

fn has_terminal(config: &Config) -> bool {
    config.process.as_ref().is_some_and(|process| process.terminal)
}

/// Accompanies the container's process until the container is created.
fn prepare(dir: &Dir, config: &Config, mut state: State, process: &Child, mut channel: Channel) -> Result<()> {
    state.process = Some(ProcessId::of(process.id()).context("the container's process has ended")?);
    dir.write(&state)?;
    channel.expect(PREPARED, NOT_CREATED)?;
    let told = state.to_json(Status::Creating).to_string();
    hooks::run("prestart", &config.hooks.prestart, &told)?;
    hooks::run("createRuntime", &config.hooks.create_runtime, &told)?;
    hooks::run("createContainer", &config.hooks.create_container, &told)?;
    channel.say(PROCEED)?;
    channel.expect(CREATED, NOT_CREATED)
}

/// Writes a PID where an engine waits for it: completely or not at all.
pub fn write_pid(path: Option<&Path>, pid: u32) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let next = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = fs::write(&next, pid.to_string()).and_then(|()| fs::rename(&next, path));
    written.with_context(|| format!("write the PID to {}", path.display()))
}
