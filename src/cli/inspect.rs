//! `husk inspect`: prints everything known about machines and images as JSON.

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::ps;
use crate::image::Store;
use crate::state_dir::StateDir;

const EXAMPLES: &str = "\
Examples:
  husk inspect web | jq '.[].state'
  husk inspect debian:12
  husk inspect debian:12 | jq -r '.[].process.env[]'";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Inspect {
    /// Names or IDs of machines; names, IDs or source paths of images
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,
}

impl Inspect {
    /// Prints a list with one object for each that exists. Machines take precedence over images of the same name.
    pub fn run(self) -> Result<Exit> {
        let state_dir = StateDir::open()?;
        let find = |name: &String| match state_dir.find(name) {
            Ok(entry) => Ok(ps::to_json(&entry)),
            Err(_) => image(name).with_context(|| format!("no such machine or image: {name}")),
        };
        let (found, failed): (Vec<_>, Vec<_>) = self.names.iter().map(find).partition(Result::is_ok);
        let found: Vec<_> = found.into_iter().flatten().collect();
        if !found.is_empty() {
            super::print_json(&found, "the details")?;
        }
        let mut exit = Exit::Success;
        for error in failed.iter().filter_map(|failed| failed.as_ref().err()) {
            exit = super::report(error);
        }
        Ok(exit)
    }
}

fn image(name: &str) -> Result<serde_json::Value> {
    let image = Store::open_default()?.find(&name.parse()?)?;
    serde_json::to_value(image).context("print the image")
}
