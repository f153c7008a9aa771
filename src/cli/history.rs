//! `husk history`: shows how an image was made.

use std::collections::BTreeMap;
use std::time::SystemTime;

use anyhow::Result;
use clap::Args;
use indicatif::{HumanBytes, HumanDuration};

use super::exit::Exit;
use super::list::{Columns, ListFlags, Row};
use crate::image::save::Step;
use crate::image::{Source, Store};

const EXAMPLES: &str = "\
Examples:
  husk history debian:12
  husk history --no-trunc --format '{{.CreatedBy}}' app";

const COLUMNS: Columns = Columns {
    all: &[
        ("ID", "IMAGE"),
        ("CreatedSince", "CREATED"),
        ("CreatedAt", "CREATED AT"),
        ("CreatedBy", "CREATED BY"),
        ("Size", "SIZE"),
        ("Comment", "COMMENT"),
    ],
    shown: &["ID", "CreatedSince", "CreatedBy", "Size", "Comment"],
    key: "ID",
    filters: &[],
};

/// The maximum width of a command.
const COMMAND_CHARS: usize = 45;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct History {
    /// Name or ID of an image
    #[arg(value_name = "IMAGE", value_parser = super::load::source)]
    image: Source,

    #[command(flatten)]
    list: ListFlags,
}

impl History {
    /// Prints the steps, latest first. Sizes are those of the layers' files, as in Docker.
    pub fn run(self) -> Result<Exit> {
        self.list.filters(&COLUMNS)?;
        let (id, steps) = Store::open_default()?.history(&self.image)?;
        let max_chars = if self.list.no_trunc { usize::MAX } else { COMMAND_CHARS };
        let rows = steps.iter().enumerate().map(|(at, step)| {
            // Only the image itself has an ID.
            let id = match at {
                0 if self.list.no_trunc => id.to_string(),
                0 => id.short(),
                _ => "<missing>".to_owned(),
            };
            row(id, step, max_chars)
        });
        self.list.print(&COLUMNS, rows.collect())?;
        Ok(Exit::Success)
    }
}

fn row(id: String, step: &Step, max_chars: usize) -> Row {
    let created = step.created.as_deref().and_then(|created| humantime::parse_rfc3339_weak(created).ok());
    let ago = created.and_then(|created| SystemTime::now().duration_since(created).ok());
    Row::new(
        [
            ("ID", id),
            ("CreatedSince", ago.map_or_else(|| "N/A".to_owned(), |ago| format!("{} ago", HumanDuration(ago)))),
            ("CreatedAt", step.created.clone().unwrap_or_default()),
            ("CreatedBy", super::ps::shortened(&step.created_by, max_chars)),
            ("Size", HumanBytes(step.size_bytes).to_string()),
            ("Comment", step.comment.clone()),
        ],
        &BTreeMap::new(),
    )
}
