//! How a session's process starts: by itself, in a container, or as the first of one.

use std::fs;
use std::os::fd::OwnedFd;

use husk_protocol::{Container, MAIN_SESSION, Process, Role, Run, ToHost};
use nix::unistd::Pid;

use super::{Session, streams_of};
use crate::cgroup;
use crate::connection::shortened;
use crate::contained;
use crate::container::Containers;
use crate::errors::Failure;
use crate::process::{self, Started};
use crate::pump::Pump;
use crate::report;

/// What a process finds in the machine when it is started.
pub struct World<'a> {
    /// The machine's host name.
    pub hostname: &'a str,
    /// The machine's containers.
    pub containers: &'a mut Containers,
}

impl Session {
    /// Starts the process of a run, or creates its container.
    pub fn begin(&mut self, run: &Run, world: &mut World) {
        match &run.container {
            None => self.start(&run.process, world),
            Some(container) => self.create(container, &run.process, world.containers),
        }
    }

    /// Notes what is to be started, once, and only in a session opened by the host.
    pub(super) fn want(&mut self, container: Option<Box<Container>>, process: Box<Process>) {
        if self.id != MAIN_SESSION && self.pid.is_none() && self.end.is_none() {
            self.wanted = Some((container, process));
        }
    }

    /// Creates a container whose process waits, or reports why it cannot be created.
    fn create(&mut self, container: &Container, process: &Process, containers: &mut Containers) {
        match contained::create(container, process, containers) {
            Ok((started, waiting)) => {
                // If one of its streams cannot be connected, the process ends, and is reported.
                let pid = started.pid;
                (self.pid, self.container) = (Some(pid), Some(container.id.clone()));
                if let Err(failure) = self.join_streams(started) {
                    return report::say(&failure.message);
                }
                self.waiting = Some(waiting);
                self.control.say(&ToHost::Created(pid.as_raw().unsigned_abs()));
            }
            Err(failure) => self.fail(failure),
        }
    }

    /// Removes what a container of this session, which has ended, has left.
    pub fn clean_up(&self) {
        let Some(id) = &self.container else { return };
        // What was killed when its first process ended may have taken until now.
        cgroup::remove_container(id);
        // What the kernel remembers of its files would keep them in use on the host.
        let _ = fs::write("/proc/sys/vm/drop_caches", "2");
    }

    /// Executes the program of the container that was created.
    pub(super) fn go(&mut self) {
        let (Some(waiting), Some(pid)) = (self.waiting.take(), self.pid) else { return };
        match waiting.go() {
            Ok(()) => self.control.say(&ToHost::Started(pid.as_raw().unsigned_abs())),
            Err(failure) => {
                // How it exits is not how the program has ended.
                (self.pid, self.input, self.terminal) = (None, None, None);
                self.outputs.clear();
                self.fail(failure);
            }
        }
    }

    /// Starts the process, or reports why it cannot start.
    fn start(&mut self, process: &Process, world: &World) {
        let started = match &process.container {
            None => process::start(process, world.hostname),
            Some(id) => world.containers.find(id).and_then(|member| contained::start_in(member, process)),
        };
        match started.and_then(|started| self.join_streams(started)) {
            Ok(pid) => {
                self.pid = Some(pid);
                self.control.say(&ToHost::Started(pid.as_raw().unsigned_abs()));
            }
            Err(failure) => self.fail(failure),
        }
    }

    /// Reports why there is no process.
    pub fn fail(&mut self, failure: Failure) {
        (self.stdin, self.stdout, self.stderr) = (None, None, None);
        self.end = Some(ToHost::Failed { message: shortened(&failure.message), code: failure.code });
    }

    fn join_streams(&mut self, started: Started) -> Result<Pid, Failure> {
        let join = |from: Option<OwnedFd>, to: Option<OwnedFd>| match (from, to) {
            (Some(from), Some(to)) => {
                Pump::new(from, to).map(Some).map_err(|error| Failure::new(format_args!("connect a stream: {error}")))
            }
            _ => Ok(None),
        };
        self.input = join(self.stdin.take(), started.stdin)?;
        let stdout = join(started.stdout, self.stdout.take())?.map(|pump| (Role::Stdout, pump));
        let stderr = join(started.stderr, self.stderr.take())?.map(|pump| (Role::Stderr, pump));
        // Other sessions end when the machine is restored.
        let remembering = |pump: Pump| if self.id == MAIN_SESSION { pump.remembering() } else { pump };
        self.outputs.extend(stdout.into_iter().chain(stderr).map(|(role, pump)| (role, remembering(pump))));
        self.terminal = started.terminal;
        Ok(started.pid)
    }

    pub(super) fn start_when_complete(&mut self, world: &mut World) {
        let there = |role| match role {
            Role::Stdin => self.stdin.is_some(),
            Role::Stdout => self.stdout.is_some(),
            Role::Stderr | Role::Control => self.stderr.is_some(),
        };
        if self.admitted
            && self.wanted.as_ref().is_some_and(|(_, process)| streams_of(process).all(there))
            && let Some((container, process)) = self.wanted.take()
        {
            match container {
                None => self.start(&process, world),
                Some(container) => self.create(&container, &process, world.containers),
            }
        }
    }
}
