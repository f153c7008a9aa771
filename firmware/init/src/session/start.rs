//! How a session's process starts: by itself, in a container, or as the first of one.

use std::fs;
use std::os::fd::OwnedFd;

use husk_protocol::{Container, MAIN_SESSION, Process, Role, Run, ToHost};

use super::{Session, streams_of};
use crate::cgroup;
use crate::connection::shortened;
use crate::contained;
use crate::container::Containers;
use crate::entering::Reached;
use crate::errors::Failure;
use crate::process::{self, Started};
use crate::pump::Pump;
use crate::report;
use crate::sys;

/// What a process finds in the machine when it is started.
pub struct World<'a> {
    /// The machine's host name.
    pub hostname: &'a str,
    /// The machine's containers.
    pub containers: &'a mut Containers,
}

impl Session {
    /// Begins to start the process of a run, or to create its container.
    pub fn begin(&mut self, run: &Run, world: &mut World) {
        self.start(run.container.as_deref(), &run.process, world);
    }

    /// Notes what is to be started, once, and only in a session opened by the host.
    pub(super) fn want(&mut self, container: Option<Box<Container>>, process: Box<Process>) {
        if self.id != MAIN_SESSION && self.pid.is_none() && self.entering.is_none() && self.end.is_none() {
            self.is_contained = Some(container.is_some() || process.container.is_some());
            self.wanted = Some((container, process));
        }
    }

    /// Begins to start a process, as the first of `container` if there is one, or reports why it cannot be started.
    fn start(&mut self, container: Option<&Container>, process: &Process, world: &mut World) {
        let entering = match (container, &process.container) {
            (Some(container), _) => contained::create(container, process, world.containers),
            (None, Some(id)) => world.containers.find(id).and_then(|member| contained::start_in(member, process)),
            (None, None) => process::start(process, world.hostname),
        };
        match entering {
            Ok(entering) => {
                self.container = container.map(|container| container.id.clone());
                self.entering = Some(entering);
            }
            Err(failure) => self.fail(failure),
        }
    }

    /// Follows the process until it has executed its program, without blocking.
    pub(super) fn follow(&mut self, containers: &mut Containers) {
        while let Some(entering) = &mut self.entering {
            match entering.advance() {
                Ok(None) => return,
                Ok(Some(Reached::Ready)) => self.note_ready(containers),
                Ok(Some(Reached::Program)) => self.note_running(),
                Err(failure) => {
                    // How it exits is not how the program has ended.
                    self.dying = entering.pid().filter(|_| self.container.is_some() && !entering.is_reaped());
                    (self.entering, self.pid, self.input, self.terminal) = (None, None, None, None);
                    self.outputs.clear();
                    match self.dying {
                        Some(pid) => drop(sys::send_signal(pid, libc::SIGKILL as u8)),
                        None => self.leave_container(containers),
                    }
                    self.fail(failure);
                }
            }
        }
    }

    fn note_ready(&mut self, containers: &mut Containers) {
        let Some(entering) = &mut self.entering else { return };
        let Some(id) = &self.container else { return entering.go() };
        containers.complete(id);
        self.pid = entering.pid();
        let started = entering.take_streams();
        // If one of its streams cannot be connected, the process ends, and is reported.
        if let Err(failure) = self.join_streams(started) {
            self.entering = None;
            return report::say(&failure.message);
        }
        self.control.say(&ToHost::Created(self.pid.map_or(0, |pid| pid.as_raw().unsigned_abs())));
    }

    fn note_running(&mut self) {
        let Some(mut entering) = self.entering.take() else { return };
        self.pid = entering.pid();
        if self.container.is_none()
            && let Err(failure) = self.join_streams(entering.take_streams())
        {
            return self.fail(failure);
        }
        self.control.say(&ToHost::Started(self.pid.map_or(0, |pid| pid.as_raw().unsigned_abs())));
        for message in std::mem::take(&mut self.held) {
            self.obey(message);
        }
    }

    /// Kills a process that has not executed its program, since the host has left.
    pub(super) fn give_up_start(&mut self) {
        let Some(entering) = self.entering.take() else { return };
        if self.container.is_some() {
            // The session is over when it has ended.
            self.pid = entering.pid();
        }
    }

    /// Removes the container of this session, if it has one, whose first process has ended.
    pub(super) fn leave_container(&self, containers: &mut Containers) {
        if let Some(id) = &self.container {
            containers.remove(id);
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

    /// Reports why there is no process.
    pub fn fail(&mut self, failure: Failure) {
        (self.stdin, self.stdout, self.stderr) = (None, None, None);
        self.end = Some(ToHost::Failed { message: shortened(&failure.message), code: failure.code });
    }

    fn join_streams(&mut self, started: Started) -> Result<(), Failure> {
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
        Ok(())
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
            self.start(container.as_deref(), &process, world);
        }
    }
}
