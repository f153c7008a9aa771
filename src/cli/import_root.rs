//! `husk import`: makes an image of a root file system's archive.

use std::fs::File;
use std::os::fd::AsFd;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::events;
use super::exit::Exit;
use super::import::ImportFlags;
use crate::image::Progress;
use crate::image::make::Making;
use crate::image::reference::Reference;

const EXAMPLES: &str = "\
Examples:
  docker export web | husk import - web:1
  husk import -c 'CMD [\"sh\"]' -c 'ENV LANG=C.UTF-8' rootfs.tar.gz base
  curl -L https://example.org/rootfs.tar.xz | husk import - base";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ImportRoot {
    /// Archive of a root filesystem, or - for standard input
    #[arg(value_name = "FILE|-")]
    file: String,

    /// Name for the image
    #[arg(value_name = "NAME[:TAG]", value_parser = super::pull::reference)]
    name: Option<Reference>,

    /// Apply an instruction of a Dockerfile: CMD, ENTRYPOINT, ENV, EXPOSE, LABEL, STOPSIGNAL, USER, VOLUME or WORKDIR
    #[arg(short, long = "change", value_name = "INSTRUCTION")]
    changes: Vec<String>,

    /// Comment for the image's history
    #[arg(short, long, value_name = "TEXT", default_value = "")]
    message: String,

    /// Suppress progress output
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    import: ImportFlags,
}

impl ImportRoot {
    /// Makes the image and prints its ID.
    pub fn run(self) -> Result<Exit> {
        let file = self.file.as_str();
        if file.starts_with("http://") || file.starts_with("https://") {
            bail!("husk does not download it: use `curl -L {file} | husk import -`");
        }
        let archive = match file {
            "-" => File::from(std::io::stdin().as_fd().try_clone_to_owned().context("read standard input")?),
            path => File::open(path).with_context(|| format!("open {path}"))?,
        };
        let store = self.import.store()?;
        let progress = if self.quiet { Progress::Hidden } else { Progress::on_terminal() };
        let making =
            Making { name: self.name.as_ref(), changes: &self.changes, ran: None, comment: &self.message, from: file };
        let id = store.import_root(archive, &making, progress).with_context(|| format!("import {file}"))?;
        let name = self.name.as_ref().map(Reference::familiar).unwrap_or_default();
        events::note("image", "import", id, name);
        super::print(&format!("{id}\n"))?;
        Ok(Exit::Success)
    }
}
