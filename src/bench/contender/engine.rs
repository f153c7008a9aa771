//! What Docker and Podman have in common: the flags of `run`, and an instance that the engine removes.

use std::path::Path;

use anyhow::Result;

use super::{ENVIRONMENT, Fixture, Job, Launch, SCRATCH, command, fixture, network, setup, strings};

/// The flags of `run` that say what an instance is and may, by one name in both.
pub fn flags(fixture: &Fixture, contender: &str, scratch: Option<&Path>, job: &Job) -> Vec<String> {
    let (id, cpus) = (fixture.instance(contender, job), fixture.limits.cpus.to_string());
    let memory = format!("{}m", fixture.limits.memory_mib);
    let mut flags = strings(&["--rm", "--name", &id, "--cpus", &cpus, "--memory", &memory]);
    // Its own log would write everything to a disk once more.
    flags.extend(strings(&["--log-driver", "none"]));
    match job.port {
        Some(port) => flags.extend(strings(&["--publish", &format!("127.0.0.1:{port}:{port}")])),
        None => flags.extend(strings(&["--network", "none"])),
    }
    flags.extend(ENVIRONMENT.iter().flat_map(|(name, value)| strings(&["--env", &format!("{name}={value}")])));
    if let Some(scratch) = scratch {
        flags.extend(strings(&["--volume", &format!("{}:{SCRATCH}", scratch.display())]));
    }
    flags
}

/// An instance that `line` starts, given its scratch directory, and that `remove` has the engine forget.
pub fn launch(
    fixture: &Fixture,
    contender: &str,
    job: &Job,
    line: impl FnOnce(Option<&Path>) -> Vec<String>,
    remove: impl FnOnce() -> Result<()> + Send + 'static,
) -> Result<Launch> {
    let dir = fixture.instance_dir(contender, job)?;
    let scratch = setup::scratch(job, &dir)?;
    let command = command(&line(scratch.as_deref()))?;
    let clean_up = move || {
        remove()?;
        fixture::clear(&dir)
    };
    Ok(Launch {
        command,
        passes_exit_code: true,
        address: job.port.map(network::loopback),
        clean_up: Some(Box::new(clean_up)),
    })
}
