//! The guest's PID 1: starts the process, transfers its streams, and ends the machine.
//!
//! [`Spec`] ─ devices, modules ─ connections to the host ─ root file system ─ [`Run`] ─ process ─ `agent`.
//!
//! The run is part of the specification, or the host sends it later: the machine was saved in between, and is restored for
//! each run.
//!
//! One thread does all of this. It waits in one place (`agent`) for children, connections and pipes, never blocks on
//! any one of them, and buffers a limited amount of each stream. A second thread waits for memory pressure
//! (`pressure`). Nothing is hidden from the process as in a container, because the machine itself is the security
//! boundary.

mod agent;
mod boot;
pub mod cgroup;
mod clock;
mod connection;
mod connections;
mod contained;
mod container;
mod content;
pub mod copy;
mod devices;
mod disk;
mod entering;
pub mod errors;
mod identity;
mod mounts;
pub mod network;
mod oom;
mod preload;
mod pressure;
mod process;
pub mod processes;
mod pump;
mod report;
pub mod root;
mod sent;
mod session;
mod setup;
mod sys;
mod sysctl;
mod trees;

use connection::Connecting;
use container::Containers;
use errors::Failure;
use husk_protocol::{Role, Run, Spec, Start};
use session::{Session, World, streams_of};
use setup::Prepared;

/// Runs the machine until its end.
pub fn run() -> ! {
    report::running();
    let failure = match boot::prepare() {
        Ok(spec) => serve(&spec),
        Err(failure) => failure,
    };
    report::say(&failure.message);
    report::end(failure.code)
}

/// Prepares the machine and runs the process. Returns only errors from before the host could be notified.
fn serve(spec: &Spec) -> Failure {
    let run = match &spec.start {
        Start::Init { args, hostname } => {
            let entered = root::mount(spec).and_then(|_| root::enter()).and_then(|()| setup::set_hostname(hostname));
            return entered.err().unwrap_or_else(|| boot::become_init(args));
        }
        Start::Process(run) => Some(&**run),
        Start::Wait(_) => None,
    };
    let streams = run.into_iter().flat_map(|run| streams_of(&run.process));
    match Connecting::start(std::iter::once(Role::Control).chain(streams)) {
        Ok(connecting) => serve_session(spec, run, connecting),
        Err(failure) => failure,
    }
}

/// The connections are established while the root file system is mounted.
fn serve_session(spec: &Spec, run: Option<&Run>, connecting: Connecting) -> Failure {
    let prepared = Prepared::new(spec).and_then(|mut prepared| match run {
        Some(run) => prepared.set_up(run).map(|()| prepared),
        None => Ok(prepared),
    });
    let mut session = match connecting.complete() {
        Ok(connections) => Session::main(connections),
        Err(failure) => return prepared.err().unwrap_or(failure),
    };
    let listener = agent::listen();
    let mut containers = Containers::default();
    let prepared = match (prepared, run) {
        (Ok(prepared), Some(run)) => {
            session.begin(run, &mut World { hostname: prepared.hostname(), containers: &mut containers });
            Some(prepared)
        }
        (Ok(mut prepared), None) => {
            if let Start::Wait(preload) = &spec.start {
                preload::read(preload);
                preload::end_others();
            }
            wait_and_begin(&mut session, &mut prepared, &mut containers);
            Some(prepared)
        }
        (Err(failure), _) => {
            session.fail(failure);
            None
        }
    };
    agent::run(session, containers, prepared, listener)
}

/// Waits for the run and begins it. If the host is gone, so is the machine soon.
fn wait_and_begin(session: &mut Session, prepared: &mut Prepared, containers: &mut Containers) {
    if let Err(failure) = begin(session, prepared, containers) {
        report::say(&failure.message);
        session.disconnect();
    }
}

fn begin(session: &mut Session, prepared: &mut Prepared, containers: &mut Containers) -> Result<(), Failure> {
    let (renewal, overlay, run) = session.wait_for_run()?;
    session.renew(&renewal);
    let connecting = Connecting::start(streams_of(&run.process))?;
    let set_up = prepared.begin(&overlay, &run);
    session.add(connecting.complete()?);
    match set_up {
        Ok(()) => session.begin(&run, &mut World { hostname: prepared.hostname(), containers }),
        Err(failure) => session.fail(failure),
    }
    session.ask_time();
    Ok(())
}
