//! `husk exec`: runs an additional process in a running machine.

use std::ffi::OsString;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use husk_protocol::{Process, ToHost, WindowSize};

use super::exit::Exit;
use super::process::ProcessFlags;
use crate::console::terminal;
use crate::guest::exec::{self, End};
use crate::image::ImageProcess;
use crate::state_dir::events::Event;
use crate::state_dir::record::{Inherited, State};
use crate::state_dir::{self, MachineEntry, StateDir};
use crate::supervisor;

const EXAMPLES: &str = "\
Examples:
  husk exec web ps                  (with the environment, working directory and user of the machine)
  husk exec -it web sh
  husk exec -d web sh -c 'while :; do tidy; sleep 60; done'
  tar c . | husk exec -i web tar x -C /srv

Exit codes:
  125    husk or the machine failed before the command started
  126    the command cannot be invoked
  127    the command cannot be found
  128+n  the command was terminated by signal n
  Any other code is the exit code of the command.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, override_usage = "husk exec [OPTIONS] MACHINE COMMAND [ARG]...")]
pub(super) struct Exec {
    /// Name or ID of the machine, followed by the command and its arguments
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, value_names = ["MACHINE", "COMMAND"])]
    words: Vec<OsString>,

    /// Run the command in the background and discard its output
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,

    #[arg(long, hide = true, value_parser = no_detach_keys)]
    detach_keys: Option<String>,

    #[command(flatten)]
    process: ProcessFlags,
}

/// A command ends with its connection.
fn no_detach_keys(_: &str) -> Result<String, String> {
    Err("a command of `husk exec` ends with it: use `husk exec -d` for one that goes on".to_owned())
}

impl Exec {
    /// Runs the command and waits until it has exited.
    pub fn run(self) -> Exit {
        match self.try_run() {
            Ok(exit) => exit,
            Err(error) => {
                super::report(&error);
                Exit::NotRun
            }
        }
    }

    fn try_run(mut self) -> Result<Exit> {
        self.process.mask_values();
        let mut words = std::mem::take(&mut self.words).into_iter();
        let machine = words.next().unwrap_or_default();
        let machine =
            machine.to_str().with_context(|| format!("the machine name {} is not valid UTF-8", machine.display()))?;
        let mut command: Vec<OsString> = words.collect();
        if command.first().is_some_and(|word| word == "--") {
            command.remove(0);
        }
        ensure!(!command.is_empty(), "no command given: add one after the machine");
        self.process.check_terminal()?;
        let state_dir = StateDir::open()?;
        let entry = state_dir.find(machine)?;
        let name = command.iter().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ");
        let process = self.process(inherited(&entry)?, command)?;
        let vsock = entry.file(state_dir::VSOCK);
        let admitted = exec::request_start(&vsock, &process)?;
        let event = |action: String| entry.record.as_ref().map(|record| Event::of(record, action));
        let began = ["exec_create", "exec_start"].into_iter().filter_map(|action| event(format!("{action}: {name}")));
        state_dir.note(&began.collect::<Vec<_>>());
        let end = if self.detach {
            End::Reported(admitted.connect()?.started()?)
        } else {
            // While waiting for admission, signals keep their default action: there is no process yet to forward them
            // to.
            let signals = supervisor::block_signals(true)?;
            exec::run_session(admitted.connect()?, &signals, self.process.tty && self.process.interactive)?
        };
        if let Some((died, code)) = event("exec_die".to_owned()).zip(exit_code(&end)) {
            state_dir.note(&[died.with("exitCode", code)]);
        }
        match end {
            End::Reported(ToHost::Exited(code)) => Ok(Exit::Reported(code)),
            End::Reported(ToHost::Signaled(number)) => Ok(Exit::Signal(number)),
            End::Reported(ToHost::Failed { message, code }) => {
                super::print_error(&message);
                Ok(Exit::Reported(code))
            }
            End::Reported(ToHost::Started(_)) if self.detach => Ok(Exit::Success),
            End::Reported(_) => bail!("the guest did not say how the process ended"),
            End::Interrupted(signal) => Ok(Exit::Signal(u8::try_from(signal).unwrap_or(u8::MAX))),
            End::Lost => bail!("the machine has exited, and the process with it"),
        }
    }

    fn process(&mut self, from: Inherited, command: Vec<OsString>) -> Result<Process> {
        let overrides = self.process.overrides(command)?;
        let mut process = overrides.apply_with(&ImageProcess::default(), from.env.into_iter().map(Vec::from).collect());
        if process.working_dir.is_empty() {
            process.working_dir = from.working_dir.into();
        }
        if process.user.is_empty() {
            process.user = from.user;
        }
        let size = || terminal::window_size().unwrap_or(WindowSize { rows: 24, columns: 80 });
        process.terminal = self.process.tty.then(size);
        process.stdin = self.process.interactive;
        process.detached = self.detach;
        process.rights = from.rights;
        Ok(process)
    }
}

/// The exit code of a process that has ended, as a shell would report it.
fn exit_code(end: &End) -> Option<u8> {
    match end {
        End::Reported(ToHost::Exited(code) | ToHost::Failed { code, .. }) => Some(*code),
        End::Reported(ToHost::Signaled(number)) => Some(number.saturating_add(128)),
        _ => None,
    }
}

/// The environment inherited by the machine's processes. Fails if the machine cannot run another process.
pub fn inherited(entry: &MachineEntry) -> Result<Inherited> {
    let name = entry.name();
    match entry.state() {
        State::Running { .. } => {}
        State::Paused { .. } => bail!("machine {name} is paused: run `husk unpause {name}` first"),
        State::Starting | State::Restarting { .. } => bail!("machine {name} is still starting: try again"),
        State::Suspended { .. } => bail!("machine {name} is suspended: run `husk start {name}` first"),
        State::Created | State::Exited { .. } | State::Lost => bail!("machine {name} is not running"),
    }
    let process = entry.record()?.process.clone();
    process.with_context(|| {
        format!("machine {name} runs its own init, which cannot execute commands: use its console or SSH")
    })
}
