//! `husk healthcheck`: checks the health of a machine once.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};

use super::exec;
use super::exit::Exit;
use crate::state_dir::{self, StateDir};
use crate::supervisor;

#[derive(Debug, Args)]
pub(super) struct HealthcheckArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the health check of a machine, and exit with 0 if it is healthy, otherwise with 1
    Run {
        /// Name or ID of the machine
        #[arg(value_name = "MACHINE")]
        machine: String,
    },
}

impl HealthcheckArgs {
    /// Checks once, apart from the machine's own checks.
    pub fn run(self) -> Result<Exit> {
        let Command::Run { machine } = self.command;
        let entry = StateDir::open()?.find(&machine)?;
        let inherited = exec::inherited(&entry)?;
        let check = entry.record()?.health_check.clone();
        let check = check.with_context(|| format!("machine {} has no health check: use --health-cmd", entry.name()))?;
        let process = inherited.process(check.command.into_iter().map(String::into_bytes).collect());
        let timeout = Duration::from_millis(check.timeout_ms);
        let probe = supervisor::probe(&entry.file(state_dir::VSOCK), &process, timeout);
        if probe.exit_code == 0 {
            return Ok(Exit::Success);
        }
        match probe.output.trim() {
            "" => bail!("unhealthy: the check exited with {}", probe.exit_code),
            output => bail!("unhealthy: {output}"),
        }
    }
}
