//! `husk pull`: from a registry's image to one in the store.

use anyhow::Result;
use clap::Args;

use super::exit::Exit;
use super::size;
use crate::image::reference::Reference;
use crate::image::{Platform, Progress, Store};

const EXAMPLES: &str = "\
Examples:
  husk pull debian:12
  husk pull registry.example.com:5000/team/app@sha256:e3b0...
  docker login registry.example.com && husk pull registry.example.com/team/app
  husk pull localhost:5000/app      (a registry on this host may do without TLS)

Names and passwords are those of docker login and podman login; a registry's own authorities are found where Docker and podman
have them, in certs.d/HOST[:PORT]/*.crt below /etc/docker, /etc/containers, or either in ~/.config.

What was fetched when a pull broke off is not fetched again.";

/// The flags of `husk pull`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct Pull {
    /// Name of the image; without a host it is of docker.io, without a tag it is the latest
    #[arg(value_name = "[HOST[:PORT]/]NAME[:TAG][@DIGEST]", value_parser = reference)]
    name: Reference,

    /// Which of an image's platforms: linux/amd64 or linux/386
    #[arg(long, value_name = "OS/ARCH", default_value = "linux/amd64", value_parser = platform)]
    platform: Platform,

    /// Say nothing but the digest
    #[arg(short, long)]
    quiet: bool,

    /// Most bytes that the image may take on its way, instead of what is free on the disk
    #[arg(long, value_name = "SIZE", value_parser = size::bytes)]
    max_size: Option<u64>,
}

impl Pull {
    /// Fetches the image, and prints its name with its digest.
    pub fn run(self) -> Result<Exit> {
        let mut store = Store::open_default()?;
        store.unpack_limit_bytes = self.max_size;
        let progress = if self.quiet { Progress::hidden() } else { Progress::on_terminal() };
        let pulled = store.pull(&self.name, &self.platform, &progress)?;
        if self.quiet {
            super::print(&format!("{}\n", pulled.prepared.id))?;
        } else {
            let state = if pulled.is_known { "is up to date" } else { "is here" };
            super::print(&format!("{} {state}: {}\n", self.name.familiar(), pulled.digest))?;
        }
        Ok(Exit::Success)
    }
}

/// Parses an image's full name.
pub fn reference(text: &str) -> Result<Reference, String> {
    text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
}

fn platform(text: &str) -> Result<Platform, String> {
    match text {
        "linux/amd64" | "linux/x86_64" => Ok(Platform::default()),
        "linux/386" => Ok(Platform { architecture: "386".into(), ..Platform::default() }),
        _ => Err("a machine is linux/amd64 or linux/386".into()),
    }
}
