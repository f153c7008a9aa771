//! `husk oci ps`: lists the processes of a container, with their PIDs in its machine.

use anyhow::{Context, Result};
use clap::Args;

use super::Flags;
use super::list::Format;
use crate::cli::top;

#[derive(Debug, Args)]
pub(super) struct Ps {
    /// Format: table or json, a list of PIDs
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    format: Format,

    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,

    /// Accepted as other runtimes have it
    #[arg(value_name = "PS_OPTION", hide = true, trailing_var_arg = true, allow_hyphen_values = true)]
    options: Vec<String>,
}

impl Ps {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let (_, state) = flags.root()?.open(&self.id)?;
        let (pids, table) = top::processes(&state.machine()?, &self.id).context("list the container's processes")?;
        match self.format {
            Format::Json => crate::cli::print_json(&pids, "the processes"),
            Format::Table => crate::cli::print(&table),
        }
    }
}
