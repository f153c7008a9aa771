//! `husk oci`: the command line of an OCI runtime, as runc and crun have it.

mod cgroup;
mod channel;
mod console;
mod create;
mod delete;
mod exec;
mod features;
mod kill;
mod list;
mod log;
mod member;
pub(super) mod operations;
mod pause;
mod ps;
mod spec;
mod start;
mod stats;
mod supervise;
mod update;
mod warm;

use std::path::PathBuf;

use anyhow::Result;
use clap::{Args, Subcommand};

use super::exit::Exit;
use crate::oci::state::Root;

const EXAMPLES: &str = "\
Examples:
  podman --runtime /usr/local/bin/husk-oci run --rm alpine uname -r
  husk oci spec                     (writes a config.json for the root filesystem in ./rootfs)
  husk oci run -b . demo

It is also called husk-oci, by a link of that name to husk. docs/oci.md shows how engines are set up.";

/// As runc prints it: engines parse this.
const VERSION_TEXT: &str = concat!("version ", env!("CARGO_PKG_VERSION"), "\nspec: 1.1.0");

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, version = VERSION_TEXT)]
pub(super) struct Oci {
    #[command(flatten)]
    flags: Flags,

    #[command(subcommand)]
    command: OciCommand,
}

// What all commands have.
#[derive(Debug, Args)]
struct Flags {
    /// Directory for the state of containers [default: husk-oci in /run or in $XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR", global = true)]
    root: Option<PathBuf>,

    /// File to which errors are also written
    #[arg(long, value_name = "FILE", global = true)]
    log: Option<PathBuf>,

    /// Format of that file: text or json
    #[arg(long, value_name = "FORMAT", global = true, default_value = "text")]
    log_format: log::Format,

    /// Take linux.cgroupsPath as SLICE:PREFIX:NAME, and ask systemd for the cgroup
    #[arg(long, global = true)]
    systemd_cgroup: bool,

    /// How the cgroup is made, as crun has it: cgroupfs, systemd (the same as --systemd-cgroup), or disabled
    #[arg(long, value_name = "MANAGER", global = true, default_value = "cgroupfs")]
    cgroup_manager: CgroupManager,

    /// Print more log messages to standard error
    #[arg(long, global = true)]
    debug: bool,

    /// Accepted as other runtimes have it: husk finds out by itself
    #[arg(long, value_name = "BOOL", global = true, hide = true, num_args = 0..=1, default_missing_value = "true")]
    rootless: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum CgroupManager {
    Cgroupfs,
    Systemd,
    Disabled,
}

#[derive(Debug, Subcommand)]
enum OciCommand {
    /// Create a container, whose process waits to be started
    Create(create::Create),
    /// Start the process of a container
    Start(start::Start),
    /// Create, start and delete a container
    Run(create::Run),
    /// Print the state of a container
    State(list::State),
    /// Send the process of a container a signal
    Kill(kill::Kill),
    /// Delete a container
    Delete(delete::Delete),
    /// Execute a process in a container
    Exec(exec::Exec),
    /// List the processes of a container
    Ps(ps::Ps),
    /// List containers
    List(list::List),
    /// Pause a container
    Pause(pause::Pause),
    /// Resume a container
    Resume(pause::Pause),
    /// Change the limits of a container
    Update(update::Update),
    /// Print statistics of a container
    Events(stats::Events),
    /// Print what this runtime supports
    Features(features::Features),
    /// Write a config.json to start from
    Spec(spec::Spec),
    /// Make machines from which containers start without booting
    Warm(warm::Warm),
    /// The process of a container on the host.
    #[command(hide = true)]
    Supervise(supervise::Supervise),
    /// Transfers the streams of a process in a container.
    #[command(hide = true)]
    Attend(exec::Attend),
}

impl Flags {
    fn root(&self) -> Result<Root> {
        Root::new(self.root.clone())
    }

    /// Whether systemd makes cgroups.
    fn uses_systemd(&self) -> bool {
        self.systemd_cgroup || self.cgroup_manager == CgroupManager::Systemd
    }

    /// Whether containers are to have no cgroups of their own.
    fn uses_no_cgroups(&self) -> bool {
        self.cgroup_manager == CgroupManager::Disabled
    }
}

impl Oci {
    /// How often `--verbose` is meant by `--debug`.
    pub fn verbosity(&self) -> u8 {
        2 * u8::from(self.flags.debug)
    }

    /// Executes the command.
    pub fn run(self) -> Result<Exit> {
        crate::sys::process::keep_descriptors();
        let flags = self.flags;
        let done = |result: Result<()>| result.map(|()| Exit::Success);
        let result = match self.command {
            OciCommand::Create(create) => done(create.run(&flags)),
            OciCommand::Start(start) => done(start.run(&flags)),
            OciCommand::Run(run) => run.run(&flags),
            OciCommand::State(state) => done(state.run(&flags)),
            OciCommand::Kill(kill) => done(kill.run(&flags)),
            OciCommand::Delete(delete) => done(delete.run(&flags)),
            OciCommand::Exec(exec) => exec.run(&flags),
            OciCommand::Ps(ps) => done(ps.run(&flags)),
            OciCommand::List(list) => done(list.run(&flags)),
            OciCommand::Pause(pause) => done(pause.pause(&flags)),
            OciCommand::Resume(pause) => done(pause.resume(&flags)),
            OciCommand::Update(update) => done(update.run(&flags)),
            OciCommand::Events(events) => done(events.run(&flags)),
            OciCommand::Features(features) => done(features.run()),
            OciCommand::Spec(spec) => done(spec.run()),
            OciCommand::Warm(warm) => done(warm.run()),
            // These report to the process that has started them.
            OciCommand::Supervise(supervise) => return supervise.run(&flags),
            OciCommand::Attend(attend) => return attend.run(),
        };
        result.inspect_err(|error| log::write(&flags, error))
    }
}
