//! The bare host: a copy of the root, without isolation or limits of a machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

use super::super::report::{self, Isolation};
use super::program::Program;
use super::setup::{self, LimitScope};
use super::{Contender, ENVIRONMENT, Fixture, Job, Launch, command, example_job, is_root, network, strings, work_dir};
use crate::resources::programs;
use crate::sys;

/// The bare host.
pub struct Host;

const NAME: &str = "host";
/// Device nodes that programs expect, with major and minor numbers (Linux, devices.txt).
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];

fn root(fixture: &Fixture) -> PathBuf {
    fixture.dir.join(NAME)
}

/// Builds the command line. Users other than root need a user namespace for chroot.
fn command_line(fixture: &Fixture, job: &Job) -> Vec<String> {
    let root = root(fixture).display().to_string();
    let mut line = if is_root() { strings(&["chroot", &root]) } else { strings(&["unshare", "-r", "chroot", &root]) };
    line.extend(job.command.iter().cloned());
    line
}

impl Contender for Host {
    fn name(&self) -> &str {
        NAME
    }

    fn isolation(&self) -> Isolation {
        Isolation::None
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        let mut notes: Vec<String> = LimitScope::Container.note(fixture).into_iter().collect();
        notes.push("its root is a copy of the image's files; writes go directly to the host's disk".into());
        if !is_root() {
            notes.push("its start includes creating a user namespace for chroot (unshare)".into());
        }
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let program = Program { version: Ok(format!("Linux {}", release.trim())) };
        program.describe(NAME, Isolation::None, command_line(fixture, &example_job()), notes)
    }

    /// Copies the root so that writes do not affect other contenders, and mounts what programs expect.
    fn prepare(&mut self, fixture: &Fixture) -> Result<()> {
        let root = root(fixture);
        let (from, to) = (fixture.root.display().to_string(), root.display().to_string());
        programs::run("cp", &["-aT", &from, &to])?;
        if !is_root() {
            return Ok(());
        }
        // No bind mounts of the host's own trees, so that a leftover mount can be removed safely.
        for (kind, at) in [("proc", "proc"), ("sysfs", "sys"), ("tmpfs", "dev"), ("tmpfs", "tmp")] {
            let flags = if at == "sys" { MountFlags::RDONLY } else { MountFlags::empty() };
            mount(kind, root.join(at), kind, flags, None).with_context(|| format!("mount {kind} in {to}"))?;
        }
        for (name, major, minor) in DEVICES {
            let path = root.join("dev").join(name).display().to_string();
            programs::run("mknod", &["-m", "666", &path, "c", &major.to_string(), &minor.to_string()])?;
        }
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        let cgroup = LimitScope::Container.cgroup(fixture, NAME, job);
        let root = root(fixture);
        let procs_files = setup::procs_files(cgroup.as_ref())?;
        let mut command =
            if is_root() { bare(job, &root, procs_files)? } else { command(&command_line(fixture, job))? };
        command.env_clear().envs(ENVIRONMENT);
        let clean_up = move || cgroup.map_or(Ok(()), |cgroup| cgroup.remove());
        Ok(Launch {
            command,
            passes_exit_code: true,
            address: job.port.map(network::loopback),
            clean_up: Some(Box::new(clean_up)),
        })
    }

    fn clean_up(&mut self, fixture: &Fixture) -> Result<()> {
        work_dir::remove(&root(fixture))
    }
}

/// Starts the program directly, without a chroot program in between.
fn bare(job: &Job, root: &Path, procs_files: Vec<fs::File>) -> Result<Command> {
    let mut command = command(&job.command)?;
    sys::process::begin_in(&mut command, procs_files, Some(root)).context("change the root directory")?;
    Ok(command)
}
