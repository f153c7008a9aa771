//! `husk restore`: creates a machine from a snapshot.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Result, ensure};
use clap::Args;

use super::boot;
use super::exit::Exit;
use super::lifecycle::{self, LifecycleArgs, RecordInfo};
use super::limits::on_or_off;
use super::run::session::{self, Start};
use crate::guest::signal;
use crate::resources::disk::stamp;
use crate::resources::{self, Source};
use crate::snapshot::{Description, Snapshot};
use crate::state_dir;
use crate::supervisor::{self, Stdio};
use crate::timings::Timings;

const EXAMPLES: &str = "\
Examples:
  Continue a saved machine on this terminal:
    husk restore ./web.snap

  Continue it in the background, several times:
    husk restore -d --name one ./web.snap
    husk restore -d --name two ./web.snap

The snapshot must not be changed while its machines run: they read their memory from it.
If it contains disks (--with-disks), each machine gets a copy, which ends with the machine.
It names the files and devices that a machine gets, as a command line does: restore only
snapshots that you trust.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Restore {
    /// Directory that `husk snapshot` has created
    #[arg(value_name = "DIR")]
    dir: PathBuf,

    #[command(flatten)]
    lifecycle: LifecycleArgs,

    /// Confine the process that runs the guest: on (the default), or off to debug it
    #[arg(long, value_name = "on|off", value_parser = on_or_off)]
    sandbox: Option<bool>,

    /// Print timings to standard error
    #[arg(long)]
    timings: bool,
}

impl Restore {
    /// Runs the machine until its end. `started` is when this process started.
    pub fn run(mut self, started: Instant) -> Result<Exit> {
        let Snapshot { description, files, disks: inside } = Snapshot::open(&self.dir)?;
        let Description { id, image, command, process, stop_signal, mut config, disks, received, fingerprint, .. } =
            description;
        let dir_name = self.dir.display();
        ensure!(fingerprint.is_none(), "its machine waits for a command: use `husk run --from {dir_name} COMMAND`");
        if self.lifecycle.spawns_detached() {
            return lifecycle::spawn_detached();
        }
        config.sandbox = self.sandbox.unwrap_or(true);
        let timings = Arc::new(Timings::new(started));
        let dir = self.lifecycle.dir()?;
        let streams = process.as_ref().map(|process| (process.stdin, process.terminal));
        if let Some(vsock) = config.vsock.as_mut().filter(|_| streams.is_some()) {
            vsock.socket = dir.file(state_dir::VSOCK);
        }
        let saved_disks = config.disks.clone();
        let own_disks = inside.own(&mut config)?;
        let info = RecordInfo { image, command, process, stop_signal };
        let endpoint = self.lifecycle.endpoint(dir, info, &config)?;
        let exit = self.lifecycle.run_with_restarts(endpoint, streams.is_some(), |endpoint, signals| {
            own_disks.fill(&|| signals.is_pending(&signal::that_end_a_process()))?;
            let opened = resources::open_for(&config, Source::Snapshot(files.try_clone()?))?;
            stamp::check(&saved_disks, &disks)?;
            endpoint.note_origin(&id);
            let Some((stdin, terminal)) = streams else {
                let reason = supervisor::run(&config, opened, timings.clone(), signals, Stdio::Console, endpoint)?;
                return Ok(boot::report(&reason));
            };
            session::run(&config, opened, Start::Resume { received, stdin, terminal }, endpoint, signals, &timings)
        })?;
        if self.timings {
            super::print_stderr(&timings.to_string());
        }
        Ok(exit)
    }
}
