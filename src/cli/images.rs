//! `husk images`: lists images.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use clap::Args;
use indicatif::{HumanBytes, HumanDuration};

use super::exit::Exit;
use crate::foreign;
use crate::image::Store;

const EXAMPLES: &str = "\
Examples:
  husk images
  husk images --quiet | xargs husk rmi
  husk images --json | jq '.[].names'";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Images {
    /// Format the output as JSON
    #[arg(long)]
    json: bool,

    /// Only display IDs
    #[arg(short, long, conflicts_with = "json")]
    quiet: bool,

    /// Show all images: always on, for compatibility with `docker images`
    #[arg(short, long, hide = true)]
    all: bool,
}

impl Images {
    /// Prints the list.
    pub fn run(self) -> Result<Exit> {
        let Images { json, quiet, all: _ } = self;
        let images = Store::open_default()?.list()?;
        if json {
            super::print_json(&images, "the images")?;
            return Ok(Exit::Success);
        }
        if quiet {
            super::print(&images.iter().map(|image| image.id.short() + "\n").collect::<String>())?;
            return Ok(Exit::Success);
        }
        let now = SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        let mut rows =
            vec![["NAME".to_owned(), "ID".into(), "ADDED".into(), "ROOT".into(), "LAYERS".into(), "WARM".into()]];
        for image in &images {
            let age = now.saturating_sub(Duration::from_secs(image.record.added_seconds));
            let rest = [
                image.id.short(),
                format!("{} ago", HumanDuration(age)),
                HumanBytes(image.root_bytes).to_string(),
                HumanBytes(image.layer_bytes).to_string(),
                HumanBytes(image.warm_bytes).to_string(),
            ];
            let unnamed = || vec![format!("<{}>", image.record.source.as_deref().unwrap_or("no name"))];
            let names = if image.names.is_empty() { unnamed() } else { image.names.clone() };
            for name in names {
                let [id, age, root, layers, warm] = rest.clone();
                rows.push([name, id, age, root, layers, warm]);
            }
        }
        super::print(&table(&rows))?;
        Ok(Exit::Success)
    }
}

/// Formats rows as aligned columns, one line each, with safe cell contents.
pub fn table<const N: usize>(rows: &[[String; N]]) -> String {
    let rows: Vec<_> = rows.iter().map(|row| row.each_ref().map(|cell| foreign::line(cell))).collect();
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: [usize; N] = std::array::from_fn(width);
    let line = |row: &[Cow<str>; N]| {
        let cells: Vec<String> = row.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["a".to_owned(), "b".into()], ["long".into(), "".into()], ["é".into(), "x".into()]];
        assert_eq!(table(&rows), "a     b\nlong\né     x\n");
    }

    #[test]
    fn cells_are_sanitized() {
        let rows = [["a\nb".to_owned(), "\x1b[2J".into()], ["x".into(), "y".into()]];
        assert_eq!(table(&rows), "a\u{fffd}b  \u{fffd}[2J\nx    y\n");
    }
}
