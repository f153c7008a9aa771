//! What containerd asks of the shim of a container or of a pod.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use prost::Message;
use rustix::termios::{Winsize, tcsetwinsize};

use super::events::{Event, Publisher, TaskCreate, TaskDelete, TaskExec, TaskIo, TaskNamed};
use super::memory::Watch;
use super::messages::*;
use super::metrics;
use super::rootfs;
use super::runtime::{Begun, Runtime};
use super::streams::{self, Paths, Screen};
use super::task::{Ended, Process, Task};
use super::ttrpc::{Code, Failure, Reply};
use crate::cli::oci::operations;
use crate::oci::config::{self, Config};
use crate::oci::state::{Root, Status as OciStatus};
use crate::sys::process::signal_opened;

mod notice;

use notice::started;

/// A shim.
#[derive(Debug, Clone)]
pub struct Shim(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    root: Root,
    runtime: Runtime,
    events: Publisher,
    /// `None` if the host gives no more of them: memory that is short is then told of when a container ends.
    memory: Option<Watch>,
    tasks: Mutex<BTreeMap<String, Arc<Task>>>,
    /// The IDs of those that are being created.
    creating: Mutex<BTreeSet<String>>,
    /// Called when there is nothing left to do.
    leave: fn(&Runtime, &Publisher) -> !,
}

/// How long a process that was killed may take to be noticed.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a container that is to be deleted may take to be created.
const CREATION_TIMEOUT: Duration = Duration::from_secs(90);

type Answer = Result<Vec<u8>, Failure>;

fn encode(message: impl Message) -> Answer {
    Ok(message.encode_to_vec())
}

fn decode<Request: Message + Default>(payload: &[u8]) -> Result<Request, Failure> {
    Request::decode(payload).map_err(|error| Failure::new(Code::InvalidArgument, format!("decode a request: {error}")))
}

fn nothing() -> Answer {
    encode(Empty {})
}

impl Shim {
    pub fn new(root: Root, runtime: Runtime, events: Publisher, leave: fn(&Runtime, &Publisher) -> !) -> Shim {
        let memory = Watch::new().inspect_err(|error| log::warn!("watch the memory of containers: {error:#}")).ok();
        let (tasks, creating) = (Mutex::default(), Mutex::default());
        Shim(Arc::new(Inner { root, runtime, events, memory, tasks, creating, leave }))
    }

    /// Handles a call of the task service.
    pub fn handle(&self, method: &str, payload: &[u8], reply: Reply) {
        log::debug!("{method}");
        match (method, decode(payload)) {
            ("Wait", Ok(Named { id, exec_id })) => self.wait(&id, &exec_id, reply),
            ("Shutdown", _) if self.tasks().is_empty() && self.creating().is_empty() => {
                reply.send(nothing());
                (self.0.leave)(&self.0.runtime, &self.0.events)
            }
            _ => reply.send(self.answer(method, payload)),
        }
    }

