//! husk itself, with each of its kernels.

use anyhow::Result;

use super::super::fixture::IMAGE;
use super::super::report::{self, Isolation, Unavailable};
use super::program::{Program, kvm};
use super::{Contender, Fixture, Job, Launch, command, example_job, network, strings};
use crate::resources::guest_kernel::Choice;
use crate::resources::programs;

/// husk with one of its kernels.
pub struct Husk {
    name: &'static str,
    /// The value of `--kernel`.
    kernel: &'static str,
    program: Program,
}

/// The contender names and their kernels, the default kernel first.
const KERNELS: [(&str, &str, Choice); 2] =
    [("husk", "micro", Choice::Made("micro")), ("husk-stock", "stock", Choice::Made("stock"))];

impl Husk {
    /// Detects the kernels and KVM.
    pub fn find() -> Vec<Husk> {
        KERNELS.iter().map(|(name, kernel, choice)| Husk { name, kernel, program: program(kernel, choice) }).collect()
    }

    fn command_line(&self, fixture: &Fixture, job: &Job) -> Vec<String> {
        let (husk, cpus) = (fixture.husk.display().to_string(), fixture.limits.cpus.to_string());
        let memory = format!("{}M", fixture.limits.memory_mib);
        let mut line = strings(&[&husk, "run", "--kernel", self.kernel, "--cpus", &cpus, "--memory", &memory]);
        match job.port {
            Some(port) => line.extend(strings(&["--publish", &format!("127.0.0.1:{port}:{port}")])),
            None => line.extend(strings(&["--network", "none"])),
        }
        if let Some(size_mib) = job.scratch_mib {
            line.extend(strings(&["--scratch", &format!("{size_mib}M")]));
        }
        line.extend(strings(&[IMAGE, "--"]));
        line.extend(job.command.iter().cloned());
        line
    }
}

fn program(name: &str, choice: &Choice) -> Program {
    let missing = |install: String| {
        move |error: anyhow::Error| Unavailable { reason: format!("{error:#}"), install: Some(install) }
    };
    let needed = || -> Result<(), Unavailable> {
        choice.find().map(drop).map_err(missing(format!("scripts/kernel {name}")))?;
        kvm()
    };
    Program { version: needed().map(|()| env!("CARGO_PKG_VERSION").to_owned()) }
}

impl Contender for Husk {
    fn name(&self) -> &str {
        self.name
    }

    fn isolation(&self) -> Isolation {
        Isolation::Machine
    }

    fn describe(&self, fixture: &Fixture) -> report::ContenderInfo {
        let notes = vec![
            "its root is compressed; writes to it go to guest memory, or to the scratch disk if there is one"
                .to_owned(),
        ];
        let mut info =
            self.program.describe(self.name, Isolation::Machine, self.command_line(fixture, &example_job()), notes);
        info.kernel = info.unavailable.is_none().then(|| self.kernel.to_owned());
        info
    }

    fn prepare(&mut self, _fixture: &Fixture) -> Result<()> {
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        let mut command = command(&self.command_line(fixture, job))?;
        command.env("HUSK_DATA", &fixture.store);
        Ok(Launch { command, passes_exit_code: true, address: job.port.map(network::loopback), clean_up: None })
    }

    /// `husk ps` removes the state of killed machines.
    fn clean_up(&mut self, fixture: &Fixture) -> Result<()> {
        let husk = fixture.husk.to_string_lossy();
        programs::run(&husk, &["ps", "--quiet"])
    }
}
