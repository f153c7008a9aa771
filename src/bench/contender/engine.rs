//! What Docker and Podman have in common: the flags of `run`, and an instance that the engine removes.

use std::path::Path;

use anyhow::Result;

use super::{ENVIRONMENT, Ground, Job, Launch, SCRATCH, command, ground, port, share, words};

/// The flags of `run` that say what an instance is and may, by one name in both.
pub fn flags(ground: &Ground, contender: &str, scratch: Option<&Path>, job: &Job) -> Vec<String> {
    let (id, cpus) = (ground.instance(contender, job), ground.limits.cpus.to_string());
    let memory = format!("{}m", ground.limits.memory_mib);
    let mut flags = words(&["--rm", "--name", &id, "--cpus", &cpus, "--memory", &memory]);
    // Its own log would write everything to a disk once more.
    flags.extend(words(&["--log-driver", "none"]));
    match job.port {
        Some(port) => flags.extend(words(&["--publish", &format!("127.0.0.1:{port}:{port}")])),
        None => flags.extend(words(&["--network", "none"])),
    }
    flags.extend(ENVIRONMENT.iter().flat_map(|(name, value)| words(&["--env", &format!("{name}={value}")])));
    if let Some(scratch) = scratch {
        flags.extend(words(&["--volume", &format!("{}:{SCRATCH}", scratch.display())]));
    }
    flags
}

/// An instance that `line` starts, given its scratch folder, and that `remove` has the engine forget.
pub fn launch(
    ground: &Ground,
    contender: &str,
    job: &Job,
    line: impl FnOnce(Option<&Path>) -> Vec<String>,
    remove: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<Launch> {
    let folder = ground.instance_folder(contender, job)?;
    let scratch = share::scratch(job, &folder)?;
    let command = command(&line(scratch.as_deref()))?;
    let clean_up = move || {
        remove()?;
        ground::clear(&folder)
    };
    Ok(Launch {
        command,
        passes_exit_code: true,
        address: job.port.map(port::on_loopback),
        clean_up: Some(Box::new(clean_up)),
    })
}
