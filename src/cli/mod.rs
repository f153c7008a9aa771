//! Command-line parsing, with one module per command. Flags become plain data here; nothing is opened.

pub mod argv;
pub mod attach;
pub mod bench;
mod booleans;
pub mod boot;
pub mod commit;
pub mod completions;
mod connect;
pub mod cp;
mod cpus;
pub mod create;
pub mod diff;
pub mod disks;
pub mod doctor;
mod events;
pub mod exec;
mod exists;
pub mod exit;
pub mod export;
mod filter;
pub mod generate;
pub mod groups;
mod healthcheck;
pub mod history;
pub mod images;
mod import;
pub mod import_root;
pub mod inspect;
pub mod kill;
mod labels;
pub mod lifecycle;
pub mod limits;
mod list;
pub mod load;
pub mod logger;
pub mod login;
pub mod logs;
mod machines;
pub mod man;
pub mod merge;
mod mounts;
mod network;
pub mod networks;
mod oci;
pub mod pause;
pub mod port;
pub mod prepare;
mod process;
pub mod prune;
pub mod ps;
pub mod pull;
pub mod push;
mod reach;
pub mod rename;
pub mod restore;
pub mod rm;
pub mod rmi;
pub mod run;
pub mod save;
mod selection;
mod shim;
mod signal;
mod size;
pub mod snapshot;
pub mod start;
pub mod stats;
pub mod stop;
pub mod suspend;
pub mod system;
pub mod tag;
mod time;
mod top;
mod transfer;
pub mod update;
mod usage;
mod volume;
pub mod wait;
pub mod warm;

use std::ffi::OsString;
use std::io::Write;
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{ArgAction, Parser, Subcommand};
use serde::Serialize;

use self::exit::{EXIT_CODES, Exit};
pub use self::usage::report_usage;
use crate::bench::plan::UsageError;
use crate::config::Invalid;
use crate::console::stream_log::Stream;
use crate::foreign;
use crate::state_dir::husk_log;

const EXAMPLES: &str = "\
Examples:
  husk doctor
  husk run ./image.tar echo hello
  husk pull debian:12
  husk boot --kernel vmlinux --initrd initrd.cpio
  husk boot --kernel bzImage --disk root.img --cpus 2 --memory 2G";

/// A lightweight virtual machine monitor (VMM) on KVM, for container images and Linux kernels
#[derive(Debug, Parser)]
#[command(name = "husk", version, propagate_version = true, max_term_width = 100)]
// The last value counts, as with Docker: an alias may have one that the command line replaces.
#[command(args_override_self = true)]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n\n{EXIT_CODES}"))]
pub struct Cli {
    #[command(subcommand)]
    command: Command,

    /// Print more log messages to standard error; repeated, or as -vv and -vvv, even more
    #[arg(long, global = true, display_order = 100, action = ArgAction::Count)]
    verbose: u8,

    /// Print nothing to standard output
    #[arg(long, global = true, hide = true)]
    noout: bool,
}

