//! `husk inspect`: prints everything known about machines, images, volumes and networks as JSON.

pub mod image;
pub mod machine;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use serde::Serialize;
use serde_json::Value;

use super::exit::Exit;
use crate::foreign;
use crate::image::Store;
use crate::resources::bridge;
use crate::state_dir::StateDir;
use crate::template::Template;

const EXAMPLES: &str = "\
Examples:
  husk inspect web | jq '.[].State'
  husk inspect --format '{{.State.Status}} {{.State.ExitCode}}' web
  husk inspect -f '{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}' web
  husk inspect -f '{{json .Config.Env}}' debian:12
  husk inspect --type volume data";

/// What is inspected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    #[value(alias = "container")]
    Machine,
    Image,
    Volume,
    Network,
}

/// All kinds. A name is that of the first that has one.
const KINDS: [Kind; 4] = [Kind::Machine, Kind::Image, Kind::Volume, Kind::Network];

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Inspect {
    /// Names or IDs of machines, images, volumes or networks; source paths of images
    #[arg(value_name = "NAME", required = true)]
    names: Vec<String>,

    #[command(flatten)]
    format: FormatFlag,

    /// Only inspect machines (or container), images (image), volumes (volume) or networks (network)
    #[arg(long = "type", value_name = "KIND", hide_possible_values = true)]
    kind: Option<Kind>,

    /// Include the disk usage of machines
    #[arg(short, long)]
    size: bool,
}

// The flag of every command that prints details.
#[derive(Debug, Args)]
pub(super) struct FormatFlag {
    /// Format the output with a Go template, or as json on one line
    #[arg(short, long, value_name = "FORMAT", value_parser = format)]
    format: Option<Format>,
}

/// The value of `--format`.
#[derive(Debug, Clone)]
pub enum Format {
    /// JSON on one line.
    Json,
    /// A template.
    Template(Template),
}

/// Parses it.
pub fn format(text: &str) -> Result<Format, String> {
    match text {
        "json" => Ok(Format::Json),
        text => Template::parse(text).map(Format::Template).map_err(|error| format!("{error:#}")),
    }
}

impl FormatFlag {
    /// Prints a list of what was found, if anything, or what the format makes of each. Values that a template fails for are
    /// reported.
    pub fn print(&self, found: &[impl Serialize]) -> Result<Exit> {
        let mut exit = Exit::Success;
        match &self.format {
            _ if found.is_empty() => {}
            None => super::print_json(&found, "the details")?,
            Some(Format::Json) => super::print_raw(&(foreign::json_line(&found)? + "\n")).map(drop)?,
            Some(Format::Template(template)) => {
                for found in found {
                    match serde_json::to_value(found).map_err(Into::into).and_then(|value| template.render(&value)) {
                        Ok(text) => super::print(&(text + "\n"))?,
                        Err(error) => exit = super::report(&error),
                    }
                }
            }
        }
        Ok(exit)
    }
}

impl Inspect {
    /// Of images only.
    pub fn images(self) -> Inspect {
        Inspect { kind: Some(Kind::Image), ..self }
    }

    /// Of machines only.
    pub fn machines(self) -> Inspect {
        Inspect { kind: Some(Kind::Machine), ..self }
    }

    /// Prints a list with one object for each that exists, or what the format makes of each.
    pub fn run(self) -> Result<Exit> {
        let (found, failed): (Vec<_>, Vec<_>) = self.names.iter().map(|name| self.find(name)).partition(Result::is_ok);
        let found: Vec<Found> = found.into_iter().flatten().collect();
        let mut exit = self.format.print(&found)?;
        for error in failed.iter().filter_map(|failed| failed.as_ref().err()) {
            exit = super::report(error);
        }
        Ok(exit)
    }

    fn find(&self, name: &str) -> Result<Found> {
        if let Some(kind) = self.kind {
            return self.find_kind(kind, name);
        }
        let found = KINDS.iter().find_map(|kind| self.find_kind(*kind, name).ok());
        found.with_context(|| format!("no such machine, image, volume or network: {name}"))
    }

    fn find_kind(&self, kind: Kind, name: &str) -> Result<Found> {
        Ok(match kind {
            Kind::Machine => {
                let entry = StateDir::open()?.find(name)?;
                let mut machine = machine::inspect(&entry);
                if self.size {
                    machine.measure();
                }
                Found::Machine(Box::new(machine))
            }
            Kind::Image => Found::Image(Box::new(image::inspect(Store::open_default()?.find(&name.parse()?)?))),
            Kind::Volume => Found::Other(super::volume::to_json(&Store::open_default()?.volume(name)?)),
            Kind::Network => {
                let network = bridge::list()?.into_iter().find(|network| network.name == name);
                Found::Other(super::networks::to_json(&network.with_context(|| format!("no such network: {name}"))?))
            }
        })
    }
}

/// What was found.
#[derive(Serialize)]
#[serde(untagged)]
enum Found {
    Machine(Box<machine::Inspected>),
    Image(Box<image::Inspected>),
    Other(Value),
}
