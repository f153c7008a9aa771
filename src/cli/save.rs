//! `husk save`: writes images to an archive.

use std::fs::{self, File};
use std::io::{BufWriter, IsTerminal, Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use super::exit::Exit;
use crate::image::save::Archive;
use crate::image::{Source, Store};

const EXAMPLES: &str = "\
Examples:
  husk save debian:12 | docker load
  husk save -o images.tar app:1 db:2
  husk save --format oci-archive -o app.tar app    (skopeo copy oci-archive:app.tar docker://...)

An image is saved with its name, if it is given by one, and with the layers that were pulled, or loaded with `husk load`.";

/// The value of `--format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    DockerArchive,
    OciArchive,
}

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Save {
    /// Names or IDs of images
    #[arg(value_name = "IMAGE", required = true, value_parser = super::load::source)]
    images: Vec<Source>,

    /// Write to a file [default: standard output]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,

    /// Format of the archive: docker-archive, which is also an OCI layout, or oci-archive
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "docker-archive",
        hide_default_value = true,
        hide_possible_values = true
    )]
    format: Format,

    /// No progress is shown anyway
    #[arg(short, long, hide = true)]
    quiet: bool,

    /// Layers are saved as they came: for compatibility with `podman save`
    #[arg(long, hide = true)]
    uncompressed: bool,
}

impl Save {
    /// Writes the archive.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        let archive = match self.format {
            Format::DockerArchive => Archive::Docker,
            Format::OciArchive => Archive::Oci,
        };
        let save = |out: &mut dyn Write| store.save(&self.images, archive, &mut BufWriter::with_capacity(1 << 20, out));
        let Some(path) = &self.output else {
            ensure!(!stdout().is_terminal(), "an archive is not for a terminal: use -o FILE, or redirect it");
            return save(&mut stdout().lock()).map(|()| Exit::Success);
        };
        // An existing file is replaced only by a complete archive.
        let mut new = path.clone().into_os_string();
        new.push(".part");
        let write = || -> Result<()> {
            let mut file = File::create(&new).with_context(|| format!("create {}", path.display()))?;
            save(&mut file)?;
            fs::rename(&new, path).with_context(|| format!("write {}", path.display()))
        };
        let is_special = fs::metadata(path).is_ok_and(|found| !found.is_file());
        if is_special {
            save(&mut File::options().write(true).open(path).with_context(|| format!("open {}", path.display()))?)?;
        } else if let Err(error) = write() {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        Ok(Exit::Success)
    }
}
