//! `husk oci delete`: removes what is left of a container.

use anyhow::{Result, bail};
use clap::Args;

use super::{Flags, kill, supervise};
use crate::oci::pod::Pod;
use crate::oci::state::{self, Dir, Root, Status};
use crate::oci::{hooks, share};
use crate::state_dir::StateDir;

#[derive(Debug, Args)]
pub(super) struct Delete {
    /// Kill the container if it is running, and succeed if it does not exist
    #[arg(short, long)]
    force: bool,

    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl Delete {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        delete(flags, &self.id, self.force)
    }
}

/// Deletes the container `id`.
pub fn delete(flags: &Flags, id: &str, force: bool) -> Result<()> {
    // It becomes a path, and what is there is removed even if it is damaged.
    state::check_id(id)?;
    let root = flags.root()?;
    let (dir, state) = match root.open(id) {
        Ok(found) => found,
        Err(_) if force => {
            // Nothing may be known of it, or what is known be damaged.
            for process in supervise::find(&root, id) {
                kill::send(process, libc::SIGKILL)?;
                kill::await_end(process, kill::KILL_TIMEOUT)?;
            }
            return clean_up(&root, &root.dir(id));
        }
        Err(error) => return Err(error),
    };
    match state.status(&dir) {
        // Like other runtimes: the program of one that is created has not been executed.
        Status::Stopped | Status::Created => {}
        _ if force => {}
        status => bail!("cannot delete container {id} that is not stopped: {status}"),
    }
    if let Some(process) = state.process {
        kill::kill_now(&state)?;
        kill::await_end(process, kill::KILL_TIMEOUT)?;
    }
    let config = dir.config();
    clean_up(&root, &dir)?;
    if let Ok(config) = config {
        hooks::run_all("poststop", &config.hooks.poststop, &state.to_json(Status::Stopped).to_string());
    }
    Ok(())
}

/// Removes what there is of a container whose process has ended.
pub fn clean_up(root: &Root, dir: &Dir) -> Result<()> {
    let state = dir.state();
    if let Ok(state) = &state {
        match (&state.pod, state.machine()) {
            (Some(pod), _) => leave(root, pod, &state.id)?,
            // Its process ends with the container's.
            (None, Ok(machine)) => drop(machine.await_end()?),
            (None, Err(_)) => {}
        }
    }
    if let (Ok(state), Ok(config)) = (&state, dir.config()) {
        state.remove_cgroup(&config)?;
    }
    // What a process that was killed has left, where machines are unless something else is known.
    match state {
        Ok(state) => StateDir::at(state.machines).and_then(|machines| machines.remove_stale())?,
        Err(_) => drop(state::machines().and_then(StateDir::at).and_then(|machines| machines.remove_stale())),
    }
    dir.remove()
}

/// Removes the container `id` from the share of its machine, if that still runs.
fn leave(root: &Root, pod: &Pod, id: &str) -> Result<()> {
    let Ok((dir, sandbox)) = pod.sandbox(root) else { return Ok(()) };
    if sandbox.status(&dir) == Status::Stopped {
        return Ok(());
    }
    let machine = sandbox.machine()?;
    let left = share::remove(machine.record()?.pid, &dir.share(), id);
    // The machine may have ended meanwhile, and its mounts with it.
    left.or_else(|error| if sandbox.status(&dir) == Status::Stopped { Ok(()) } else { Err(error) })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    #[test]
    fn only_what_is_in_the_root_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let outside = dir.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        let root = dir.path().join("root");
        let flags = Line::try_parse_from(["husk", "--root", root.to_str().unwrap()]).unwrap().flags;
        for id in ["../outside", outside.to_str().unwrap(), "..", ""] {
            let told = delete(&flags, id, true).unwrap_err().to_string();
            assert!(told.starts_with("invalid container ID"), "{told}");
        }
        assert!(outside.is_dir());
        delete(&flags, "none", true).unwrap();
    }
}
