//! `husk system`, `husk info` and `husk version`: the host, the disk usage, and what can be removed.

mod df;

use anyhow::Result;
use clap::{Args, Subcommand};
use rustix::system::{sysinfo, uname};
use serde::Serialize;

use super::exit::Exit;
use super::inspect::{self, Format};
use super::prune::Prune;
use super::reach;
use crate::foreign;
use crate::image::Store;
use crate::state_dir::StateDir;
use crate::state_dir::record::State;

const EXAMPLES: &str = "\
Examples:
  husk system df -v
  husk system prune";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct System {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Show the disk usage of images, machines and volumes
    Df(df::Df),
    /// Show what is known about this husk and its host
    Info(Info),
    /// Remove unused data, like `husk prune`
    #[command(name = "prune")]
    Clean {
        #[command(flatten)]
        prune: Prune,
        /// Also remove the anonymous volumes that no machine has
        #[arg(long)]
        volumes: bool,
    },
}

impl System {
    /// Executes the subcommand.
    pub fn run(self) -> Result<Exit> {
        match self.command {
            Command::Df(df) => df.run(),
            Command::Info(info) => info.run(),
            Command::Clean { prune, volumes } => {
                let pruned = if volumes { super::volume::prune(false)? } else { Exit::Success };
                let exit = prune.run()?;
                Ok(if matches!(exit, Exit::Success) { pruned } else { exit })
            }
        }
    }
}

/// Prints `value` with a template, or as JSON on a line.
fn print_formatted(value: &impl Serialize, format: &Format) -> Result<Exit> {
    match format {
        Format::Template(template) => super::print(&(template.render(&serde_json::to_value(value)?)? + "\n"))?,
        Format::Json => super::print_raw(&(foreign::json_line(value)? + "\n")).map(drop)?,
    }
    Ok(Exit::Success)
}

#[derive(Debug, Args)]
pub(super) struct Version {
    /// Format the output with a Go template, or as json on one line
    #[arg(short, long, value_name = "FORMAT", value_parser = inspect::format)]
    format: Option<Format>,
}

/// There is no daemon: what Docker calls client and server are the same.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Versions {
    client: Engine,
    server: Engine,
}

#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Engine {
    version: &'static str,
    os: &'static str,
    arch: &'static str,
    kernel_version: String,
}

impl Version {
    /// Prints the version.
    pub fn run(self) -> Result<Exit> {
        let kernel_version = uname().release().to_string_lossy().into_owned();
        let engine = Engine { version: env!("CARGO_PKG_VERSION"), os: "linux", arch: "amd64", kernel_version };
        if let Some(format) = &self.format {
            return print_formatted(&Versions { client: engine.clone(), server: engine }, format);
        }
        let Engine { version, os, arch, kernel_version } = engine;
        super::print(&format!("Version:  {version}\nOS/Arch:  {os}/{arch}\nKernel:   {kernel_version}\n"))?;
        Ok(Exit::Success)
    }
}

const INFO_EXAMPLES: &str = "\
Examples:
  husk info
  husk info --format '{{.ContainersRunning}} of {{.Containers}}'

`husk doctor` checks whether this host can run machines.";

#[derive(Debug, Args)]
#[command(after_help = INFO_EXAMPLES)]
pub(super) struct Info {
    /// Format the output with a Go template, or as json on one line
    #[arg(short, long, value_name = "FORMAT", value_parser = inspect::format)]
    format: Option<Format>,
}

/// In Docker's words, in which machines are containers.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Facts {
    containers: usize,
    containers_running: usize,
    containers_paused: usize,
    containers_stopped: usize,
    images: usize,
    server_version: &'static str,
    driver: &'static str,
    docker_root_dir: String,
    kernel_version: String,
    operating_system: String,
    #[serde(rename = "OSType")]
    os_type: &'static str,
    architecture: String,
    #[serde(rename = "NCPU")]
    cpus: usize,
    mem_total: u64,
    name: String,
}

impl Info {
    /// Prints the facts.
    pub fn run(self) -> Result<Exit> {
        let facts = facts()?;
        if let Some(format) = &self.format {
            return print_formatted(&facts, format);
        }
        let rows = [
            ["Machines:".to_owned(), facts.containers.to_string()],
            ["  Running:".into(), facts.containers_running.to_string()],
            ["  Paused:".into(), facts.containers_paused.to_string()],
            ["  Stopped:".into(), facts.containers_stopped.to_string()],
            ["Images:".into(), facts.images.to_string()],
            ["Version:".into(), facts.server_version.into()],
            ["Store:".into(), facts.docker_root_dir],
            ["Kernel:".into(), facts.kernel_version],
            ["System:".into(), facts.operating_system],
            ["CPUs:".into(), facts.cpus.to_string()],
            ["Memory:".into(), indicatif::HumanBytes(facts.mem_total).to_string()],
            ["Name:".into(), facts.name],
        ];
        super::print(&super::images::table(&rows))?;
        Ok(Exit::Success)
    }
}

fn facts() -> Result<Facts> {
    let store = Store::open_default()?;
    let states: Vec<State> = reach::machines(&StateDir::open()?)?.iter().map(|entry| entry.state()).collect();
    let count = |is: &dyn Fn(&State) -> bool| states.iter().filter(|state| is(state)).count();
    let running = count(&|state| matches!(state, State::Starting | State::Running { .. } | State::Restarting { .. }));
    let paused = count(&|state| matches!(state, State::Paused { .. }));
    let host = uname();
    let text = |text: &std::ffi::CStr| text.to_string_lossy().into_owned();
    let memory = sysinfo();
    Ok(Facts {
        containers: states.len(),
        containers_running: running,
        containers_paused: paused,
        containers_stopped: states.len() - running - paused,
        images: store.list()?.len(),
        server_version: env!("CARGO_PKG_VERSION"),
        driver: "erofs",
        docker_root_dir: store.dir().display().to_string(),
        kernel_version: text(host.release()),
        operating_system: operating_system(),
        os_type: "linux",
        architecture: text(host.machine()),
        cpus: std::thread::available_parallelism().map_or(1, usize::from),
        mem_total: memory.totalram.saturating_mul(u64::from(memory.mem_unit)),
        name: text(host.nodename()),
    })
}

/// The name of the host's distribution.
fn operating_system() -> String {
    let text = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "Linux".to_owned(), |name| name.trim_matches('"').to_owned())
}
