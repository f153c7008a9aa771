//! Firecracker, if `scripts/bench --firecracker` names it: the same guests, in turn with husk.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

/// A directory that cargo provides for files of benchmarks.
const DIR: &str = env!("CARGO_TARGET_TMPDIR");

/// Returns a command that boots a guest in Firecracker, started as in production except for its jailer: without the
/// API's socket, and with its seccomp filters. `None` if there is no Firecracker.
pub fn firecracker(guest: &str, words: &str, memory_mib: u64) -> Result<Option<Command>> {
    let Some(program) = std::env::var_os("MEASURE_FIRECRACKER") else { return Ok(None) };
    let name = Path::new(guest).file_stem().context("a guest has a name")?.to_string_lossy();
    let path = Path::new(DIR).join(format!("firecracker-{name}.json"));
    let config = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{guest}", "boot_args": "{words}"}}, "drives": [],
            "machine-config": {{"vcpu_count": 1, "mem_size_mib": {memory_mib}}}}}"#
    );
    fs::write(&path, config).with_context(|| format!("write {}", path.display()))?;
    let mut command = Command::new(program);
    command.args(["--no-api", "--level", "Error", "--config-file"]).arg(path);
    Ok(Some(command))
}
