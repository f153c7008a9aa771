//! `husk oci state` and `list`: what there is.

use anyhow::Result;
use clap::Args;
use serde_json::Value;

use super::Flags;
use crate::cli::images;
use crate::oci::state::Status;

#[derive(Debug, Args)]
pub(super) struct State {
    /// ID of the container
    #[arg(value_name = "ID")]
    id: String,
}

impl State {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let (dir, state) = flags.root()?.open(&self.id)?;
        crate::cli::print_json(&state.to_json(state.status(&dir)), "the container's state")
    }
}

#[derive(Debug, Args)]
pub(super) struct List {
    /// Format: table or json
    #[arg(short, long, value_name = "FORMAT", default_value = "table")]
    format: Format,

    /// Print only IDs
    #[arg(short, long)]
    quiet: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

impl List {
    pub(super) fn run(self, flags: &Flags) -> Result<()> {
        let found = flags.root()?.list()?;
        if self.quiet {
            let ids: String = found.iter().map(|(_, state)| format!("{}\n", state.id)).collect();
            return crate::cli::print(&ids);
        }
        let described: Vec<(Status, Value)> = found
            .iter()
            .map(|(dir, state)| {
                let status = state.status(dir);
                (status, state.to_json(status))
            })
            .collect();
        if self.format == Format::Json {
            let all: Vec<&Value> = described.iter().map(|(_, json)| json).collect();
            return crate::cli::print_json(&all, "the containers");
        }
        let cells = |json: &Value| {
            ["id", "pid", "status", "bundle", "created"].map(|name| match &json[name] {
                Value::String(text) => text.clone(),
                other => other.to_string(),
            })
        };
        let heading = ["ID", "PID", "STATUS", "BUNDLE", "CREATED"].map(str::to_owned);
        let rows: Vec<[String; 5]> =
            std::iter::once(heading).chain(described.iter().map(|(_, json)| cells(json))).collect();
        crate::cli::print(&images::table(&rows))
    }
}