// Building the options of all commands takes longer than parsing those of one. Their structs have no doc comments, which
// would replace the descriptions here.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
enum Command {
    /// Boot a machine from a kernel, an initrd and disks, with its console on this terminal
    Boot(Box<boot::Boot>),
    /// Run a command from an image in a new machine
    Run(Box<run::Run>),
    /// Create a machine without starting it
    Create(Box<create::Create>),
    /// List machines
    Ps(ps::Ps),
    /// List the published ports of a machine
    Port(port::Port),
    /// Fetch the logs of a machine
    Logs(logs::Logs),
    /// Execute a command in a running machine
    Exec(exec::Exec),
    /// Copy files between a machine and the local filesystem
    Cp(cp::Cp),
    /// List what a machine has changed in its root filesystem
    Diff(diff::Diff),
    /// Make an image of a machine and what it has changed
    Commit(commit::Commit),
    /// Write the root filesystem of a machine as a tar archive
    Export(export::Export),
    /// Attach this terminal to a machine running in the background
    Attach(attach::Attach),
    /// Display resource usage statistics
    Stats(stats::StatsArgs),
    /// Display the running processes of a machine
    Top(top::Top),
    /// Check the health of machines
    Healthcheck(healthcheck::HealthcheckArgs),
    /// Print what happens to machines, images and networks
    Events(events::Events),
    /// Change the resource limits of running machines
    Update(update::UpdateArgs),
    /// Stop running machines
    Stop(stop::Stop),
    /// Start stopped machines
    Start(start::Start),
    /// Restart machines
    Restart(start::Restart),
    /// Generate a unit for systemd that runs a machine
    Generate(generate::Generate),
    /// Kill running machines, or send them a signal
    Kill(kill::Kill),
    /// Block until machines stop, then print their exit codes
    Wait(wait::Wait),
    /// Pause running machines
    Pause(pause::Pause),
    /// Resume paused machines
    Unpause(pause::Pause),
    /// Take a snapshot of a running machine
    Snapshot(snapshot::SnapshotArgs),
    /// Make a diff snapshot whole
    Merge(merge::Merge),
    /// Save running machines to disk and stop them, until `husk start`
    Suspend(suspend::Suspend),
    /// Create a machine from a snapshot
    Restore(restore::Restore),
    /// Rename a machine
    Rename(rename::Rename),
    /// Remove stopped machines
    Rm(rm::Rm),
    /// Pull an image from a registry
    Pull(pull::Pull),
    /// Prepare the root filesystem of an image, and print the image ID
    #[command(hide = true)]
    Prepare(prepare::Prepare),
    /// Load an image from an archive or a directory
    Load(load::Load),
    /// Push an image to a registry
    Push(push::Push),
    /// Log in to a registry
    Login(login::Login),
    /// Remove the credentials for a registry
    Logout(login::Logout),
    /// Save images to an archive
    Save(save::Save),
    /// Make an image of a root filesystem
    Import(import_root::ImportRoot),
    /// Show the history of an image
    History(history::History),
    /// Make a snapshot that machines for an image start from, without booting
    Warm(Box<warm::Warm>),
    /// List images
    Images(images::Images),
    /// Display detailed information about machines or images
    Inspect(inspect::Inspect),
    /// Give an image another name
    Tag(tag::Tag),
    /// Remove images
    Rmi(rmi::Rmi),
    /// Remove unused data: untagged images, outdated warm images, incomplete pulls, and optionally layers
    Prune(prune::Prune),
    /// List or remove persistent disks
    Disks(disks::Disks),
    /// Manage named volumes
    Volume(volume::VolumeArgs),
    /// Manage networks
    Network(networks::Networks),
    /// Run containers of container engines in machines, as an OCI runtime
    Oci(Box<oci::Oci>),
    /// A shim of containerd, which calls husk containerd-shim-husk-v2.
    #[command(hide = true)]
    Shim(shim::Shim),
    /// Benchmark machines against containers and the bare host
    Bench(bench::Bench),
    /// Check whether this host can run machines, and suggest fixes
    Doctor(doctor::Doctor),
    /// Show the disk usage, or remove unused data
    System(system::System),
    /// Show what is known about this husk and its host
    Info(system::Info),
    /// Show the version
    Version(system::Version),
    /// Docker's group of commands for images
    #[command(hide = true)]
    Image(Box<groups::Image>),
    /// Docker's group of commands for containers
    #[command(hide = true)]
    Container(Box<groups::Container>),
    /// Generate a shell completion script
    #[command(alias = "completion")]
    Completions(completions::Completions),
    /// Print names for a shell's completion
    #[command(name = "__complete", hide = true)]
    Names(completions::Names),
    /// Generate manual pages
    Man(man::Man),
}

impl Cli {
    /// Parses `words`, which follow the program's name.
    pub fn parse_words(words: &[OsString]) -> Result<Cli, clap::Error> {
        Cli::try_parse_from([OsString::from("husk")].iter().chain(booleans::without_values(words).iter()))
    }

    /// Executes the command on the calling thread. Must be called once per process, since it sets up the log. `started`
    /// is when the process started.
    pub fn run(mut self, started: Instant) -> Result<Exit> {
        let more = match &mut self.command {
            Command::Run(run) => run.take_verbosity(),
            Command::Create(create) => create.take_verbosity(),
            Command::Oci(oci) => oci.verbosity(),
            Command::Shim(shim) => shim.verbosity(),
            _ => 0,
        };
        logger::init(self.verbose.saturating_add(more));
        set_panic_hook();
        if self.noout {
            print_nothing()?;
        }
        match self.command {
            Command::Boot(boot) => boot.run(started),
            Command::Run(run) => Ok(run.run(started)),
            Command::Create(create) => Ok(create.run(started)),
            Command::Ps(ps) => ps.run(),
            Command::Port(port) => port.run(),
            Command::Logs(logs) => logs.run(),
            Command::Exec(exec) => Ok(exec.run()),
            Command::Cp(cp) => cp.run(),
            Command::Diff(diff) => diff.run(),
            Command::Commit(commit) => commit.run(),
            Command::Export(export) => export.run(),
            Command::Attach(attach) => attach.run(),
            Command::Stats(stats) => stats.run(),
            Command::Top(top) => top.run(),
            Command::Healthcheck(healthcheck) => healthcheck.run(),
            Command::Events(events) => events.run(),
            Command::Update(update) => update.run(),
            Command::Stop(stop) => stop.run(),
            Command::Start(start) => start.run(),
            Command::Restart(restart) => restart.run(),
            Command::Generate(generate) => generate.run(),
            Command::Kill(kill) => kill.run(),
            Command::Wait(wait) => wait.run(),
            Command::Pause(pause) => pause.pause(),
            Command::Unpause(pause) => pause.unpause(),
            Command::Snapshot(snapshot) => snapshot.run(),
            Command::Merge(merge) => merge.run(),
            Command::Suspend(suspend) => suspend.run(),
            Command::Restore(restore) => restore.run(started),
            Command::Rename(rename) => rename.run(),
            Command::Rm(rm) => rm.run(),
            Command::Pull(pull) => pull.run(),
            Command::Prepare(prepare) => prepare.run(),
            Command::Load(load) => load.run(),
            Command::Push(push) => push.run(),
            Command::Login(login) => login.run(),
            Command::Logout(logout) => logout.run(),
            Command::Save(save) => save.run(),
            Command::Import(import) => import.run(),
            Command::History(history) => history.run(),
            Command::Warm(warm) => warm.run(started),
            Command::Images(images) => images.run(),
            Command::Inspect(inspect) => inspect.run(),
            Command::Tag(tag) => tag.run(),
            Command::Rmi(rmi) => rmi.run(),
            Command::Prune(prune) => prune.run(),
            Command::Disks(disks) => disks.run(),
            Command::Volume(volume) => volume.run(),
            Command::Network(networks) => networks.run(),
            Command::Oci(oci) => oci.run(),
            Command::Shim(shim) => shim.run(),
            Command::Bench(bench) => bench.run(),
            Command::Doctor(doctor) => doctor.run(),
            Command::System(system) => system.run(),
            Command::Info(info) => info.run(),
            Command::Version(version) => version.run(),
            Command::Image(image) => image.run(),
            Command::Container(container) => container.run(),
            Command::Completions(completions) => completions.run(),
            Command::Names(names) => names.run(),
            Command::Man(man) => man.run(),
        }
    }
}

