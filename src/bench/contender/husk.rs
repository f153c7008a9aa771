//! husk itself, with each of its kernels, and starting from a warm image.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::super::fixture::IMAGE;
use super::super::report::{self, Isolation, Unavailable};
use super::program::{Program, kvm};
use super::{Contender, Fixture, Job, Launch, Unsupported, WORKLOAD, command, example_job, network, strings};
use crate::resources::guest_kernel::Choice;
use crate::resources::programs;

/// husk with one of its kernels.
pub struct Husk {
    name: &'static str,
    /// The value of `--kernel`.
    kernel: &'static str,
    start: Start,
    program: Program,
}

/// How its machines start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Boot,
    /// From the image that `husk warm` has made.
    Warm {
        /// Whether there is one of a machine with a network, too.
        has_network: bool,
    },
}

/// The contender names and their kernels, the default kernel first.
const KINDS: [(&str, &str, Start); 3] = [
    ("husk", "micro", Start::Boot),
    ("husk-stock", "stock", Start::Boot),
    ("husk-warm", "micro", Start::Warm { has_network: false }),
];

impl Husk {
    /// Detects the kernels and KVM.
    pub fn find() -> Vec<Husk> {
        KINDS
            .iter()
            .map(|(name, kernel, start)| Husk { name, kernel, start: *start, program: program(kernel) })
            .collect()
    }

    /// What determines the machine, which a warm image fits only if it is the same.
    fn machine(&self, fixture: &Fixture, has_network: bool) -> Vec<String> {
        let (cpus, memory) = (fixture.limits.cpus.to_string(), format!("{}M", fixture.limits.memory_mib));
        let mut words = strings(&["--kernel", self.kernel, "--cpus", &cpus, "--memory", &memory]);
        if !has_network {
            words.extend(strings(&["--network", "none"]));
        }
        words
    }

    fn command_line(&self, fixture: &Fixture, job: &Job) -> Vec<String> {
        let mut line = strings(&[&fixture.husk.to_string_lossy(), "run"]);
        line.extend(self.machine(fixture, job.port.is_some()));
        if self.start == Start::Boot {
            line.extend(strings(&["--no-warm"]));
        }
        if let Some(port) = job.port {
            line.extend(strings(&["--publish", &format!("127.0.0.1:{port}:{port}")]));
        }
        if let Some(size_mib) = job.scratch_mib {
            line.extend(strings(&["--scratch", &format!("{size_mib}M")]));
        }
        line.extend(strings(&[IMAGE, "--"]));
        line.extend(job.command.iter().cloned());
        line
    }

    /// Makes the warm image of such a machine.
    fn warm(&self, fixture: &Fixture, has_network: bool) -> Result<()> {
        let mut warm = Command::new(&fixture.husk);
        warm.arg("warm").args(self.machine(fixture, has_network)).args([IMAGE, WORKLOAD]);
        warm.env("HUSK_DATA", &fixture.store);
        let output = warm.stdin(Stdio::null()).output().context("run husk warm")?;
        let words = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "husk warm: {}", words.trim());
        Ok(())
    }
}

fn program(kernel: &'static str) -> Program {
    let missing = |install: String| {
        move |error: anyhow::Error| Unavailable { reason: format!("{error:#}"), install: Some(install) }
    };
    let needed = || -> Result<(), Unavailable> {
        Choice::Made(kernel).find().map(drop).map_err(missing(format!("scripts/kernel {kernel}")))?;
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
        let mut notes = vec![
            "its root is compressed; writes to it go to guest memory, or to the scratch disk if there is one"
                .to_owned(),
        ];
        if self.start != Start::Boot {
            notes.push(
                "its kernel was booted once, by `husk warm`: each machine continues a copy of that one".to_owned(),
            );
        }
        let mut info =
            self.program.describe(self.name, Isolation::Machine, self.command_line(fixture, &example_job()), notes);
        info.kernel = info.unavailable.is_none().then(|| self.kernel.to_owned());
        info
    }

    fn prepare(&mut self, fixture: &Fixture) -> Result<()> {
        if self.start == Start::Boot {
            return Ok(());
        }
        self.warm(fixture, false)?;
        let networked = self.warm(fixture, true).inspect_err(|error| log::info!("{}: {error:#}", self.name));
        self.start = Start::Warm { has_network: networked.is_ok() };
        Ok(())
    }

    fn launch(&self, fixture: &Fixture, job: &Job) -> Result<Launch> {
        if let Start::Warm { has_network } = self.start {
            let refused = |reason: &str| Err(Unsupported(reason.to_owned()).into());
            if job.port.is_some() && !has_network {
                return refused("there is no warm image of a machine with a network");
            }
        }
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

#[cfg(test)]
mod tests {
    use super::super::tests::{fixture, job};
    use super::*;

    fn warm(has_network: bool) -> Husk {
        Husk { name: "husk-warm", kernel: "micro", start: Start::Warm { has_network }, program: program("micro") }
    }

    #[test]
    fn only_one_kind_starts_from_a_warm_image() {
        let job = Job { scratch_mib: None, ..job(&["echo"]) };
        let lines = Husk::find().into_iter().map(|husk| (husk.name, husk.command_line(&fixture(), &job).join(" ")));
        let warm: Vec<&str> = lines.filter(|(_, line)| !line.contains(" --no-warm ")).map(|(name, _)| name).collect();
        assert_eq!(warm, ["husk-warm"]);
    }

    #[test]
    fn what_cannot_start_from_a_warm_image_is_skipped_instead_of_booted() {
        let with_port = Job { scratch_mib: None, port: Some(8000), ..job(&["echo"]) };
        let reason = |husk: Husk, job: &Job| {
            let error = husk.launch(&fixture(), job).err()?;
            assert!(error.is::<Unsupported>());
            Some(error.to_string())
        };
        assert!(reason(warm(false), &with_port).unwrap().contains("no warm image"));
        assert_eq!(reason(warm(true), &with_port), None);
    }

    #[test]
    fn a_run_has_the_machine_of_its_warm_image() {
        for has_network in [false, true] {
            let husk = warm(true);
            let port = has_network.then_some(8000);
            let line = husk.command_line(&fixture(), &Job { scratch_mib: None, port, ..job(&["echo"]) });
            let machine = husk.machine(&fixture(), has_network);
            assert!(line.windows(machine.len()).any(|part| part == machine), "{line:?}");
            assert_eq!(line.contains(&"none".to_owned()), !has_network);
        }
    }
}
