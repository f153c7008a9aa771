//! bubblewrap: namespaces alone.

use anyhow::{Context, Result};

use super::super::result::{self, Walls};
use super::program::Program;
use super::share::{self, Held};
use super::{Contender, ENVIRONMENT, Ground, Job, Launch, SCRATCH, command, ground, port, sample, words};
use crate::sys;

/// bubblewrap.
pub struct Bwrap(Program);

const NAME: &str = "bwrap";

impl Bwrap {
    /// Looks for it.
    pub fn find() -> Bwrap {
        Bwrap(Program::find(NAME, &["--version"], "sudo apt-get install bubblewrap"))
    }
}

fn command_line(root: &str, can_change: bool, scratch: Option<&str>, job: &Job) -> Vec<String> {
    let mut line = words(&["bwrap", "--unshare-all"]);
    if job.port.is_some() {
        line.extend(words(&["--share-net"]));
    }
    line.extend(words(&["--die-with-parent", "--uid", "0", "--gid", "0"]));
    line.extend(words(&[if can_change { "--bind" } else { "--ro-bind" }, root, "/"]));
    line.extend(words(&["--proc", "/proc", "--dev", "/dev", "--ro-bind", "/sys", "/sys", "--tmpfs", "/tmp"]));
    line.extend(scratch.into_iter().flat_map(|scratch| words(&["--bind", scratch, SCRATCH])));
    line.push("--clearenv".to_owned());
    line.extend(ENVIRONMENT.iter().flat_map(|(name, value)| words(&["--setenv", name, value])));
    line.extend(words(&["--chdir", "/", "--"]));
    line.extend(job.command.iter().cloned());
    line
}

impl Contender for Bwrap {
    fn name(&self) -> &str {
        NAME
    }

    fn walls(&self) -> Walls {
        Walls::Container
    }

    fn about(&self, ground: &Ground) -> result::Contender {
        let notes = self.limits_not_applied(ground).into_iter().chain(share::root_note()).collect();
        self.0.about(NAME, Walls::Container, command_line("ROOT", super::is_root(), None, &sample()), notes)
    }

    fn prepare(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }

    fn launch(&self, ground: &Ground, job: &Job) -> Result<Launch> {
        let folder = ground.instance_folder(NAME, job)?;
        let root = share::root(ground, &folder)?.display().to_string();
        let scratch = share::scratch(job, &folder)?.map(|scratch| scratch.display().to_string());
        let pen = Held::Container.pen(ground, NAME, job);
        let mut command = command(&command_line(&root, super::is_root(), scratch.as_deref(), job))?;
        let doors = share::doors(pen.as_ref())?;
        sys::process::begin_in(&mut command, doors, None).context("enter its control groups")?;
        let clean_up = move || pen.map_or(Ok(()), |pen| pen.remove()).and_then(|()| ground::clear(&folder));
        Ok(Launch {
            command,
            passes_exit_code: true,
            address: job.port.map(port::on_loopback),
            clean_up: Some(Box::new(clean_up)),
        })
    }

    fn limits_not_applied(&self, ground: &Ground) -> Option<String> {
        Held::Container.note(ground)
    }

    fn clean_up(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }
}