/// Makes standard output end nowhere.
fn print_nothing() -> Result<()> {
    let nowhere = std::fs::File::options().write(true).open("/dev/null").context("open /dev/null")?;
    rustix::stdio::dup2_stdout(nowhere).context("redirect standard output")
}

/// Makes a panic, on any thread, end the process with a one-line message and exit code 1.
fn set_panic_hook() {
    std::panic::set_hook(Box::new(|fault| {
        print_error(&format!("internal error, please report it: {fault}"));
        std::process::exit(i32::from(Exit::Failure.code()));
    }));
}

/// Prints an error and its causes on one line. Distinguishes usage errors from failures.
pub fn report(error: &anyhow::Error) -> Exit {
    print_error(&format!("{error:#}"));
    exit_of(error)
}

fn exit_of(error: &anyhow::Error) -> Exit {
    if error.chain().any(|cause| cause.is::<Invalid>() || cause.is::<UsageError>()) {
        Exit::Usage
    } else {
        Exit::Failure
    }
}

fn print_error(text: &str) {
    print_stderr(&format!("husk: {}\n", foreign::line(&foreign::one_line(text))));
}

/// Prints sanitized text to standard error.
fn print_stderr(text: &str) {
    let text = foreign::lines(text);
    // There is nowhere else to report that it is closed or on a full disk.
    let _ = std::io::stderr().write_all(text.as_bytes());
    husk_log::keep_small();
}

/// Prints sanitized text to standard output.
fn print(text: &str) -> Result<()> {
    print_raw(&foreign::lines(text)).map(drop)
}

/// Prints `value`, which contains `what`, as JSON.
fn print_json(value: &impl Serialize, what: &str) -> Result<()> {
    let json = foreign::json(value).with_context(|| format!("print {what}"))?;
    print_raw(&(json + "\n")).map(drop)
}

/// Prints text that may contain terminal control sequences, which the caller has otherwise sanitized, to standard
/// output. Returns false if the reader has closed it.
fn print_raw(text: &str) -> Result<bool> {
    crate::request::attach::write(Stream::Output, text.as_bytes())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_definition_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_last_value_of_a_flag_counts() {
        let words =
            ["husk", "run", "--name=a", "-m", "1G", "--rm", "--rm", "-e", "A=1", "--name", "b", "-e", "B=2", "x"];
        let Command::Run(run) = Cli::try_parse_from(words).unwrap().command else { unreachable!() };
        let text = format!("{run:?}");
        assert!(text.contains("\"b\"") && !text.contains("\"a\""), "{text}");
        assert!(text.contains("A=1") && text.contains("B=2"), "{text}");
    }

    #[test]
    fn a_command_has_one_description() {
        let listed = Cli::command();
        let mut built = listed.clone();
        built.build();
        for command in listed.get_subcommands() {
            let name = command.get_name();
            let description = |command: &clap::Command| {
                let text = command.get_long_about().or(command.get_about());
                text.map(ToString::to_string)
            };
            assert_eq!(description(command), description(built.find_subcommand(name).unwrap()), "{name}");
            assert!(description(command).is_some(), "{name}");
        }
    }

    #[test]
    fn an_invalid_configuration_is_a_usage_error_in_any_context() {
        let wrong = anyhow::Error::from(Invalid::NoKernel).context("read machine.json");
        assert_eq!(exit_of(&wrong), Exit::Usage);
        assert_eq!(exit_of(&anyhow::anyhow!("no such file").context("open disk x")), Exit::Failure);
    }
}
