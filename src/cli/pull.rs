//! `husk pull`: downloads an image from a registry.

use anyhow::Result;
use clap::Args;

use super::events;
use super::exit::Exit;
use super::import::ImportFlags;
use crate::image::on_demand::{Finding, PullPolicy};
use crate::image::reference::Reference;
use crate::image::{Platform, Progress};

const EXAMPLES: &str = "\
Examples:
  husk pull debian:12
  husk pull registry.example.com:5000/team/app@sha256:e3b0...
  husk login registry.example.com && husk pull registry.example.com/team/app
  husk pull localhost:5000/app      (TLS is optional for a registry on this host)

Credentials from `husk login`, `docker login` and `podman login` are used. CA certificates of a registry are read from the same places as
by Docker and podman: certs.d/HOST[:PORT]/*.crt in /etc/docker or /etc/containers, or in either below ~/.config.

An interrupted pull resumes where it stopped.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Pull {
    /// Name of the image; the default registry is docker.io, the default tag is latest
    #[arg(value_name = "[HOST[:PORT]/]NAME[:TAG][@DIGEST]", value_parser = reference)]
    name: Reference,

    /// Platform of the image: linux/amd64 or linux/386
    #[arg(long, value_name = "OS/ARCH", default_value = "linux/amd64", value_parser = platform)]
    platform: Platform,

    /// Pull all tags of the repository
    #[arg(short, long)]
    all_tags: bool,

    /// Suppress progress output, print only the image ID
    #[arg(short, long)]
    quiet: bool,

    #[command(flatten)]
    import: ImportFlags,
}

impl Pull {
    /// Downloads the image, and prints its name and digest.
    pub fn run(self) -> Result<Exit> {
        let store = self.import.store()?;
        let progress = if self.quiet { Progress::Hidden } else { Progress::on_terminal() };
        let names = if self.all_tags { store.remote_tags(&self.name)? } else { vec![self.name.clone()] };
        for name in &names {
            let pulled = store.pull(name, &self.platform, progress)?;
            events::note("image", "pull", pulled.prepared.id, name.familiar());
            if self.quiet {
                super::print(&format!("{}\n", pulled.prepared.id))?;
            } else {
                let state = if pulled.is_known { "is up to date" } else { "was pulled" };
                super::print(&format!("{} {state}: {}\n", name.familiar(), pulled.digest))?;
            }
        }
        Ok(Exit::Success)
    }
}

/// Parses an image name.
pub fn reference(text: &str) -> Result<Reference, String> {
    text.parse().map_err(|error: anyhow::Error| format!("{error:#}"))
}

// When to pull, for commands that run an image.
#[derive(Debug, Args)]
pub(super) struct PullFlags {
    /// When to pull the image: always, missing or never
    #[arg(long, value_name = "POLICY", value_parser = policy, default_value = "missing", hide_default_value = true)]
    pull: PullPolicy,

    /// Platform of an image that is pulled: linux/amd64 or linux/386
    #[arg(long, value_name = "OS/ARCH", value_parser = platform_name)]
    platform: Option<String>,

    /// Do not show the progress of a pull
    #[arg(short, long)]
    quiet: bool,
}

impl PullFlags {
    /// How an image is found, with the limit and the sandbox of its import.
    pub fn finding(&self, max_bytes: Option<u64>, sandbox: bool) -> Finding<'_> {
        Finding { pull: self.pull, platform: self.platform.as_deref(), max_bytes, sandbox, quiet: self.quiet }
    }
}

fn policy(text: &str) -> Result<PullPolicy, String> {
    match text {
        "always" => Ok(PullPolicy::Always),
        "missing" => Ok(PullPolicy::Missing),
        "never" => Ok(PullPolicy::Never),
        _ => Err("use always, missing or never".into()),
    }
}

fn platform_name(text: &str) -> Result<String, String> {
    platform(text).map(|_| text.to_owned())
}

/// Parses the platform of an image.
pub fn platform(text: &str) -> Result<Platform, String> {
    match text {
        "linux/amd64" | "linux/x86_64" => Ok(Platform::default()),
        "linux/386" => Ok(Platform { architecture: "386".into(), ..Platform::default() }),
        _ => Err("machines are x86-64: use linux/amd64 or linux/386".into()),
    }
}
