//! `husk attach`: attaches this terminal to a machine in the background.

use anyhow::{Context, Result};
use clap::{ArgAction, Args};

use super::exit::Exit;
use crate::request::attach::{self, End, Options};
use crate::request::detach::DetachKeys;
use crate::state_dir::{self, MachineEntry, StateDir};
use crate::supervisor;

const EXAMPLES: &str = "\
Examples:
  husk attach web                   (Ctrl-P Ctrl-Q detaches and leaves it running)
  husk attach --no-stdin web

Earlier output is in `husk logs`. A machine keeps running even if nothing reads its output.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Attach {
    /// Name or ID of the machine
    #[arg(value_name = "MACHINE")]
    machine: String,

    /// Do not attach standard input
    #[arg(long)]
    no_stdin: bool,

    #[command(flatten)]
    keys: AttachFlags,
}

// Of an attached terminal, shared with `husk start -a`.
#[derive(Debug, Args)]
pub(super) struct AttachFlags {
    /// Forward signals to the machine; with false, they end this command and leave the machine running
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    #[arg(action = ArgAction::Set, default_value = "true", hide_default_value = true)]
    pub(super) sig_proxy: bool,

    /// Keys that detach
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q", value_parser = str::parse::<DetachKeys>)]
    pub(super) detach_keys: DetachKeys,
}

impl Attach {
    /// Attaches until the machine has ended, and returns its exit code, or until the user detaches.
    pub fn run(self) -> Result<Exit> {
        attach_to(&StateDir::open()?.find(&self.machine)?, !self.no_stdin, self.keys)
    }
}

/// Attaches until the machine has ended, and returns its exit code, or until the user detaches. `with_stdin` says whether its process
/// may read this process's standard input.
pub(super) fn attach_to(entry: &MachineEntry, with_stdin: bool, flags: AttachFlags) -> Result<Exit> {
    let record = entry.record()?;
    // A machine started by `husk boot` has a console, which is a terminal with input.
    let (stdin, terminal) = record.process.as_ref().map_or((true, true), |process| (process.stdin, process.terminal));
    let signals = supervisor::block_signals(true)?;
    let AttachFlags { sig_proxy, detach_keys } = flags;
    let options = Options { input: stdin && with_stdin, terminal, keeps_signals: !sig_proxy, detach_keys };
    let end = attach::attach(&entry.file(state_dir::CONTROL), &signals, options);
    match end.with_context(|| format!("attach to {}", entry.name()))? {
        End::Ended(code) => Ok(Exit::Reported(code)),
        End::Detached => Ok(Exit::Success),
    }
}
