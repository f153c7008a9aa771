//! `husk load`: loads an archive, an OCI layout or a directory into the store as an image.

use std::io::IsTerminal;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use clap::Args;

use super::events;
use super::exit::Exit;
use super::import::ImportFlags;
use crate::image::reference::Reference;
use crate::image::{Progress, Source};

const EXAMPLES: &str = "\
Examples:
  docker save debian:12 | husk load
  docker save debian:12 -o debian.tar && husk load debian.tar
  husk load docker-archive:images.tar:debian:12     (one image of several, by default all)
  husk load oci:layout-directory:latest --name app
  husk load rootfs.tar.zst --name debian:mine
  sudo debootstrap bookworm root && sudo husk load ./root --name bookworm

`husk run` accepts any of these paths directly, without loading them first (./FILE for a file in the working directory). An
archive or a directory without manifest.json or index.json is taken as a root filesystem, with a notice.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Load {
    /// Archive written by `docker save`, OCI layout, or root filesystem (a tar archive or a directory) [default: an archive
    /// from standard input]
    #[arg(value_name = "PATH", value_parser = path)]
    path: Option<Input>,

    /// Same as PATH, for compatibility with `docker load`
    #[arg(short, long, value_name = "PATH", value_parser = path, conflicts_with = "path")]
    input: Option<Input>,

    /// Name for the only image, instead of the names in the archive
    #[arg(short, long, value_parser = super::pull::reference)]
    name: Option<Reference>,

    /// Suppress progress output
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    import: ImportFlags,
}

impl Load {
    /// Adds the image to the store and prints its name.
    pub fn run(self) -> Result<Exit> {
        let store = self.import.store()?;
        let (name, progress) =
            (self.name.as_ref(), if self.quiet { Progress::Hidden } else { Progress::on_terminal() });
        let loaded = match self.path.or(self.input).unwrap_or(Input::Stdin) {
            Input::Source(source) => store.load(&source, name, progress)?,
            Input::Stdin => {
                let stdin = std::io::stdin();
                ensure!(
                    !stdin.is_terminal(),
                    "no image given: use `husk load PATH` or `docker save IMAGE | husk load`"
                );
                let input = stdin.as_fd().try_clone_to_owned().context("read standard input")?;
                store.load_stream(input.into(), name, progress)?
            }
        };
        for (prepared, names) in loaded {
            events::note("image", "load", prepared.id, names.first().map_or("", String::as_str));
            // Any archive that is not an image is taken as a root file system.
            let taken = if prepared.is_bare_root { ", taken as a root filesystem" } else { "" };
            let lines: String = match names.is_empty() {
                true => format!("Loaded image ID: {}{taken}\n", prepared.id),
                false => names.iter().map(|name| format!("Loaded image: {name}{taken}\n")).collect(),
            };
            super::print(&lines)?;
        }
        Ok(Exit::Success)
    }
}

/// The input of `husk load`.
#[derive(Debug, Clone)]
enum Input {
    Source(Source),
    Stdin,
}

/// Parses the path of an image source: here, a word that could be an image name is a file.
fn path(text: &str) -> Result<Input, String> {
    match text {
        "" => Err("the path is empty".into()),
        "-" => Ok(Input::Stdin),
        text => Source::at_path(text).map(Input::Source).map_err(|error| format!("{error:#}")),
    }
}

/// Parses an image source.
pub fn source(text: &str) -> Result<Source, String> {
    text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
}
