//! `husk volume`: manages named volumes.

pub mod users;

use anyhow::Result;
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use self::users::Users;
use super::exists::Exists;
use super::exit::Exit;
use super::filter::matches_name;
use super::inspect::FormatFlag;
use super::labels::LabelFlags;
use super::list::{Columns, ListFlags, Row};
use crate::image::Store;
use crate::image::volumes::{self, Volume};
use crate::state_dir::StateDir;

const EXAMPLES: &str = "\
Examples:
  husk run -v data:/var/lib/postgresql postgres
  husk volume create --label team=web data
  husk volume ls --filter label=team
  husk volume rm data";

/// Docker's name for volumes that are folders on the host.
const DRIVER: &str = "local";

const COLUMNS: Columns = Columns {
    all: &[
        ("Driver", "DRIVER"),
        ("Name", "VOLUME NAME"),
        ("Mountpoint", "MOUNTPOINT"),
        ("Scope", "SCOPE"),
        ("State", "STATE"),
        ("Labels", "LABELS"),
        ("Label", "LABEL"),
    ],
    shown: &["Driver", "Name", "State"],
    key: "Name",
    filters: &["name", "dangling", "driver", "label"],
};

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
        /// Names of volumes; without any, one is chosen
        names: Vec<String>,
        #[command(flatten)]
        labels: LabelFlags,
        /// Docker's name for folders on the host
        #[arg(short, long, hide = true, value_parser = [DRIVER])]
        driver: Option<String>,
    },
    /// List volumes
    #[command(visible_alias = "list")]
    Ls {
        #[command(flatten)]
        list: ListFlags,
        /// Print what `husk volume inspect` prints
        #[arg(long, conflicts_with_all = ["format", "quiet"])]
        json: bool,
    },
    /// Display detailed information about volumes, as JSON
    Inspect {
        /// Names of volumes
        #[arg(required = true)]
        names: Vec<String>,
        #[command(flatten)]
        format: FormatFlag,
    },
    /// Remove volumes and their data
    #[command(visible_alias = "remove")]
    Rm {
        /// Names of volumes
        #[arg(required = true)]
        names: Vec<String>,
        /// Do not fail if a volume does not exist
        #[arg(short, long)]
        force: bool,
    },
    /// Whether there is a volume by this name, as the exit code: 0 or 1
    Exists(Exists),
    /// Remove the anonymous volumes that no machine has, and their data
    Prune {
        /// Remove those with a name as well
        #[arg(short, long)]
        all: bool,
        /// Do not ask
        #[arg(short, long, required = true)]
        force: bool,
    },
}

impl VolumeArgs {
    /// Executes the subcommand.
    pub fn run(self) -> Result<Exit> {
        let store = Store::open_default()?;
        let state_dir = StateDir::open()?;
        let users = Users::find(&state_dir)?;
        match self.command {
            Command::Create { names, labels, driver: _ } if names.is_empty() => {
                super::print(&format!("{}\n", store.create_anonymous_volume(&labels.labels()?)?))?;
                Ok(Exit::Success)
            }
            Command::Create { names, labels, driver: _ } => {
                let labels = labels.labels()?;
                for_each(&names, |name| store.create_volume(name, &labels))
            }
            Command::Rm { mut names, force } => {
                if force {
                    let found: Vec<String> = store.volumes()?.into_iter().map(|volume| volume.name).collect();
                    names.retain(|name| found.contains(name));
                }
                for_each(&names, |name| users.check_none(name).and_then(|()| store.remove_volume(name)))
            }
            Command::Exists(exists) => exists.volume(),
            Command::Prune { all, .. } => prune(all),
            Command::Ls { list, json } => {
                let filters = list.filters(&COLUMNS)?;
                let mut volumes = users.volumes(&store)?;
                volumes.retain(|volume| {
                    filters.any("name", |name| matches_name(&volume.name, name))
                        && filters.any("dangling", |wanted| (wanted == "true") != volume.in_use)
                        && filters.any("driver", |driver| driver == DRIVER)
                        && filters.labels(&volume.labels)
                });
                if json {
                    let all: Vec<Value> = volumes.iter().map(to_json).collect();
                    super::print_json(&all, "the volumes")?;
                } else {
                    list.print(&COLUMNS, volumes.iter().map(row).collect())?;
                }
                Ok(Exit::Success)
            }
            Command::Inspect { names, format } => {
                let volumes = names.iter().map(|name| Ok(to_json(&store.volume(name)?))).collect::<Result<Vec<_>>>()?;
                format.print(&volumes)
            }
        }
    }
}

/// Removes the anonymous volumes that no machine has, or `all` that none has, and prints their names.
pub fn prune(all: bool) -> Result<Exit> {
    let (store, state_dir) = (Store::open_default()?, StateDir::open()?);
    let unused = Users::find(&state_dir)?.volumes(&store)?.into_iter().filter(|volume| !volume.in_use);
    let names = unused.map(|volume| volume.name);
    let names: Vec<String> = names.filter(|name| all || volumes::is_anonymous(name)).collect();
    // Removing many may take long enough for a machine to get one of them.
    let check = |name: &str| Users::find(&state_dir)?.check_none(name);
    for_each(&names, |name| check(name).and_then(|()| store.remove_volume(name)))
}

/// What is known about a volume, in Docker's words.
pub fn to_json(volume: &Volume) -> Value {
    json!({
        "Name": volume.name, "Driver": DRIVER, "Mountpoint": volume.path, "Scope": "local", "Labels": volume.labels, "Options": {},
        "Husk": { "InUse": volume.in_use },
    })
}

fn row(volume: &Volume) -> Row {
    let fields = [
        ("Name", volume.name.clone()),
        ("Driver", DRIVER.to_owned()),
        ("Mountpoint", volume.path.display().to_string()),
        ("Scope", "local".to_owned()),
        ("State", if volume.in_use { "in use" } else { "free" }.to_owned()),
    ];
    Row::new(fields, &volume.labels)
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
