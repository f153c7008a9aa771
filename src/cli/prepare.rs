//! `husk prepare`, which `husk run` starts for an image that is not prepared: data from registries and archives is
//! processed in a separate, short-lived process, and never in one that runs a machine.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::import::ImportFlags;
use crate::image::{Form, Platform, Progress, Source};
use crate::sys;

#[derive(Debug, Args)]
pub(super) struct Prepare {
    /// Source of the image
    #[arg(value_name = "IMAGE")]
    image: String,

    #[command(flatten)]
    import: ImportFlags,

    /// Pull the image even if it is in the store
    #[arg(long)]
    pull: bool,

    /// Platform of an image that is pulled
    #[arg(long, value_name = "OS/ARCH", default_value = "linux/amd64", value_parser = super::pull::platform)]
    platform: Platform,

    /// Suppress progress output
    #[arg(long)]
    quiet: bool,

    /// Do not compress the root filesystem (to measure the cost of compression)
    #[arg(long)]
    plain: bool,
}

impl Prepare {
    /// Prepares the image with its progress on standard error, and prints its ID.
    pub fn run(self) -> Result<Exit> {
        sys::end_with_parent().context("tie this process to the lifetime of its parent")?;
        let mut store = self.import.store()?;
        if self.plain {
            store.form = Form::Plain;
        }
        let source = self.image.parse()?;
        if matches!(source, Source::Name { path: None, .. }) && Path::new(&self.image).exists() {
            super::print_stderr(&format!("husk: {0} is taken as an image name; use ./{0} for the file\n", self.image));
        }
        let progress = if self.quiet { Progress::Hidden } else { Progress::on_terminal() };
        let is_to_be_pulled = self.pull || store.prepared(&source)?.is_none() && self.platform != Platform::default();
        let prepared = match &source {
            Source::Name { reference, .. } if is_to_be_pulled && store.path_of(&source)?.is_none() => {
                store.pull(reference, &self.platform, progress)?.prepared
            }
            _ => store.prepare(&source, progress)?,
        };
        if prepared.is_bare_root {
            let list = "manifest.json or index.json";
            super::print_stderr(&format!("husk: {} has no {list}: taken as a root filesystem\n", self.image));
        }
        super::print(&prepared.id.hex())?;
        Ok(Exit::Success)
    }
}
