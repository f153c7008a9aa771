//! `husk volume`: manages named volumes.

use anyhow::Result;
use clap::{Args, Subcommand};

use super::exit::Exit;
use crate::image::Store;

const EXAMPLES: &str = "\
Examples:
  husk run -v data:/var/lib/postgresql postgres
  husk volume ls
  husk volume rm data";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct VolumeArgs {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create volumes, for `husk run -v NAME:PATH`
    Create {
        /// Names of volumes
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// List volumes
    #[command(visible_alias = "list")]
    Ls {
        /// Format the output as JSON
        #[arg(long)]
        json: bool,
        /// Print only the names
        #[arg(short, long)]
        quiet: bool,
    },
    /// Display detailed information about volumes, as JSON
    Inspect {
        /// Names of volumes
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove volumes and their data
    #[command(visible_alias = "remove")]
    Rm {
        /// Names of volumes
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove all volumes that no running machine has, and their data
    Prune {
        /// Do not ask
        #[arg(short, long, required = true)]
        force: bool,
    },
}

impl VolumeArgs {
    /// Executes the subcommand.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        match self.command {
            Command::Create { names } => for_each(&names, |name| store.create_volume(name)),
            Command::Rm { names } => for_each(&names, |name| store.remove_volume(name)),
            Command::Prune { .. } => {
                let unused = store.volumes()?.into_iter().filter(|volume| !volume.in_use);
                let names: Vec<String> = unused.map(|volume| volume.name).collect();
                for_each(&names, |name| store.remove_volume(name))
            }
            Command::Ls { json: true, .. } => {
                super::print_json(&store.volumes()?, "the volumes")?;
                Ok(Exit::Success)
            }
            Command::Ls { quiet, .. } => {
                let mut rows = vec![["NAME".to_owned(), "STATE".into()]];
                rows.extend(store.volumes()?.into_iter().map(|volume| {
                    let state = if volume.in_use { "in use" } else { "free" };
                    [volume.name, state.into()]
                }));
                let names = || rows.iter().skip(1).map(|[name, _]| format!("{name}\n")).collect();
                super::print(&if quiet { names() } else { super::images::table(&rows) })?;
                Ok(Exit::Success)
            }
            Command::Inspect { names } => {
                let volumes = names.iter().map(|name| store.volume(name)).collect::<Result<Vec<_>>>()?;
                super::print_json(&volumes, "the volumes")?;
                Ok(Exit::Success)
            }
        }
    }
}

/// Does something with each volume, and prints the names of those where it succeeded.
fn for_each(names: &[String], act: impl Fn(&str) -> Result<()>) -> Result<Exit> {
    let mut exit = Exit::Success;
    for name in names {
        match act(name) {
            Ok(()) => super::print(&format!("{name}\n"))?,
            Err(error) => exit = super::report(&error),
        }
    }
    Ok(exit)
}
