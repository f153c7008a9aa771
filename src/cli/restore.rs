//! `husk restore`: creates a machine from a snapshot.

mod identity;

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Args;

use self::identity::IdentityFlags;
use super::boot;
use super::exit::Exit;
use super::lifecycle::{self, LifecycleArgs, RecordInfo};
use super::limits::on_or_off;
use super::mounts::place;
use super::run::session::{self, Ended, Start};
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

  Continue it in the background, several times, each with a port of its own:
    husk restore -d --name one -p 8081:80 ./web.snap
    husk restore -d --name two -p 8082:80 ./web.snap

A machine of `husk run` gets a host name, MAC addresses, and names and addresses on shared
networks of its own; its TCP connections to others are reset. A machine of `husk boot` keeps
what its guest has set up.
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

    #[command(flatten)]
    identity: IdentityFlags,

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
        let Snapshot { description, files, disks: inside, .. } = Snapshot::open(&self.dir)?;
        let Description {
            id,
            image,
            command,
            process,
            identity,
            mounts,
            stop_signal,
            stop_timeout_ms,
            health_check,
            mut config,
            disks,
            received,
            fingerprint,
            ..
        } = description;
        let dir_name = self.dir.display();
        ensure!(fingerprint.is_none(), "its machine waits for a command: use `husk run --from {dir_name} COMMAND`");
        self.lifecycle.check_cidfile()?;
        if self.lifecycle.spawns_detached() {
            return lifecycle::spawn_detached();
        }
        config.sandbox = self.sandbox.unwrap_or(true);
        let timings = Arc::new(Timings::new(started));
        let dir = self.lifecycle.dir()?;
        let name = self.lifecycle.name.clone().unwrap_or_else(|| dir.id());
        let streams = process.as_ref().map(|process| (process.stdin, process.terminal));
        if let Some(vsock) = config.vsock.as_mut().filter(|_| streams.is_some()) {
            vsock.socket = dir.file(state_dir::VSOCK);
        }
        let own = match streams {
            Some(_) => Some(self.identity.apply(&mut config, &identity.unwrap_or_default(), dir.id(), &name)?),
            None => self.identity.apply_outside(&mut config).map(|()| None)?,
        };
        config.validate()?;
        let _volumes = place::use_volumes(&mounts)?;
        let saved_disks = config.disks.clone();
        let own_disks = inside.own(&mut config)?;
        let identity = own.as_ref().map(|own| own.record.clone());
        let info = RecordInfo {
            image,
            image_id: None,
            command,
            process,
            identity,
            mounts,
            stop_signal,
            stop_timeout: stop_timeout_ms.map(Duration::from_millis),
            health_check,
        };
        let endpoint = self.lifecycle.endpoint(dir, info, &config)?;
        let exit = self.lifecycle.run_with_restarts(endpoint, streams.is_some(), |endpoint, signals| {
            let asked = RefCell::new(&mut *endpoint);
            let is_to_end = || signals.is_pending(&signal::that_end_a_process()) || asked.borrow_mut().is_to_end();
            own_disks.fill(&is_to_end)?;
            let opened = resources::open_for(&config, Source::Snapshot(files.try_clone()?))?;
            stamp::check(&saved_disks, &disks)?;
            endpoint.note_origin(&id);
            let (Some((stdin, terminal)), Some(own)) = (streams, &own) else {
                let reason = supervisor::run(&config, opened, timings.clone(), signals, Stdio::Console, endpoint)?;
                return Ok(boot::report(&reason));
            };
            let start = Start::Resume { received, stdin, terminal, change: own.change.clone() };
            session::run(&config, opened, start, endpoint, signals, &timings).map(Ended::exit)
        })?;
        if self.timings {
            super::print_stderr(&timings.to_string());
        }
        Ok(exit)
    }
}
