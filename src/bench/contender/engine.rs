//! What Docker and Podman have in common: the flags of `run`, and containers that the engine removes.

use std::path::Path;

use anyhow::Result;

use super::{ENVIRONMENT, Fixture, Job, Launch, SCRATCH, command, network, setup, strings, work_dir};

/// Returns the flags of `run` that both engines share.
pub fn flags(fixture: &Fixture, contender: &str, scratch: Option<&Path>, job: &Job) -> Vec<String> {
    let (id, cpus) = (fixture.instance_name(contender, job), fixture.limits.cpus.to_string());
    let memory = format!("{}m", fixture.limits.memory_mib);
    let mut flags = strings(&["--rm", "--name", &id, "--cpus", &cpus, "--memory", &memory]);
    // The engine's log driver would write all output to disk a second time.
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

/// Prepares an instance. `line` builds the command line from the scratch directory, `remove` removes the container.
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
        work_dir::remove(&dir)
    };
    Ok(Launch {
        command,
        passes_exit_code: true,
        address: job.port.map(network::loopback),
        clean_up: Some(Box::new(clean_up)),
    })
}