    fn answer(&self, method: &str, payload: &[u8]) -> Answer {
        let named = || decode::<Named>(payload);
        match method {
            "Create" => self.create(decode(payload)?),
            "Start" => self.start(&named()?),
            "Delete" => self.delete(&named()?),
            "Exec" => self.exec(decode(payload)?),
            "State" => self.state(&named()?),
            "Kill" => self.kill(&decode(payload)?),
            "ResizePty" => self.resize(&decode(payload)?),
            "CloseIO" => self.close_input(&decode(payload)?),
            "Pids" => self.pids(&named()?.id),
            "Pause" => self.pause(named()?.id, true),
            "Resume" => self.pause(named()?.id, false),
            "Update" => self.update(&decode(payload)?),
            "Stats" => self.stats(&named()?.id),
            "Connect" => self.connect(&named()?.id),
            // There are other containers.
            "Shutdown" => nothing(),
            "Checkpoint" => Err(Failure::new(Code::Unimplemented, "checkpoints of containers are not supported")),
            _ => Err(Failure::new(Code::Unimplemented, format!("there is no method {method}"))),
        }
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Task>>> {
        self.0.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn task(&self, id: &str) -> Result<Arc<Task>, Failure> {
        let found = self.tasks().get(id).cloned();
        found.ok_or_else(|| Failure::new(Code::NotFound, format!("container {id} does not exist")))
    }

    fn wait(&self, id: &str, exec_id: &str, reply: Reply) {
        let mut reply = Some(reply);
        let waits = self.task(id).and_then(|task| {
            task.with(exec_id, |process| {
                reply.take().into_iter().for_each(|reply| process.await_end(reply));
                Ok(())
            })
        });
        if let (Err(failure), Some(reply)) = (waits, reply) {
            reply.send(Err(failure));
        }
    }

    fn creating(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.creating.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn create(&self, request: Create) -> Answer {
        let id = request.id.clone();
        if !self.creating().insert(id.clone()) {
            return Err(Failure::new(Code::AlreadyExists, format!("container {id} is being created")));
        }
        let created = self.create_task(request);
        self.creating().remove(&id);
        created
    }

    fn create_task(&self, request: Create) -> Answer {
        let Create { id, bundle, rootfs: mounts, terminal, stdin, stdout, stderr, checkpoint, options } = request;
        if self.tasks().contains_key(&id) {
            return Err(Failure::new(Code::AlreadyExists, format!("container {id} exists")));
        }
        if !checkpoint.is_empty() {
            return Err(Failure::new(Code::Unimplemented, "checkpoints of containers are not supported"));
        }
        if options.is_some_and(|options| !options.value.is_empty()) {
            let told = "the runtime io.containerd.husk.v2 has no options: remove them from containerd's configuration";
            return Err(Failure::new(Code::InvalidArgument, told));
        }
        let (bundle, paths) = (PathBuf::from(bundle), Paths { stdin, stdout, stderr, terminal });
        streams::check(&paths)?;
        let config = Config::read(&bundle.join(config::FILE))?;
        // As containerd's CRI plugin and runc have it: SLICE:PREFIX:NAME.
        let systemd_cgroup = config.linux.cgroups_path.split(':').count() == 3;
        rootfs::mount_all(&bundle, &mounts)?;
        let created = self.0.runtime.create(&id, &bundle, systemd_cgroup, &paths);
        let begun = created.inspect_err(|_| drop(rootfs::unmount_all(&bundle)))?;
        let pid = begun.pid;
        let io =
            TaskIo { stdin: paths.stdin.clone(), stdout: paths.stdout.clone(), stderr: paths.stderr.clone(), terminal };
        self.publish(&Event::Create(TaskCreate {
            container_id: id.clone(),
            bundle: bundle.display().to_string(),
            rootfs: mounts,
            io: Some(io),
            pid,
        }));
        let task = Arc::new(Task::new(&id, bundle, Process::added(paths, Vec::new())));
        self.tasks().insert(id.clone(), task.clone());
        let watched = self.0.memory.as_ref().map_or(Ok(()), |memory| memory.add(&id, &self.0.root.dir(&id)));
        if let Err(error) = watched {
            log::warn!("that memory is short will be told when the container ends: {error:#}");
        }
        self.adopt(&task, "", begun)?;
        encode(Pid { pid })
    }

    /// Notes that a process is there, and what is to be done when it ends.
    fn adopt(&self, task: &Arc<Task>, exec_id: &str, begun: Begun) -> Result<(), Failure> {
        let pid = begun.pid;
        task.with(exec_id, |process| {
            process.begin(begun);
            Ok(())
        })?;
        let (shim, of, exec_id) = (self.clone(), task.clone(), exec_id.to_owned());
        self.0.runtime.children.adopt(pid, move |code| shim.note_end(&of, &exec_id, Ended::now(code)));
        Ok(())
    }

    fn start(&self, Named { id, exec_id }: &Named) -> Answer {
        let task = self.task(id)?;
        let (spec, paths) = task.with(exec_id, |process| {
            process.hold_end()?;
            Ok((std::mem::take(&mut process.spec), process.paths.clone()))
        })?;
        let runtime = &self.0.runtime;
        let begun = match exec_id.as_str() {
            "" => runtime.run(&task.bundle, &["start", id], None).map_err(Failure::from),
            _ => {
                let begun = runtime.exec(id, &task.bundle, &spec, &paths);
                begun.map_err(Failure::from).and_then(|begun| self.adopt(&task, exec_id, begun))
            }
        };
        let is_running = begun.is_ok();
        let (pid, has_ended) = task.with(exec_id, |process| {
            if is_running {
                self.publish(&started(id, exec_id, process.pid));
            }
            Ok((process.pid, process.release_end(is_running)))
        })?;
        if let Some(ended) = has_ended {
            self.note_end(&task, exec_id, ended);
        } else if !is_running && !exec_id.is_empty() {
            let (waiters, ended) = task.with(exec_id, |process| Ok(process.fail()))?;
            waiters.into_iter().for_each(|waiter| waiter.send(Ok(ended.to_answer())));
        }
        begun.and_then(|()| encode(Pid { pid }))
    }

    fn delete(&self, Named { id, exec_id }: &Named) -> Answer {
        // Who has asked for it may have given up.
        let until = Instant::now() + CREATION_TIMEOUT;
        while self.creating().contains(id) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        let task = self.task(id)?;
        task.with(exec_id, |process| match process.status {
            Status::Running => Err(Failure::new(Code::FailedPrecondition, "the process has not ended: kill it first")),
            _ if process.is_starting() => Err(Failure::new(Code::FailedPrecondition, "the process is being started")),
            _ => Ok(()),
        })?;
        if exec_id.is_empty() {
            self.0.runtime.run(&task.bundle, &["delete", "--force", id], None)?;
            rootfs::unmount_all(&task.bundle)?;
        }
        let (pid, ended) = await_end(&task, exec_id)?;
        task.with(exec_id, |process| Ok(process.take_screen()))?.into_iter().for_each(Screen::finish);
        let (exit_status, exited_at) = (ended.map_or(0, |ended| ended.code), ended.map(|ended| ended.at));
        if exec_id.is_empty() {
            self.tasks().remove(id);
            self.publish(&Event::Delete(TaskDelete { container_id: id.clone(), pid, exit_status, exited_at }));
        } else {
            task.processes().remove(exec_id);
        }
        encode(Deleted { pid, exit_status, exited_at })
    }

    fn exec(&self, request: Exec) -> Answer {
        let Exec { id, exec_id, terminal, stdin, stdout, stderr, spec } = request;
        let (task, paths) = (self.task(&id)?, Paths { stdin, stdout, stderr, terminal });
        streams::check(&paths)?;
        let spec = spec.map(|spec| spec.value).unwrap_or_default();
        if exec_id.is_empty() || task.processes().contains_key(&exec_id) {
            return Err(Failure::new(Code::AlreadyExists, format!("container {id} has a process {exec_id:?}")));
        }
        task.processes().insert(exec_id.clone(), Process::added(paths, spec));
        self.publish(&Event::ExecAdded(TaskExec { container_id: id, exec_id, pid: 0 }));
        nothing()
    }

    fn state(&self, Named { id, exec_id }: &Named) -> Answer {
        let task = self.task(id)?;
        let mut state = task.with(exec_id, |process| Ok(process.state()))?;
        let is_paused = || self.0.root.open(id).is_ok_and(|(dir, known)| known.status(&dir) == OciStatus::Paused);
        if state.status() == Status::Running && exec_id.is_empty() && is_paused() {
            state.set_status(Status::Paused);
        }
        let bundle = task.bundle.display().to_string();
        encode(State { id: id.clone(), exec_id: exec_id.clone(), bundle, ..state })
    }

    fn kill(&self, Kill { id, exec_id, signal }: &Kill) -> Answer {
        let gone = || Failure::new(Code::NotFound, "the process has ended");
        let signal =
            u8::try_from(*signal).map_err(|_| Failure::new(Code::InvalidArgument, "there is no such signal"))?;
        let task = self.task(id)?;
        if exec_id.is_empty() {
            task.with("", |process| process.handle().map(drop).ok_or_else(gone))?;
            let killed = operations::kill(&self.0.root, id, signal);
            // It may just have ended.
            return match task.with("", |process| Ok(process.handle().is_none())) {
                Ok(true) if killed.is_err() => Err(gone()),
                _ => killed.map_err(Failure::from).and_then(|()| nothing()),
            };
        }
        task.with(exec_id, |process| {
            if process.pid == 0 && process.ended.is_none() {
                return Err(Failure::new(Code::FailedPrecondition, "the process has not been started"));
            }
            signal_opened(process.handle().ok_or_else(gone)?, signal.into()).map_err(|_| gone())
        })?;
        nothing()
    }

    fn resize(&self, Resize { id, exec_id, width, height }: &Resize) -> Answer {
        let clamp = |cells: u32| u16::try_from(cells).unwrap_or(u16::MAX);
        let size = Winsize { ws_row: clamp(*height), ws_col: clamp(*width), ws_xpixel: 0, ws_ypixel: 0 };
        self.task(id)?.with(exec_id, |process| {
            // One that has ended, or has none, has no size.
            let resized = process.terminal().map_or(Ok(()), |terminal| tcsetwinsize(terminal, size));
            resized.map_err(|error| Failure::new(Code::Unknown, format!("set the size of the terminal: {error}")))
        })?;
        nothing()
    }

    fn close_input(&self, CloseIo { id, exec_id, stdin }: &CloseIo) -> Answer {
        self.task(id)?.with(exec_id, |process| {
            if *stdin {
                process.close_input();
            }
            Ok(())
        })?;
        nothing()
    }

    fn pids(&self, id: &str) -> Answer {
        let own = self.task(id)?.with("", |process| Ok(process.handle().map(|_| process.pid)))?;
        let is_paused = self.0.root.open(id).is_ok_and(|(dir, known)| known.status(&dir) == OciStatus::Paused);
        // containerd takes a container without any for one whose shim is left over, when it is started again.
        let pids = match (own, is_paused) {
            (Some(own), true) => vec![own],
            (Some(own), false) => operations::pids(&self.0.root, id).unwrap_or_else(|_| vec![own]),
            (None, _) => operations::pids(&self.0.root, id)?,
        };
        encode(Pids { processes: pids.into_iter().map(|pid| Pid { pid }).collect() })
    }

    fn pause(&self, id: String, pauses: bool) -> Answer {
        self.task(&id)?;
        operations::set_paused(&self.0.root, &id, pauses)?;
        let named = TaskNamed { container_id: id };
        self.publish(&if pauses { Event::Paused(named) } else { Event::Resumed(named) });
        nothing()
    }

    fn update(&self, Update { id, resources }: &Update) -> Answer {
        let task = self.task(id)?;
        let limits = resources.as_ref().map_or(&b"{}"[..], |resources| &resources.value);
        self.0.runtime.update(id, &task.bundle, limits)?;
        nothing()
    }

    fn stats(&self, id: &str) -> Answer {
        self.task(id)?;
        encode(Stats { stats: Some(metrics::pack(&operations::stats(&self.0.root, id)?)) })
    }

    fn connect(&self, id: &str) -> Answer {
        let task_pid = self.task(id)?.with("", |process| Ok(process.pid))?;
        encode(Connected { shim_pid: std::process::id(), task_pid })
    }
}

/// The PID of a process, and how it has ended: one that is deleted before it is started is being killed.
fn await_end(task: &Task, exec_id: &str) -> Result<(u32, Option<Ended>), Failure> {
    let until = Instant::now() + END_TIMEOUT;
    loop {
        let (pid, ended) = task.with(exec_id, |process| Ok((process.pid, process.ended)))?;
        if pid == 0 || ended.is_some() || Instant::now() > until {
            return Ok((pid, ended));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}
