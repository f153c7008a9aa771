//! `husk oci start`: executes the program of a container that was created.

use std::borrow::Cow;
use std::iter::once;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use serde_json::json;

use super::{Flags, kill};
use crate::cli::machines;
use crate::oci::config::{Config, Hook};
use crate::oci::state::{Dir, Status};
use crate::oci::{gate, hooks};
use crate::request::Request;

#[derive(Debug, Args)]
pub(super) struct Start {
    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl Start {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        start(flags, &self.id)
    }
}

/// Starts the container `id`.
pub fn start(flags: &Flags, id: &str) -> Result<()> {
    let (dir, state) = flags.root()?.open(id)?;
    match state.status(&dir) {
        Status::Created => {}
        Status::Stopped => bail!("cannot start a container that has stopped"),
        Status::Creating => bail!("cannot start a container that is being created"),
        Status::Running | Status::Paused => bail!("cannot start an already running container"),
    }
    let config = dir.config()?;
    ensure!(
        state.pod.is_none() || config.hooks.start_container.is_empty(),
        "startContainer hooks are not supported in a container that shares another one's machine"
    );
    let told = state.to_json(Status::Created).to_string();
    for hook in &config.hooks.start_container {
        let run = in_container(flags, &dir, &config, id, hook).and_then(|hook| hooks::run_one(&hook, &told));
        if let Err(error) = run {
            // As the specification demands.
            kill::kill_now(&state)?;
            return Err(error).with_context(|| format!("run the startContainer hook {}", hook.path.display()));
        }
    }
    let started =
        if state.pod.is_some() { gate::pass(&dir) } else { machines::request(&state.machine()?, &Request::Go) };
    started.with_context(|| format!("start container {id}"))?;
    hooks::run_all("poststart", &config.hooks.poststart, &state.to_json(Status::Running).to_string());
    Ok(())
}

/// The program of the host that runs `hook` in the container, as its root and with its capabilities.
fn in_container(flags: &Flags, dir: &Dir, config: &Config, id: &str, hook: &Hook) -> Result<Hook> {
    let capabilities = config.process.as_ref().and_then(|process| process.capabilities.as_ref());
    let args: Vec<Cow<'_, str>> =
        once(hook.path.to_string_lossy()).chain(hook.args.iter().skip(1).map(Into::into)).collect();
    let process = json!({ "args": args, "env": hook.env, "cwd": "/", "user": { "uid": 0, "gid": 0 }, "capabilities": capabilities });
    let path = dir.hook();
    std::fs::write(&path, process.to_string()).with_context(|| format!("write {}", path.display()))?;
    let root = flags.root()?;
    let words = ["husk", "oci", "--root", text(root.path())?, "exec", "--process", text(&path)?, id];
    let args = words.map(str::to_owned).to_vec();
    Ok(Hook { path: "/proc/self/exe".into(), args, env: Vec::new(), timeout: hook.timeout })
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().with_context(|| format!("{} is not valid text", path.display()))
}
