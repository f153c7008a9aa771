//! `husk prepare`, which `husk run` starts for an image that is not prepared: data from registries and archives is
//! processed in a separate, short-lived process, and never in one that runs a machine.

use std::path::Path;

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::import::ImportFlags;
use crate::image::{Form, Progress, Source};
use crate::sys;

#[derive(Debug, Args)]
pub(super) struct Prepare {
    /// Source of the image
    #[arg(value_name = "IMAGE")]
    image: String,

    #[command(flatten)]
    import: ImportFlags,

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
        let prepared = store.prepare(&source, Progress::on_terminal())?;
        if prepared.is_bare_root {
            let list = "manifest.json or index.json";
            super::print_stderr(&format!("husk: {} has no {list}: taken as a root filesystem\n", self.image));
        }
        super::print(&prepared.id.hex())?;
        Ok(Exit::Success)
    }
}
