//! `husk image` and `husk container`: Docker's groups, of commands that husk has without them.

use anyhow::Result;
use clap::{Args, Subcommand};

use super::exit::Exit;
use super::{
    attach, commit, cp, diff, exec, exists, export, history, images, import_root, inspect, kill, load, logs, pause,
    port, prune, ps, pull, push,
};
use super::{rename, rm, rmi, save, start, stats, stop, tag, top, update, wait};

#[derive(Debug, Args)]
pub(super) struct Image {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// List images
    #[command(alias = "list")]
    Ls(images::Images),
    /// Remove images
    #[command(alias = "remove")]
    Rm(rmi::Rmi),
    /// Display detailed information about images
    Inspect(inspect::Inspect),
    /// Pull an image from a registry
    Pull(pull::Pull),
    /// Push an image to a registry
    Push(push::Push),
    /// Give an image another name
    Tag(tag::Tag),
    /// Save images to an archive
    Save(save::Save),
    /// Load an image from an archive or a directory
    Load(load::Load),
    /// Make an image of a root filesystem
    Import(import_root::ImportRoot),
    /// Show the history of an image
    History(history::History),
    /// Whether there is an image by this name, as the exit code: 0 or 1
    Exists(exists::Exists),
    /// Remove unused data
    Prune(prune::Prune),
}

impl Image {
    /// Executes the command.
    pub fn run(self) -> Result<Exit> {
        match self.command {
            ImageCommand::Ls(images) => images.run(),
            ImageCommand::Rm(rmi) => rmi.run(),
            ImageCommand::Inspect(inspect) => inspect.images().run(),
            ImageCommand::Pull(pull) => pull.run(),
            ImageCommand::Push(push) => push.run(),
            ImageCommand::Tag(tag) => tag.run(),
            ImageCommand::Save(save) => save.run(),
            ImageCommand::Load(load) => load.run(),
            ImageCommand::Import(import) => import.run(),
            ImageCommand::History(history) => history.run(),
            ImageCommand::Exists(exists) => exists.image(),
            ImageCommand::Prune(prune) => prune.run(),
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct Container {
    #[command(subcommand)]
    command: ContainerCommand,
}

#[derive(Debug, Subcommand)]
enum ContainerCommand {
    /// List machines
    #[command(alias = "list", alias = "ps")]
    Ls(ps::Ps),
    /// Remove stopped machines
    Rm(rm::Rm),
    /// Whether there is a machine by this name, as the exit code: 0 or 1
    Exists(exists::Exists),
    /// Remove all stopped machines
    Prune(rm::Prune),
    /// Execute a command in a running machine
    Exec(exec::Exec),
    /// Attach this terminal to a machine running in the background
    Attach(attach::Attach),
    /// Copy files between a machine and the local filesystem
    Cp(cp::Cp),
    /// List what a machine has changed
    Diff(diff::Diff),
    /// Write the files of a machine to an archive
    Export(export::Export),
    /// Make an image of a machine
    Commit(commit::Commit),
    /// Display the running processes of a machine
    Top(top::Top),
    /// List the published ports of a machine
    Port(port::Port),
    /// Change the resource limits of running machines
    Update(update::UpdateArgs),
    /// Display detailed information about machines
    Inspect(inspect::Inspect),
    /// Fetch the logs of a machine
    Logs(logs::Logs),
    /// Display resource usage statistics
    Stats(stats::StatsArgs),
    /// Stop running machines
    Stop(stop::Stop),
    /// Start stopped machines
    Start(start::Start),
    /// Restart machines
    Restart(start::Restart),
    /// Kill running machines, or send them a signal
    Kill(kill::Kill),
    /// Block until machines stop, then print their exit codes
    Wait(wait::Wait),
    /// Pause running machines
    Pause(pause::Pause),
    /// Resume paused machines
    Unpause(pause::Pause),
    /// Rename a machine
    Rename(rename::Rename),
}

impl Container {
    /// Executes the command.
    pub fn run(self) -> Result<Exit> {
        match self.command {
            ContainerCommand::Ls(ps) => ps.run(),
            ContainerCommand::Rm(rm) => rm.run(),
            ContainerCommand::Exists(exists) => exists.machine(),
            ContainerCommand::Prune(prune) => prune.run(),
            ContainerCommand::Exec(exec) => Ok(exec.run()),
            ContainerCommand::Attach(attach) => attach.run(),
            ContainerCommand::Cp(cp) => cp.run(),
            ContainerCommand::Diff(diff) => diff.run(),
            ContainerCommand::Export(export) => export.run(),
            ContainerCommand::Commit(commit) => commit.run(),
            ContainerCommand::Top(top) => top.run(),
            ContainerCommand::Port(port) => port.run(),
            ContainerCommand::Update(update) => update.run(),
            ContainerCommand::Inspect(inspect) => inspect.machines().run(),
            ContainerCommand::Logs(logs) => logs.run(),
            ContainerCommand::Stats(stats) => stats.run(),
            ContainerCommand::Stop(stop) => stop.run(),
            ContainerCommand::Start(start) => start.run(),
            ContainerCommand::Restart(restart) => restart.run(),
            ContainerCommand::Kill(kill) => kill.run(),
            ContainerCommand::Wait(wait) => wait.run(),
            ContainerCommand::Pause(pause) => pause.pause(),
            ContainerCommand::Unpause(pause) => pause.unpause(),
            ContainerCommand::Rename(rename) => rename.run(),
        }
    }
}
