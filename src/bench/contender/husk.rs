//! husk itself, with each kernel that there is.

use anyhow::Result;

use super::super::ground::IMAGE;
use super::super::result::{self, Walls};
use super::program::{Missing, Program, kvm};
use super::{Contender, Ground, Job, Launch, command, port, sample, words};
use crate::resources::guest_kernel::Choice;
use crate::resources::programs;

/// husk with one of its kernels.
pub struct Husk {
    name: &'static str,
    /// What `--kernel` calls it.
    kernel: &'static str,
    program: Program,
}

/// The names of the two, and those of their kernels, the usual one first.
const KERNELS: [(&str, &str, Choice); 2] =
    [("husk", "micro", Choice::Made("micro")), ("husk-stock", "stock", Choice::Made("stock"))];

impl Husk {
    /// Looks for kernels, and for KVM.
    pub fn find() -> Vec<Husk> {
        KERNELS.iter().map(|(name, kernel, choice)| Husk { name, kernel, program: program(kernel, choice) }).collect()
    }

    fn command_line(&self, ground: &Ground, job: &Job) -> Vec<String> {
        let (husk, cpus) = (ground.husk.display().to_string(), ground.limits.cpus.to_string());
        let memory = format!("{}M", ground.limits.memory_mib);
        let mut line = words(&[&husk, "run", "--kernel", self.kernel, "--cpus", &cpus, "--memory", &memory]);
        match job.port {
            Some(port) => line.extend(words(&["--publish", &format!("127.0.0.1:{port}:{port}")])),
            None => line.extend(words(&["--network", "none"])),
        }
        if let Some(size_mib) = job.scratch_mib {
            line.extend(words(&["--scratch", &format!("{size_mib}M")]));
        }
        line.extend(words(&[IMAGE, "--"]));
        line.extend(job.command.iter().cloned());
        line
    }
}

fn program(name: &str, choice: &Choice) -> Program {
    let missing =
        |install: String| move |error: anyhow::Error| Missing { why: format!("{error:#}"), install: Some(install) };
    let needed = || -> Result<(), Missing> {
        choice.find().map(drop).map_err(missing(format!("scripts/kernel {name}")))?;
        kvm()
    };
    Program { version: needed().map(|()| env!("CARGO_PKG_VERSION").to_owned()) }
}

impl Contender for Husk {
    fn name(&self) -> &str {
        self.name
    }

    fn walls(&self) -> Walls {
        Walls::Machine
    }

    fn about(&self, ground: &Ground) -> result::Contender {
        let notes = vec!["its root's files are compressed, and what is written there goes to the guest's memory, or to its scratch disk where it has one".to_owned()];
        let mut about = self.program.about(self.name, Walls::Machine, self.command_line(ground, &sample()), notes);
        about.kernel = about.absent.is_none().then(|| self.kernel.to_owned());
        about
    }

    fn prepare(&mut self, _ground: &Ground) -> Result<()> {
        Ok(())
    }

    fn launch(&self, ground: &Ground, job: &Job) -> Result<Launch> {
        let mut command = command(&self.command_line(ground, job))?;
        command.env("HUSK_DATA", &ground.store);
        Ok(Launch { command, passes_exit_code: true, address: job.port.map(port::on_loopback), clean_up: None })
    }

    /// A machine that was killed is forgotten when machines are listed.
    fn clean_up(&mut self, ground: &Ground) -> Result<()> {
        let husk = ground.husk.to_string_lossy();
        programs::run(&husk, &["ps", "--quiet"])
    }
}
