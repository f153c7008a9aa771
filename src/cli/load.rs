//! `husk load`: from an archive, a layout or a directory to an image in the store, with a name.

use anyhow::{Context, Result};
use clap::Args;

use super::exit::Exit;
use super::size;
use crate::image::reference::Reference;
use crate::image::{Progress, Source, Store};

const EXAMPLES: &str = "\
Examples:
  docker save debian:12 -o debian.tar && husk load debian.tar
  husk load docker-archive:images.tar:debian:12     (one of several images)
  husk load oci:layout-directory:latest --name app
  husk load rootfs.tar.zst --name debian:mine
  sudo debootstrap bookworm root && sudo husk load ./root --name bookworm

A machine can be run from any of these paths without loading them first, a file of this folder as ./FILE; a name makes it
shorter. What has no list of images (manifest.json, index.json) is taken for a root file system, which is said.";

/// The flags of `husk load`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Load {
    /// What docker save wrote, an OCI layout, a root file system's tar archive, or a root directory
    #[arg(value_name = "PATH", value_parser = path, required_unless_present = "input")]
    path: Option<Source>,

    /// The same, as docker load has it
    #[arg(short, long, value_name = "PATH", value_parser = path, conflicts_with = "path")]
    input: Option<Source>,

    /// Name of the image, instead of those that the archive gives it
    #[arg(short, long, value_parser = super::pull::reference)]
    name: Option<Reference>,

    /// Most bytes that the image may unpack to, instead of what is free on the disk
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    max_size: Option<u64>,
}

impl Load {
    /// Puts the image into the store, and prints what it is called.
    pub fn run(self) -> Result<Exit> {
        let mut store = Store::open_default()?;
        store.unpack_limit_bytes = self.max_size;
        let source = self.path.or(self.input).context("a path is missing")?;
        let (prepared, names) = store.load(&source, self.name.as_ref(), &Progress::on_terminal())?;
        let id = prepared.id.short();
        let names = if names.is_empty() { vec![id.clone()] } else { names };
        // Nothing tells a root file system but that it is no image.
        let taken = if prepared.is_bare_root { ", taken for a root file system" } else { "" };
        let lines: String = names.iter().map(|name| format!("Loaded {name} ({id}){taken}\n")).collect();
        super::print(&lines)?;
        Ok(Exit::Success)
    }
}

/// Parses the path of what an image is made from: a word that could be a name is a file's here.
fn path(text: &str) -> Result<Source, String> {
    if text.is_empty() {
        return Err("an image has a path".into());
    }
    Source::at_path(text).map_err(|error| format!("{error:#}"))
}

/// Parses what an image is made from.
pub fn source(text: &str) -> Result<Source, String> {
    text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
}
