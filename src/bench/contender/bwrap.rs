//! bubblewrap: namespaces only.

use anyhow::{Context, Result};

use super::super::report::{self, Isolation};
use super::program::Program;
use super::setup::{self, LimitScope};
use super::{Contender, ENVIRONMENT, Fixture, Job, Launch, SCRATCH, command, example_job, network, strings, work_dir};
use crate::sys;

/// bubblewrap.
pub struct Bwrap(Program);

const NAME: &str = "bwrap";

impl Bwrap {
    /// Detects it.
    pub fn find() -> Bwrap {
        Bwrap(Program::find(NAME, &["--version"], "sudo apt-get install bubblewrap"))
    }
}

fn command_line(root: &str, can_change: bool, scratch: Option<&str>, job: &Job) -> Vec<String> {
    let mut line = strings(&["bwrap", "--unshare-all"]);
    if job.port.is_some() {
        line.extend(strings(&["--share-net"]));
    }
    line.extend(strings(&["--die-with-parent", "--uid", "0", "--gid", "0"]));
    line.extend(strings(&[if can_change { "--bind" } else { "--ro-bind" }, root, "/"]));
    line.extend(strings(&["--proc", "/proc", "--dev", "/dev", "--ro-bind", "/sys", "/sys", "--tmpfs", "/tmp"]));
    line.extend(scratch.into_iter().flat_map(|scratch| strings(&["--bind", scratch, SCRATCH])));
    line.push("--clearenv".to_owned());
    line.extend(ENVIRONMENT.iter().flat_map(|(name, value)| strings(&["--setenv", name, value])));
    line.extend(strings(&["--chdir", "/", "--"]));
    line.extend(job.command.iter().cloned());
    line
}

impl Contender for Bwrap {
    fn name(&self) -> &str {
        NAME
    }

    fn isolation(&self) -> Isolation {
        Isolation::Container
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        let notes = self.unenforced_limits(fixture).into_iter().chain(setup::root_note()).collect();
        self.0.describe(NAME, Isolation::Container, command_line("ROOT", super::is_root(), None, &example_job()), notes)
    }

    fn prepare(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        let dir = fixture.instance_dir(NAME, job)?;
        let root = setup::root(fixture, &dir)?.display().to_string();
        let scratch = setup::scratch(job, &dir)?.map(|scratch| scratch.display().to_string());
        let cgroup = LimitScope::Container.cgroup(fixture, NAME, job);
        let mut command = command(&command_line(&root, super::is_root(), scratch.as_deref(), job))?;
        let procs_files = setup::procs_files(cgroup.as_ref())?;
        sys::process::begin_in(&mut command, procs_files, None).context("join the control groups")?;
        let clean_up = move || cgroup.map_or(Ok(()), |cgroup| cgroup.remove()).and_then(|()| work_dir::remove(&dir));
        Ok(Launch {
            command,
            passes_exit_code: true,
            address: job.port.map(network::loopback),
            clean_up: Some(Box::new(clean_up)),
        })
    }

    fn unenforced_limits(&self, fixture: &Fixture) -> Option<String> {
        LimitScope::Container.note(fixture)
    }

    fn clean_up(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }
}
