//! The process on the host of a further container of a machine. It is the container's for its engine, as `supervise.rs` has it, and has
//! the connections with the container's process in the guest: if it ends, the container does.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result};
use husk_protocol::Mount;

use super::channel::Channel;
use super::create::{CREATED, PREPARED, PROCEED};
use crate::cli::exit::Exit;
use crate::guest::exec::{self, End, Moments};
use crate::oci::config::Config;
use crate::oci::gate::{self, Gate};
use crate::oci::guest::Bind;
use crate::oci::oom::Mark;
use crate::oci::pod::Pod;
use crate::oci::share::Files;
use crate::oci::state::{Dir, Root, State};
use crate::oci::{guest, share};
use crate::state_dir;
use crate::supervisor;

/// A further container of a machine.
pub struct Member<'a> {
    pub root: &'a Root,
    pub dir: &'a Dir,
    pub config: &'a Config,
    pub pod: &'a Pod,
}

impl Member<'_> {
    /// Creates the container `id`, and accompanies it until it has ended.
    pub fn run(&self, channel: &mut Channel, id: &str) -> Result<Exit> {
        let signals = supervisor::block_all_signals()?;
        let state = self.dir.state()?;
        let (sandbox_dir, sandbox) = self.pod.sandbox(self.root)?;
        let machine = sandbox.machine()?;
        let (container, binds) = guest::container(id, self.config, &state.bundle, Some(self.pod))?;
        let process = self.config.process.as_ref().context("process is missing")?;
        let process = guest::process(process, self.config.linux.seccomp.as_ref())?;
        share::separate()?;
        share::add(machine.record()?.pid, &sandbox_dir.share(), id, Files::copy(&state.rootfs, &binds)?)?;
        channel.say(PREPARED)?;
        if channel.hear()? != PROCEED {
            // The creator has given up, and says why.
            return Ok(Exit::Failure);
        }
        let mounts = container.mounts.clone();
        let connections = exec::request_creation(&machine.file(state_dir::VSOCK), container, &process)?.connect()?;
        let state = State { machine: Some(machine.id.clone()), ..self.dir.state()? };
        let mark = Mark::of(self.dir)?;
        let mut life = Life { dir: self.dir, state, binds, mounts, channel, gate: None, starter: None, mark };
        match exec::run_contained(connections, &signals, process.terminal.is_some(), &mut life)? {
            // As if it had been killed by whoever has ended the machine.
            End::Lost => Ok(Exit::Signal(libc::SIGKILL as u8)),
            end => super::exec::exit(end),
        }
    }
}

/// What others hear of the container.
struct Life<'a> {
    dir: &'a Dir,
    state: State,
    binds: Vec<Bind>,
    mounts: Vec<Mount>,
    channel: &'a Channel,
    gate: Option<Gate>,
    starter: Option<UnixStream>,
    mark: Mark,
}

impl Moments for Life<'_> {
    fn created(&mut self) -> Result<()> {
        self.gate = Some(Gate::shut(self.dir)?);
        self.dir.write(&self.state)?;
        share::enter(&self.state.rootfs, &self.binds, &self.mounts).context("enter the container's root")?;
        // One that is gone has cleaned up, or will.
        let _ = self.channel.say(CREATED);
        Ok(())
    }

    fn order(&self) -> Option<RawFd> {
        self.gate.as_ref().map(AsRawFd::as_raw_fd)
    }

    fn ordered(&mut self) -> Result<()> {
        self.starter = self.gate.take().map(Gate::open).transpose()?;
        Ok(())
    }

    fn ran_out_of_memory(&mut self) -> Result<()> {
        // The container goes on without it.
        self.mark.set().or_else(|error| {
            log::warn!("{error:#}");
            Ok(())
        })
    }

    fn started(&mut self, failure: Option<&str>) -> Result<()> {
        if let Some(starter) = self.starter.take() {
            gate::answer(starter, failure);
        }
        Ok(())
    }
}
